"""Two hours of faults: python -m benchmark.soak (--batches for a shorter one). Task: tldr-tiny, or --task FOLDER.

One run undisturbed and, beside it, the same with a fault every minute or two: the run or its engine killed (SIGKILL),
the engine stopped for some seconds, the last checkpoint altered (which must be refused) and deleted. After each end the
same command goes on. Both must end with the same metrics and weights to the last bit, the memory of both processes is
recorded, and no engine and no weights on their way may be left. The result is added to benchmark/results/soak.json.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from safetensors.torch import load_file

from benchmark.run import git_commit

RESULTS = Path("benchmark/results/soak.json")


@dataclass
class Args:
    batches: int = 7000
    """batches of each of the two runs"""
    seconds: float = 90.0
    """mean time between two faults"""
    seed: int = 1
    """of the faults"""
    task: str = "tasks/tldr-tiny"
    """folder with sft-m, rm-m and data"""


def command(args: Args, folder: Path) -> list[str]:
    files = [f"--model={args.task}/sft-m", f"--reward={args.task}/rm-m", f"--dataset={args.task}/data"]
    sizes = ["--batch-size=32", f"--total-episodes={32 * args.batches}", "--learning-rate=1e-5", "--save-every=25"]
    options = [*files, *sizes, "--eval-every=500", "--eval-prompts=64", f"--output-dir={folder}"]
    return [sys.executable, "async_rloo.py", *options]


def engine_of(pid: int) -> int | None:
    listing = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return next((int(line.split()[0]) for line in listing.splitlines() if "EngineCore" in line), None)


def resident(pid: int | None) -> float | None:
    """Resident memory in MiB."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return None


def start(args: Args, folder: Path) -> subprocess.Popen:
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(command(args, folder), stdout=log, stderr=log)


def batches(folder: Path) -> int:
    log = folder / "metrics.jsonl"
    return log.read_text().count('"step"') if log.exists() else 0


def undisturbed(args: Args, folder: Path) -> list[dict]:
    """Run to the end. Returns resident memory over time."""
    process, memory, begin = start(args, folder), [], time.time()
    while process.poll() is None:
        time.sleep(5)
        sizes = dict(learner=resident(process.pid), engine=resident(engine_of(process.pid)))
        if batches(folder) and None not in sizes.values():
            memory.append({"minutes": round((time.time() - begin) / 60, 2), "batch": batches(folder)} | sizes)
    if process.returncode:
        raise SystemExit(f"the undisturbed run failed: see {folder}.log")
    return memory


def disturbed(args: Args, folder: Path) -> Counter:
    """Run to the end with faults, again and again by the same command. Returns how many there were of each kind."""
    dice, counts = random.Random(args.seed), Counter()
    process = start(args, folder)
    while True:
        try:
            process.wait(timeout=20 + dice.expovariate(1 / max(1.0, args.seconds - 20)))
            if process.returncode == 0:
                return counts
            raise SystemExit(f"the disturbed run ended by itself with status {process.returncode}: see {folder}.log")
        except subprocess.TimeoutExpired:
            pass
        kind, engine = dice.choice(["kill", "alter", "kill engine", "stop engine"]), engine_of(process.pid)
        if engine is None:
            kind = "kill"  # while it starts
        counts[kind] += 1
        print(f"{time.strftime('%H:%M:%S')} batch {batches(folder)}: {kind}", flush=True)
        if kind == "stop engine":
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine, signal.SIGSTOP)
                time.sleep(dice.uniform(1, 20))
                os.kill(engine, signal.SIGCONT)
            continue
        if kind == "kill engine":
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)
        else:
            process.kill()
        process.wait(timeout=60)
        if process.returncode == 0:  # it had just finished
            return counts
        saved = sorted((folder / "checkpoints").glob("version-*.pt"))
        if kind == "alter" and len(saved) > 1:  # there is an older one to go on from
            with open(saved[-1], "r+b") as f:
                f.seek(saved[-1].stat().st_size // 2)
                byte = f.read(1)
                f.seek(-1, os.SEEK_CUR)
                f.write(bytes([byte[0] ^ 1]))
            refused = subprocess.run(command(args, folder), capture_output=True, text=True)
            if refused.returncode == 0 or f"{saved[-1]} is damaged" not in refused.stderr:
                raise SystemExit(f"an altered checkpoint was not refused:\n{refused.stderr[-2000:]}")
            saved[-1].unlink()
        process = start(args, folder)


def results(folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    records = [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]
    return records, load_file(folder / "policy" / "model.safetensors")


def growth(memory: list[dict]) -> dict[str, float]:
    """Median of the last third less that of the second, MiB: single values jump by 40, as buffers come and go."""
    third = len(memory) // 3
    parts = memory[third : 2 * third], memory[2 * third :]
    return {
        side: float(np.subtract(*(np.median([sample[side] for sample in part]) for part in reversed(parts))))
        for side in ("learner", "engine")
    }


def main(args: Args) -> None:
    begin = time.time()
    one, other = Path("runs/soak/undisturbed"), Path("runs/soak/disturbed")
    shutil.rmtree("runs/soak", ignore_errors=True)
    os.makedirs("runs/soak")
    with ThreadPoolExecutor() as pool:
        watched = pool.submit(undisturbed, args, one)
        counts = disturbed(args, other)
        minutes = (time.time() - begin) / 60
        memory = watched.result()
    (records, weights), (others, other_weights) = results(one), results(other)
    equal = records == others and all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())
    weights_left = [str(path) for path in Path("runs/soak").glob("*/weights-*")]
    processes = subprocess.run(["ps", "-A", "-o", "ppid=,args="], capture_output=True, text=True).stdout.splitlines()
    left = [line for line in processes if "EngineCore" in line and line.split()[0] == "1"]  # without a parent
    settled = memory[len(memory) // 10 :: max(1, len(memory) // 40)]  # after the start
    found = {
        "command": f"python -m benchmark.soak --batches {args.batches} --seconds {args.seconds} --seed {args.seed}",
        "commit": git_commit(), "date": time.strftime("%Y-%m-%d"), "faults": counts, "equal_to_the_last_bit": equal,
        "weights_left": weights_left, "engines_left": left, "minutes_with_faults": minutes,
        "growth_of_resident_memory_mib": growth(settled), "memory_mib": settled,
    }  # fmt: skip
    RESULTS.write_text(json.dumps([*json.loads(RESULTS.read_text()), found], indent=1) + "\n")
    print(json.dumps({name: value for name, value in found.items() if name != "memory_mib"}, indent=1))
    if not equal or weights_left or left:
        raise SystemExit("the disturbed run is not as the undisturbed one, or something was left")


if __name__ == "__main__":
    main(tyro.cli(Args))
