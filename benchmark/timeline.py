"""Draw who waited for whom: python -m benchmark.timeline [RUN_FOLDER], by default the newest under runs/.

Reads trace.jsonl and metrics.jsonl, of a run that has ended or of one that goes on. Prints where the time of a step
went and the last seconds of generator and learner as two lines of letters. Writes timeline.png beside them (the same as
bars above, the evaluations below) and trace.json, which Perfetto opens.
"""

import glob
import json
import os
import sys

LETTERS = {"generate": "G", "load weights": "w", "snapshot": "s", "label": "r", "learn": "L", "evaluate": "E"}
COLORS = {
    "generate": "#4c78a8",
    "load weights": "#9ecae9",
    "learn": "#f58518",
    "label": "#ffbf79",
    "snapshot": "#b79a20",
    "evaluate": "#bab0ac",
}


FEWEST = 5  # timed steps that a ratio of times needs


def lines(folder: str, name: str) -> list[dict]:
    """The records of a file of JSON lines; a last line that is not whole yet is left out."""
    with open(os.path.join(folder, name)) as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def timed_steps(records: list[dict], lag: int) -> list[dict]:
    """The steps whose time says how long a step takes: not those at the start, nor those that an evaluation or a
    checkpoint shortened. (The step after it has no time; the batches of the next `lag` steps were generated during it.)
    """
    since, found = 0, []
    for record in records:
        since = since + 1 if "step" in record and record["time/step"] is not None else 0
        if since > lag and record["step"] > lag:
            found.append(record)
    return found


def summary(records: list[dict], lag: int) -> dict:
    """Mean seconds of the timed steps and of their parts, and their ratios; empty where fewer than FEWEST are timed.

    generation G: generate + load; learning L: snapshot + label + learn; ideal: max(G, L), or G + L without lag.
    """
    timed = timed_steps(records, lag)
    if len(timed) < FEWEST:
        return {}
    names = ("generate", "load", "generator_wait", "snapshot", "label", "learn", "wait", "step")
    mean = {name: sum(record[f"time/{name}"] for record in timed) / len(timed) for name in names}
    generation, learning = mean["generate"] + mean["load"], mean["snapshot"] + mean["label"] + mean["learn"]
    ideal, total = max(generation, learning) if lag else generation + learning, generation + learning
    times = {"generation": generation, "learning": learning, "step": mean["step"], "ideal_step": ideal}
    ratios = {"overlap": ideal / mean["step"], "overlap_ratio": total / mean["step"]}
    ratios["overlap_ratio_ideal"] = total / ideal
    return {"timed_steps": len(timed), "seconds": mean} | times | ratios


def table(found: dict, lag: int) -> str:
    """The summary as a person reads it."""
    if not found:
        return f"Fewer than {FEWEST} steps without evaluation: too few for a table of times\n"
    s, ideal = found["seconds"], f"{'max(G, L)' if lag else 'G + L'} {found['ideal_step']:.2f}"
    return (
        f"Means of {found['timed_steps']} steps without evaluation, in seconds\n"
        f"  generation G   {found['generation']:7.2f}   of it loading weights {s['load']:.2f}\n"
        f"  learning L     {found['learning']:7.2f}   snapshot {s['snapshot']:.2f}, label {s['label']:.2f}, "
        f"learn {s['learn']:.2f}\n"
        f"  waiting                  generator {s['generator_wait']:.2f}, learner {s['wait']:.2f}\n"
        f"  step           {found['step']:7.2f}   ideal {ideal}, reached {found['overlap']:.0%}\n"
        f"  (G + L) / step {found['overlap_ratio']:7.2f}   ideal {found['overlap_ratio_ideal']:.2f}: "
        f"speed-up over both in turn\n"
    )


def read(folder: str) -> tuple[list[tuple], float]:
    """Bars (track, name, start, seconds, details) of the run's trace, and the end of its last update."""
    plain = ("track", "name", "start", "seconds")
    events = lines(folder, "trace.jsonl")
    bars = [(*(e[key] for key in plain), {k: v for k, v in e.items() if k not in plain}) for e in events]
    return bars, max(start + length for _, name, start, length, _ in bars if name == "learn")


def write_trace(folder: str) -> None:
    """trace.json for Perfetto: a thread for each side, microseconds."""
    tracks = {"generator": 0, "learner": 1}
    events = [{"ph": "M", "pid": 1, "name": "thread_name", "tid": i, "args": {"name": t}} for t, i in tracks.items()]
    for track, name, start, length, details in read(folder)[0]:
        where = {"pid": 1, "tid": tracks[track], "ts": start * 1e6, "dur": length * 1e6}
        events.append({"ph": "X", "name": name, "args": details} | where)
    with open(os.path.join(folder, "trace.json"), "w") as f:
        json.dump({"traceEvents": events}, f)


def text(folder: str, seconds: float = 5.0, width: int = 100) -> str:
    """The last seconds before the last update: a letter for what was done, . for waiting."""
    bars, end = read(folder)
    rows = {"generator": ["."] * width, "learner": ["."] * width}
    for track, name, start, length, _ in bars:
        first, last = (int((x - end + seconds) / seconds * width) for x in (start, start + length))
        for i in range(max(0, first), min(width, last)):
            rows[track][i] = LETTERS.get(name, ".")
    legend = ", ".join(f"{letter} {name}" for name, letter in LETTERS.items())
    picture = "".join(f"{track:>9} |{''.join(line)}|\n" for track, line in rows.items())
    return f"Who waited for whom: the last {seconds:.0f} s ({legend}, . waiting)\n{picture}"


def draw(folder: str, batches: int = 12) -> str:
    """Draw the time of the last generated batches before the last update of the run in folder. Returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    bars, end = read(folder)
    begun = sorted(start for _, name, start, _, _ in bars if name == "generate" and start < end)
    seconds = end - begun[-batches:][0]
    evals = [record for record in lines(folder, "metrics.jsonl") if "eval/score" in record]
    shape = dict(figsize=(11, 5.5), height_ratios=(1, 1.3), layout="constrained")
    figure, axes = plt.subplots(2, 1, **shape)
    row = {"generator": 1, "learner": 0}
    for track, name, start, length, details in bars:
        if name in COLORS and end - seconds <= start < end:
            style = dict(color=COLORS[name], height=0.7, edgecolor="white")
            axes[0].barh(row[track], length, left=start - end + seconds, **style)
            label = {"generate": details.get("request", ""), "learn": f"learn {details.get('step')}"}.get(name, "")
            if length > seconds / 20:
                middle = start - end + seconds + length / 2
                axes[0].text(middle, row[track], label, ha="center", va="center", fontsize=7)
    axes[0].set(yticks=[0, 1], yticklabels=["learner", "generator (vLLM)"], xlim=(0, seconds), xlabel="seconds")
    axes[0].set_title(f"Who waited for whom: the last {seconds:.1f} s of training (white: waiting)")
    legend = [Patch(color=color, label=name) for name, color in COLORS.items()]
    axes[0].legend(handles=legend, ncols=len(legend), fontsize=7, loc="lower center", bbox_to_anchor=(0.5, -0.5))
    versions = [r["version"] for r in evals]
    axes[1].plot(versions, [r["eval/score"] for r in evals], "o-", color="#f58518", label="proxy reward")
    axes[1].set(xlabel="policy version (batches learned from)", ylabel="proxy reward")
    if evals and "eval/win_rate" in evals[0]:
        right = axes[1].twinx()
        right.plot(versions, [r["eval/win_rate"] for r in evals], "s-", color="#4c78a8", label="gold win-rate")
        right.set(ylabel="gold win-rate against the reference", ylim=(0, 1))
        right.legend(loc="lower right")
    axes[1].legend(loc="upper left")
    path = os.path.join(folder, "timeline.png")
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    runs = sys.argv[1:2] or sorted(glob.glob("runs/*/trace.jsonl"), key=os.path.getmtime)[-1:]
    if not runs:
        raise SystemExit("timeline: there is no run under runs/ yet: run `python async_online_dpo.py` first")
    folder = os.path.dirname(runs[0]) if runs[0].endswith(".jsonl") else runs[0]
    if not os.path.exists(os.path.join(folder, "trace.jsonl")):
        raise SystemExit(f"timeline: {folder} is not the folder of a run: it has no trace.jsonl")
    with open(os.path.join(folder, "config.json")) as f:
        lag = json.load(f)["args"]["max_staleness"]
    print(table(summary(lines(folder, "metrics.jsonl"), lag), lag))
    print(text(folder))
    write_trace(folder)
    print("picture:", draw(folder))
