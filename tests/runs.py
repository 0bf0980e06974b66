"""Runs of the scripts on tests/tiny.py's task, and what they leave: shared by the tests."""

import functools
import json
import os
import shlex
import subprocess
import sys
import time

import torch
from safetensors.torch import load_file

import async_online_dpo
import async_ppo
import async_rloo

ALGORITHMS = {"online_dpo": async_online_dpo, "rloo": async_rloo, "ppo": async_ppo}
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def flags(task, **changes):
    """The flags of a run of 6 batches of 16 prompts x 2 samples, as a dict of Args fields."""
    flags = dict(model=f"{task}/policy", reward=f"{task}/rm", gold="tests.tiny:reward", dataset=f"{task}/data")
    flags |= dict(batch_size=32, total_episodes=192, prompt_length=32, response_length=12, learning_rate=1e-3)
    return flags | dict(eval_every=0, dtype="float32") | changes


def metrics(folder):
    """The metrics without the times, and the trained weights."""
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        records = [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in f]
    return records, load_file(os.path.join(folder, "policy", "model.safetensors"))


def same(a, b):
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(a[1][k], b[1][k]) for k in a[1])


def command(task, *extra, name="async_online_dpo.py", **changes):
    """The command line of a run."""
    options = [f"--{k.replace('_', '-')}={v}" for k, v in (flags(task) | changes).items()]
    return [sys.executable, name, *options, *extra]


def start(task, *extra, **changes):
    """Run a script in a process of its own. Returns (exit status, output)."""
    done = subprocess.run(command(task, *extra, **changes), cwd=HERE, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def until_batch(t, folder, process=None):
    """Wait until a run has learned from t batches."""
    log, deadline = os.path.join(folder, "metrics.jsonl"), time.monotonic() + 120
    while not (os.path.exists(log) and len(open(log).readlines()) >= t):
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{folder} has not come to batch {t}"
        time.sleep(0.02)


def engine_of(pid):
    """The newest vLLM engine among the children of a process."""
    listing = ["ps", "-o", "pid=,args=", "--sort=start_time", "--ppid", str(pid)]
    lines = subprocess.run(listing, capture_output=True, text=True).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if "EngineCore" in line][-1]


@functools.cache
def dry(name, scale):
    """The commands of an experiment of benchmark/, as lists of words."""
    bash = ["bash", f"benchmark/{name}", scale]
    env = {key: value for key, value in os.environ.items() if key not in ("SEEDS", "KEEP", "LAUNCH", "LEARNERS")}
    done = subprocess.run(bash, cwd=HERE, env=env | {"DRY": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]
