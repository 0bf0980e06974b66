"""What goes wrong, a test for each row of the table in docs/async_online_dpo.md.

No hang, one clear line, nothing left behind, nothing lost. vLLM is real, and what fails does so for real wherever that
can be brought about.
"""

import contextlib
import fcntl
import glob
import os
import re
import resource
import signal
import socket
import subprocess
import threading
import time

import numpy as np
import pytest
import wandb

import async_online_dpo as script
import async_ppo
import async_rloo
import sync_baseline
from tests.runs import ALGORITHMS, HERE, command, engine_of, flags, metrics, same, start, until_batch


# ----------------------------------------------------------------------------------------- resume, to the last bit
class Killed(BaseException):
    """Nothing may catch it."""


CASES = [(module, dict(max_staleness=s)) for module in (script, async_ppo) for s in (0, 1, 2)]
CASES += [(sync_baseline, dict(algo="ppo", placement="colocate"))]
CASES += [(async_rloo, dict(num_mini_batches=2, num_epochs=2, batch_size=16))]


@pytest.mark.parametrize("module, changes", CASES, ids=[f"{m.__name__}-{list(c.values())}" for m, c in CASES])
def test_a_resumed_run_ends_as_if_never_interrupted(run, monkeypatch, module, changes):
    """Ended at four random moments: while weights or a checkpoint are written, before learning, while evaluating.

    Where there is no checkpoint yet, --resume begins anew.
    """
    random = np.random.default_rng(len(changes) + changes.get("max_staleness", 0))
    changes = dict(save_every=2, eval_every=3, eval_prompts=16) | changes
    calls, end = [0], [-1]

    def counted(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == end[0]:
                raise Killed
            return function(*args, **kwargs)

        return call

    for name in ("save_file", "make_batch", "learn", "write_checkpoint"):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    whole, _ = run("whole", module, **changes)
    total = calls[0]
    for moment in random.choice(np.arange(1, total), 4, replace=False):
        calls[0], end[0] = 0, moment
        with pytest.raises(Killed):
            run(f"run-{moment}", module, **changes)
        end[0] = -1
        folder, _ = run(f"run-{moment}", module, resume=True, **changes)
        assert same(metrics(whole), metrics(folder)), moment
        assert sorted(os.listdir(os.path.join(folder, "checkpoints"))) == ["version-000004", "version-000006"]


def test_a_signal_ends_the_run_with_a_checkpoint(run, monkeypatch):
    whole, _ = run("whole")

    labelled = []

    def signal_at_the_second_batch():
        labelled.append(1)
        if len(labelled) == 2:
            script.SIGNALS.append(signal.SIGTERM)

    monkeypatch.setattr(script, "SIGNALS", [])
    with pytest.raises(SystemExit) as left:
        run("run", before_label=signal_at_the_second_batch)
    assert left.value.code == 128 + signal.SIGTERM and len(labelled) == 2
    script.SIGNALS.clear()
    folder, _ = run("run", resume=True)
    assert same(metrics(whole), metrics(folder))


def test_wrong_checkpoints_are_refused_by_name(run, capsys):
    folder, _ = run("run", save_every=2)
    last = os.path.join(folder, "checkpoints", "version-000006")

    def refusal(**changes):
        with pytest.raises(SystemExit) as left:
            run("run", resume=True, save_every=2, **changes)
        return str(left.value)

    assert f"{last} is of a run with --learning-rate 0.001, not 0.002" in refusal(learning_rate=2e-3)
    file = os.path.join(last, "optimizer.safetensors")
    with open(file, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"x")
    assert f"{file} is not what was written to it; delete that folder to continue" in refusal()
    os.truncate(os.path.join(last, "state.json"), 100)
    assert f"{last} is damaged" in refusal()
    os.remove(os.path.join(folder, "config.json"))
    assert f"'{folder}' is not the folder of a run" in refusal()


# ------------------------------------------------------------------------- errors in this process, one shared engine
def fails(run, error, message, module=script, **changes):
    """Run until this error; it must not take long nor leave the generator's thread. Returns its notes."""
    begin = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        run("run", module, **changes)
    assert time.monotonic() - begin < 60
    assert not [thread for thread in threading.enumerate() if thread.name == "generator"]
    return " ".join(caught.value.__notes__)


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 100 kB: writing fails as on a full disk, with another number (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_exception_in_the_generator_reaches_the_learner(run):
    def fail(weights):
        if weights.version == 2:
            raise ValueError("broken on purpose")

    notes = fails(run, RuntimeError, "the generator failed: ValueError: broken on purpose", before_load=fail)
    assert re.search(r"generator: load weights version 2, ended \d+ s ago; learner: wait step 3, ended", notes)


def test_an_exception_in_the_learner(run, monkeypatch):
    def broken(model, loss_fn, optimizer, batch, t, args):
        if t == 3:
            raise ValueError("broken on purpose")
        return learn(model, loss_fn, optimizer, batch, t, args)

    learn = script.learn
    monkeypatch.setattr(script, "learn", broken)
    notes = fails(run, ValueError, "broken on purpose", save_every=2)
    assert "async_online_dpo.py ended in batch 3 of 6" in notes and "learner: learn step 3" in notes
    assert "--resume --output-dir" in notes
    monkeypatch.setattr(script, "learn", learn)
    assert same(metrics(run("run", resume=True, save_every=2)[0]), metrics(run("whole", save_every=2)[0]))


REWARDS = [
    ("broken_reward", ZeroDivisionError, "division by zero"),
    ("short_reward", ValueError, "tests.tiny:short_reward returned 31 scores for 32 responses"),
    ("nan_reward", ValueError, "the reward 'tests.tiny:nan_reward' gave a score that is not finite in batch-0"),
]


@pytest.mark.parametrize("reward, error, message", REWARDS)
def test_a_wrong_reward_function_is_refused(run, reward, error, message):
    notes = fails(run, error, message, reward=f"tests.tiny:{reward}")
    assert "learner: label step 0" in notes and "there is no checkpoint (--save-every)" in notes


def test_a_reward_function_that_ends_the_process_is_no_signal(run, capfd):
    with pytest.raises(SystemExit, match="3"):
        run("run", reward="tests.tiny:leaving_reward")
    assert "ended in batch 0 of 6, by sys.exit(3); there is no checkpoint" in capfd.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run(run):
    message = "update 0 of batch 0: the norm of the gradients is (nan|inf): look at the scores, or lower --learning-"
    fails(run, FloatingPointError, message, async_rloo, reward="tests.tiny:huge_reward", rloo_loss="vanilla")


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_equal_rewards_teach_nothing_and_break_nothing(run, algo):
    """All scores are equal, those of the EOS rule too."""
    folder, _ = run("run", ALGORITHMS[algo], reward="tests.tiny:equal_reward", missing_eos_score=1.0)
    for record in metrics(folder)[0]:
        assert record["ties"] == 1 and np.isfinite([v for v in record.values() if v is not None]).all()


@pytest.mark.parametrize("tokens, found", [([], "0 to"), ([7] * 13, r"\d+ to 13")])
def test_responses_of_a_wrong_length_are_refused(run, monkeypatch, tokens, found):
    def other(generator, *args):
        rollout = generate(generator, *args)
        rollout.responses[5], rollout.logprobs[5] = tokens, [0.0] * len(tokens)
        return rollout

    generate = script.Generator.generate
    monkeypatch.setattr(script.Generator, "generate", other)
    fails(run, RuntimeError, f"batch-0 has responses of {found}.* tokens: 1 to 12 were asked for")


def test_a_full_disk_leaves_the_last_checkpoint(run, monkeypatch):
    def write(folder, writes, t, *rest):
        with full_disk() if t == 4 else contextlib.nullcontext():
            write_checkpoint(folder, writes, t, *rest)

    write_checkpoint = script.write_checkpoint
    whole, _ = run("whole", save_every=2)
    monkeypatch.setattr(script, "write_checkpoint", write)
    fails(run, OSError, r"version-000004.tmp/model.safetensors could not be written: .* MiB free there", save_every=2)
    monkeypatch.setattr(script, "write_checkpoint", write_checkpoint)
    assert same(metrics(whole), metrics(run("run", resume=True, save_every=2)[0]))


def test_a_full_disk_after_a_signal_leaves_no_engine(run, monkeypatch):
    """The checkpoint that a signal asks for fails while the learner waits: the generator is closed nevertheless."""

    def wait(generator, name):
        if name == "batch-3":
            raise SystemExit(128 + signal.SIGTERM)
        return wait_for(generator, name)

    def write(*arguments):
        with full_disk():
            write_checkpoint(*arguments)

    wait_for, write_checkpoint = script.Generator.wait, script.write_checkpoint
    monkeypatch.setattr(script.Generator, "wait", wait)
    monkeypatch.setattr(script, "write_checkpoint", write)
    with pytest.raises(OSError, match="version-000003.tmp/model.safetensors could not be written"):
        run("run")
    assert not [thread for thread in threading.enumerate() if thread.name == "generator"]


def test_a_checkpoint_is_on_the_disk_before_an_old_one_goes(run, monkeypatch):
    """Its files, then its folder, then the folder with its new name; only then is anything deleted."""
    order, fsync = [], os.fsync

    def synced(descriptor):
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def deleted(path, *rest, **options):
        order.append(f"delete {os.path.basename(path)}")
        rmtree(path, *rest, **options)

    rmtree = script.shutil.rmtree
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(script.shutil, "rmtree", deleted)
    run("run", save_every=1)
    third = order[order.index("version-000003.tmp") - 4 : order.index("delete version-000001") + 1]
    assert {"model.safetensors", "optimizer.safetensors", "state.json"} <= set(third[:4])
    assert third[4] == "version-000003.tmp" and third[-2:] == ["checkpoints", "delete version-000001"]


def test_full_shared_memory_ends_the_run(run, monkeypatch):
    def snapshot(policy, version, *rest):
        with full_disk() if version == 2 else contextlib.nullcontext():
            return snapshot_weights(policy, version, *rest)

    snapshot_weights = script.snapshot_weights
    monkeypatch.setattr(script, "snapshot_weights", snapshot)
    notes = fails(run, OSError, r"/dev/shm/async-rlhf-.*/version-000002/model.safetensors could not be written")
    assert "learner: snapshot step 2" in notes


def test_folders_in_shared_memory_go_with_their_process_only():
    one, other = script.shared_memory_folder(), script.shared_memory_folder()
    assert os.path.exists(one.name) and os.path.exists(other.name)
    one.lock.close()  # as the kernel does where the process is killed
    script.shared_memory_folder().cleanup()
    assert not os.path.exists(one.name) and os.path.exists(other.name)
    other.cleanup()


def test_no_other_run_finds_a_folder_in_shared_memory_before_it_is_locked(monkeypatch):
    """A run that starts at the moment in which another one locks its folder must not take that for left over."""

    def lock(file, how):
        if how == fcntl.LOCK_EX:
            assert not os.path.exists(os.path.join(os.path.dirname(file.name), "lock"))
        flock(file, how)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lock)
    folder = script.shared_memory_folder()
    assert os.path.exists(os.path.join(folder.name, "lock"))
    folder.cleanup()


def test_weights_and_biases_offline(run, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder, _ = run("tracked", track=True)
    assert os.path.isdir(os.path.join(folder, "wandb"))


def test_weights_and_biases_unreachable(run, monkeypatch, capfd):
    """Nobody listens at that port: the run goes on, and logs for later."""
    secret = "0123456789" * 4
    options = dict(BASE_URL="http://127.0.0.1:9", API_KEY=secret, INIT_TIMEOUT="3", MODE="online", SILENT="true")
    for name, value in options.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # it has read the variables before
    folder, _ = run("tracked", track=True)
    assert "Weights & Biases cannot be reached" in capfd.readouterr().out
    assert [name for name in os.listdir(os.path.join(folder, "wandb")) if name.startswith("offline-run")]
    assert len(metrics(folder)[0]) == 6


# ------------------------------------------------------------------------------------------------ as a user starts it
def popen(arguments, **env):
    """Start a command; it and all that it starts carry a mark in their environment."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    heed = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # the shell of a job may ignore it
    process = subprocess.Popen(arguments, cwd=HERE, env=os.environ | env | {"TEST_MARK": mark}, **pipes, **heed)
    process.mark = mark
    STARTED.append(process)
    return process


STARTED = []


@pytest.fixture(autouse=True)
def nothing_goes_on():
    """Whatever a failed test has left running ends."""
    yield
    while STARTED:
        for pid in marked(STARTED[-1]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        STARTED.pop().wait(timeout=20)


def marked(process):
    """The processes of a command that live."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", errors="replace") as f:
            found += [pid] if f"TEST_MARK={process.mark}" in f.read() else []
    return found


def left_behind(process, seconds=10):
    """Its processes, once those that are ending had some time for it, and folders in /dev/shm that no process holds."""
    deadline = time.monotonic() + seconds
    while (left := marked(process)) and time.monotonic() < deadline:
        time.sleep(0.2)
    unlocked = []
    for path in glob.glob("/dev/shm/async-rlhf-*/lock"):
        with contextlib.suppress(BlockingIOError, FileNotFoundError), open(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unlocked.append(path)
    return left, unlocked


NOTHING = ([], [])


@pytest.fixture(scope="module")
def undisturbed(task, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("whole") / "run")
    status, output = start(task, name="async_rloo.py", output_dir=folder, **LONG)
    assert status == 0, output
    return metrics(folder)


LONG = dict(total_episodes=32 * 40, save_every=5)


def test_a_killed_run_resumes_to_the_same_bits(task, tmp_path, undisturbed):
    """Killed before its first checkpoint, and resumed; killed after some, and resumed. Whole runs repeat, too."""
    folder, resume = str(tmp_path / "run"), []
    for t in (3, 12):
        process = popen(command(task, *resume, name="async_rloo.py", output_dir=folder, **LONG))
        until_batch(t, folder, process)
        assert str(engine_of(process.pid)) in marked(process)
        process.kill()
        process.wait(timeout=60)
        assert left_behind(process)[0] == []
        resume = ["--resume"]
    status, output = start(task, "--resume", name="async_rloo.py", output_dir=folder, **LONG)
    assert status == 0, output
    assert same(undisturbed, metrics(folder))
    assert left_behind(process) == NOTHING


def test_an_engine_ends_if_the_run_is_killed_while_it_starts(task):
    """It notices at the end of its imports; vLLM alone would wait five minutes for the one who is gone."""
    process, commands = popen(command(task)), []
    while not any("spawn_main" in found for found in commands):
        assert process.poll() is None, process.communicate()[0]
        listing = ["ps", "-ww", "-o", "args=", "--ppid", str(process.pid)]
        commands = subprocess.run(listing, capture_output=True, text=True).stdout.splitlines()
    process.kill()
    process.wait(timeout=20)
    assert left_behind(process, seconds=60)[0] == []


def test_the_engines_death_costs_nothing(task, tmp_path, undisturbed):
    """Killed twice: vLLM is started again both times, and the results are the same to the bit."""
    folder = str(tmp_path / "run")
    process = popen(command(task, name="async_rloo.py", output_dir=folder, **LONG))
    for t in (8, 20):
        until_batch(t, folder, process)
        os.kill(engine_of(process.pid), signal.SIGKILL)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert "starting it again (death 1 of" in output and "starting it again (death 2 of" in output
    assert same(undisturbed, metrics(folder))
    assert left_behind(process) == NOTHING


def test_an_engine_out_of_memory_costs_nothing(task, tmp_path, undisturbed):
    """It either dies of that, and is started again, or its error ends the run, and --resume goes on: the same bits."""
    folder = str(tmp_path / "run")
    process = popen(command(task, name="async_rloo.py", output_dir=folder, timeout=60, **LONG))
    until_batch(8, folder, process)
    resource.prlimit(engine_of(process.pid), resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
    output = process.communicate(timeout=200)[0]
    if process.returncode == 0:
        assert "starting it again (death 1 of" in output
    else:
        assert re.search("(the generator failed|the learner waited 60 s).*--resume", output, re.DOTALL), output
        status, output = start(task, "--resume", name="async_rloo.py", output_dir=folder, **LONG)
        assert status == 0, output
    assert same(undisturbed, metrics(folder))
    assert left_behind(process) == NOTHING


def test_an_engine_that_hangs_ends_the_run(task, tmp_path):
    folder = str(tmp_path / "run")
    process = popen(command(task, output_dir=folder, total_episodes=64_000, timeout=30))
    until_batch(3, folder, process)
    engine = engine_of(process.pid)
    os.kill(engine, signal.SIGSTOP)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 1, output
    assert re.search(r"TimeoutError: the learner waited 30 s \(--timeout\) for batch-\d+ and the generator", output)
    doing = r"generator: (generate request batch-\d+|load weights) version \d+, \d+ s so far; learner: wait"
    assert re.search(doing, output)
    assert left_behind(process) == NOTHING


def test_too_many_deaths_end_the_run(task, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "MAX_ENGINE_DEATHS", 0)
    affinity, folder = os.sched_getaffinity(0), str(tmp_path / "run")

    def kill():
        until_batch(2, folder)
        os.kill(engine_of(os.getpid()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(RuntimeError, match="vLLM died 1 times, last while making batch-"):
            script.main(script.Args(**flags(task, output_dir=folder, total_episodes=64_000)))
    finally:
        os.sched_setaffinity(0, affinity)
        killer.join()


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2"]


def test_an_error_of_another_learner_ends_all_and_the_run_resumes(task, tmp_path):
    """The reward of learner 1 fails in batch 2; both end, and go on from the checkpoint before it."""
    changes = dict(name="async_rloo.py", reward="tests.tiny:fragile_reward", save_every=1)
    whole, folder = str(tmp_path / "whole"), str(tmp_path / "run")
    python, *rest = command(task, output_dir=whole, **changes)
    process = popen([python, *TORCHRUN, "--standalone", *rest])
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    python, *rest = command(task, output_dir=folder, **changes)
    process = popen([python, *TORCHRUN, "--standalone", *rest], BREAK_RANK="1")
    begin, output = time.monotonic(), process.communicate(timeout=200)[0]
    assert process.returncode == 1 and "ValueError: broken on rank 1" in output, output
    assert left_behind(process)[0] == [] and time.monotonic() - begin < 100
    assert sorted(os.listdir(os.path.join(folder, "checkpoints"))) == ["version-000001", "version-000002"]
    process = popen([python, *TORCHRUN, "--standalone", *rest, "--resume"])
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert same(metrics(whole), metrics(folder))


def test_a_port_in_use_is_told(task, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        python, *rest = command(task, output_dir=str(tmp_path / "run"))
        where = ["--nnodes=1", "--master_addr=127.0.0.1", f"--master_port={taken.getsockname()[1]}"]
        output = popen([python, *TORCHRUN, *where, *rest]).communicate(timeout=100)[0]
    assert "address already in use" in output, output


def test_ctrl_c_ends_with_a_checkpoint(task, tmp_path, undisturbed):
    """To the whole group of processes, as a terminal sends it: the engine must not take it for its own end."""
    folder = str(tmp_path / "run")
    process = popen(command(task, name="async_rloo.py", output_dir=folder, **LONG))
    until_batch(2, folder, process)
    end_by(process, signal.SIGINT)
    status, output = start(task, "--resume", name="async_rloo.py", output_dir=folder, **LONG)
    assert status == 0, output
    assert same(undisturbed, metrics(folder))


def end_by(process, number):
    """Send a signal; the run must end within 30 s, with a checkpoint. Returns its output."""
    begin = time.monotonic()
    os.killpg(process.pid, number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number and "--resume --output-dir" in output, output
    assert time.monotonic() - begin < 30
    assert left_behind(process) == NOTHING
    return output


# --------------------------------------------------------------------------------------------------------------- trust
def listening(pid):
    """Addresses of the TCP sockets that a process listens at, from /proc (hexadecimal)."""
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{name}"))
            inodes |= {found[1]} if found else set()
    rows = []
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{table}") as f:
            rows += [line.split() for line in list(f)[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_sockets_listen_on_loopback_only_and_secrets_stay_secret(task, tmp_path):
    secret, folder = "s3cr3t-token-0123456789", str(tmp_path / "run")
    process = popen(command(task, output_dir=folder, total_episodes=64_000), HF_TOKEN=secret, WANDB_API_KEY=secret)
    until_batch(1, folder, process)
    with open(f"/proc/{engine_of(process.pid)}/environ") as f:
        assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in f.read()
    found = listening(process.pid) | listening(engine_of(process.pid))
    output = end_by(process, signal.SIGTERM)
    assert found <= LOOPBACK
    files = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
    assert len(files) > 5 and secret not in output
    for file in files:
        with open(file, "rb") as f:
            assert secret.encode() not in f.read(), file
