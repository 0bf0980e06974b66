"""docs/exercises.md: every change applies to its script, and the changed script shows what the page says."""

import json
import os
import re
import subprocess

import pytest

from tests.runs import HERE, command

PAGE = open(f"{HERE}/docs/exercises.md").read()
EXERCISES = re.findall(r"^## (\d+)\. .*?\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
CHANGED = {int(number): text for number, text in EXERCISES if "```diff" in text}


def changed(number, folder):
    """The script of an exercise with its change, in a folder. Returns its path."""
    text = CHANGED[number]
    name = re.search(r"`(async_\w+\.py)`", text)[1]
    lines = re.search(r"```diff\n(.*?)```", text, re.DOTALL)[1].splitlines()
    old = "\n".join(line[1:] for line in lines if line[0] in " -")
    new = "\n".join(line[1:] for line in lines if line[0] in " +")
    with open(f"{HERE}/{name}") as f:
        source = f.read()
    assert source.count(old) == 1, f"exercise {number}: its lines are not in {name}"
    path = folder / name
    path.write_text(source.replace(old, new))
    return path


@pytest.mark.parametrize("number", CHANGED)
def test_the_change_of_an_exercise_applies(number, tmp_path):
    compile(changed(number, tmp_path).read_text(), "mine.py", "exec")


def train(task, path, folder, **changes):
    options = command(task, name=str(path), output_dir=str(folder), gold="", **changes)
    environment = os.environ | {"PYTHONPATH": HERE}
    return subprocess.run(options, cwd=folder.parent, env=environment, capture_output=True, text=True)


def records(folder):
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


@pytest.mark.long
@pytest.mark.parametrize("number", CHANGED)
def test_an_exercise_shows_what_its_page_says(number, task, tmp_path):
    path = changed(number, tmp_path)
    flags = {1: dict(max_staleness=3), 10: dict(response_length=60, total_episodes=512)}.get(number, {})
    done = train(task, path, tmp_path / "run", **flags)
    if number == 3:
        assert done.returncode and "vLLM has other weights" in done.stderr
        return
    assert done.returncode == 0, done.stderr[-2000:]
    if number == 1:
        assert re.findall(r"made by version (\d)", done.stdout) == ["0", "0", "0", "0", "1", "2"]
        return
    plain = train(task, f"{HERE}/{path.name}", tmp_path / "plain", **flags)
    assert plain.returncode == 0, plain.stderr[-2000:]
    mine, theirs = records(tmp_path / "run"), records(tmp_path / "plain")
    if number == 2:
        assert mine == theirs
    elif number == 5:
        assert mine[0]["loss"] == pytest.approx(1) and theirs[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    elif number == 6:
        assert sum(line["loss_clipped"] for line in mine) < sum(line["loss_clipped"] for line in theirs)
    elif number == 10:
        assert sum(line["score"] for line in mine[-4:]) < sum(line["score"] for line in theirs[-4:])
