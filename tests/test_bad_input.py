"""Bad input: one line that names the flag or file and what would be right, before a model loads, within a second."""

import json
import os
import shutil
import time

import pytest
import torch
import tyro
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import async_online_dpo
import async_ppo
import async_rloo
import sync_baseline
from tests import tiny
from tests.test_algorithm import DATA

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DPO, RLOO, PPO, SYNC = async_online_dpo, async_rloo, async_ppo, sync_baseline
CASES = [  # script, flags ({} is the folder of the tiny task), what the line must say
    (DPO, dict(batch_size=0), "--batch-size is 0: it must be above 0"),
    (DPO, dict(micro_batch_size=0), "--micro-batch-size is 0: it must be above 0"),
    (DPO, dict(samples_per_prompt=0), "--samples-per-prompt is 0: it must be above 0"),
    (DPO, dict(num_mini_batches=0), "--num-mini-batches is 0: it must be above 0"),
    (DPO, dict(num_epochs=0), "--num-epochs is 0: it must be above 0"),
    (DPO, dict(response_length=-3), "--response-length is -3: it must be above 0"),
    (DPO, dict(prompt_length=0), "--prompt-length is 0: it must be above 0"),
    (DPO, dict(temperature=0.0), "--temperature is 0.0: it must be above 0"),
    (DPO, dict(learning_rate=0.0), "--learning-rate is 0.0: it must be above 0"),
    (DPO, dict(learning_rate=float("nan")), "--learning-rate is nan: it must be above 0"),
    (DPO, dict(max_grad_norm=-1.0), "--max-grad-norm is -1.0: it must be above 0"),
    (DPO, dict(timeout=0.0), "--timeout is 0.0: it must be above 0"),
    (DPO, dict(eval_prompts=0), "--eval-prompts is 0: it must be above 0"),
    (DPO, dict(eval_every=-1), "--eval-every is -1: it must be 0 or more"),
    (DPO, dict(max_staleness=-1), "--max-staleness is -1: it must be 0 or more"),
    (DPO, dict(seed=-1), "--seed is -1: it must be 0 or more"),
    (DPO, dict(gpu_memory_utilization=0.0), "--gpu-memory-utilization is 0.0: it must be above 0"),
    (DPO, dict(total_episodes=31), "--total-episodes 31 is less than the 32 of one generated batch"),
    (DPO, dict(samples_per_prompt=3), "--batch-size 32 must be a multiple of 3, learners x samples per prompt"),
    (DPO, dict(samples_per_prompt=1), "--samples-per-prompt must be 2 or more"),
    (DPO, dict(placement="colocate"), "--placement colocate generates and learns in turn: it needs --max-staleness 0"),
    (DPO, dict(beta=0.0), "--beta is 0.0: it must be above 0"),
    (RLOO, dict(samples_per_prompt=1), "--samples-per-prompt must be 2 or more"),
    (RLOO, dict(kl_coef=-0.1), "--kl-coef is -0.1: it must be 0 or more"),
    (RLOO, dict(clip_range=0.0), "--clip-range is 0.0: it must be above 0"),
    (RLOO, dict(importance_cap=0.0), "--importance-cap is 0.0: it must be above 0"),
    (RLOO, dict(rloo_loss="tba", kl_coef=0.0), "--rloo-loss tba divides by it, so it must be above 0"),
    (PPO, dict(gamma=-1.1), "--gamma is -1.1: it must be 0 or more"),
    (PPO, dict(gae_lambda=-0.5), "--gae-lambda is -0.5: it must be 0 or more"),
    (PPO, dict(value_coef=-1.0), "--value-coef is -1.0: it must be 0 or more"),
    (PPO, dict(value_clip_range=0.0), "--value-clip-range is 0.0: it must be above 0"),
    (PPO, dict(value_model="{}/nothing"), "--value-model {}/nothing: "),
    (SYNC, dict(samples_per_prompt=1), "--samples-per-prompt must be 2 or more"),
    (DPO, dict(dataset="tasks/tldr-tny/data"), "run `python -m benchmark.tasks.tldr_tny` first"),
    (DPO, dict(model="tasks/tldr-tny/sft-m"), "run `python -m benchmark.tasks.tldr_tny` first"),
    (DPO, dict(model="{}/polcy"), "--model {}/polcy: "),
    (DPO, dict(model="{}/empty"), "--model {}/empty: "),
    (DPO, dict(model="{}/rm"), "--model {}/rm: it is a ['LlamaForSequenceClassification']: a policy must be a"),
    (DPO, dict(model="{}/no-eos"), "{}/no-eos: it needs an EOS token"),
    (DPO, dict(reward="{}/r"), "--reward {}/r: "),
    (DPO, dict(reward="{}/policy"), "--reward {}/policy: it is a ['LlamaForCausalLM'] with"),
    (DPO, dict(reward="{}/two-labels"), "with 2 labels: a judge must be a sequence classifier with one label"),
    (PPO, dict(value_model="{}/other-words"), "--value-model {}/other-words: it has another vocabulary than the"),
    (DPO, dict(reward=""), "--reward : "),
    (DPO, dict(model=""), "--model : "),
    (DPO, dict(model="tests.tiny:reward"), "--model tests.tiny:reward: "),
    (DPO, dict(reward="nowhere:reward"), "--reward nowhere:reward: No module named 'nowhere'"),
    (DPO, dict(reward="tests.tiny:rewrd"), "module 'tests.tiny' has no attribute 'rewrd'"),
    (DPO, dict(gold="tests.tiny:gld"), "--gold tests.tiny:gld: module 'tests.tiny' has no attribute 'gld'"),
    (DPO, dict(dataset="{}/dta"), "--dataset {}/dta, split train: "),
    (DPO, dict(train_split="trian"), "--dataset {}/data, split trian: "),
    (DPO, dict(eval_split="test"), "--dataset {}/data, split test: "),
    (DPO, dict(query_column="qury"), "--dataset {}/data, split train: "),
    (DPO, dict(reference_column="answer"), "--dataset {}/data, split validation: "),
    (DPO, dict(dataset="{}/numbers"), "--dataset {}/numbers, split train: "),
    (DPO, dict(dataset="{}/input_ids"), "--dataset {}/input_ids, split train: "),
    (DPO, dict(prompt_length=2), "split train: 0 of 256 prompts fit --prompt-length 2; 16 are needed"),
    (DPO, dict(batch_size=1024, total_episodes=1024), "split train: 256 of 256 prompts fit --prompt-length 32; 512"),
    (DPO, dict(model="{}/remote-code"), "--model {}/remote-code: "),
    (DPO, dict(output_dir="{}/data"), "--output-dir {}/data: it is not empty and holds no run: name a new folder"),
    (DPO, dict(output_dir="{}/policy/config.json"), "--output-dir {}/policy/config.json: it holds a finished run, or"),
    (DPO, dict(output_dir="{}/policy/config.json/run"), "config.json/run: [Errno 20] Not a directory"),
]  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The tiny task, and beside it things that are wrong."""
    folder = tiny.make(str(tmp_path_factory.mktemp("tiny")))
    os.mkdir(f"{folder}/empty")
    shutil.copytree(f"{folder}/policy", f"{folder}/no-eos")
    AutoTokenizer.from_pretrained(f"{folder}/policy", eos_token=None).save_pretrained(f"{folder}/no-eos")
    AutoConfig.from_pretrained(f"{folder}/policy", eos_token_id=None).save_pretrained(f"{folder}/no-eos")
    os.remove(f"{folder}/no-eos/generation_config.json")
    wrong = {"two-labels": dict(num_labels=2), "other-words": {}}
    for name, changes in wrong.items():
        shutil.copytree(f"{folder}/rm", f"{folder}/{name}")
        config = AutoConfig.from_pretrained(f"{folder}/rm")
        config.update(changes)
        config.save_pretrained(f"{folder}/{name}")
    tiny.tokenizer(["<eos>", "<pad>", "<unk>", "Q:", "A:"]).save_pretrained(f"{folder}/other-words")
    shutil.copytree(f"{folder}/rm", f"{folder}/pickled-rm")
    os.rename(f"{folder}/pickled-rm/model.safetensors", f"{folder}/pickled-rm/pytorch_model.bin")
    os.mkdir(f"{folder}/remote-code")
    with open(f"{folder}/remote-code/config.json", "w") as f:
        json.dump({"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config"}}, f)
    with open(f"{folder}/remote-code/strange.py", "w") as f:
        f.write(f"open('{folder}/code-was-run', 'w')")
    numbers = Dataset.from_dict({"query": [1, 2], "reference": ["a", "b"]})
    DatasetDict({"train": numbers, "validation": numbers}).save_to_disk(f"{folder}/numbers")
    taken = Dataset.from_dict({"query": ["Q: w1 A:"], "reference": ["w2"], "input_ids": ["w3"]})
    DatasetDict({"train": taken, "validation": taken}).save_to_disk(f"{folder}/input_ids")
    return folder


def refusal(script, task, monkeypatch, flags):
    """The line with which a script refuses its flags; loading a model fails the test."""
    for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(kind, "from_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
    base = dict(model=f"{task}/policy", reward=f"{task}/rm", gold="tests.tiny:reward", dataset=f"{task}/data")
    base |= dict(batch_size=32, total_episodes=192, prompt_length=32, response_length=12, dtype="float32")
    flags = {k: v.replace("{}", task) if isinstance(v, str) else v for k, v in flags.items()}
    affinity, threads = os.sched_getaffinity(0), torch.get_num_threads()
    start = time.monotonic()
    try:
        with pytest.raises((SystemExit, ValueError)) as stopped:
            script.main(script.Args(**base | flags))
    finally:
        os.sched_setaffinity(0, affinity)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    assert time.monotonic() - start < 2
    line = str(stopped.value)
    assert stopped.type is ValueError or line.startswith(f"{script.__name__}.py: ")
    assert "\n" not in line
    return line


@pytest.mark.parametrize("script, flags, message", CASES, ids=lambda x: getattr(x, "__name__", str(x))[:50])
def test_bad_input_gets_one_line(script, flags, message, task, monkeypatch, tmp_path):
    monkeypatch.chdir(HERE)
    before = sorted(os.listdir(f"{task}/data"))
    line = refusal(script, task, monkeypatch, {"output_dir": str(tmp_path / "run")} | flags)
    message = message.replace("{}", task)
    assert message in line and not line.endswith(": ")
    assert not os.path.exists(f"{task}/code-was-run")
    assert sorted(os.listdir(f"{task}/data")) == before and not os.listdir(tmp_path)  # nothing is lost, nothing written


def test_weights_that_are_no_safetensors_get_one_line(task):
    args = DPO.Args(reward=f"{task}/pickled-rm")
    with pytest.raises(SystemExit, match="--reward .*/pickled-rm: .*safetensors"):
        DPO.make_reward("reward", DATA, tiny.tokenizer(), [1], args, None)


def test_a_reward_model_without_its_head_gets_one_line(task, tmp_path):
    shutil.copytree(f"{task}/rm", tmp_path / "rm")
    weights = load_file(tmp_path / "rm/model.safetensors")
    weights.pop("score.weight")
    save_file(weights, tmp_path / "rm/model.safetensors", {"format": "pt"})
    args = DPO.Args(reward=str(tmp_path / "rm"))
    with pytest.raises(SystemExit, match="--reward .*/rm: it has no .*score.weight"):
        DPO.make_reward("reward", DATA, tiny.tokenizer(), [1], args, None)


@pytest.mark.parametrize(
    "script, processes, gpus, flags, message",
    [
        (DPO, 4, 4, {}, "4 learners need as many GPUs; of 4, 3 can learn"),
        (SYNC, 3, 2, dict(placement="colocate"), "3 learners need as many GPUs; of 2, 2 can learn"),
        (DPO, 3, 0, {}, "--batch-size 32 must be a multiple of 6, learners x samples per prompt"),
    ],
)
def test_more_processes_than_devices(script, processes, gpus, flags, message, task, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert message in refusal(script, task, monkeypatch, dict(batch_size=48 if gpus else 32) | flags)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--dpo-loss=dop", "--dpo-loss"),
        ("--max-stalenes=1", "--max-staleness"),
        ("--seed=x", "--seed"),
        ("--beta=-1", "--beta is -1.0: it must be above 0"),
    ],
)
def test_a_wrong_flag_is_shown_by_tyro(flag, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        tyro.cli(DPO.Args, args=[flag])
    output = capsys.readouterr()
    assert message in output.out + output.err
