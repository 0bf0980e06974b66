"""Draw figures and tables: python -m benchmark.plot [NAME ...], by default every one that has results.

From benchmark/results/*.csv alone, which benchmark.run wrote, to benchmark/figures/NAME.png and, with claims and
tables, benchmark/study/NAME.md. Experiments that share runs have one table of results (SHARED). A row for each figure
of the paper goes into benchmark/README.md, a summary into README.md. Lines and bands are the mean over seeds and its
95 % bootstrap interval; of three seeds that is their range, which is too narrow.

benchmark/claims.csv holds what the paper finds and what was expected here before the runs. A claim is a difference of
runs, `plus` less `minus`, paired by seed (and by how the task was prepared). The verdict is on the 95 % t-interval of
the mean difference (of seconds and step_seconds: of the mean logarithm of their ratio). Yes: it lies wholly above or
below zero, as the paper finds, or within MARGIN, where the paper finds no difference. No: it contradicts the paper
wholly, or lies within MARGIN, and not wholly on the paper's side, though the paper finds a difference. `decides`: the
row of benchmark/README.md that the claim decides, or helps to.
"""

import contextlib
import csv
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


class Panel(NamedTuple):
    x: str
    """a dial: points are means of the last evaluations; any other column: of all evaluations, one for each version"""
    y: str
    lines: tuple[str, ...]


DIALS = {"max_staleness": "S: lag in batches", "num_mini_batches": "N: updates on one generated batch"}
DIALS |= {"num_epochs": "T: epochs per batch", "samples_per_prompt": "K: samples per prompt"}
LABELS = DIALS | {"win_rate": "gold win-rate", "kl": "KL to the reference, per response", "score": "proxy reward"}
LABELS |= {"seconds": "seconds of training, runs timed alone", "episodes": "completions", "gold_score": "gold reward"}
LABELS |= {"accuracy": "accuracy on held-out problems"}
FIGURES = {
    "async_vs_sync": [Panel(x, "win_rate", ("way",)) for x in ("episodes", "seconds")],
    "off_policyness": [
        Panel("num_mini_batches", "win_rate", ("algorithm",)),
        Panel("kl", "win_rate", ("num_mini_batches",)),
    ],
    "losses": [Panel("num_mini_batches", y, ("loss",)) for y in ("win_rate", "kl")],
    "scale": [Panel("num_mini_batches", y, ("policy", "judge")) for y in ("win_rate", "kl")],
    "epochs": [Panel(x, "accuracy", ("num_epochs",)) for x in ("episodes", "kl", "seconds")],
    "samples": [Panel(x, "win_rate", ("samples_per_prompt", "learning_rate")) for x in ("episodes", "kl", "seconds")],
    "lag": [Panel("max_staleness", "win_rate", ("loss",))],
    "preparations": [Panel("num_mini_batches", "win_rate", ("algorithm",))],
    "math": [Panel(x, "accuracy", ("way",)) for x in ("episodes", "seconds")],
    "chatbot": [Panel(x, "win_rate", ("way",)) for x in ("episodes", "seconds")],
    "overoptimisation": [Panel("kl", y, ("algorithm",)) for y in ("win_rate", "score", "gold_score")],
}
# A column for each value, in this order; else all panels stand in one row.
COLUMNS = {"async_vs_sync": "policy"}
COLUMNS |= dict.fromkeys(("losses", "scale", "lag", "math"), "algorithm")
ORDER = ["online_dpo", "rloo", "ppo", "sft-s", "sft-m", "sft-l"]
SHOWN = {"async_vs_sync": {"algorithm": "online_dpo"}}  # in the figure, as in the paper's; the tables have all
WORDS = {"S=1": "asynchronous", "online_dpo": "Online DPO", "rloo": "RLOO", "ppo": "PPO", "best_of_k": "best-of-2 SFT"}
WORDS |= {"sft-s": "policy s", "sft-m": "policy m", "sft-l": "policy l", "sft": "SmolLM2-135M"}
OWN_LOSS = {"online_dpo": "dpo", "rloo": "proximal", "ppo": "behaviour"}
LOSSES = ("best_of_k", "ipo", "vanilla", "truncated", "topr", "copg", "asymre", "recompute", "decoupled", "cispo")
COLOURS = {"S=1": "C0", "colocate": "C1", "split": "C2"} | dict.fromkeys(OWN_LOSS.values(), "black")
COLOURS |= dict(zip(LOSSES, (f"C{i}" for i in (0, 1, 2, 3, 4, 5, 6, 8, 9, 0))))
SHARED = dict.fromkeys(("losses", "scale", "lag"), "off_policyness")  # experiment: whose table of results it shares
USUAL = ("sft-m", "rm-m", "pythia410m-sft-tldr", "pythia410m-rm-tldr6.9b")  # policies and reward models
STUDY = {  # experiment: title of its page; those of the paper's figures first
    "async_vs_sync": "Asynchronous against synchronous (figure 1)",
    "async_vs_sync-docstrings": "Asynchronous against synchronous on real text (figure 1)",
    "off_policyness": "Off-policyness of PPO (figure 3)",
    "losses": "Losses on off-policy data (figure 4)",
    "scale": "Off-policyness by size of the policy (figure 5)",
    "epochs": "Several epochs on a batch (figure 7)",
    "samples": "Several samples of a prompt (figure 8)",
    "math": "Math with a verifiable reward (the GSM8K table)",
    "lag": "Lag of the generator (not in the paper)",
    "preparations": "Off-policyness, of five policies and reward models (not in the paper)",
    "overoptimisation": "Over-optimisation (not in the paper)",
}
ROWS = {  # of the table in benchmark/README.md, each decided by the claim that names it: figure, what the paper finds
    "good": ("1", "asynchronous as good as synchronous"),
    "fast": ("1", "and faster, 1.25 times (-20 %) at 2.8B"),
    "policyness": ("3", "the more off-policy, the worse PPO gets"),
    "curve": ("3", "all on one curve of win-rate against KL"),
    "losses": ("4", "Online DPO bears off-policy data best"),
    "sft": ("4", "best-of-2 SFT ends lowest"),
    "policy": ("5", "a larger policy bears it better"),
    "judge": ("5", "a larger reward model does not help"),
    "epochs": ("7", "three epochs on a batch buy win-rate"),
    "samples": ("8", "four samples: as far in half the updates"),
    "chatbot": ("9", "a chatbot: as good, and 40 % faster"),
    "accurate": ("GSM8K", "asynchronous as accurate"),
    "math": ("GSM8K", "and faster, 1.7 times (-41 %)"),
}
LETTERS = {label[0]: dial for dial, label in DIALS.items()}
MARGIN = {"points": 2.0, "points of share": 10.0, "%": 10.0, "nats": 0.0}  # less is called equal
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # at most ten seeds


def number(value: str) -> float | str:
    with contextlib.suppress(ValueError):
        return float(value)
    return value


def results_of(name: str) -> Path:
    kind, dash, scale = name.partition("-")
    return Path(f"benchmark/results/{SHARED.get(kind, kind)}{dash}{scale}.csv")


def read(name: str) -> list[dict]:
    """The lines of an experiment, with numbers as numbers, and what the flags mean."""
    with open(results_of(name)) as f:
        rows = list(csv.DictReader(f))
    words = ("commit", "prepared", "torch", "transformers", "vllm")
    rows = [meaning({key: value if key in words else number(value) for key, value in row.items()}) for row in rows]
    for (task,), group in groups(rows, ("task",)).items():
        if len(prepared := {row["prepared"] for row in group}) > 1:
            told = f"{results_of(name)} has runs on {task} as prepared {' and '.join(sorted(prepared))}"
            raise SystemExit(f"benchmark.plot: {told}; delete it, or make the old ones again with KEEP=1")
    return [row for row in rows if shown(name.partition("-")[0], row)]


def shown(kind: str, row: dict) -> bool:
    """Whether an experiment shows a run, of those in the table that it shares."""
    usual, synchronous = {row["policy"], row["judge"]} <= set(USUAL), not row["max_staleness"]
    own, ppo = row["loss"] == OWN_LOSS[row["algorithm"]], row["algorithm"] == "ppo"
    match kind:
        case "off_policyness":
            return usual and synchronous and own and ppo
        case "losses":
            return usual and synchronous
        case "scale":
            return synchronous and own and not ppo
        case "lag":
            return usual and row["num_mini_batches"] == 1 and (own or not synchronous)
    return True


def meaning(row: dict) -> dict:
    algorithm = row.get("algo") or row["script"].removeprefix("async_")  # algo: of runs up to commit f474b45
    way = f"S={row['max_staleness']:.0f}" if row["max_staleness"] else row["placement"] or "split"
    names = {"policy": Path(row["model"]).name, "judge": Path(row["reward"]).name, "algorithm": algorithm, "way": way}
    names["prepared"] = row.get("prepared", "")
    return row | names | {"loss": row[algorithm.removeprefix("online_") + "_loss"], "accuracy": row.get("score")}


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % bootstrap interval: 10,000 draws, always the same ones."""
    values = np.array(values)
    draws = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    return values.mean(), *np.percentile(draws, [2.5, 97.5])


def groups(rows: list[dict], keys: tuple) -> dict[tuple, list[dict]]:
    """Rows with the same values of the keys, sorted by these."""
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in keys)].append(row)
    return dict(sorted(found.items()))


def varying(rows: list[dict], keys) -> tuple:
    """The keys that differ between rows."""
    return tuple(key for key in keys if len({row[key] for row in rows}) > 1)


def select(rows: list[dict], values: dict) -> list[dict]:
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def timed(rows: list[dict], measure: str) -> list[dict]:
    """Of a measure in seconds, the runs that had the machine for themselves."""
    return [row for row in rows if row["jobs"] == 1] if "seconds" in measure else rows


def last(rows: list[dict]) -> list[dict]:
    """The last evaluation of each run that did not diverge."""
    return [run[-1] for run in groups(rows, ("command",)).values() if not run[-1]["diverged"]]


def text(value) -> str:
    return f"{value:g}" if isinstance(value, float) else value


def line(axis, rows: list[dict], x: str, y: str, **look) -> tuple[float, float]:
    """Draw the mean of runs and its interval; of two evaluations only the end. Returns the last point."""
    points = groups(last(rows), (x,)) if x in DIALS else groups(timed(rows, x), ("version",))
    found = [(np.mean([row[x] for row in p]), *interval([row[y] for row in p])) for p in points.values()]
    found = found[-1:] if len(found) == 2 and x not in DIALS else found
    where, middle, low, high = np.array(found).T
    axis.plot(where, middle, marker="o", markersize=3, **look)
    if len(found) > 1:
        axis.fill_between(where, low, high, alpha=0.15, color=look["color"])
    else:
        axis.vlines(where, low, high, color=look["color"], alpha=0.5)
    return where[-1], middle[-1]


def label(axis, ends: dict[str, tuple[float, float, str]]) -> None:
    """Write the name of each line beside its last point (x, y, colour), no two on top of each other."""
    low, high = axis.get_ylim()
    below, line_height = -1.0, 0.055  # shares of the axis
    for name, (x, y, colour) in sorted(ends.items(), key=lambda end: end[1][1]):
        below = max((y - low) / (high - low), below + line_height)
        place = dict(xytext=(1.01, below), textcoords="axes fraction", va="center", fontsize=8, color=colour)
        arrow = dict(arrowstyle="-", color="grey", linewidth=0.5, linestyle=":")
        axis.annotate(name, (x, y), arrowprops=arrow, annotation_clip=False, **place)


def name_of(lines: tuple, key: tuple) -> str:
    """ "N = 4", "asynchronous", "best-of-2 SFT"."""
    signs = {dial: f"{words[0]} = " for dial, words in DIALS.items()} | {"learning_rate": "rate "}
    words = [signs.get(k, "") + text(value) for k, value in zip(lines, key)]
    return ", ".join(WORDS.get(word, word) for word in words)


def y_of(panel: Panel, rows: list[dict]) -> str:
    """What a panel shows: the win-rate in place of the accuracy where there is one."""
    return "win_rate" if panel.y == "accuracy" and "win_rate" in rows[0] else panel.y


def draw(name: str) -> None:
    """At most six panels: a column for each algorithm or policy, or one row. Names stand beside the lines."""
    kind = name.partition("-")[0]
    rows = select(read(name), SHOWN.get(kind, {}))
    columns = groups(rows, (COLUMNS[kind],)) if kind in COLUMNS else {("",): rows}
    titles = sorted(title for (title,) in columns)
    titles.sort(key=lambda title: ORDER.index(title) if title in ORDER else 0)
    columns = {title: columns[title,] for title in titles}
    panels = FIGURES[kind]
    shape = (len(panels), len(columns)) if kind in COLUMNS else (1, len(panels))
    options = dict(figsize=(4.4 * shape[1], 3.2 * shape[0]), layout="constrained", squeeze=False)
    figure, axes = plt.subplots(*shape, sharey="row" if kind in COLUMNS else False, **options)
    places = [(panel, part, title) for panel in panels for title, part in columns.items()]
    ends = [{} for _ in places]
    for i, (axis, (panel, part, title)) in enumerate(zip(axes.flat, places)):
        lines = varying(part, panel.lines)
        seen, seeds = [sorted({row[key] for row in part}) for key in lines], []
        for j, (key, group) in enumerate(groups(part, lines).items()):
            look = {"color": f"C{j}", "linestyle": "-"}
            if lines:  # the first key is the colour, the second the dashes
                colour, dashes = ([values.index(value) for values, value in zip(seen, key)] + [0])[:2]
                look = {"color": COLOURS.get(key[0], f"C{colour}"), "linestyle": ["-", "--", ":"][dashes]}
            if key == ("colocate",) and panel.x == "episodes":  # it learns what split learns
                continue
            if not timed(last(group), panel.x):  # it ran beside others, or diverged
                continue
            x, y = line(axis, group, panel.x, y_of(panel, rows), **look)
            points = groups(timed(group, panel.x), (panel.x,) if panel.x in DIALS else ())
            seeds += [len(groups(point, ("prepared", "seed"))) for point in points.values()]
            end = " (end)" if panel.x not in DIALS and len(groups(group, ("version",))) == 2 else ""
            if lines:
                ends[i][name_of(lines, key) + end] = x, y, look["color"]
        if panel.x in DIALS:
            axis.set_xscale("symlog", base=2, linthresh=1)
            axis.set_xticks(sorted({row[panel.x] for row in part}))
            axis.xaxis.set_major_formatter("{x:g}")
        if panel.x in DIALS and panel.y == "win_rate":
            for (policy,), group in groups(part, ("policy",)).items():
                start = np.mean([row["win_rate"] for row in group if not row["version"]])
                axis.axhline(start, color="grey", linewidth=0.8, linestyle="--")
                told = f"{WORDS.get(policy, policy)}, before" if "policy" in lines else "before training"
                ends[i][told] = axis.get_xlim()[1], start, "grey"
        told = " to ".join(map(str, sorted({min(seeds), max(seeds)})))
        axis.set_xlabel(f"{LABELS[panel.x]} ({told} seeds)")
        above = [*SHOWN.get(kind, {}).values(), title]  # such as Online DPO, policy m
        axis.set_title(", ".join(WORDS.get(word, word) for word in above) if i < shape[1] else "")
        if i % shape[1] == 0 or kind not in COLUMNS:
            axis.set_ylabel(LABELS[y_of(panel, rows)])
    for axis, last_points in zip(axes.flat, ends):  # now that the axes have their limits
        label(axis, last_points)
    figure.savefig(f"benchmark/figures/{name}.png", dpi=90)
    plt.close(figure)


def table(name: str) -> str:
    """Last evaluations, mean [95 % interval] over seeds: a line for each group, a column for each value of a dial."""
    rows, kind = read(name), name.partition("-")[0]
    lines = FIGURES[kind][0].lines
    dials = tuple(dial for dial in varying(rows, DIALS) if dial in (FIGURES[kind][0].x, *lines))
    keys = tuple(key for key in varying(rows, dict.fromkeys(("policy", "judge", *lines))) if key not in dials)
    keys = ("algorithm",) * (kind in COLUMNS) + keys
    runs = max(map(len, groups(last(rows), keys + dials).values()))
    measures = ["win_rate" if "win_rate" in rows[0] else "accuracy", "kl"]
    measures += ["seconds"] * (kind in ("samples", "epochs"))
    measures += ["generation_seconds", "learning_seconds", "step_seconds"] * ("way" in lines)
    for group in groups(last(rows), keys + dials + ("task",)).values():
        if len({row["seed"] for row in group}) < len(group):
            raise SystemExit(f"benchmark.plot: {name} has runs of more than one grid, as {group[0]['command']}")
    if len(dials) == 1:
        values = sorted({row[dials[0]] for row in rows})
        lines = []
        for measure in measures:
            lines += [f"{LABELS[measure]}:", "", *head([*keys, *(f"{DIALS[dials[0]][0]} = {v:g}" for v in values)])]
            for key, group in groups(last(rows), keys).items():
                parts = groups(group, dials)
                cells = [brief([row[measure] for row in timed(parts.get((v,), []), measure)], runs) for v in values]
                lines.append(f"| {' | '.join([*map(text, key), *cells])} |")
            lines.append("")
    else:
        lines = head([*keys, *measures])
        for key, group in groups(last(rows), keys).items():
            cells = [brief([r[m] for r in timed(group, m) if r[m] != ""], runs) for m in measures]
            lines.append(f"| {' | '.join([*map(text, key), *cells])} |")
        lines.append("")
    seeds, commits = (sorted({row[name] for row in rows}) for name in ("seed", "commit"))
    told = f"Last evaluations: mean [95 % bootstrap interval], seeds {', '.join(map(text, seeds))}"
    fewest = min(len(timed(group, "seconds")) or len(group) for group in groups(last(rows), keys + dials).values())
    told += " (of three: their range, which holds the true mean in three cases of four)" * (fewest == 3)
    tasks = sorted({row["prepared"] for row in rows} - {""})
    told += f". Task prepared {', '.join(tasks)}." if tasks else "."
    if gone := sorted({row["command"] for row in rows if row["diverged"]}):
        told += " Diverged and left out: " + "; ".join(f"`{command}`" for command in gone) + "."
    return "\n".join([*lines, f"{told} Commit {', '.join(commits)}.", ""])


def head(names: list[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]


def brief(values: list[float], runs: int) -> str:
    """Mean and interval; of fewer runs than elsewhere in the table their number too."""
    if not values:
        return ""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval(values)) + f" ({len(values)})" * (len(values) < runs)


def t_interval(values: list[float]) -> tuple[float, float, float]:
    mean, half = np.mean(values), T_95[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5
    return mean, mean - half, mean + half


def ratio_interval(values: list[float]) -> tuple[float, float, float]:
    """Of differences in %: of the logarithms of the ratios, so that a ratio and its inverse say the same."""
    return tuple(100 * np.expm1(t_interval(np.log1p(np.array(values) / 100))))


def sides(cell: str) -> list[dict]:
    """ "loss=dpo N=16 + loss=ipo N=1" -> [{"loss": "dpo", "num_mini_batches": 16.0}, {"loss": "ipo", ...: 1.0}]."""
    found = []
    for side in cell.split(" + "):
        words = [word.split("=", 1) for word in side.split()]
        found.append({LETTERS.get(key, key): number(value) for key, value in words})
    return found


def differences(rows: list[dict], plus: str, minus: str, measure: str = "win_rate") -> list[float]:
    """Of each pair that is complete, `plus` less `minus`: the differences, in the unit of the measure.

    win_rate, accuracy     points
    kl                     nats
    seconds, step_seconds  % (runs that had the machine for themselves)
    seconds_to             seconds until `plus` first has the last win-rate (or accuracy) of `minus`, against those
                           until `minus` first has it, in %; evaluations are the resolution. Not a number where
                           `plus` does not get there
    win_rate_at_kl         points above the curve of `minus` at the KL at which `plus` ends; not a number beyond it
    win_rate_at_seconds,   points above the curve of `minus` after the seconds that `plus` takes; beyond its end, above
    accuracy_at_seconds    its end
    kept                   of two and two: gain in win-rate since version 0 over that of the first of `minus`, less the
                           second of `minus` over that of `plus`, in points of share
    """
    values = []
    for side in sides(plus) + sides(minus):
        runs = defaultdict(list)
        for row in timed(select(rows, {key: value for key, value in side.items() if key != "version"}), measure):
            runs[row["prepared"], row["seed"]].append(row)
        for pair, run in runs.items():
            if len({row["command"] for row in run}) > 1:
                raise SystemExit(f"benchmark.plot: more than one run of {side} for seed {pair[1]:g}")
        if "version" in side:
            runs = {pair: [row for row in run if row["version"] <= side["version"]] for pair, run in runs.items()}
        values.append(runs)
    common = sorted(set.intersection(*map(set, values)))
    return [difference([runs[pair] for runs in values], measure) for pair in common]


def difference(runs: list[list[dict]], measure: str) -> float:
    """Of runs, each the rows of its evaluations: the first half less the second; not a number where one diverged."""
    if any(row["diverged"] for run in runs for row in run):
        return float("nan")
    gains = [100 * (run[-1]["win_rate"] - run[0]["win_rate"]) for run in runs if measure == "kept"]
    match measure, len(runs):
        case "kept", 4:
            return 100 * (gains[0] / gains[2] - gains[3] / gains[1])
        case (("win_rate_at_kl" | "win_rate_at_seconds" | "accuracy_at_seconds"), 2):
            y, x = measure.split("_at_")
            new, curve = runs[0][-1], {key: [row[key] for row in runs[1]] for key in (x, y)}
            rising, beyond = np.maximum.accumulate(curve[x]), np.nan if x == "kl" else curve[y][-1]
            return 100 * (new[y] - np.interp(new[x], rising, curve[y], right=beyond))
        case "seconds_to", 2:
            goal = "win_rate" if "win_rate" in runs[1][-1] else "accuracy"
            end = runs[1][-1][goal]
            first = [next((row["seconds"] for row in run if row[goal] >= end), float("nan")) for run in runs]
            return 100 * (first[0] / first[1] - 1) if first[1] else float("nan")
        case (("seconds" | "step_seconds"), 2):
            return 100 * (runs[0][-1][measure] / runs[1][-1][measure] - 1)
    new, old = (sum(run[-1][measure] for run in half) for half in (runs[: len(runs) // 2], runs[len(runs) // 2 :]))
    return (new - old) * (1 if measure == "kl" else 100)


def verdict(paper: str, low: float, high: float, unit: str = "points") -> str:
    """Of an interval: yes, no, or undecided (see above)."""
    margin = MARGIN[unit]
    equal = -margin <= low and high <= margin
    answers = {"equal": (equal, low > margin or high < -margin), "": (False, False)}
    answers |= {"lower": (high < 0, low > 0 or equal), "higher": (low > 0, high < 0 or equal)}
    yes, no = answers[paper.split(" ")[0]]
    return "yes" if yes else "no" if no else "undecided" if paper else ""


def unit_of(claim: dict) -> str:
    units = {"kl": "nats", "kept": "points of share"} | dict.fromkeys(("seconds", "step_seconds", "seconds_to"), "%")
    return units.get(claim["measure"], "points")


def judged() -> list[dict]:
    """The claims, each with what was found, its pairs and the verdict; with fewer than three pairs it was not run."""
    with open("benchmark/claims.csv") as f:
        rows = list(csv.DictReader(f))
    tables = {name: read(name) for name in {row["experiment"] for row in rows} if results_of(name).exists()}
    for row in rows:
        found, unit = [], unit_of(row)
        if row["experiment"] in tables:
            found = differences(tables[row["experiment"]], row["plus"], row["minus"], row["measure"])
        row |= {"found": "", "pairs": str(len(found)), "verdict": "not run"}
        if len(found) < 3:
            continue
        if np.isnan(found).any():
            row["found"] = f"{np.isnan(found).sum()} of {len(found)} diverged or did not get there"
            row["verdict"] = "undecided" * bool(row["paper"])
        else:
            ratio = row["measure"] in ("seconds", "step_seconds")
            mean, low, high = (ratio_interval if ratio else t_interval)(found)
            row["found"] = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] {unit}"
            row["verdict"] = verdict(row["paper"], low, high, unit)
    return rows


def digest(rows: list[dict]) -> str:
    """A line for each of ROWS: what the paper finds, what is found here, and the verdict.

    Of several claims that decide it the first is shown, and the verdicts of all are counted."""
    lines = head(["figure", "the paper", "what was measured here", "found", "reproduced?"])
    deciding = {key: group for (key,), group in groups(rows, ("decides",)).items() if key}
    if unknown := set(deciding) - set(ROWS):
        raise SystemExit(f"benchmark.plot: claims.csv decides {', '.join(unknown)}, which is none of {', '.join(ROWS)}")
    for key, (figure, said) in ROWS.items():
        cells = ["", "", "not run here"]
        if claims := deciding.get(key):
            first, verdicts = claims[0], Counter(claim["verdict"] for claim in claims)
            found = first["verdict"] if len(verdicts) == 1 else ", ".join(f"{n} {word}" for word, n in verdicts.items())
            cells = [first["claim"], first["found"], f"[{found}](study/{first['experiment']}.md)"]
        lines.append(f"| {' | '.join([figure, said, *cells])} |")
    return "\n".join([*lines, ""])


def page(name: str, rows: list[dict]) -> str:
    """benchmark/study/NAME.md: figure, claims and tables of an experiment, all of them generated."""
    kind, _, scale = name.partition("-")
    parts = [f"# {STUDY[name]}", "", f"`bash benchmark/{kind}.sh {scale}".strip() + "`", ""]
    parts += ["Written by `make figures`. How to read it: [benchmark/README.md](../README.md).", ""]
    if Path(f"benchmark/figures/{name}.png").exists():
        parts += [f"![{STUDY[name]}](../figures/{name}.png)", ""]
    columns = ("claim", "paper", "expected", "found", "pairs", "verdict")
    parts += head(["claim", "the paper", "expected here", "found here", "pairs", "reproduced?"])
    parts += [f"| {' | '.join(row[column] for column in columns)} |" for row in rows if row["experiment"] == name]
    if kind in FIGURES and results_of(name).exists() and read(name):
        parts += ["", table(name).rstrip()]
    return "\n".join([*parts, ""])


def results() -> str:
    """The README's table: asynchronous runs beside synchronous ones, of policy m on tldr-tiny."""
    lines = head(["algorithm", "before", "asynchronous", "synchronous", "difference", "`split`", "`colocate`"])
    rows = select(read("async_vs_sync"), {"policy": "sft-m"})
    for (algorithm,), group in groups(rows, ("algorithm",)).items():
        start = [row for row in group if row["way"] == "S=1" and row["version"] == 0]
        values = [start, *(select(last(group), {"way": way}) for way in ("S=1", "split"))]
        values = [[100 * row["win_rate"] for row in part] for part in values]
        cells = [f"{np.mean(v):.1f} ± {np.std(v, ddof=1):.1f} %" for v in values]
        cells.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*t_interval(differences(group, "way=S=1", "way=split"))))
        for way in ("split", "colocate"):
            slower = differences(group, f"way={way}", "way=S=1", "step_seconds")
            told = "{:.2f} [{:.2f}, {:.2f}]".format(*(1 + p / 100 for p in ratio_interval(slower))) if slower else ""
            cells.append(told)
        lines.append(f"| {' | '.join([WORDS[algorithm], *cells])} |")
    return "\n".join([*lines, ""])


def premise() -> str:
    """tldr-tiny's policies by size, from results/tldr-tiny.json (its info.json) and results/learning_rates.csv."""
    found = json.loads(Path("benchmark/results/tldr-tiny.json").read_text())["numbers"]
    lines = head(["policy", "parameters", "held-out loss", "win-rate before", "gain at N = 1", "learning rate"])
    rows = select(read("learning_rates"), {"algorithm": "online_dpo"})
    for (policy,), group in groups(rows, ("policy",)).items():
        numbers, best = found[policy], max(last(group), key=lambda row: row["win_rate"])
        start = next(row for row in group if row["command"] == best["command"])["win_rate"]
        cells = [f"{numbers['parameters']:,}", f"{numbers['held_out_loss']:.3f}", f"{numbers['win_rate_T0.7']:.1%}"]
        cells += [f"{100 * (best['win_rate'] - start):+.1f} points", text(best["learning_rate"])]
        lines.append(f"| {' | '.join([policy, *cells])} |")
    return "\n".join([*lines, ""])


def steps() -> str:
    """Step times of docs/speed.md: of every setting the last lines of part `steps` in results/speed.csv."""
    with open("benchmark/results/speed.csv") as f:
        found = {row["what"]: row for row in csv.DictReader(f) if row["part"] == "steps"}
    whats = ("asynchronous step", "split / asynchronous", "colocate / asynchronous", "asynchronous step / its limit")
    lines = head(["", "asynchronous step, s", *whats[1:], "date"])
    for task in ("tldr-tiny", "math-tiny"):
        for algorithm in ("online_dpo", "rloo", "ppo"):
            rows = [found[f"{task}, async_{algorithm}: {what}"] for what in whats]
            cells = [[float(row[key]) for key in ("median", "least", "most")] for row in rows]
            cells = ["{:.2f} ({:.2f} to {:.2f})".format(*cell) for cell in cells]
            lines.append(f"| {task}, {WORDS[algorithm]} | {' | '.join(cells)} | {rows[0]['date']} |")
    return "\n".join([*lines, ""])


def include(page: Path, name: str, new: str) -> None:
    """Put a table into the page, between <!-- NAME --> and <!-- end -->."""
    found, count = re.subn(
        f"<!-- {name} -->\n.*?<!-- end -->",
        lambda _: f"<!-- {name} -->\n{new}<!-- end -->",
        page.read_text(),
        flags=re.DOTALL,
    )
    if count != 1:
        raise SystemExit(f"benchmark.plot: {page} must have one place <!-- {name} --> ... <!-- end -->")
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


def main(*names: str) -> None:
    for folder in ("figures", "study"):
        Path("benchmark", folder).mkdir(exist_ok=True)
    if not names:
        weights()
    names_of = {kind: (kind, f"{kind}-docstrings", f"{kind}-paper") for kind in FIGURES}
    have = [name for kind in FIGURES for name in names_of[kind] if results_of(name).exists() and read(name)]
    for name in names or have:
        if name not in have:
            raise SystemExit(f"benchmark.plot: {name} has no results or no figure; there are {', '.join(have)}")
        draw(name)
        if name.endswith("-paper"):
            Path(f"benchmark/study/{name}.md").write_text(table(name))
        print(f"benchmark/figures/{name}.png, and its tables")
    rows = judged()
    for name in STUDY:
        Path(f"benchmark/study/{name}.md").write_text(page(name, rows))
    include(Path("benchmark/README.md"), "digest", digest(rows))
    if not names or "async_vs_sync" in names:
        include(Path("README.md"), "results", results())
    if not names:
        include(Path("benchmark/tasks/README.md"), "premise", premise())
        include(Path("docs/speed.md"), "steps", steps())


if __name__ == "__main__":
    main(*sys.argv[1:])
