"""Run a grid: python -m benchmark.run NAME SCRIPT --flag value[,value...] ...

    python -m benchmark.run lag async_rloo.py --max-staleness 0,1,2,4 --rloo-loss proximal,vanilla --seed 1,2,3

Values with commas span the grid; the last flag changes fastest. A run is kept in runs/NAME/, in a folder named after
what varies and a hash of the whole command. Finished ones are skipped, others go on from their last checkpoint; a run
that fails ends the command with its output. After each run its lines, one an evaluation, take the place in
benchmark/results/NAME.csv of those of the same command; the others stay. KEEP=1 runs only what has no lines there for
the task as it is prepared here (column `prepared`).
LAUNCH="torchrun ..." starts the scripts with that instead of Python; with DRY=1 the commands are only printed. JOBS=2
runs two at a time, each on its half of the cores: times do not compare then, and results only with those of as many
threads a side (on 2 cores all but `colocate`).
"""

import csv
import fcntl
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmark import timeline

# The columns of the table, from the flags, the evaluation, and the steps before it (means).
FLAGS = ("seed", "model", "reward", "placement", "dpo_loss", "rloo_loss", "ppo_loss", "max_staleness")
FLAGS += ("num_mini_batches", "num_epochs", "samples_per_prompt", "learning_rate", "lr_schedule", "batch_size")
FLAGS += ("beta", "kl_coef", "value_model")
EVALUATION = ("win_rate", "gold_score", "score", "ended", "kl", "perplexity", "response_length")
STEPS = ("lag", "logratio", "behaviour_kl", "clip_fraction", "loss_clipped", "grad_norm")


def grid(options: list[str]) -> list[list[str]]:
    """["--a", "1,2", "--b=3", "--c"] -> [["--a=1", "--b=3", "--c"], ["--a=2", "--b=3", "--c"]]."""
    axes, bare = {}, None  # of a flag given twice the last counts; bare: a flag whose value may come as the next word
    for word in options:
        flag, equals, values = word.partition("=")
        if not flag.startswith("--"):
            flag, equals, values, bare = bare, True, word, None
            if flag is None:
                raise SystemExit(f"benchmark.run: {word} does not belong to a flag")
        else:
            bare = None if equals else flag
        axes[flag] = [f"{flag}={value}" for value in values.split(",")] if equals else [flag]
    return [list(point) for point in itertools.product(*axes.values())]


def folder_of(name: str, script: str, flags: list[str], varied: set[str]) -> Path:
    """runs/NAME/<script>-<what varies>-<hash of the command>."""
    shown = [Path(script).stem] + [flag[2:] for flag in flags if flag.split("=")[0] in varied]
    launch = shlex.split(os.environ.get("LAUNCH") or "")
    digest = hashlib.sha256("\0".join([*launch, script, *flags]).encode()).hexdigest()[:8]
    new = Path("runs", name, "-".join([*(re.sub(r"[^\w.=-]", "_", part) for part in shown), digest]))
    return next((path for path in Path("runs", name).glob(f"*-{digest}") if path.is_dir()), new)


def start(script: str, flags: list[str], folder: Path, slot: int, jobs: int, lock: int) -> subprocess.Popen:
    """One run of a script, which goes on where it stopped; of several jobs each has its own cores."""
    config = folder / "config.json"
    other = config.exists() and config.stat().st_mtime < age(task_of(folder))
    if finished(folder) or other:  # of the task as it was prepared before: begin anew
        shutil.rmtree(folder)
        Path(f"{folder}.log").unlink(missing_ok=True)
    launcher = shlex.split(os.environ.get("LAUNCH") or sys.executable)
    command = [*launcher, script, *flags, f"--output-dir={folder}"]
    print(shlex.join(command), flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    if jobs > 1:
        command = ["taskset", "--cpu-list", ",".join(map(str, cores[slot::jobs])), *command]
    processor = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or ["unknown"]
    where = {"JOBS": jobs, "PROCESSOR": processor[0], "MACHINE": platform.platform(), "CORES": os.cpu_count()}
    where["COMMIT"] = git_commit()
    with open(f"{folder}.log", "a") as log:
        print(*(f"{key}={value}" for key, value in where.items()), sep="\n", file=log, flush=True)
        own = dict(start_new_session=True, pass_fds=[lock])  # signals come from here; the lock lasts as long as the run
        return subprocess.Popen(command, stdout=log, stderr=log, **own)


def git_commit() -> str:
    """The commit of this repository, marked if code differs from it; unknown outside of one."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    named = subprocess.run([*git, "describe", "--always", "--abbrev=12", "--exclude=*"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":/*.py", ":/*.sh"], capture_output=True)
    return (named.stdout.strip() + ("-dirty" if changed.returncode else "")) if named.returncode == 0 else "unknown"


def finished(folder: Path) -> bool:
    return (folder / "prepared").exists() or (folder / "policy").exists()


def up_to_date(folder: Path) -> bool:
    """Finished, and on the task as it is prepared now."""
    file = folder / "prepared"
    return file.exists() and file.read_text() == prepared(task_of(folder))


def task_of(folder: Path) -> Path:
    return Path(json.loads((folder / "config.json").read_text())["args"]["dataset"]).parent


def run_all(name: str, points: list[tuple[str, list[str], Path]], jobs: int, lock: int) -> None:
    """Every run to its end, `jobs` at a time. Ctrl-C and SIGTERM end them; the same command goes on from there.

    A loss or a gradient that is not finite is a result, kept as such; any other failure ends the command.
    """
    running, waiting = {}, [point for point in points if not up_to_date(point[2])]
    try:
        while running or waiting:
            for slot in range(jobs):
                if waiting and slot not in running:
                    point = waiting.pop(0)
                    running[slot] = point[2], start(*point, slot, jobs, lock)
            time.sleep(0.2)
            for slot, (folder, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                if process.returncode:
                    output = Path(f"{folder}.log").read_text()[-3000:]
                    if "FloatingPointError" not in output:
                        raise SystemExit(f"{output}\nbenchmark.run: {folder} failed with status {process.returncode}")
                    (folder / "diverged").write_text(output)
                (folder / "prepared").write_text(prepared(task_of(folder)))
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # gigabytes each, and of no more use
                write_table(name)
    except KeyboardInterrupt:
        raise SystemExit("benchmark.run: ended; the same command goes on where this one stopped") from None
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def rows(folder: Path) -> list[dict]:
    """A line for each evaluation of a finished run."""
    config = json.loads((folder / "config.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    diverged = (folder / "diverged").exists()
    summary = timeline.summary(records, config["args"]["max_staleness"])
    times = {f"{key}_seconds": summary.get(key) for key in ("generation", "learning", "step")}  # a short run has none
    args, packages = config["args"], {name.removesuffix("-cpu"): value for name, value in config["versions"].items()}
    same = {"script": Path(config["command"].split()[1]).stem, "task": Path(args["dataset"]).parent.name}
    same |= {name: args.get(name, "") for name in FLAGS} | {"prepared": (folder / "prepared").read_text()}
    own = {record["step"]: record["time/step"] for record in timeline.timed_steps(records, args["max_staleness"])}
    times["step_seconds"] = statistics.median(own.values()) if own else None
    where = {key: value and round(value, 4) for key, value in times.items()}
    where["command"] = config["command"].split(" --output-dir")[0]
    where["diverged"] = "yes" if diverged else ""
    log = Path(f"{folder}.log").read_text()
    where["jobs"] = max(map(int, re.findall(r"^JOBS=(\d+)$", log, re.MULTILINE)))
    for key in ("COMMIT", "MACHINE", "CORES", "PROCESSOR"):
        where[key.lower()] = re.findall(rf"^{key}=(.*)$", log, re.MULTILINE)[-1]
    where |= packages
    found, steps, episodes, seconds = [], [], 0, 0.0
    for record in records:
        if "step" in record:
            steps.append(record)
            episodes, seconds = record["episodes"], seconds + own.get(record["step"], times["step_seconds"] or 0.0)
            continue
        values = {"version": record["version"], "episodes": episodes, "seconds": seconds}
        values |= {name: record[f"eval/{name}"] for name in EVALUATION if f"eval/{name}" in record}
        if steps:
            values |= {name: statistics.fmean(s[name] for s in steps) for name in STEPS if name in steps[0]}
            values["train_score"] = statistics.fmean(s["score"] for s in steps)
        found.append(same | {k: round(v, 5) for k, v in values.items()} | where)
        steps = []
    return found


@functools.cache
def prepared(task: Path) -> str:
    """How a task was prepared: 8 hexadecimal digits of the weights of its SFT policy (of size m); of the Hub: ""."""
    files = policies(task)
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8] if files else ""


def age(task: Path) -> float:
    """When its SFT policy was written; of the Hub: 0."""
    return max((path.stat().st_mtime for path in policies(task)), default=0)


def policies(task: Path) -> list[Path]:
    return sorted(path for name in ("sft", "sft-m") for path in task.glob(f"{name}/*.safetensors"))


def saved(name: str) -> dict[str, list[dict]]:
    """The lines of benchmark/results/NAME.csv, by "<script> <flags>"."""
    found = {}
    if (path := Path(f"benchmark/results/{name}.csv")).exists():
        with open(path) as f:
            for row in csv.DictReader(f):
                found.setdefault(row["command"].partition(" ")[2], []).append(row)
    return found


def write_table(name: str) -> None:
    """benchmark/results/NAME.csv, sorted by command: the lines of finished runs in place of their old ones."""
    table = saved(name)
    for folder in sorted(path.parent for path in Path("runs", name).glob("*/prepared")):
        if new := rows(folder):
            table[new[0]["command"].partition(" ")[2]] = new
    found = [row for command in sorted(table) for row in table[command]]
    columns = list(dict.fromkeys(column for row in found for column in row))
    path = Path(f"benchmark/results/{name}.csv")
    with open(part := path.with_suffix(".part"), "w") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(found)
    part.replace(path)


def main(name: str, script: str, *options: str) -> None:
    jobs, cores = int(os.environ.get("JOBS") or 1), len(os.sched_getaffinity(0))
    if not 1 <= jobs <= cores:
        raise SystemExit(f"benchmark.run: JOBS={jobs}: there are {cores} cores, each run needs at least one")
    points = grid(list(options))
    varied = {values[0].split("=")[0] for values in zip(*points) if len(set(values)) > 1}
    if os.environ.get("KEEP"):
        lines = [(command, run[0]) for command, run in saved(name).items()]
        have = [command for command, row in lines if row.get("prepared", "") == prepared(Path("tasks", row["task"]))]
        points = [flags for flags in points if shlex.join([script, *flags]) not in have]
    if os.environ.get("DRY"):
        for flags in points:
            print(script, *flags)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    Path("runs").mkdir(exist_ok=True)
    with open("runs/.lock", "w") as lock:  # one grid at a time
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("benchmark.run: waiting for another grid in this folder", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        runs = [(script, flags, folder_of(name, script, flags, varied)) for flags in points]
        run_all(name, runs, jobs, lock.fileno())
        write_table(name)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("benchmark.run: python -m benchmark.run NAME SCRIPT --flag value[,value...] ...")
    main(*sys.argv[1:])
