"""Draw figures and tables: python -m benchmark.plot [NAME ...], by default every one that has results.

From benchmark/results/NAME.csv alone, which benchmark.run wrote, to benchmark/figures/NAME.png and NAME.md. Lines and
bands are the mean over seeds and its 95 % bootstrap interval. Of three seeds that is their range, which is too narrow:
each extreme is drawn three times in a row with probability 1/27.
"""

import contextlib
import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler

LABELS = {"win_rate": "gold win-rate", "kl": "KL to the reference, per response", "seconds": "seconds of training"}
LABELS |= {"max_staleness": "S: lag in batches", "num_mini_batches": "N: mini-batches per generated batch"}
LABELS |= {"num_epochs": "T: epochs per batch", "samples_per_prompt": "K: samples per prompt", "score": "proxy reward"}
LABELS |= {"episodes": "completions", "effective_sample_size": "effective sample size"}
DIALS = ("max_staleness", "num_mini_batches", "num_epochs", "samples_per_prompt")
FIGURES = {  # panels (x, y), and what the lines are. Where a dial varies, points are last evaluations, else all of them
    "async_vs_sync": ([("episodes", "win_rate"), ("seconds", "win_rate")], ("algorithm", "way", "model")),
    "off_policyness": (
        [("num_mini_batches", "win_rate"), ("num_mini_batches", "kl"), ("kl", "win_rate")],
        ("lr_schedule", "learning_rate"),
    ),
    "losses": ([("num_mini_batches", "win_rate"), ("num_mini_batches", "kl")], ("loss",)),
    "scale": ([("num_mini_batches", "win_rate"), ("num_mini_batches", "kl")], ("model", "reward")),
    "epochs": ([("num_epochs", "win_rate"), ("num_epochs", "kl"), ("seconds", "win_rate")], ("algorithm",)),
    "samples": ([("samples_per_prompt", "win_rate"), ("samples_per_prompt", "kl")], ("algorithm",)),
    "lag": ([("max_staleness", "win_rate"), ("max_staleness", "kl")], ("loss", "learning_rate")),
    "math": ([("episodes", "score"), ("seconds", "score")], ("algorithm", "way")),
}


def read(name: str) -> list[dict]:
    """The lines of a table, with numbers as numbers, and algorithm, loss and way to run as columns of their own."""
    with open(f"benchmark/results/{name}.csv") as f:
        rows = list(csv.DictReader(f))
    for row in rows:
        for key, value in row.items():
            if key in ("commit", "torch", "transformers", "vllm"):
                continue
            with contextlib.suppress(ValueError):
                row[key] = float(value)
        row["algorithm"] = row["algo"] or row["script"].removeprefix("async_")
        row["loss"] = f"{row['algorithm']}: {row[row['algorithm'].removeprefix('online_') + '_loss']}"
        row["way"] = f"S={row['max_staleness']:.0f}" if row["script"].startswith("async") else row["placement"]
    return rows


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % bootstrap interval: 10,000 draws, always the same ones."""
    values = np.array(values)
    draws = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    return values.mean(), *np.percentile(draws, [2.5, 97.5])


def groups(rows: list[dict], keys: tuple) -> dict[tuple, list[dict]]:
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in keys)].append(row)
    return dict(found)


def varying(rows: list[dict], keys: tuple) -> tuple:
    """The keys that differ between rows."""
    return tuple(key for key in keys if len({row[key] for row in rows}) > 1)


def text(value) -> str:
    return f"{value:g}" if isinstance(value, float) else Path(value).name


def last(rows: list[dict]) -> list[dict]:
    """The last evaluation of each run."""
    return [run[-1] for run in groups(rows, ("command",)).values()]


def draw(name: str) -> None:
    panels, keys = FIGURES[name]
    rows = read(name)
    keys = varying(rows, keys)
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), layout="constrained")
    for axis, (x, y) in zip(axes, panels):
        axis.set_prop_cycle(cycler(linestyle=["-", "--", ":"]) * plt.rcParams["axes.prop_cycle"])
        for key, group in groups(rows, keys).items():
            dials = varying(group, DIALS)
            if x in DIALS or dials:
                points = groups(sorted(last(group), key=lambda row: [row[d] for d in dials]), dials)
            else:
                points = groups(group, ("version",))
            line = [(np.mean([row[x] for row in p]), *interval([row[y] for row in p])) for p in points.values()]
            where, middle, low, high = np.array(line).T
            axis.plot(where, middle, marker="o", markersize=3, label=", ".join(text(value) for value in key) or None)
            axis.fill_between(where, low, high, alpha=0.15)
        axis.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y))
        if x in DIALS and max(row[x] for row in rows) > 4:
            axis.set_xscale("symlog", base=2, linthresh=1)
            axis.xaxis.set_major_formatter("{x:g}")
    if keys:
        axes[-1].legend(fontsize=7, title=", ".join(keys), title_fontsize=7)
    figure.savefig(f"benchmark/figures/{name}.png", dpi=110)
    plt.close(figure)


def table(name: str) -> None:
    """A line for each group and value of the dials: last evaluation, mean [95 % interval], number of runs."""
    panels, keys = FIGURES[name]
    rows = read(name)
    keys = (*varying(rows, keys), *varying(rows, DIALS))
    measures = ["win_rate", "score", "kl", "perplexity"] + ["step_seconds"] * ("way" in keys)
    measures = [measure for measure in measures if rows[0].get(measure) not in (None, "")]
    lines = [f"| {' | '.join([*keys, *measures, 'runs'])} |", "|" + " --- |" * (len(keys) + len(measures) + 1)]
    for key, group in sorted(groups(last(rows), keys).items(), key=lambda item: item[0]):
        cells = [text(value) for value in key]
        cells += ["{:.3f} [{:.3f}, {:.3f}]".format(*interval([row[m] for row in group])) for m in measures]
        lines.append(f"| {' | '.join(cells)} | {len(group)} |")
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    lines += ["", f"Last evaluations; mean [95 % bootstrap interval]. `bash benchmark/{name}.sh`, commit {commits}."]
    Path(f"benchmark/figures/{name}.md").write_text("\n".join(lines) + "\n")


def weights() -> None:
    """Seconds from "the learner has them" to "the generator has them" by size of the policy, from speed.csv."""
    with open("benchmark/results/speed.csv") as f:
        rows = [row for row in csv.DictReader(f) if row["part"] == "weights"]
    figure, axis = plt.subplots(figsize=(5.2, 4), layout="constrained")
    for side in ("snapshot by the learner", "loading by the generator"):
        mine = [row for row in rows if row["what"].endswith(side)]
        points = sorted((float(row["what"].split()[0]), float(row["median"])) for row in mine)
        axis.plot(*zip(*points), "o", label=side)
    axis.set(xscale="log", yscale="log", xlabel="millions of parameters", ylabel="seconds")
    axis.legend(title="float32; the largest in bfloat16", fontsize=7, title_fontsize=7)
    figure.savefig("benchmark/figures/weights.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    Path("benchmark/figures").mkdir(exist_ok=True)
    if len(sys.argv) == 1:
        weights()
    for name in sys.argv[1:] or [name for name in FIGURES if Path(f"benchmark/results/{name}.csv").exists()]:
        if name not in FIGURES or not Path(f"benchmark/results/{name}.csv").exists():
            raise SystemExit(f"benchmark.plot: {name} has no results or no figure; there are {', '.join(FIGURES)}")
        draw(name)
        table(name)
        print(f"benchmark/figures/{name}.png and .md")
