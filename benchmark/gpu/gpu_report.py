"""One line about a run of a script: python3 gpu_report.py STEP RUN_FOLDER RC SECONDS LOG RESULTS.jsonl"""

import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, os.getcwd())
from benchmark import timeline


def main(step, folder, rc, seconds, log, results):
    line = {"step": step, "rc": int(rc), "wall": int(seconds), "ok": False}
    folder = Path(folder)
    try:
        records = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [r for r in records if "step" in r]
        line |= {"batches": len(steps), "lags": [r["lag"] for r in steps]}
        if steps:
            line["probe_error"] = max(r["probe_error"] for r in steps)
            few = max(1, len(steps) // 4)
            line["score_first"] = sum(r["score"] for r in steps[:few]) / few
            line["score_last"] = sum(r["score"] for r in steps[-few:]) / few
            line["kl_last"], line["grad_norm_last"] = steps[-1]["kl"], steps[-1]["grad_norm"]
            line["behaviour_kl_first"] = steps[0].get("behaviour_kl")  # lag 0: rounding between generator and learner
        line["evals"] = [{k.removeprefix("eval/"): v for k, v in r.items()} for r in records if "step" not in r]
        events = timeline.lines(folder, "trace.jsonl")
        line["engine_start"] = [round(e["seconds"], 1) for e in events if e["name"] == "start"]
        lag = json.loads((folder / "config.json").read_text())["args"]["max_staleness"]
        summary = timeline.summary(records, lag)
        line |= summary
        line["step_seconds"], line["step"] = summary.get("step"), step
        line["ok"] = int(rc) == 0
    except (OSError, ValueError, KeyError) as error:
        line["missing"] = f"{type(error).__name__}: {error}"[:200]
    if not line["ok"] and os.path.exists(log):
        text = Path(log).read_text(errors="replace")
        errors = re.findall(r"^.*(?:Error|Exception|error:|assert|CUDA|killed|refus).*$", text, re.M)
        errors = list(dict.fromkeys(e.strip()[:300] for e in errors if "batch/s]" not in e))
        line["errors"] = errors[:3] + [e for e in errors[-5:] if e not in errors[:3]]
    with open(results, "a") as f:
        print(json.dumps(line), file=f)
    shown = {
        k: (round(v, 4) if isinstance(v, float) else v)
        for k, v in line.items()
        if k not in ("lags", "errors", "seconds")
    }
    print(json.dumps(shown))
    for error in line.get("errors", []):
        print("    ", error)
    sys.exit(not line["ok"])


main(*sys.argv[1:])
