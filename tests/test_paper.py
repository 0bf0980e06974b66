"""The commands at the paper's scale, on toy models of the same architectures and data with the same columns and names.

A folder stands in for the Hub: names such as mnoukhov/pythia410m-sft-tldr are folders in it. From every experiment the
first command of each script loads its data, makes one update and evaluates; the chatbot's judge is a real vLLM server.
"""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import tyro
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from benchmark import judge
from benchmark.tasks import gsm8k, no_robots, tldr
from tests.conftest import real_engine, run_main
from tests.runs import HERE, dry
from tests.test_benchmark import EXPERIMENTS, NONE, SCRIPTS

SHAPE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, initializer_range=0.1)
ARCHITECTURES = {
    "pythia": (GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, "<|endoftext|>", "<|padding|>"),
    "llama": (LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, "</s>", "<|finetune_right_pad_id|>"),
}
MODELS = {  # folder: architecture, and whether it is a policy
    **{f"mnoukhov/pythia{size}-sft-tldr": ("pythia", True) for size in ("410m", "1b", "2.8b")},
    **{f"mnoukhov/pythia{size}-rm-tldr6.9b": ("pythia", False) for size in ("410m", "1b", "2.8b")},
    "cleanrl/EleutherAI_pythia-6.9b-deduped__reward__tldr": ("pythia", False),
    "realtreetune/rho-1b-sft-GSM8K": ("llama", True),
    "EleutherAI/pythia-410m-deduped": ("pythia", True),
    "meta-llama/Llama-3.1-8B": ("llama", True),
}
SMALL = dict(micro_batch_size=4, prompt_length=80, response_length=8, eval_prompts=4)


def tokenizer(eos: str, pad: str) -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate([eos, pad, *letters])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, pad_token=pad)
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def save(folder: str, architecture: str, policy: bool, seed: int) -> PreTrainedTokenizerFast:
    config, causal, classifier, eos, pad = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    ids = dict(eos_token_id=0, pad_token_id=1, bos_token_id=None)
    made = config(vocab_size=258, max_position_embeddings=4608, num_labels=1, tie_word_embeddings=False, **SHAPE, **ids)
    (causal if policy else classifier)(made).save_pretrained(folder)
    words = tokenizer(eos, pad)
    words.save_pretrained(folder)
    return words


def without_pad_token(folder: str) -> None:
    """As some models on the Hub are: no pad token, at most an unknown one (Llama's)."""
    words, config = PreTrainedTokenizerFast.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    text = words.backend_tokenizer.to_str()
    if config.model_type == "llama":
        text = text.replace(words.pad_token, "<unk>")
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), eos_token=words.eos_token)
    if config.model_type == "llama":
        made.unk_token = "<unk>"
    made.save_pretrained(folder)
    config.pad_token_id = None
    config.save_pretrained(folder)


def write_json_lines(path: str, rows: list[dict]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The folder that stands in for the Hub; the data sets have the columns of the real ones."""
    folder = str(tmp_path_factory.mktemp("hub"))
    for i, (name, (architecture, policy)) in enumerate(MODELS.items()):
        save(f"{folder}/{name}", architecture, policy, seed=i)
    for name in ("cleanrl/EleutherAI_pythia-6.9b-deduped__reward__tldr", "realtreetune/rho-1b-sft-GSM8K"):
        without_pad_token(f"{folder}/{name}")

    def post(i):
        query = f"SUBREDDIT: r/a\n\nTITLE: {i}\n\nPOST: my {i} is lost.\n\nTL;DR:"
        texts = dict(id=f"t3_{i}", subreddit="r/a", title=str(i), post=f"my {i} is lost.", summary=f"lost {i}")
        return texts | dict(query=query, query_token=[1, 2], reference_response=f" lost {i}<|endoftext|>")

    def pair(i):
        query, _, answer = (post(i)[name] for name in ("query", "post", "reference_response"))
        return dict(prompt=query, chosen=answer, rejected=" no<|endoftext|>", chosen_score=1.0, rejected_score=0.0)

    def exercise(i):
        return dict(question=f"What is {i} + {i}?", answer=f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}")

    def talk(i):
        messages = [dict(role="user", content=f"Name {i}."), dict(role="assistant", content=f"It is {i}.")]
        return dict(prompt=f"Name {i}.", prompt_id=str(i), messages=messages, category="Open QA")

    rows = DatasetDict({split: Dataset.from_list([post(i) for i in range(64)]) for split in ("train", "validation")})
    rows.save_to_disk(f"{folder}/{tldr.Args.dataset}")
    for path, row, held_out in (
        ("raw/tldr", post, "validation"),
        ("raw/pairs", pair, "validation"),
        ("raw/gsm8k", exercise, "test"),
        ("raw/no_robots", talk, "test"),
    ):
        for split in ("train", held_out):
            write_json_lines(f"{folder}/{path}/{split}.jsonl", [row(i) for i in range(64)])
    here = os.getcwd()
    os.chdir(folder)
    gsm8k.main(gsm8k.Args("raw/gsm8k", None, 8))
    no_robots.main(no_robots.Args("raw/no_robots"))
    tldr.main(tldr.Args("raw/tldr", "raw/pairs"))
    os.chdir(here)
    for name, policy in (("models/no_robots-sft", True), ("models/no_robots-reward", False)):
        save(f"{folder}/{name}", "llama", policy, seed=1)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server whose model says A to everything: the last token of the prompt alone decides."""
    folder = str(tmp_path_factory.mktemp("judge") / "always-a")
    tokenizer = save(folder, "llama", policy=True, seed=0)
    weights = load_file(f"{folder}/model.safetensors")
    for name, weight in weights.items():
        if "proj" in name:
            weight.zero_()  # the hidden state is the embedding of the last token
    weights["lm_head.weight"].zero_()
    (dot,), (letter,) = tokenizer(".")["input_ids"], tokenizer("A")["input_ids"]
    weights["lm_head.weight"][letter] = weights["model.embed_tokens.weight"][dot]
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--max-model-len", "1024"]
    command = [*server, "--host", "127.0.0.1", "--port", port, "--enforce-eager"]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with open(f"{folder}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    yield f"http://127.0.0.1:{port}/v1", process, f"{folder}.log"
    process.terminate()
    process.wait(60)


@pytest.fixture
def judged(server, monkeypatch):
    address, process, log = server
    monkeypatch.setenv("JUDGE_URL", address)
    deadline = time.monotonic() + 300
    while True:
        judge.server.cache_clear()
        try:
            judge.server()
            return
        except SystemExit:
            assert process.poll() is None and time.monotonic() < deadline, open(log).read()[-3000:]
            time.sleep(1)


def commands() -> dict[str, tuple]:
    """From every experiment the first command of each script, lag or not, and placement: {id: (script, Args)}."""
    found = {}
    for name in EXPERIMENTS:
        if (name, "paper") in NONE:
            continue
        for script, *options in dry(name, "paper"):
            args = tyro.cli(SCRIPTS[script].Args, args=options)
            kind = "-".join([name, script, "lag" if args.max_staleness else "in-turn", args.placement])
            found.setdefault(kind, (SCRIPTS[script], args))
    return found


COMMANDS = commands()


@pytest.fixture(scope="module")
def engines(hub):
    """{architecture: a real engine}: each is started when the first command of its architecture comes."""
    started = {}

    def engine(model: str):
        architecture = "pythia" if "pythia" in model else "llama"
        if architecture not in started:
            args = small(SCRIPTS["async_online_dpo.py"].Args(model=model))
            started[architecture] = stack.enter_context(real_engine(args, f"{hub}/weights-{architecture}"))
        return started[architecture]

    with contextlib.ExitStack() as stack:
        yield engine


def small(args):
    batch = 4 * args.samples_per_prompt
    episodes = batch * args.num_mini_batches
    return replace(args, **SMALL, batch_size=batch, total_episodes=episodes, save_every=0)


LONG = ("chatbot.sh", "math.sh-async_online_dpo.py-lag-split")
JUDGED = [pytest.param(n, marks=pytest.mark.long) if n.startswith(LONG) else n for n in COMMANDS]


@pytest.mark.parametrize("name", JUDGED)
def test_a_paper_command_makes_one_update(name, hub, engines, tmp_path, monkeypatch, request):
    monkeypatch.chdir(hub)
    module, args = COMMANDS[name]
    if args.gold == "benchmark.judge:gold":
        request.getfixturevalue("judged")
    folder = str(tmp_path / "run")
    run_main(engines(args.model), module, replace(small(args), output_dir=folder))
    with open(f"{folder}/metrics.jsonl") as f:
        first, step, last = map(json.loads, f)
    measure = "eval/win_rate" if args.gold else "eval/score"
    assert (first["version"], step["step"], last["version"]) == (0, 0, 1) and measure in first and measure in last
    assert all(math.isfinite(value) for value in step.values() if isinstance(value, float))


def test_a_reference_that_brings_its_eos_is_judged_with_one(hub, engines, tmp_path, monkeypatch):
    monkeypatch.chdir(hub)
    module, args = COMMANDS["async_vs_sync.sh-async_online_dpo.py-lag-split"]
    rows = DatasetDict.load_from_disk(args.dataset)
    cut = rows.map(lambda row: {"reference_response": row["reference_response"].removesuffix("<|endoftext|>")})
    cut.save_to_disk(str(tmp_path / "cut"))
    seen = []

    def spy(*args):
        reward = make_reward(*args)
        return lambda prompts, responses, *rest: seen.append(responses) or reward(prompts, responses, *rest)

    make_reward = module.make_reward
    monkeypatch.setattr(module, "make_reward", spy)
    for i, dataset in enumerate((args.dataset, str(tmp_path / "cut"))):
        run_main(engines(args.model), module, replace(small(args), dataset=dataset, output_dir=str(tmp_path / str(i))))
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


@pytest.mark.long
@pytest.mark.parametrize("task", ["tldr", "no_robots"])
def test_sft_and_reward_model(task, hub, tmp_path):
    """The shell file as it is, but for the number of steps, the GPUs, and bfloat16."""
    for name in ("benchmark", "tasks", "raw", "EleutherAI", "meta-llama"):
        os.symlink(f"{HERE if name == 'benchmark' else hub}/{name}", tmp_path / name)
    os.symlink(os.path.dirname(os.path.dirname(sys.executable)), tmp_path / ".venv")
    base = {"tldr": "EleutherAI/pythia-410m-deduped", "no_robots": "meta-llama/Llama-3.1-8B"}[task]
    fewer = ["--max_steps", "1", "--gradient_accumulation_steps", "1", "--use_cpu", "--bf16", "False"]
    env = os.environ | {"ACCELERATE": "", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = ["bash", "benchmark/sft_and_reward.sh", task, base, *fewer]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    with open(tmp_path / f"models/{task}-reward/config.json") as f:
        config = json.load(f)
    assert "SequenceClassification" in config["architectures"][0] and config["pad_token_id"] == 1
    assert os.path.exists(tmp_path / f"models/{task}-sft/model.safetensors")


@pytest.mark.long
def test_a_server_judges(judged):
    """It always says A, so a response wins where it stood first, which a hash draws: about half of the time."""
    n = 32
    queries, responses, references = ([f"{word} {i}" for i in range(n)] for word in ("say", "mine", "yours"))
    verdicts = judge.gold(queries, responses, references)
    assert set(verdicts) == {0.0, 1.0} and 8 <= sum(verdicts) <= 24
    assert judge.gold(queries, responses, references) == verdicts
    assert judge.gold(["say"], ["the same"], [" the same"]) == [0.5]


def test_without_a_server_one_line_says_so(monkeypatch):
    monkeypatch.setenv("JUDGE_URL", "http://127.0.0.1:9/v1")
    judge.server.cache_clear()
    with pytest.raises(SystemExit, match="no judge at JUDGE_URL=http://127.0.0.1:9/v1 .* start one"):
        judge.gold(["a"], ["b"], ["c"])
