"""Does the working tree still give the bits of an older commit? `python -m tests.golden COMMIT`, 6 minutes a side.

Runs 15 small runs there and here (each algorithm with S = 0, 1, 2, with N = T = 2, and colocated; with evaluations) and
compares metrics.jsonl without time/... and the sha256 of the trained policy. Bits differ between processors, so the
older commit runs on this machine too; its results are kept in runs/golden-COMMIT.json.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

HERE = Path(__file__).parents[1]
FLAGS = "--gold tests.tiny:reward --batch-size 32 --total-episodes 192 --prompt-length 32 --response-length 12"
FLAGS += " --learning-rate 1e-3 --dtype float32 --eval-every 3 --eval-prompts 16 --micro-batch-size 16"
VARIANTS = {f"S={lag}": ["--max-staleness", str(lag)] for lag in (0, 1, 2)}
VARIANTS["N=T=2"] = ["--batch-size", "16", "--num-mini-batches", "2", "--num-epochs", "2"]
VARIANTS["colocate"] = ["--placement", "colocate", "--max-staleness", "0"]


def digest(folder: Path) -> dict[str, str]:
    """What a run must repeat: its metrics without the times, and its weights."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [{k: v for k, v in record.items() if not k.startswith("time/")} for record in records]
    weights = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "policy/model.safetensors").items()):
        weights.update(name.encode() + tensor.numpy().tobytes())
    metrics = hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
    return {"metrics": metrics, "policy": weights.hexdigest(), "last": records[-1]}


def results(tree: Path) -> dict[str, dict]:
    """The digest of every run of the scripts in a tree."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        make = f"from tests import tiny; tiny.make({folder!r})"
        subprocess.run([sys.executable, "-c", make], cwd=tree, check=True, capture_output=True)
        files = [f"--model={folder}/policy", f"--reward={folder}/rm", f"--dataset={folder}/data"]
        for algorithm in ("online_dpo", "rloo", "ppo"):
            for variant, options in VARIANTS.items():
                command = [f"async_{algorithm}.py", *files, *FLAGS.split(), *options]
                if variant == "colocate" and "placement: Literal" not in (tree / command[0]).read_text():
                    command = ["sync_baseline.py", "--algo", algorithm, *command[1:-2]]  # up to commit f474b45
                output = f"{folder}/{algorithm}-{variant}"
                command = [sys.executable, *command, f"--output-dir={output}"]
                done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
                found[f"{algorithm} {variant}"] = digest(Path(output))
                print(tree.name, algorithm, variant, found[f"{algorithm} {variant}"]["policy"][:16], flush=True)
    return found


def older(commit: str) -> dict[str, dict]:
    """The results of a commit, from the file of an earlier call or from runs in a worktree."""
    path = HERE / f"runs/golden-{commit}.json"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            tree = f"{folder}/{commit}"
            subprocess.run(["git", "worktree", "add", "--detach", tree, commit], cwd=HERE, check=True)
            try:
                found = results(Path(tree))
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=HERE, check=True)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1))
    return json.loads(path.read_text())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("golden: python -m tests.golden COMMIT")
    before, now = older(sys.argv[1]), results(HERE)
    for name, expected in before.items():
        parts = [part for part in ("metrics", "policy") if expected[part] != now[name][part]]
        print(f"{name}: {' and '.join(parts) + ' differ' if parts else 'equal'}")
    sys.exit(before != now)
