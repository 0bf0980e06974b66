"""Each script is self-contained, so the scripts hold copies. This keeps them from drifting apart.

    python -m benchmark.copies                # list what differs, and how long the sibling diffs are
    python -m benchmark.copies async_ppo.py   # make the others' copies what they are in async_ppo.py

A copy is a top-level function, class or assignment of the same name, or a field of Args of the same name.
"""

import ast
import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = ["async_online_dpo.py", "async_rloo.py", "async_ppo.py", "sync_baseline.py"]
DIFFER = {"Args", "Args.__post_init__", "Args.max_staleness", "Batch", "main"}  # the same name, but each has its own
BUDGETS = {  # most lines that one of the pair may have in place of the other's, docstring and Args left out
    ("async_rloo.py", "async_ppo.py"): 110,
    ("async_online_dpo.py", "async_rloo.py"): 60,
    ("async_online_dpo.py", "sync_baseline.py"): 20,
}
LINES = {"async_online_dpo.py": 1110, "sync_baseline.py": 1105, "async_rloo.py": 1142, "async_ppo.py": 1200}
MAIN, FUNCTION = 65, 60  # most lines of main(), and of any other function


def parts(source: str) -> dict[str, tuple[int, int]]:
    """Name -> (first line, line after the last) of every part that may be a copy; lines count from 0."""
    found = {}
    for node in ast.parse(source).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = first, node.end_lineno
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            found[(node.target if isinstance(node, ast.AnnAssign) else node.targets[0]).id] = first, node.end_lineno
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for field in node.body:
                name = field.name if isinstance(field, ast.FunctionDef) else field.target.id
                found[f"Args.{name}"] = field.lineno - 1, field.end_lineno
    return found


def texts(source: str) -> dict[str, str]:
    """Name -> text of every part that must be the same wherever it stands."""
    lines = source.splitlines()
    return {name: "\n".join(lines[a:b]) for name, (a, b) in parts(source).items() if name not in DIFFER}


def headings(source: str) -> list[str]:
    """The lines that divide the script into its sections."""
    return [line for line in source.splitlines() if line.startswith("# ") and line.endswith(("---", "==="))]


def imports(source: str) -> str:
    """From the first import to the arguments: one script's new import is soon needed by the others."""
    return source[source.index("\nimport ") : source.index("# 1. Arguments")]


def plumbing(source: str) -> str:
    """Everything below the plumbing's heading, which is to be the same even in what is there at all."""
    return source[source.index("# Plumbing: ") :]


def differences(sources: dict[str, str]) -> list[str]:
    """One line for every part that is not the same in all scripts that have it; if there is none, for the divisions."""
    problems, first = [], {}
    for script, source in sources.items():
        for name, text in texts(source).items():
            other, same = first.setdefault(name, (script, text))
            if text != same:
                problems.append(f"{name} in {script} is not as in {other}")
        for name, part in (("headings", headings), ("imports", imports), ("plumbing", plumbing)):
            other, same = first.setdefault(name, (script, part(source)))
            if part(source) != same and not problems:
                problems.append(f"the {name} of {script} is not as in {other}")
    return problems


def changed(sources: dict[str, str], a: str, b: str) -> int:
    """Lines of a diff between two scripts, outside the docstring and Args: the longer side of each change."""
    shared = []
    for script in (a, b):
        source, (first, end) = sources[script], parts(sources[script])["Args"]
        lines = source.splitlines()
        lines[first:end] = []
        lines = lines[source[: source.index("\nimport ")].count("\n") :]
        shared.append([line for line in lines if line.strip()])
    blocks = difflib.SequenceMatcher(None, *shared, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in blocks if tag != "equal")


def too_long(source: str) -> list[str]:
    """Functions of more lines than a reader keeps in mind."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    sizes = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    return [f"{name}: {size}" for name, size in sizes.items() if size > (MAIN if name == "main" else FUNCTION)]


def rewrite(source: str, model: str) -> str:
    """The source with imports, plumbing, and every part that the model script has too, made the same."""
    source = source.removesuffix(plumbing(source)) + plumbing(model)
    source = source.replace(imports(source), imports(model), 1)
    lines, wanted = source.splitlines(), texts(model)
    for name, (first, end) in sorted(parts(source).items(), key=lambda part: -part[1][0]):
        if name in wanted:
            lines[first:end] = wanted[name].split("\n")
    return "\n".join(lines) + "\n"


def read() -> dict[str, str]:
    """Script -> its text."""
    return {script: (ROOT / script).read_text() for script in SCRIPTS}


if __name__ == "__main__":
    sources = read()
    for model in sys.argv[1:2]:
        if model not in sources:
            raise SystemExit(f"copies: {model} is none of {', '.join(sources)}")
        for script, source in sources.items():
            if script != model:
                for name, text in texts(sources[model]).items():
                    if texts(source).get(name, text) != text:
                        print(f"{script}: {name} rewritten")  # what is lost is in git
                (ROOT / script).write_text(rewrite(source, sources[model]))
        sources = read()
    print("\n".join(differences(sources)) or "all copies are the same")
    for (a, b), budget in BUDGETS.items():
        print(f"{a} and {b}: {changed(sources, a, b)} lines differ (budget {budget})")
    for script, most in LINES.items():
        print(f"{script}: {len(sources[script].splitlines())} lines (budget {most}); {too_long(sources[script])}")
    sys.exit(bool(differences(sources)))
