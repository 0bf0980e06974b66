"""What goes wrong, a test for each row of the table in docs/async_online_dpo.md.

No hang, one clear line, nothing left behind, nothing lost: the same command goes on. vLLM is real, and what fails does
so for real wherever that can be brought about.
"""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import async_online_dpo as script
import async_ppo
import async_rloo
import sync_baseline
from tests.conftest import run_main
from tests.runs import ALGORITHMS, HERE, command, engine_of, flags, metrics, same, start, until_batch


# --------------------------------------------------------------- the same command goes on, to the last bit: in process
class Killed(BaseException):
    """Nothing may catch it."""


SLOW = {"generator": {"before_load": lambda _: time.sleep(0.1)}, "learner": {"before_label": lambda: time.sleep(0.1)}}
CASES = [(script, dict(max_staleness=s), None) for s in (0, 1, 4)]
CASES += [(script, dict(max_staleness=2), "generator"), (script, dict(max_staleness=2), "learner")]
CASES += [(async_ppo, dict(max_staleness=1), None), (sync_baseline, dict(placement="colocate"), None)]
CASES += [(async_rloo, dict(num_mini_batches=2, num_epochs=2, batch_size=16), None)]


def case_name(case):
    return f"{case[0].__name__}-{'-'.join(map(str, case[1].values()))}-{case[2]}"


def end_at_random_moments(run, monkeypatch, case, moments, seed):
    """End a run while weights or a checkpoint are written, before learning, while evaluating; the same command goes on.

    Where there is no checkpoint yet, it begins anew.
    """
    module, changes, slow = case
    changes = dict(save_every=2, eval_every=3, eval_prompts=16) | changes
    calls, end = [0], [-1]

    def counted(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == end[0]:
                raise Killed
            return function(*args, **kwargs)

        return call

    steps = [(module, "save_file"), (module, "make_batch"), (module, "learn"), (torch, "save"), (os, "replace")]
    for owner, name in steps:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    whole, _ = run("whole", module, **changes)
    total = calls[0]
    for moment in np.random.default_rng(seed).choice(np.arange(1, total), moments, replace=False):
        calls[0], end[0] = 0, moment
        with pytest.raises(Killed):
            run(f"run-{moment}", module, **changes, **SLOW.get(slow, {}))
        end[0] = -1
        folder, _ = run(f"run-{moment}", module, **changes, **SLOW.get(slow, {}))
        assert same(metrics(whole), metrics(folder)), moment
        assert sorted(os.listdir(f"{folder}/checkpoints")) == ["version-000004.pt", "version-000006.pt"]
        assert not list(Path(folder).glob("weights-*"))


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_continued_run_ends_as_if_never_interrupted(run, monkeypatch, case):
    end_at_random_moments(run, monkeypatch, case, moments=2, seed=len(case[1]) + case[1].get("max_staleness", 0))


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_continued_run_ends_as_if_never_interrupted_at_many_moments(run, monkeypatch, case):
    end_at_random_moments(run, monkeypatch, case, moments=12, seed=7)


def refusal(run, **changes):
    """The one line with which a run ends before it loads a model."""
    with pytest.raises(SystemExit) as left:
        run("run", **changes)
    return str(left.value)


def test_wrong_output_folders_are_refused_by_name(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "save_policy", lambda *_: None)  # it has not finished yet
        folder, _ = run("run", save_every=2)
    assert f"{folder}: it holds a run with learning_rate 0.001, not 0.002" in refusal(run, learning_rate=2e-3)
    assert f"{folder}: it holds a run with script 'async_online_dpo.py'" in refusal(run, module=async_rloo)
    last = f"{folder}/checkpoints/version-000006.pt"
    size = os.path.getsize(last)
    with open(last, "r+b") as f:
        f.seek(size // 2)
        byte = f.read(1)[0]
        f.seek(size // 2)
        f.write(bytes([byte ^ 1]))
    assert f"{last} is damaged (delete it to go on from the one before it)" in refusal(run)
    os.truncate(last, size // 2)
    assert f"{last} is damaged" in refusal(run)
    os.remove(last)
    assert len(metrics(run("run")[0])[0]) == 6
    assert f"{folder}: it holds a finished run" in refusal(run)
    os.rename(f"{folder}/policy", f"{folder}/other")
    os.remove(f"{folder}/config.json")
    assert f"{folder}: it is not empty and holds no run" in refusal(run)


# ------------------------------------------------------------------------- errors in this process, one shared engine
def fails(run, error, message, module=script, **changes):
    """Run until this error; it must not take long. Returns the last line, which says how to go on."""
    begin = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        run("run", module, **changes)
    assert time.monotonic() - begin < 60
    return caught.value.__notes__[-1]


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

    message = r"no batch-3: the generator failed: ValueError\('broken on purpose'\)"
    assert "This command goes on from version 0" in fails(run, RuntimeError, message, before_load=fail)


def test_an_exception_in_the_learner(run, monkeypatch):
    def broken(model, loss_fn, optimizer, batch, t, *rest):
        if t == 3:
            raise ValueError("broken on purpose")
        return learn(model, loss_fn, optimizer, batch, t, *rest)

    learn = script.learn
    monkeypatch.setattr(script, "learn", broken)
    assert "goes on from version 2 of 6: python " in fails(run, ValueError, "broken on purpose", save_every=2)
    monkeypatch.setattr(script, "learn", learn)
    assert same(metrics(run("run", save_every=2)[0]), metrics(run("whole")[0]))


REWARDS = [
    ("broken_reward", SystemExit, "--reward tests.tiny:broken_reward: ZeroDivisionError: division by zero"),
    ("short_reward", SystemExit, "tests.tiny:short_reward must give 2 finite scores; it gave .0.0."),
    ("nan_reward", ValueError, "tests.tiny:nan_reward must give 32 finite scores; it gave .nan"),
]


@pytest.mark.parametrize("reward, error, message", REWARDS)
def test_a_wrong_reward_function_is_refused(run, reward, error, message):
    assert "goes on from version 0" in fails(run, error, message, reward=f"tests.tiny:{reward}")


def test_a_loss_that_is_not_finite_ends_the_run(run):
    message = "batch 0, update 0: gradients are not finite: lower --learning-rate?"
    fails(run, FloatingPointError, message, async_rloo, reward="tests.tiny:huge_reward", rloo_loss="vanilla")


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_equal_rewards_teach_nothing_and_break_nothing(run, algo):
    """All scores are equal, those of the EOS rule too."""
    folder, _ = run("run", ALGORITHMS[algo], reward="tests.tiny:equal_reward", missing_eos_score=1.0)
    for record in metrics(folder)[0]:
        assert record.get("score", 1) == 1 and np.isfinite([v for v in record.values() if v is not None]).all()


def test_a_full_disk_leaves_the_last_checkpoint(run, monkeypatch):
    def write(state, file):
        with full_disk() if state["version"] == 4 else contextlib.nullcontext():
            torch_save(state, file)

    torch_save = torch.save
    whole, _ = run("whole")
    monkeypatch.setattr(torch, "save", write)
    with pytest.raises(RuntimeError) as caught:
        run("run", save_every=2)
    assert "File too large" in str(caught.value.__context__)  # the traceback shows both
    assert "goes on from version 2" in caught.value.__notes__[-1]
    monkeypatch.setattr(torch, "save", torch_save)
    assert same(metrics(whole), metrics(run("run", save_every=2)[0]))


def test_no_room_for_the_weights_ends_the_run(run, monkeypatch):
    def save(tensors, path):
        with full_disk() if "version-000002" in str(path) else contextlib.nullcontext():
            save_file(tensors, path)

    save_file = script.save_file
    monkeypatch.setattr(script, "save_file", save)
    assert "goes on from version 0" in fails(run, Exception, "File too large")


def test_weights_and_biases_offline(run, monkeypatch):
    """One run under the id in config.json, also where it was ended and continued."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder, _ = run("tracked", track=True, total_episodes=64)
    with open(f"{folder}/config.json") as f:
        wandb_id = json.load(f)["wandb_id"]
    assert [name for name in os.listdir(f"{folder}/wandb") if name.endswith(f"-{wandb_id}")]


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
    """Its processes, once those that are ending had some time for it."""
    deadline = time.monotonic() + seconds
    while (left := marked(process)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
LONG = dict(total_episodes=32 * 40, save_every=5)


@pytest.fixture(scope="module")
def undisturbed(task, engine, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("whole") / "run")
    run_main(engine, async_rloo, async_rloo.Args(**flags(task, output_dir=folder, **LONG)))
    return metrics(folder)


def recovers(task, folder, undisturbed, faults, timeout):
    """torchrun starts again what ends, unattended: to the bit of a run in one process that nothing disturbed."""
    python, *rest = command(task, name="async_rloo.py", output_dir=folder, timeout=timeout, **LONG)
    process = popen([python, *TORCHRUN, "--nproc_per_node=1", "--max-restarts=9", *rest])
    for t, fault in faults:
        until_batch(t, folder, process)
        learner = learner_of(process.pid)
        pid = learner if fault == "learner" else engine_of(learner)
        os.kill(pid, signal.SIGSTOP if fault == "hang" else signal.SIGKILL)
        deadline = time.monotonic() + timeout + 60
        while os.path.exists(f"/proc/{learner}") and time.monotonic() < deadline:
            time.sleep(0.1)  # its successor begins with the batches of the last checkpoint
        assert time.monotonic() < deadline, "the learner has not ended"
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert output.count("goes on from version") == sum(1 + (fault != "learner") for _, fault in faults)
    assert same(undisturbed, metrics(folder))
    assert left_behind(process) == []
    return output


def test_torchrun_recovers_from_a_killed_learner_and_a_killed_engine(task, tmp_path, undisturbed):
    output = recovers(task, str(tmp_path / "run"), undisturbed, [(8, "engine"), (20, "learner")], timeout=100)
    assert re.search("RuntimeError: no batch-[0-9]+: vLLM died", output), output


@pytest.mark.long
def test_torchrun_recovers_from_both_killed_twice_and_a_hang(task, tmp_path, undisturbed):
    faults = [(6, "learner"), (12, "engine"), (18, "learner"), (24, "engine"), (32, "hang")]
    output = recovers(task, str(tmp_path / "run"), undisturbed, faults, timeout=100)
    assert re.search("TimeoutError: the learner waited 100 s", output), output


def learner_of(pid):
    """The process that torchrun has started last."""
    listing = ["ps", "-o", "pid=", "--sort=start_time", "--ppid", str(pid)]
    return int(subprocess.run(listing, capture_output=True, text=True).stdout.split()[-1])


@pytest.mark.long
def test_an_engine_ends_if_the_run_is_killed_while_it_starts(task):
    """It notices at the end of its imports; vLLM alone would wait five minutes for the one who is gone."""
    process, commands = popen(command(task)), []
    while not any("spawn_main" in found for found in commands):
        assert process.poll() is None, process.communicate()[0]
        listing = ["ps", "-ww", "-o", "args=", "--ppid", str(process.pid)]
        commands = subprocess.run(listing, capture_output=True, text=True).stdout.splitlines()
    process.kill()
    process.wait(timeout=20)
    assert left_behind(process, seconds=60) == []


@pytest.mark.long
def test_an_engine_out_of_memory_costs_nothing(task, tmp_path, undisturbed):
    """It dies of that, or its error ends the run, or it hangs; the same command goes on to the same bits."""
    folder = str(tmp_path / "run")
    process = popen(command(task, name="async_rloo.py", output_dir=folder, timeout=60, **LONG))
    until_batch(8, folder, process)
    resource.prlimit(engine_of(process.pid), resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 1 and "This command goes on from version" in output, output
    assert left_behind(process) == []
    status, output = start(task, name="async_rloo.py", output_dir=folder, timeout=60, **LONG)
    assert status == 0, output
    assert same(undisturbed, metrics(folder))


@pytest.mark.long
def test_a_port_in_use_is_told(task, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        python, *rest = command(task, output_dir=str(tmp_path / "run"))
        where = ["--nnodes=1", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
        where.append(f"--master_port={taken.getsockname()[1]}")
        output = popen([python, *TORCHRUN[:2], *where, *rest]).communicate(timeout=100)[0]
    assert "address already in use" in output, output


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


def test_ctrl_c_ends_at_once_and_nothing_leaks(task, tmp_path, undisturbed):
    """To the whole group of processes, as a terminal sends it. Sockets listen on loopback only; secrets stay secret.

    Then the same command goes on, and its first line says from where.
    """
    secret, folder = "s3cr3t-token-0123456789", str(tmp_path / "run")
    arguments = command(task, name="async_rloo.py", output_dir=folder, **LONG)
    process = popen(arguments, HF_TOKEN=secret, WANDB_API_KEY=secret)
    until_batch(12, folder, process)
    engine = engine_of(process.pid)
    assert str(engine) in marked(process)
    with open(f"/proc/{engine}/environ") as f:
        assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in f.read()
    found = listening(process.pid) | listening(engine)
    begin = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert time.monotonic() - begin < 20 and left_behind(process) == []
    told = re.search(r"KeyboardInterrupt\nThis command goes on from version ([0-9]+) of 40: python .*\n$", output)
    assert told and folder in told[0], output
    assert found <= LOOPBACK
    files = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
    assert len(files) > 4 and secret not in output
    for file in files:
        with open(file, "rb") as f:
            assert secret.encode() not in f.read(), file
    done = subprocess.run(arguments, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{folder} goes on from version {told[1]} of 40" in done.stdout
    assert same(undisturbed, metrics(folder))
