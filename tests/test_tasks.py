"""The tasks' rules: rewards by hand, held-out problems, the same bytes for the same seed. No model is trained here."""

import json
import platform
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk

from benchmark.tasks import common, docstrings, gsm8k, math_tiny, no_robots, tldr_tiny

FACTS = dict(actor="boss", action="broke", object="phone", place="office", day="monday", feeling="angry", plan="leave")


def tldr(response):
    return tldr_tiny.gold([""], [response], facts=[json.dumps(FACTS)])[0]


def test_tldr_gold_counts_facts_and_punishes_errors():
    base = tldr("my boss broke my phone")
    assert base == 1.5  # three facts worth a half each, nothing wrong
    assert tldr("my boss broke my phone should i leave ?") == base + 1.5
    assert tldr("my boss broke my phone should i call ?") == base - 0.7  # a wrong fact
    assert tldr("my boss broke my phone my phone") < base  # repeated, and no grammar for it
    assert tldr("phone boss my") < base
    full = "my boss broke my phone at the office on monday and i feel angry should i leave ?"
    assert tldr(full) > tldr(full + " also my aunt likes my car")
    assert tldr(full) > tldr(full + " and i feel angry" * 3)


def test_tldr_posts_hold_their_facts_and_repeat_with_the_seed():
    rows = [tldr_tiny.make_row(random.Random(seed)) for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]
    for row in rows:
        words = row["query"].split()
        assert all(value in words for value in json.loads(row["facts"]).values())
        assert row["query"].endswith("TL;DR:") and row["reference"].startswith(" my ")


def test_the_examples_of_the_page_are_posts_of_the_task_and_judged_so():
    rng = random.Random(tldr_tiny.Args().seed)
    rows = {row["query"]: row for row in (tldr_tiny.make_row(rng) for _ in range(20_000 + 1_024))}
    page = Path(common.__file__).with_name("README.md").read_text()
    lines = re.findall(r"^\| (?:post|reference|version) .*", page, re.M)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    judged = []
    for name, words, score in table:
        if name == "post":
            row = rows[words]
            continue
        judged.append(f"{tldr_tiny.gold([''], [words], facts=[row['facts']])[0]:.1f}" == score)
        assert name != "reference" or words == row["reference"].strip()
    assert judged == [True] * 6


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muon_steps_as_torchs_does(shape):
    """But for bfloat16, in which torch.optim.Muon multiplies: about one percent."""
    torch.manual_seed(0)
    start, *gradients = torch.randn(6, *shape)
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [common.Muon([mine], lr=0.01), torch.optim.Muon([theirs], lr=0.01, adjust_lr_fn="match_rms_adamw")]
    for gradient in gradients:
        for weight, optimizer in zip((mine, theirs), optimizers):
            weight.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert moved > 0.05 and (mine - theirs).norm() < 0.02 * moved


def test_orthogonal_keeps_the_directions_of_a_matrix():
    torch.manual_seed(0)
    matrix = torch.randn(8, 24)
    values = torch.linalg.svdvals(common.orthogonal(matrix))
    assert values.min() > 0.6 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ common.orthogonal(matrix) @ right.T
    assert (inside - inside.diag().diag()).abs().max() < 1e-4


def test_math_reward_reads_the_number_after_the_hashes():
    reference = [" 12+7=19, 19-2=17\n#### 17"] * 5
    answers = [" #### 17", " 1+1=2\n#### 17", " 17", " #### 170", " #### 71"]
    assert math_tiny.reward([""] * 5, answers, reference=reference) == [1, 1, 0, 0, 0]


def test_math_references_are_right_and_splits_share_no_problem():
    splits = {name: math_tiny.problems(name, 300, seed=1, slips=0.6) for name in ("train", "validation", "test")}
    seen = {}
    for name, rows in splits.items():
        for query, reference in zip(rows["query"], rows["reference"]):
            for sum_, result in re.findall(r"(\d+[-+*]\d+)=(\d+)", reference):
                assert eval(sum_) == int(result)
            assert reference.endswith(f"#### {result}")
            key = re.sub(r"[A-Z][a-z]+|apples|books|coins|eggs|nuts|pens|shells|stamps", "", query)
            seen.setdefault(key, set()).add(name)
    assert all(len(names) == 1 for names in seen.values())
    assert splits["train"][:] == math_tiny.problems("train", 300, seed=1, slips=0.6)[:]


def test_math_pupils_slip_in_their_known_ways_and_go_on_with_what_came_out():
    assert [math_tiny.slip(*step) for step in ((17, "+", 8), (32, "-", 17), (7, "*", 8))] == [15, 25, 49]
    assert [math_tiny.slip(*step) for step in ((12, "+", 7), (38, "-", 17), (4, "*", 5))] == [None] * 3
    assert math_tiny.solution([7, 8, 6], "*+", 1, random.Random(1)) == " 7*8=49, 49+6=45\n#### 45"
    assert math_tiny.solution([7, 8, 6], "*+", 0, random.Random(1)) == " 7*8=56, 56+6=62\n#### 62"
    rows = math_tiny.problems("train", 300, seed=1, slips=0.6)
    assert 0.3 < sum(a != b for a, b in zip(rows["reference"], rows["demonstration"])) / 300 < 0.6


def test_docstrings_gold_prefers_a_sentence_about_the_description():
    prompt = "Reads the configuration from a file and returns the parsed settings as a dictionary."
    rarity = [json.dumps({word: 1.0 for word in docstrings.stems(prompt)})]

    def gold(text):
        return docstrings.gold([prompt], [text], rarity=rarity)[0]

    good = gold("Return the settings that a configuration file holds as a dictionary.")
    assert 0 <= gold("") < gold("Do something with it all.") < good <= 10
    assert gold("return the settings that a configuration file holds as a dictionary") < good
    assert gold("Reads the configuration from a file and returns the parsed settings.") < good  # copied


def write_jsonl(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_gsm8k_from_a_folder_with_its_columns(tmp_path):
    answers = [f"{i}+1000={i + 1000}\n#### {i + 1000:,}" for i in range(8)]
    rows = [{"question": f"What is {i} + 1,000?", "answer": answer} for i, answer in enumerate(answers)]
    write_jsonl(tmp_path / "in" / "train.jsonl", rows)
    write_jsonl(tmp_path / "in" / "test.jsonl", rows[:2])
    gsm8k.main(gsm8k.Args(str(tmp_path / "in"), None, 3, str(tmp_path / "out")))
    data = load_from_disk(str(tmp_path / "out"))
    assert {name: len(split) for name, split in data.items()} == {"train": 5, "validation": 3, "test": 2}
    assert data["test"][1] == {
        "query": "[MATH_TASK] Problem:\nWhat is 1 + 1,000?\n\nSolution:",
        "reference": " 1+1000=1001\n#### 1,001",
    }
    answers = [" #### 1001", " #### 1,001.0", " 1001", " #### 1002", " #### 7\n#### 1001"]
    assert gsm8k.reward([""] * 5, answers, data["test"]["reference"][1:] * 5) == [1, 1, 0, 0, 1]


def test_no_robots_from_a_folder_with_its_columns(tmp_path):
    talk = [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi!"), ("user", "Bye"), ("assistant", "See you.")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in talk]}]
    for name in ("train", "test"):
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", rows)
    no_robots.main(no_robots.Args(str(tmp_path / "in"), output=str(tmp_path / "out")))
    row = load_from_disk(str(tmp_path / "out" / "data"))["test"][0]
    assert row["query"].startswith("### System:\nBe kind.\n\n### User:\nHello\n\n### Assistant:\nHi!\n\n### User:\nBye")
    assert row["query"].endswith("### Assistant:\n") and row["reference"] == "See you."


def test_another_seed_is_prepared_beside_the_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for seed, folder in [(1, "tasks/tldr-tiny"), (2, "tasks/tldr-tiny-2")]:
        assert str(common.Preparation("tldr-tiny", tldr_tiny.Args(seed=seed)).folder) == folder
        assert (tmp_path / folder).is_dir()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="about the instruction sets of x86 processors")
@pytest.mark.parametrize("task", ["tldr_tiny", "math_tiny"])
def test_preparing_uses_the_instructions_that_every_processor_has(task, tmp_path):
    """After everything was imported, as when a task is prepared: with wider instructions its bytes would be others."""
    code = f"""
import torch
from benchmark.tasks import common, {task}
common.Preparation.__init__ = lambda self, *_: setattr(self, "done", True)
{task}.main({task}.Args())
print(torch.get_num_threads(), torch.backends.cpu.get_cpu_capability())"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.split()[-2:] == ["2", "AVX2"]


@pytest.mark.parametrize("first", ["os", "torch"])
def test_threads_that_prepare_do_not_spin(first, monkeypatch):
    """Set before torch reads it. A run that imports a reward has torch already, and is timed: it stays as it was."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    code = f"import {first}, benchmark.tasks, os; print(os.environ.get('OMP_WAIT_POLICY'))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.split() == (["PASSIVE"] if first == "os" else ["None"])
