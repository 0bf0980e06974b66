"""Several learners over gloo: the same global batch, so the same losses and weights as one learner's."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import run_main

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def flags(task, folder, **changes):
    """A run of 4 batches of 8 prompts x 2 samples in two mini-batches, with an evaluation, as a dict of Args fields."""
    flags = dict(model=f"{task}/policy", reward=f"{task}/rm", gold=f"{task}/rm", dataset=f"{task}/data")
    flags |= dict(dtype="float32", batch_size=16, num_mini_batches=2, micro_batch_size=4, total_episodes=128)
    flags |= dict(prompt_length=32, response_length=12, learning_rate=1e-3, eval_every=4, eval_prompts=16)
    return flags | dict(output_dir=folder) | changes


def options(task, name, folder, **changes):
    """Script and flags of that run."""
    return [name, *(f"--{key.replace('_', '-')}={value}" for key, value in flags(task, folder, **changes).items())]


def results(folder):
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        records = [json.loads(line) for line in f]
    return records, load_file(os.path.join(folder, "policy", "model.safetensors"))


def finish(*processes):
    for process in processes:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output


def start(command, **env):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=HERE, env=os.environ | env, **pipes)


def assert_same_to_tolerance(one, many):
    """Every weight, and every metric but the times and `accuracy`, in which a tie counts by its rounding error."""
    (records, weights), (others, other_weights) = results(one), results(many)
    assert len(records) == len(others) == 6
    for record, other in zip(records, others):
        assert record.keys() == other.keys()
        for name, value in record.items():
            if not name.startswith("time/") and name not in ("probe_error", "accuracy"):
                assert value == pytest.approx(other[name], rel=2e-3, abs=2e-5), name
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        assert torch.allclose(weight, other_weights[name], atol=2e-5), name


@pytest.fixture
def alone(task, engine, tmp_path):
    """alone(name, **changes) -> folder of the run of one learner."""

    def run(name, **changes):
        module = importlib.import_module(name.removesuffix(".py"))
        run_main(engine, module, module.Args(**flags(task, str(tmp_path / "alone"), **changes)))
        return str(tmp_path / "alone")

    return run


@pytest.fixture(scope="module")
def pair(task, tmp_path_factory):
    """pair(name, **changes) -> folder of the run of two learners; made once."""
    made = {}

    def run(name, **changes):
        key = name, *changes.items()
        if key not in made:
            made[key] = str(tmp_path_factory.mktemp("pair") / "run")
            finish(start([*TORCHRUN, "--standalone", "--nproc_per_node=2", *options(task, name, made[key], **changes)]))
        return made[key]

    return run


FRAGILE = dict(reward="tests.tiny:fragile_reward", save_every=1)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("async_ppo.py", FRAGILE),
        pytest.param("async_online_dpo.py", {}, marks=pytest.mark.long),
        pytest.param("async_ppo.py", dict(max_staleness=0, placement="colocate"), marks=pytest.mark.long),
    ],
)
def test_two_learners_are_one(alone, pair, name, changes):
    assert_same_to_tolerance(alone(name, **changes), pair(name, **changes))


@pytest.mark.long
def test_two_learners_in_bfloat16(pair):
    """FSDP casts what forward() is given: it must be tensors and plain values."""
    records, _ = results(pair("async_rloo.py", dtype="bfloat16"))
    assert len(records) == 6


@pytest.mark.long
def test_an_error_of_one_learner_ends_both_and_they_go_on(task, tmp_path, pair):
    """The reward of learner 1 fails in batch 2; torchrun starts both again: the bits of a run without that."""
    folder = str(tmp_path / "run")
    again = ["--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    process = start([*TORCHRUN, *again, *options(task, "async_ppo.py", folder, **FRAGILE)], BREAK_RANK="1")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "ValueError: broken on rank 1" in output, output
    assert "This command goes on from version 1 of 4: torchrun ... async_ppo.py" in output
    (records, weights), (others, other_weights) = results(folder), results(pair("async_ppo.py", **FRAGILE))
    assert [plain(record) for record in records] == [plain(record) for record in others]
    assert all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())


def plain(record):
    return {name: value for name, value in record.items() if not name.startswith("time/")}


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them: [(name, interface, address), ...]."""
    names = [f"rlhf-{os.getpid()}-{i}" for i in range(2)]
    wires, addresses = ("wire0", "wire1"), ("10.77.0.1", "10.77.0.2")
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` command here")
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace may be made here: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", wires[0], "netns", names[0], "type", "veth", "peer", "name", wires[1], "netns", names[1])
        for name, wire, address in zip(names, wires, addresses):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", wire)
            ip("-n", name, "link", "set", wire, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, wires, addresses))
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.long
def test_two_hosts_with_a_generator_each_are_one(task, tmp_path, alone, hosts):
    """A torchrun agent, a vLLM and two learners on each host."""
    folder, processes = str(tmp_path / "run"), []
    for rank, (name, wire, _) in enumerate(hosts):
        where = ["--nnodes=2", f"--node_rank={rank}", f"--master_addr={hosts[0][2]}", "--master_port=29512"]
        command = [*TORCHRUN, *where, "--nproc_per_node=2", *options(task, "async_rloo.py", folder)]
        processes.append(start(["ip", "netns", "exec", name, *command], GLOO_SOCKET_IFNAME=wire))
    finish(*processes)
    assert_same_to_tolerance(alone("async_rloo.py"), folder)
