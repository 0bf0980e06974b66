"""The experiments of benchmark/: every command of every scale parses; the harness runs, skips, resumes and fails."""

import csv
import glob
import hashlib
import math
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tyro

import async_online_dpo
import async_ppo
import async_rloo
import sync_baseline
from benchmark import plot, run
from tests.runs import HERE, dry, flags

SCRIPTS = {f"{m.__name__}.py": m for m in (async_online_dpo, async_rloo, async_ppo, sync_baseline)}
EXPERIMENTS = sorted(
    os.path.basename(path) for path in glob.glob(f"{HERE}/benchmark/*.sh") if "scales.sh" in open(path).read()
)


SHARING = {"off_policyness", *plot.SHARED}
NONE = [("chatbot.sh", "tiny"), ("preparations.sh", "paper")]
SCALES = [(name, scale) for name in EXPERIMENTS for scale in ("tiny", "paper") if (name, scale) not in NONE]


@pytest.mark.parametrize("name, scale", [*SCALES, ("async_vs_sync.sh", "docstrings")])
def test_every_command_of_an_experiment_parses(name, scale):
    lines = dry(name, scale)
    assert lines and len(set(map(tuple, lines))) == len(lines)
    for script, *options in lines:
        if "--seed=1" not in options:  # the other seeds differ in nothing else
            continue
        args = tyro.cli(SCRIPTS[script].Args, args=options)
        learners = (7 if name == "chatbot.sh" else 3) if scale == "paper" else 1
        learners += scale == "paper" and args.placement == "colocate"
        assert args.num_batches > 0 and args.batch_size % (args.samples_per_prompt * learners) == 0


def test_every_claim_has_its_runs():
    """Each side of a claim names one run of its experiment for every pair, and there are three pairs or more."""
    with open(f"{HERE}/benchmark/claims.csv") as f:
        claims = list(csv.DictReader(f))
    for name in {claim["experiment"] for claim in claims}:
        kind, _, scale = name.partition("-")
        rows = []
        kinds = {kind} if kind not in SHARING else SHARING
        commands = {tuple(line) for kind in kinds for line in dry(f"{kind}.sh", scale or "tiny")}
        for script, *options in commands:
            args = vars(tyro.cli(SCRIPTS[script].Args, args=options))
            rows.append(plot.meaning({flag: args.get(flag, "") for flag in run.FLAGS} | {"script": script[:-3]}))
        rows = [row for row in rows if plot.shown(kind, row)]
        for claim in claims:
            if claim["experiment"] == name:
                seeds = []
                for side in plot.sides(claim["plus"]) + plot.sides(claim["minus"]):
                    side.pop("version", None)
                    seeds.append([row["seed"] for row in plot.select(rows, side)])
                assert all(len(set(found)) == len(found) for found in seeds), claim
                enough = 5 if claim["decides"] and "seconds" not in claim["measure"] else 3
                assert len(set.intersection(*map(set, seeds))) >= enough, claim


@pytest.mark.parametrize(
    ("paper", "low", "high", "unit", "answer"),
    [
        ("equal (fig 1)", -1.9, 1.9, "points", "yes"),
        ("equal (fig 1)", -2.1, 1.9, "points", "undecided"),
        ("equal (fig 1)", -1.5, -0.5, "points", "yes"),
        ("equal (fig 1)", -3.0, -0.5, "points", "undecided"),
        ("equal (fig 1)", -3.0, -2.1, "points", "no"),
        ("lower (fig 4)", -3.0, -0.5, "points", "yes"),
        ("lower (fig 4)", 0.5, 3.0, "points", "no"),
        ("lower (fig 4)", -0.5, 1.9, "points", "no"),
        ("lower (fig 4)", -1.9, -0.1, "points", "yes"),
        ("higher (fig 7)", 0.5, 3.0, "points", "yes"),
        ("higher (fig 7)", -0.5, 3.0, "points", "undecided"),
        ("", 0.5, 3.0, "points", ""),
        ("higher (fig 5)", -9.0, 8.0, "points of share", "no"),
        ("higher (fig 5)", -9.0, 12.0, "points of share", "undecided"),
        ("lower (fig 1)", -9.0, -3.0, "%", "yes"),
        ("equal (fig 7)", -9.0, 3.0, "%", "yes"),
        ("higher (fig 7)", -0.1, 0.1, "nats", "undecided"),
    ],
)
def test_verdict(paper, low, high, unit, answer):
    assert plot.verdict(paper, low, high, unit) == answer


def test_differences():
    """The last win-rate, that at the same KL, the gain kept, seconds until, and no number of a diverged run."""
    rows = []
    for loss, seed, rates, kls in [("a", 1, (0.2, 0.3, 0.4), (0, 1, 2)), ("b", 1, (0.2, 0.25, 0.3), (0, 0.5, 1.5))]:
        for version, (rate, kl) in enumerate(zip(rates, kls)):
            row = {"loss": loss, "seed": seed, "version": version, "win_rate": rate, "kl": kl, "episodes": 10 * version}
            row["prepared"] = "a"
            rows.append(row | {"command": f"{loss} {seed}", "diverged": "", "jobs": 1.0, "step_seconds": 2.0 + version})
    for measure, expected in [("win_rate", -10), ("kl", -0.5), ("win_rate_at_kl", -5)]:
        assert plot.differences(rows, "loss=b", "loss=a", measure) == pytest.approx([expected]), measure
    scores = [row | {"accuracy": row["win_rate"], "seconds": row["episodes"] + 10} for row in rows]
    for row in scores:
        del row["win_rate"]
    assert plot.differences(scores, "loss=a", "loss=b", "seconds_to") == pytest.approx([-100 / 3])
    late = [row | {"seconds": row["episodes"] / (1 + (row["loss"] == "a"))} for row in rows]  # b has 0.25 when a ends
    assert plot.differences(late, "loss=a", "loss=b", "win_rate_at_seconds") == pytest.approx([15])
    assert plot.differences(rows, "loss=a version=2", "loss=a version=1") == pytest.approx([10])
    assert plot.differences(rows, "loss=b + loss=a", "loss=a + loss=b", "kept") == pytest.approx([0])
    half = [row | {"step_seconds": row["step_seconds"] / (1 + (row["loss"] == "b"))} for row in rows]
    assert plot.differences(half, "loss=b", "loss=a", "step_seconds") == pytest.approx([-50])
    assert plot.differences(rows, "loss=b + loss=b", "loss=a + loss=b") == pytest.approx([-10])
    assert plot.differences(rows, "loss=b + loss=b", "loss=a + loss=b", "kept") == pytest.approx([-50])
    assert plot.differences(late, "loss=b", "loss=a", "win_rate_at_seconds") == pytest.approx([-10])  # after its end
    assert plot.differences(rows, "loss=a", "loss=b", "win_rate_at_kl") == pytest.approx([float("nan")], nan_ok=True)
    other = [row | {"prepared": row["loss"]} for row in rows]  # each on a task of its own: no pair
    assert plot.differences(other, "loss=b", "loss=a") == []
    rows[-1]["diverged"] = "yes"
    assert math.isnan(plot.differences(rows, "loss=b", "loss=a")[0])
    for row in rows:
        row["jobs"] = 2.0
    assert plot.differences(rows, "loss=b", "loss=a", "step_seconds") == []


def test_a_way_has_one_colour_in_all_panels(tmp_path, monkeypatch):
    """Also where `colocate` was not run. Six panels, and a name stands beside every line."""
    monkeypatch.chdir(HERE)
    found = plot.read("async_vs_sync")
    kept = [row for row in found if row["way"] != "colocate" or row["policy"] == "sft-m"]
    (tmp_path / "benchmark/figures").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "read", lambda name: kept)
    monkeypatch.setattr(plot.plt, "close", lambda figure: None)
    plot.draw("async_vs_sync")
    figure = plot.plt.gcf()
    monkeypatch.undo()
    plot.plt.close(figure)
    names = [(text.get_text(), text.get_color()) for axis in figure.axes for text in axis.texts]
    lines = [line.get_color() for axis in figure.axes for line in axis.get_lines()]
    assert sorted(name for name, _ in set(names)) == ["asynchronous", "colocate", "split"]
    assert sorted(colour for _, colour in names) == sorted(lines)
    assert len(set(lines)) == 3
    assert [axis.get_title() for axis in figure.axes] == [*(f"Online DPO, policy {size}" for size in "sml"), *[""] * 3]


def test_pages_show_what_the_results_say(monkeypatch):
    """`make figures` would change no table."""
    monkeypatch.chdir(HERE)
    rows = plot.judged()
    for page, name, block in [
        ("README.md", "results", plot.results()),
        ("benchmark/README.md", "digest", plot.digest(rows)),
        ("benchmark/tasks/README.md", "premise", plot.premise()),
        ("docs/speed.md", "steps", plot.steps()),
    ]:
        assert f"<!-- {name} -->\n{block}<!-- end -->" in Path(page).read_text(), f"{page}: {name}"
    for name in plot.STUDY:
        assert Path(f"benchmark/study/{name}.md").read_text() == plot.page(name, rows), name
    assert {row["experiment"] for row in rows} == set(plot.STUDY)


def test_the_numbers_on_speed_were_measured():
    """Every median with its range is a row of results/speed.csv; every other decimal is one of its values, rounded."""
    with open(f"{HERE}/benchmark/results/speed.csv") as f:
        rows = [[float(row[key]) for key in ("median", "least", "most")] for row in csv.DictReader(f)]
    page = re.sub("(?s)<!-- steps -->.*<!-- end -->", "", Path(HERE, "docs/speed.md").read_text())
    page = page.replace("TRL (1.16)", "").replace("0.9 M", "")
    ranges = re.findall(r"([\d.]+)(?: s)? \(([\d.]+) to ([\d.]+)\)", page)
    numbers = re.findall(r"\d+\.\d+|[\d,]+(?= MiB| GFLOP)", page)
    assert len(ranges) > 15 and len(numbers) > 50
    for found in ranges:
        digits = len(found[0].partition(".")[2])
        assert [float(number) for number in found] in [[round(x, digits) for x in row] for row in rows], found
    rounded = {digits: {round(x, digits) for row in rows for x in row} for digits in (0, 1, 2)}
    for number in numbers:
        assert float(number.replace(",", "")) in rounded[len(number.partition(".")[2])], number


def test_intervals():
    """1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 4.303. A ratio and its inverse have the same interval."""
    assert plot.t_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    ratios = np.array([0.8, 0.7, 0.9])
    mean, low, high = (1 + value / 100 for value in plot.ratio_interval(100 * (ratios - 1)))
    assert mean == pytest.approx(np.prod(ratios) ** (1 / 3))
    assert plot.ratio_interval(100 * (1 / ratios - 1)) == pytest.approx([100 * (1 / x - 1) for x in (mean, high, low)])


def test_a_task_of_two_preparations_is_refused(tmp_path, monkeypatch):
    with open(f"{HERE}/benchmark/results/samples.csv") as f:
        rows = list(csv.DictReader(f))
    with open(tmp_path / "samples.csv", "w") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(row | {"prepared": "new" if row["seed"] == "1" else "old"} for row in rows)
    monkeypatch.setattr(plot, "results_of", lambda name: tmp_path / "samples.csv")
    with pytest.raises(SystemExit, match="runs on tldr-tiny as prepared new and old; delete it, or make"):
        plot.read("samples")


def test_what_ran_side_by_side_has_no_line_over_seconds(tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    found = [row | {"jobs": 1.0 + (row["samples_per_prompt"] == 4)} for row in plot.read("samples")]
    monkeypatch.setattr(plot, "read", lambda name: found if name == "samples" else [])
    monkeypatch.setattr(plot.plt, "close", lambda figure: None)
    monkeypatch.setattr(plot.plt.Figure, "savefig", lambda *_, **__: None)
    plot.draw("samples")
    figure = plot.plt.gcf()
    monkeypatch.undo()
    plot.plt.close(figure)
    assert [len(axis.get_lines()) for axis in figure.axes] == [3, 3, 1]


def test_two_evaluations_are_no_curve(monkeypatch):
    """Figure 3: of N = 1 a curve of win-rate against KL, of the others their ends; and where all began."""
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(plot.plt, "close", lambda figure: None)
    monkeypatch.setattr(plot.plt.Figure, "savefig", lambda *_, **__: None)
    plot.draw("off_policyness")
    figure = plot.plt.gcf()
    monkeypatch.undo()
    plot.plt.close(figure)
    against_n, against_kl = figure.axes
    one, *others = [len(line.get_xdata()) for line in against_kl.get_lines()]
    assert one > 10 and others == [1, 1, 1]
    assert "before training" in [text.get_text() for text in against_n.texts]
    assert {"N = 1", "N = 16 (end)"} <= {text.get_text() for text in against_kl.texts}
    assert [axis.get_xlabel().rpartition("(")[2] for axis in figure.axes] == ["5 to 8 seeds)"] * 2
    assert against_n.get_xticks().tolist() == [1, 4, 16, 64]


def test_an_experiment_without_runs_has_a_page(monkeypatch):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(plot, "read", lambda name: [])
    assert plot.page("scale", []).count("\n") < 12


def test_a_point_of_several_tasks_is_not(monkeypatch):
    monkeypatch.chdir(HERE)
    rows = [row | {key: f"{row['seed']:g}" for key in ("task", "prepared")} for row in plot.read("samples")]
    monkeypatch.setattr(plot, "read", lambda name: rows)
    assert f"Task prepared {', '.join(sorted({row['task'] for row in rows}))}." in plot.table("samples")


def test_a_claim_that_decides_an_unknown_row_is_refused(monkeypatch):
    monkeypatch.chdir(HERE)
    monkeypatch.delitem(plot.ROWS, "samples")
    with pytest.raises(SystemExit, match="claims.csv decides samples, which is none of good"):
        plot.digest(plot.judged())


def test_a_wrong_scale_is_refused():
    for name, scale, allowed in [("lag", "papre", "tiny or paper"), ("chatbot", "tiny", "paper")]:
        done = subprocess.run(["bash", f"benchmark/{name}.sh", scale], cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 2 and f"the scale is {allowed}, not {scale}" in done.stderr


def test_how_a_task_was_prepared(tmp_path):
    (tmp_path / "sft-m").mkdir()
    (tmp_path / "sft-m/model.safetensors").write_bytes(b"weights")
    assert run.prepared(tmp_path) == hashlib.sha256(b"weights").hexdigest()[:8]
    assert run.prepared(tmp_path / "sft-m") == ""


def test_grid():
    assert run.grid(["--a", "1,2", "--b=x", "--c", "--a=3,4"]) == [["--a=3", "--b=x", "--c"], ["--a=4", "--b=x", "--c"]]
    assert run.grid(["--gold", "", "--temperature", "-1"]) == [["--gold=", "--temperature=-1"]]
    for wrong in (["a", "1"], ["--a", "1", "2"]):
        with pytest.raises(SystemExit, match="does not belong to a flag"):
            run.grid(wrong)


def test_a_grid_runs_goes_on_and_draws(task, tmp_path, monkeypatch, capsys):
    """A finished run is skipped, one that was cut off goes on, one that fails ends the command."""
    for name in ("benchmark/results", "benchmark/figures"):
        os.makedirs(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", HERE)
    given = flags(task, eval_every=2, eval_prompts=16, save_every=2, total_episodes=128)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    script = os.path.join(HERE, "async_online_dpo.py")
    monkeypatch.setenv("JOBS", "2")
    run.main("preparations", script, *options, "--seed=1,2")
    with open("benchmark/results/preparations.csv") as f:
        rows = list(csv.DictReader(f))
    assert [(row["seed"], row["jobs"]) for row in rows] == [(seed, "2") for seed in "12" for _ in range(3)]
    assert all(row["commit"] and row["machine"] and row["cores"] == str(os.cpu_count()) for row in rows)
    page = tmp_path / "benchmark/README.md"
    page.write_text("<!-- digest -->\n<!-- end -->\n")
    (tmp_path / "benchmark/claims.csv").write_text(
        "experiment,claim,paper,expected,measure,plus,minus,decides\n"
        "preparations,nothing,equal,,win_rate,S=1,S=1,good\npreparations,to come,,,win_rate,S=2,S=1,\n"
    )
    third = [{key: value.replace("--seed=2", "--seed=3") for key, value in row.items()} for row in rows[3:]]
    with open("benchmark/results/preparations.csv", "a") as f:  # of another machine
        csv.DictWriter(f, rows[0]).writerows(row | {"seed": "3"} for row in third)
    plot.main("preparations")
    assert "nothing | +0.0 [+0.0, +0.0] points | [yes](study/preparations.md)" in page.read_text()
    study = (tmp_path / "benchmark/study/preparations.md").read_text()
    assert "win_rate" in study and "+0.0 [+0.0, +0.0] points | 3 | yes |" in study
    assert "| to come |  |  |  | 0 | not run |" in study
    assert os.path.exists("benchmark/figures/preparations.png")

    run.main("preparations", script, *options, "--seed=1,2")
    assert capsys.readouterr().out.count("--output-dir") == 2
    first, other = sorted(path for path in (tmp_path / "runs/preparations").iterdir() if path.is_dir())
    os.rename(first / "policy", tmp_path / "policy")  # as if it had been killed
    os.remove(first / "prepared")
    table = (tmp_path / "benchmark/results/preparations.csv").read_text()
    (other / "prepared").write_text("another")  # prepared anew since: the run begins anew, and its log
    Path(f"{other}.log").write_text("JOBS=16\n")
    run.main("preparations", script, *options, "--seed=1,2")
    assert Path(f"{first}.log").read_text().count("JOBS=2") == 2 and (first / "policy").exists()
    assert not (first / "checkpoints").exists() and (first / "prepared").exists()
    assert "JOBS=16" not in Path(f"{other}.log").read_text() and (other / "prepared").read_text() != "another"
    assert metrics_columns(tmp_path / "benchmark/results/preparations.csv") == metrics_columns(table)
    with pytest.raises(SystemExit, match="failed with status"):
        run.main("preparations", script, *options, "--max-staleness=-1")

    os.rename("runs/preparations", "runs/elsewhere")  # as on another machine, which has the table only
    table = (tmp_path / "benchmark/results/preparations.csv").read_text()
    monkeypatch.setenv("DRY", "1")
    capsys.readouterr()
    run.main("preparations", script, *options, "--seed=1,2,3")
    assert capsys.readouterr().out.count(script) == 3
    monkeypatch.setenv("KEEP", "1")
    run.main("preparations", script, *options, "--seed=1,2,3,4")
    assert capsys.readouterr().out.splitlines() == [f"{script} {' '.join(options)} --seed=4"]
    with monkeypatch.context() as patch:
        patch.setattr(run, "prepared", lambda _: "anew")  # these lines are of another preparation of the task
        run.main("preparations", script, *options, "--seed=1,2,3,4")
    assert capsys.readouterr().out.count(script) == 4
    monkeypatch.delenv("DRY")
    run.main("preparations", script, *options, "--seed=1,2,3")
    assert (tmp_path / "benchmark/results/preparations.csv").read_text() == table
    (tmp_path / "runs/preparations").mkdir(exist_ok=True)  # a run made again takes the place of its old lines
    for path in (tmp_path / "runs/elsewhere").glob("*seed=2*"):
        path.rename(tmp_path / "runs/preparations" / path.name)
    lines = table.splitlines(keepends=True)
    old = [line.replace("async_online_dpo", "old", 1) if "--seed=2" in line else line for line in lines]
    old = [old[0], *old[-3:], *old[1:-3]]  # and all are sorted
    (tmp_path / "benchmark/results/preparations.csv").write_text("".join(old))
    run.write_table("preparations")
    assert (tmp_path / "benchmark/results/preparations.csv").read_text() == table != "".join(old)


def metrics_columns(table):
    """What a run must repeat, of every line of a table (a path or its text)."""
    text = table.read_text() if isinstance(table, Path) else table
    rows = csv.DictReader(text.splitlines())
    return [(row["command"], row["version"], row["score"], row["kl"], row.get("train_score")) for row in rows]
