"""One line a run, as CSV: python -m benchmark.table RUN_FOLDER... > benchmark/results/NAME.csv

First and last evaluation, times (seconds, medians of steps without evaluation), and where the numbers come from.
With --evals before the folders: one line an evaluation instead, for curves.
"""

import csv
import json
import os
import shlex
import sys


def row(folder: str) -> dict:
    """The row of one finished run, from its config.json and summary.json."""
    with open(os.path.join(folder, "config.json")) as f:
        config = json.load(f)
    with open(os.path.join(folder, "summary.json")) as f:
        summary = json.load(f)
    args, first, last = config["args"], summary["evals"][0], summary["evals"][-1]
    names = ("win_rate", "gold_score", "score", "kl", "perplexity", "response_length")
    both = (("first", first), ("last", last))
    numbers = {f"{name}_{when}": e[name] for name in names for when, e in both if name in e}
    if args["gold"]:
        numbers["win_rate_best"] = max(e["win_rate"] for e in summary["evals"])
    times = {name: summary[name] for name in ("generation", "learning", "step", "ideal_step", "overlap")}
    times |= {name: summary[name] for name in ("overlap_ratio_ideal", "overlap_ratio", "timed_steps")}
    shown = ("seed", "max_staleness", "placement", "algo", "dpo_loss", "rloo_loss", "ppo_loss", "learning_rate")
    kept = {name: args.get(name, "") for name in (*shown, "total_episodes")}
    where = {"command": config["command"], "commit": config["commit"], "machine": config["machine"]["platform"]}
    where |= {"cores": config["machine"]["cores"]} | {k.removesuffix("-cpu"): v for k, v in config["versions"].items()}
    script = {"script": os.path.splitext(os.path.basename(shlex.split(config["command"])[1]))[0]}
    script["task"] = os.path.basename(os.path.dirname(os.path.normpath(args["dataset"])))
    return script | kept | {k: round(v, 4) for k, v in (numbers | times).items()} | where


def eval_rows(folder: str) -> list[dict]:
    """The rows of all evaluations of one finished run."""
    run = row(folder)
    with open(os.path.join(folder, "summary.json")) as f:
        evals = json.load(f)["evals"]
    names = ("script", "task", "seed", "max_staleness", "learning_rate")
    values = [{k: round(v, 4) for k, v in record.items()} for record in evals]
    return [{n: run[n] for n in names} | v | {n: run[n] for n in ("command", "commit")} for v in values]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--evals"]:
        rows = [record for folder in sys.argv[2:] for record in eval_rows(folder)]
    else:
        rows = [row(folder) for folder in sys.argv[1:]]
    if not rows:
        raise SystemExit("table: name the folders of finished runs, such as runs/*")
    writer = csv.DictWriter(sys.stdout, list(max(rows, key=len)))  # a run without --gold has no win-rate
    writer.writeheader()
    writer.writerows(rows)
