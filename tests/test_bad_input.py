"""Bad input: one line that names the flag or file and what would be right, before a model loads, within a second."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import async_online_dpo
import async_ppo
import async_rloo
import sync_baseline
from tests import tiny

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DPO, RLOO, PPO, SYNC = async_online_dpo, async_rloo, async_ppo, sync_baseline
CASES = [  # script, flags ({} is the folder of the tiny task), what the line must say
    (DPO, dict(batch_size=0), "--batch-size is 0: it must be above 0"),
    (DPO, dict(micro_batch_size=0), "--micro-batch-size is 0: it must be above 0"),
    (DPO, dict(samples_per_prompt=0), "--samples-per-prompt is 0: it must be above 0"),
    (DPO, dict(num_mini_batches=0), "--num-mini-batches is 0: it must be above 0"),
    (DPO, dict(num_epochs=0), "--num-epochs is 0: it must be above 0"),
    (DPO, dict(response_length=-3), "--response-length is -3: it must be above 0"),
    (DPO, dict(prompt_length=0), "--prompt-length is 0: it must be 2 or more"),
    (DPO, dict(temperature=0.0), "--temperature is 0.0: it must be above 0"),
    (DPO, dict(learning_rate=0.0), "--learning-rate is 0.0: it must be above 0"),
    (DPO, dict(learning_rate=float("nan")), "--learning-rate is nan: it must be above 0"),
    (DPO, dict(max_grad_norm=-1.0), "--max-grad-norm is -1.0: it must be above 0"),
    (DPO, dict(timeout=0.0), "--timeout is 0.0: it must be above 0"),
    (DPO, dict(eval_prompts=0), "--eval-prompts is 0: it must be above 0"),
    (DPO, dict(eval_every=-1), "--eval-every is -1: it must be 0 or more"),
    (DPO, dict(max_staleness=-1), "--max-staleness is -1: it must be 0 or more"),
    (DPO, dict(seed=-1), "--seed is -1: it must be 0 or more"),
    (DPO, dict(gpu_memory_utilization=1.5), "--gpu-memory-utilization is 1.5: it must be 1 or less"),
    (DPO, dict(total_episodes=31), "--total-episodes 31 is less than one generated batch of 32 completions"),
    (DPO, dict(samples_per_prompt=3), "take a multiple of 3, such as 30"),
    (DPO, dict(samples_per_prompt=1), "--samples-per-prompt is 1: it must be 2 or more"),
    (DPO, dict(beta=0.0), "--beta is 0.0: it must be above 0"),
    (RLOO, dict(samples_per_prompt=1), "--samples-per-prompt is 1: it must be 2 or more"),
    (RLOO, dict(kl_coef=-0.1), "--kl-coef is -0.1: it must be 0 or more"),
    (RLOO, dict(clip_range=0.0), "--clip-range is 0.0: it must be above 0"),
    (RLOO, dict(importance_cap=0.0), "--importance-cap is 0.0: it must be above 0"),
    (RLOO, dict(rloo_loss="tba", kl_coef=0.0), "--rloo-loss tba divides by it, so it must be above 0"),
    (PPO, dict(gamma=1.1), "--gamma is 1.1: it must be 1 or less"),
    (PPO, dict(gae_lambda=-0.5), "--gae-lambda is -0.5: it must be 0 or more"),
    (PPO, dict(value_coef=-1.0), "--value-coef is -1.0: it must be 0 or more"),
    (PPO, dict(value_clip_range=0.0), "--value-clip-range is 0.0: it must be above 0"),
    (PPO, dict(value_model="{}/nothing"), "--value-model {}/nothing is neither a folder"),
    (SYNC, dict(algo="rloo", samples_per_prompt=1), "--samples-per-prompt is 1: it must be 2 or more"),
    (SYNC, dict(algo="ppo", gamma=-1.0), "--gamma is -1.0: it must be 0 or more"),
    (SYNC, dict(algo="rloo", rloo_loss="copg", kl_coef=0.0), "--rloo-loss copg divides by it"),
    (DPO, dict(model="tasks/tldr-tiny/nothing"), "run `python -m benchmark.tasks.tldr_tiny` first"),
    (DPO, dict(model="{}/polcy"), "a folder with a config.json nor a model on the Hub, did you mean {}/policy?"),
    (DPO, dict(model="{}/empty"), "--model {}/empty is neither a folder with a config.json nor a model on the Hub"),
    (DPO, dict(model="{}/rm"), "--model {}/rm is a LlamaForSequenceClassification: it must be a language model"),
    (DPO, dict(model="{}/no-eos"), "needs an EOS token and another pad token; it has eos None"),
    (DPO, dict(model="{}/pad-is-eos"), "needs an EOS token and another pad token; it has eos '<eos>', pad '<eos>'"),
    (DPO, dict(reward="{}/r"), "--reward {}/r is neither a folder with a config.json nor a model on the Hub"),
    (DPO, dict(reward="{}/policy"), "--reward {}/policy is a LlamaForCausalLM with"),
    (DPO, dict(reward="{}/two-labels"), "with 2 labels: it must be a sequence-classification model with one"),
    (DPO, dict(reward="{}/other-words"), "--reward {}/other-words has another vocabulary than the policy"),
    (DPO, dict(reward="nowhere:reward"), "--reward nowhere:reward does not import: No module named 'nowhere'"),
    (DPO, dict(reward="tests.tiny:rewrd"), "module 'tests.tiny' has no attribute 'rewrd'"),
    (DPO, dict(reward="tests.tiny:WORDS"), "--reward tests.tiny:WORDS is no function"),
    (DPO, dict(gold="tests.tiny:gld"), "--gold tests.tiny:gld does not import"),
    (DPO, dict(dataset="{}/dta"), "--dataset {}/dta does not load, did you mean {}/data?"),
    (DPO, dict(train_split="trian"), "{}/data has no split trian: it has train, validation, did you mean train?"),
    (DPO, dict(eval_split="test"), "{}/data has no split test: it has train, validation"),
    (DPO, dict(query_column="qury"), "split train of {}/data has the columns query, reference, did you mean query?"),
    (DPO, dict(reference_column="answer"), "--reference-column answer: split train of {}/data has the columns"),
    (DPO, dict(dataset="{}/numbers"), "--query-column query: it must hold text, and holds int"),
    (DPO, dict(dataset="{}/input_ids"), "{}/input_ids has a column input_ids, a name that the script needs itself"),
    (DPO, dict(dataset="{}/responses"), "{}/responses has a column responses, a name that the script needs itself"),
    (DPO, dict(prompt_length=2), "has 0 prompts within --prompt-length 2 tokens: every learner"),
    (DPO, dict(prompt_length=120), "--prompt-length 120 + --response-length 12 + 1 is more than the 128 positions of"),
    (DPO, dict(batch_size=1024, total_episodes=1024), "256 prompts are fewer than the 512 of one batch"),
    (DPO, dict(model="{}/pickled"), "--model {}/pickled has no .safetensors file: no other format is read"),
    (DPO, dict(reward="{}/pickled-rm"), "--reward {}/pickled-rm has no .safetensors file: no other format is read"),
    (DPO, dict(model="{}/remote-code"), "contains custom code which must be executed"),
    (DPO, dict(output_dir="{}/data"), "--output-dir {}/data is not empty: name a new folder"),
    (DPO, dict(output_dir="{}/policy/config.json"), "--output-dir {}/policy/config.json is a file: name a new folder"),
]  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The tiny task, and beside it things that are wrong."""
    folder = tiny.make(str(tmp_path_factory.mktemp("tiny")))
    os.mkdir(f"{folder}/empty")
    for name, tokens in {"no-eos": dict(eos_token=None), "pad-is-eos": dict(pad_token="<eos>", unk_token=None)}.items():
        shutil.copytree(f"{folder}/policy", f"{folder}/{name}")
        AutoTokenizer.from_pretrained(f"{folder}/policy", **tokens).save_pretrained(f"{folder}/{name}")
    wrong = {"two-labels": dict(num_labels=2), "other-words": {}}
    for name, changes in wrong.items():
        shutil.copytree(f"{folder}/rm", f"{folder}/{name}")
        config = AutoConfig.from_pretrained(f"{folder}/rm")
        config.update(changes)
        config.save_pretrained(f"{folder}/{name}")
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/rm")
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(f"{folder}/other-words")
    for name, source in {"pickled": "policy", "pickled-rm": "rm"}.items():
        shutil.copytree(f"{folder}/{source}", f"{folder}/{name}")
        os.rename(f"{folder}/{name}/model.safetensors", f"{folder}/{name}/pytorch_model.bin")
    os.mkdir(f"{folder}/remote-code")
    with open(f"{folder}/remote-code/config.json", "w") as f:
        json.dump({"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config"}}, f)
    with open(f"{folder}/remote-code/strange.py", "w") as f:
        f.write(f"open('{folder}/code-was-run', 'w')")
    numbers = Dataset.from_dict({"query": [1, 2], "reference": ["a", "b"]})
    DatasetDict({"train": numbers, "validation": numbers}).save_to_disk(f"{folder}/numbers")
    for name in ("input_ids", "responses"):
        taken = Dataset.from_dict({"query": ["Q: w1 A:"], "reference": ["w2"], name: ["w3"]})
        DatasetDict({"train": taken, "validation": taken}).save_to_disk(f"{folder}/{name}")
    return folder


def refusal(script, task, monkeypatch, flags):
    """The line with which a script's main() ends; loading a model fails the test."""
    for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(kind, "from_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
    base = dict(model=f"{task}/policy", reward=f"{task}/rm", gold="tests.tiny:reward", dataset=f"{task}/data")
    base |= dict(batch_size=32, total_episodes=192, prompt_length=32, response_length=12, dtype="float32")
    flags = {k: v.replace("{}", task) if isinstance(v, str) else v for k, v in flags.items()}
    affinity, threads = os.sched_getaffinity(0), torch.get_num_threads()
    start = time.monotonic()
    try:
        with pytest.raises(SystemExit) as stopped:
            script.main(script.Args(**base | flags))
    finally:
        os.sched_setaffinity(0, affinity)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    assert time.monotonic() - start < 1
    line = str(stopped.value)
    assert line.startswith(f"{script.__name__}.py: ") and "\n" not in line
    return line


@pytest.mark.parametrize("script, flags, message", CASES, ids=lambda x: getattr(x, "__name__", str(x))[:50])
def test_bad_input_gets_one_line(script, flags, message, task, monkeypatch):
    assert message.replace("{}", task) in refusal(script, task, monkeypatch, flags)
    assert not os.path.exists(f"{task}/code-was-run")
    assert sorted(os.listdir(f"{task}/data")) == ["dataset_dict.json", "train", "validation"]  # nothing is lost


@pytest.mark.parametrize(
    "script, processes, gpus, flags, message",
    [
        (DPO, 4, 4, {}, "4 learners on 4 GPU(s): start 3, the last 1 are vLLM's"),
        (DPO, 3, 4, dict(generator_tensor_parallel=2), "3 learners on 4 GPU(s): start 2, the last 2 are vLLM's"),
        (DPO, 1, 0, dict(generator_tensor_parallel=2), "--generator-tensor-parallel 2 needs as many GPUs beside the"),
        (DPO, 1, 2, dict(generator_tensor_parallel=2), "as many GPUs beside the learners'; there are 2"),
        (DPO, 2, 0, dict(eval_prompts=1), "--eval-prompts 1 is less than the 2 learners: raise it"),
        (SYNC, 3, 2, dict(placement="colocate"), "3 learners on 2 GPU(s): start 2"),
        (DPO, 3, 0, {}, "--batch-size 32 does not divide into 3 learner(s) x 2 samples per prompt: take a mul"),
    ],
)
def test_more_processes_than_devices(script, processes, gpus, flags, message, task, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert message in refusal(script, task, monkeypatch, dict(batch_size=48 if gpus else 32) | flags)


def test_too_little_shared_memory(task, monkeypatch):
    policy = AutoModelForCausalLM.from_pretrained(f"{task}/policy")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 20, 0, 1 << 20))
    with pytest.raises(SystemExit, match="/dev/shm has 1 MiB free and the snapshots of the weights need 1 MiB"):
        DPO.check_shared_memory(policy, DPO.Args(max_staleness=1, dtype="float32"))


@pytest.mark.parametrize(
    "flag, message", [("--dpo-loss=dop", "--dpo-loss"), ("--max-stalenes=1", "--max-staleness"), ("--seed=x", "--seed")]
)
def test_a_wrong_flag_names_the_right_one(flag, message):
    done = subprocess.run([sys.executable, "async_online_dpo.py", flag], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stdout + done.stderr
