"""The experiments of benchmark/: every command of every scale parses; the harness runs, skips, resumes and fails."""

import csv
import glob
import json
import os
import shlex
import subprocess

import pytest
import tyro

import async_online_dpo
import async_ppo
import async_rloo
import sync_baseline
from benchmark import plot, run
from tests.runs import HERE, flags

SCRIPTS = {f"{m.__name__}.py": m for m in (async_online_dpo, async_rloo, async_ppo, sync_baseline)}
EXPERIMENTS = sorted(
    os.path.basename(path) for path in glob.glob(f"{HERE}/benchmark/*.sh") if "scales.sh" in open(path).read()
)


@pytest.mark.parametrize("scale", ["tiny", "paper"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_command_of_an_experiment_parses(name, scale):
    bash = ["bash", f"benchmark/{name}", scale]
    done = subprocess.run(bash, cwd=HERE, env=os.environ | {"DRY": "1"}, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines and len(set(lines)) == len(lines), done.stderr
    for line in lines:
        script, *options = shlex.split(line)
        if "--seed=1" not in options:  # the other seeds differ in nothing else
            continue
        args = tyro.cli(SCRIPTS[script].Args, args=options)
        SCRIPTS[script].check_algorithm(args)
        learners = (7 if name == "chatbot.sh" else 3) if scale == "paper" else 1
        learners += scale == "paper" and getattr(args, "placement", "") == "colocate"
        assert args.num_batches > 0 and args.batch_size % (args.samples_per_prompt * learners) == 0


def test_a_wrong_scale_is_refused():
    done = subprocess.run(["bash", "benchmark/lag.sh", "papre"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and "the scale is tiny or paper, not papre" in done.stderr


def test_grid():
    assert run.grid(["--a", "1,2", "--b=x", "--c", "--a=3,4"]) == [["--a=3", "--b=x", "--c"], ["--a=4", "--b=x", "--c"]]
    assert run.grid(["--gold", "", "--temperature", "-1"]) == [["--gold=", "--temperature=-1"]]
    for wrong in (["a", "1"], ["--a", "1", "2"]):
        with pytest.raises(SystemExit, match="does not belong to a flag"):
            run.grid(wrong)


def test_a_grid_runs_resumes_and_draws(task, tmp_path, monkeypatch, capsys):
    """A finished run is skipped, one that was cut off is resumed, one that fails ends the command."""
    for name in ("benchmark/results", "benchmark/figures"):
        os.makedirs(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", HERE)
    given = flags(task, eval_every=2, eval_prompts=16, save_every=2, total_episodes=128)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    script = os.path.join(HERE, "async_online_dpo.py")
    monkeypatch.setenv("JOBS", "2")
    run.main("lag", script, *options, "--seed=1,2")
    with open("benchmark/results/lag.csv") as f:
        rows = list(csv.DictReader(f))
    assert [(row["seed"], row["jobs"]) for row in rows] == [("1", "2")] * 3 + [("2", "2")] * 3
    plot.draw("lag")
    assert "win_rate" in plot.table("lag") and os.path.exists("benchmark/figures/lag.png")

    run.main("lag", script, *options, "--seed=1,2")
    assert capsys.readouterr().out.count("--output-dir") == 2
    folder = next(path for path in (tmp_path / "runs/lag").iterdir() if path.is_dir())
    os.remove(folder / "summary.json")
    run.main("lag", script, *options, "--seed=1,2")
    assert "--resume" in capsys.readouterr().out and json.loads((folder / "summary.json").read_text())
    with pytest.raises(SystemExit, match="failed with status"):
        run.main("lag", script, *options, "--max-staleness=-1")
