"""The copies in the scripts are the same, and the scripts stay close to each other. Standard library only."""

import textwrap

import pytest

from benchmark import copies

SOURCES = copies.read()


def test_copies_headings_and_flags_are_the_same():
    assert list(SOURCES) == copies.SCRIPTS
    assert copies.differences(SOURCES) == []


@pytest.mark.parametrize("pair", copies.BUDGETS)
def test_siblings_stay_within_their_budget(pair):
    assert 0 < copies.changed(SOURCES, *pair) <= copies.BUDGETS[pair]


@pytest.mark.parametrize(
    "old, new, found",
    [
        ("the same request or rollout", "a request or rollout", "take_rows"),  # a docstring of a function
        ('name="generator", daemon=True', 'name="generator"', "Generator"),
        ("temperature: float = 0.7 ", "temperature: float = 0.8 ", "Args.temperature"),  # a default
        ("  # of the data order and", "  # of the order and", "Args.seed"),  # a help string
        ("track: bool", "track: int", "Args.track"),  # a type
        ("# 6. Evaluation ", "# 6. Evaluations ", "headings"),
        ("-F.logsigmoid(args.beta * margin)", "-F.logsigmoid(margin)", "dpo_loss"),
        ("import zipfile\n", "", "imports"),
        ("class Run:", "def more():\n    pass\n\n\nclass Run:", "plumbing"),
    ],
)
def test_a_copy_that_drifts_is_found(old, new, found):
    script = "sync_baseline.py"
    broken = SOURCES[script].replace(old, new).replace(old.capitalize(), new.capitalize())
    assert broken != SOURCES[script]
    (problem,) = copies.differences(SOURCES | {script: broken})
    assert found in problem and script in problem


@pytest.mark.parametrize("script", copies.LINES)
def test_a_script_stays_within_its_lines(script):
    assert len(SOURCES[script].splitlines()) <= copies.LINES[script]
    assert copies.too_long(SOURCES[script]) == []


def test_the_readme_shows_the_loop_as_it_is():
    source, page = SOURCES["async_online_dpo.py"], (copies.ROOT / "README.md").read_text()
    first = source.index("        for t in range(first, args.num_batches + 1):\n")
    loop = source[first : source.index("        run.save_policy(", first)]
    assert "```python\n" + textwrap.dedent(loop) + "```\n" in page


def test_an_algorithm_that_grows_breaks_its_budget():
    pair, budget = next(iter(copies.BUDGETS.items()))
    grown = SOURCES | {pair[1]: SOURCES[pair[1]] + "x = 1\n" * (budget + 1)}
    assert copies.changed(grown, *pair) > budget


def test_rewriting_mends_a_copy_and_leaves_the_rest():
    model = SOURCES["async_ppo.py"]
    for source in SOURCES.values():
        assert copies.rewrite(source, model) == source
    broken = SOURCES["async_rloo.py"].replace("def pad(rows: list[list], value,", "def pad(rows, value,")
    broken = broken.replace("temperature: float = 0.7 ", "temperature: float = 0.8 ")
    broken = broken.replace("def full_tensor", "def whole_tensor").replace("import zipfile\n", "")
    assert broken != SOURCES["async_rloo.py"]
    assert copies.rewrite(broken, model) == SOURCES["async_rloo.py"]
