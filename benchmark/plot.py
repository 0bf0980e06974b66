"""Draw figures and tables: python -m benchmark.plot [NAME ...], by default every one that has results.

From benchmark/results/NAME.csv alone, which benchmark.run wrote, to benchmark/figures/NAME.png and NAME.md; the
tables also go into benchmark/README.md, between <!-- NAME --> and <!-- end -->. Lines and bands are the mean over
seeds and its 95 % bootstrap interval. Of three seeds that is their range, which is too narrow: each extreme is drawn three times in a
row with probability 1/27.
"""

import contextlib
import csv
import re
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
    "async_vs_sync": ([("episodes", "win_rate"), ("seconds", "win_rate")], ("model", "way")),
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
    "overoptimisation": ([("kl", "win_rate"), ("kl", "score"), ("kl", "gold_score")], ("algorithm",)),
}
COLUMNS = ("async_vs_sync", "losses", "lag")  # these have a column of panels for each algorithm


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
    """The last evaluation of each run that did not diverge."""
    return [run[-1] for run in groups(rows, ("command",)).values() if not run[-1].get("diverged")]


def line(axis, rows: list[dict], x: str, y: str, label: str | None) -> None:
    """One line with its band: against a dial the last evaluation of each run, else all evaluations."""
    dials = varying(rows, DIALS)
    if x in DIALS or dials:
        points = groups(sorted(last(rows), key=lambda row: [row[dial] for dial in dials]), dials)
    else:
        points = groups(rows, ("version",))
    found = [(np.mean([row[x] for row in p]), *interval([row[y] for row in p])) for p in points.values()]
    where, middle, low, high = np.array(found).T
    axis.plot(where, middle, marker="o", markersize=3, label=label)
    axis.fill_between(where, low, high, alpha=0.15)


def draw(name: str) -> None:
    panels, keys = FIGURES[name]
    rows = read(name)
    keys = varying(rows, keys)
    columns = dict(sorted(groups(rows, ("algorithm",)).items())) if name in COLUMNS else {(): rows}
    if name in COLUMNS:  # a row of axes for each panel
        places = [(panel, part, title) for panel in panels for title, part in columns.items()]
        shape = len(panels), len(columns)
    else:
        places = [(panel, rows, ()) for panel in panels]
        shape = 1, len(panels)
    size = (5.2 * shape[1], 4 * shape[0])
    figure, axes = plt.subplots(
        *shape, figsize=size, layout="constrained", squeeze=False, sharey="row" if name in COLUMNS else False
    )
    for axis, ((x, y), part, title) in zip(axes.flat, places):
        axis.set_prop_cycle(cycler(linestyle=["-", "--", ":"]) * plt.rcParams["axes.prop_cycle"])
        for key, group in sorted(groups(part, keys).items()):
            line(axis, group, x, y, ", ".join(text(value) for value in key) or None)
        axis.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y), title=", ".join(title))
        if x in DIALS and max(row[x] for row in rows) > 4:
            axis.set_xscale("symlog", base=2, linthresh=1)
            axis.xaxis.set_major_formatter("{x:g}")
        if keys and (name in COLUMNS or axis is axes.flat[-1]):
            axis.legend(fontsize=7, title=", ".join(keys), title_fontsize=7)
    figure.savefig(f"benchmark/figures/{name}.png", dpi=90)
    plt.close(figure)


def table(name: str) -> str:
    """Last evaluations, mean [95 % interval] over seeds: a line for each group, a column for each value of a dial."""
    rows = read(name)
    keys, dials = varying(rows, FIGURES[name][1]), varying(rows, DIALS)
    if "way" in keys:  # it says what S is
        dials = tuple(dial for dial in dials if dial != "max_staleness")
    runs = max(map(len, groups(last(rows), keys + dials).values()))
    if name in COLUMNS and "loss" not in keys:
        keys = ("algorithm", *keys)
    measures = [m for m in ("win_rate", "score", "kl", "perplexity") if isinstance(rows[0].get(m), float)]
    if "way" in keys:
        measures.append("step_seconds")
    lines = []
    if len(dials) == 1:
        values = sorted({row[dials[0]] for row in rows})
        for measure in measures[:1] + ["kl"]:
            head = [*keys, *(f"{dials[0].replace('_', ' ')} {value:g}" for value in values)]
            lines += ["", f"{LABELS.get(measure, measure)}:", "", *markdown_head(head)]
            for key, group in sorted(groups(last(rows), keys).items()):
                parts = groups(group, dials)
                cells = [brief([row[measure] for row in parts.get((v,), [])], runs) for v in values]
                lines.append(f"| {' | '.join([*map(text, key), *cells])} |")
    else:
        lines += ["", *markdown_head([*keys, *dials, *measures])]
        for key, group in sorted(groups(last(rows), keys + dials).items()):
            cells = [brief([row[measure] for row in group if row[measure] != ""], runs) for measure in measures]
            lines.append(f"| {' | '.join([*map(text, key), *cells])} |")
    seeds, commits = (sorted({row[name] for row in rows}) for name in ("seed", "commit"))
    told = (
        f"Last evaluations: mean [95 % bootstrap interval], seeds {', '.join(map(text, seeds))} of one prepared task."
    )
    if gone := sorted({row["command"] for row in rows if row.get("diverged")}):
        told += " Diverged and left out: " + "; ".join(f"`{command}`" for command in gone) + "."
    return "\n".join([*lines, "", f"{told} `bash benchmark/{name}.sh`, commit {', '.join(commits)}.", ""])


def markdown_head(names: list[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]


def brief(values: list[float], runs: int) -> str:
    """Mean and interval; of fewer runs than elsewhere in the table their number too."""
    if not values:
        return ""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval(values)) + f" ({len(values)})" * (len(values) < runs)


def include(page: Path) -> None:
    """Put every table into the page, between <!-- NAME --> and <!-- end -->."""
    found = page.read_text()
    for name in FIGURES:
        if Path(f"benchmark/figures/{name}.md").exists():
            if f"<!-- {name} -->" not in found:
                raise SystemExit(f"benchmark.plot: {page} has no place <!-- {name} --> ... <!-- end -->")
            new = f"<!-- {name} -->\n{Path(f'benchmark/figures/{name}.md').read_text()}<!-- end -->"
            found = re.sub(f"<!-- {name} -->\n.*?<!-- end -->", lambda _, new=new: new, found, flags=re.DOTALL)
    page.write_text(found)


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
        Path(f"benchmark/figures/{name}.md").write_text(table(name))
        print(f"benchmark/figures/{name}.png and .md")
    include(Path("benchmark/README.md"))
