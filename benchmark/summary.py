"""Mean and spread over seeds of a table of runs, as Markdown: python -m benchmark.summary benchmark/results/NAME.csv

One line for each task, algorithm and way to run it. The measure is the gold win-rate (without a gold
reward: the score), in per cent; spread is the standard deviation over the seeds; KL is per response, at temperature 1;
times are medians of a run's steps, in seconds: G generation, L learning.
"""

import csv
import statistics
import sys
from collections import defaultdict


def way(row: dict) -> str:
    return f"asynchronous, S={row['max_staleness']}" if row["script"].startswith("async") else row["placement"]


def algorithm(row: dict) -> str:
    return row["algo"] or row["script"].removeprefix("async_")


def spread(values: list[float], digits: int, factor: float = 1.0) -> str:
    if not values:
        return ""
    values = [factor * v for v in values]
    more = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{more}"


def summary(rows: list[dict]) -> list[str]:
    """Lines of the Markdown table. The ratio is of pairs: the same seed, synchronous over asynchronous."""
    groups, asynchronous = defaultdict(list), {}
    for row in rows:
        groups[row["task"], algorithm(row), way(row)].append(row)
        if way(row).startswith("async"):
            asynchronous[row["task"], algorithm(row), row["seed"]] = float(row["step"])
    names = ("task", "algorithm", "run", "seeds", "SFT, %", "trained, %", "KL", "G", "L", "step", "step / asynchronous")
    lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    for (task, algo, how), group in groups.items():
        measure = "win_rate" if group[0].get("win_rate_last") else "score"

        def column(name, digits=2, factor=1.0, group=group):
            return spread([float(row[name]) for row in group], digits, factor)

        pairs = [(float(r["step"]), asynchronous.get((task, algo, r["seed"]))) for r in group]
        ratios = [step / other for step, other in pairs if other]
        cells = [task, algo, how, str(len(group))]
        cells += [column(f"{measure}_first", 1, 100), column(f"{measure}_last", 1, 100)]
        cells += [column("kl_last"), column("generation"), column("learning"), column("step"), spread(ratios, 2)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("summary: name one CSV file that benchmark.table wrote")
    with open(sys.argv[1]) as f:
        print("\n".join(summary(list(csv.DictReader(f)))))
