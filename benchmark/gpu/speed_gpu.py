"""Times of one policy of random weights, asynchronous (S = 1) against synchronous (S = 0), one vLLM engine for both.

    python3 .gpu/speed_gpu.py SHAPE FOLDER      from the repository's root; SHAPE: a key of SHAPES

Writes FOLDER/SHAPE.ready when the engine is there, waits for FOLDER/SHAPE.go, then runs async_online_dpo.main() twice
and writes FOLDER/SHAPE.jsonl, a line a run, and FOLDER/SHAPE-S1, FOLDER/SHAPE-S0 with the usual files of a run.
Environment: LAUNCH as in launch.py (kv=4 unless set: engines that start side by side must not profile memory),
SPEED_BATCHES (8), SPEED_BATCH (256 completions), SPEED_PROMPT, SPEED_RESPONSE (tokens), SPEED_MICRO.
"""

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
if __name__ == "__mp_main__":  # the engine's process: it ends with its parent
    import ctypes
    import signal

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(os.environ["ENGINE_PARENT"]):
        os._exit(1)
    os.environ["ENGINE_PARENT"] = str(os.getpid())
    os.setsid()

SHAPES = {  # hidden size, layers, heads, key-value heads, head size, intermediate size, vocabulary, tied
    "tiny": (64, 2, 2, 2, 32, 128, 512, True),
    "tiny2": (128, 2, 2, 2, 64, 256, 1024, False),
    "135M": (576, 30, 9, 3, 64, 1536, 49152, True),  # SmolLM2-135M
    "410M": (1024, 24, 16, 4, 64, 2736, 50304, False),  # as large as Pythia-410m
    "1B": (2048, 16, 16, 4, 128, 5504, 50304, False),  # as large as Pythia-1b
    "2.8B": (2560, 32, 20, 4, 128, 6912, 50304, False),  # as large as Pythia-2.8b
}
TASK = "tasks/tldr-tiny"


def number(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def reward(prompts: list[str], responses: list[str], **columns) -> list[float]:
    return [float(len(set(response.split()))) for response in responses]


def make_model(folder: str, shape: tuple, device) -> int:
    """A Llama of random weights, bfloat16 on the disk, with tldr-tiny's tokenizer. Returns its number of parameters."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, kv_heads, head_dim, intermediate, vocabulary, tied = shape
    tokenizer = AutoTokenizer.from_pretrained(f"{TASK}/sft-m")
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, intermediate_size=intermediate, tie_word_embeddings=tied,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def make_data(folder: str, longest: int, rows: int = 1024) -> None:
    """Prompts of random words, half of the longest to the longest."""
    import numpy as np
    from datasets import Dataset, DatasetDict
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(f"{TASK}/sft-m")
    words = [w for w in tokenizer.get_vocab() if w.strip() and not w.startswith("<")]
    words = [w for w in words if len(tokenizer(w).input_ids) == 1]
    random = np.random.default_rng(0)
    counts = random.integers(longest // 2, longest - 2, rows)
    lines = [{"query": " ".join(random.choice(words, n)), "reference": "a"} for n in counts]
    DatasetDict({"train": Dataset.from_list(lines), "validation": Dataset.from_list(lines[:8])}).save_to_disk(folder)


def engine_memory() -> dict:
    """MiB of every process on the GPU, by nvidia-smi."""
    import subprocess

    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()
        return {int(pid): int(mib) for pid, mib in (line.split(",") for line in lines)}
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


def main(name: str, folder: str) -> None:
    import launch

    launch.MODES.setdefault("kv", "4")
    dpo = launch.load("async_online_dpo.py")
    import torch

    from benchmark import timeline

    cuda, work = torch.cuda.is_available(), Path(folder)
    work.mkdir(parents=True, exist_ok=True)
    times = {"begin": time.time()}
    model, data = str(work / f"{name}-model"), str(work / f"{name}-data")
    batch, prompt, response = number("SPEED_BATCH", 256), number("SPEED_PROMPT", 256), number("SPEED_RESPONSE", 128)
    parameters = make_model(model, SHAPES[name], "cuda" if cuda else "cpu")
    make_data(data, prompt)
    times["model"] = time.time()

    def arguments(staleness: int):
        return dpo.Args(
            model=model, dataset=data, reward="speed_gpu:reward", gold="", samples_per_prompt=2, batch_size=batch,
            total_episodes=number("SPEED_BATCHES", 8) * batch, micro_batch_size=number("SPEED_MICRO", 32),
            prompt_length=prompt, response_length=response, temperature=1.0, eval_every=0, dpo_loss="best_of_k",
            learning_rate=1e-5, max_staleness=staleness, output_dir=str(work / f"{name}-S{staleness}"), timeout=150,
            gpu_memory_utilization=0.12,
        )  # fmt: skip

    args = arguments(1)
    devices = dpo.Devices(args)
    policy = dpo.Policy(args).to(devices.device)
    first = dpo.snapshot(policy, 0, list(range(5, 40)), args, devices, work / f"{name}-engine")
    del policy
    affinity = os.sched_getaffinity(0)
    llm, send_weights = dpo.start_engine(args, devices, first)
    first.tensors = None
    os.sched_setaffinity(0, affinity)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    times["engine"] = time.time()
    print(f"{name}: {parameters / 1e6:.0f} M parameters; model {times['model'] - times['begin']:.1f} s, engine "
          f"{times['engine'] - times['model']:.1f} s", flush=True)  # fmt: skip
    (work / f"{name}.ready").touch()
    while not (work / f"{name}.go").exists():
        time.sleep(0.2)

    class Shared:  # an engine for two runs: neither may shut it down
        llm_engine = SimpleNamespace(engine_core=SimpleNamespace(resources=SimpleNamespace(engine_dead=False)))

        def __getattr__(self, attribute):
            return getattr(llm, attribute)

    dpo.start_engine = lambda *_: (Shared(), send_weights)  # every run begins by sending its weights
    dpo.Generator.close = lambda generator: generator.devices.requests.put(None)  # not the engine
    for staleness in (1, 0):
        line = {"step": f"speed-{name}-S{staleness}", "shape": name, "parameters": parameters, "S": staleness}
        line |= {"batch": batch, "prompt": prompt, "response": response, "micro": number("SPEED_MICRO", 32)}
        line |= {"engine_start": round(times["engine"] - times["model"], 1), "launch": dict(launch.MODES)}
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.time()
        try:
            dpo.main(arguments(staleness))
            run = work / f"{name}-S{staleness}"
            records = timeline.lines(run, "metrics.jsonl")
            summary = timeline.summary(records, staleness)
            seconds = summary["seconds"]
            length = sum(r["response_length"] for r in records) / len(records)
            line |= {k: summary[k] for k in ("generation", "learning", "step", "ideal_step", "overlap", "overlap_ratio",
                                             "overlap_ratio_ideal", "timed_steps")}  # fmt: skip
            line |= {f"s_{k}": v for k, v in seconds.items()}
            line["step"], line["step_seconds"] = f"speed-{name}-S{staleness}", summary["step"]
            line["response_tokens_per_second"] = batch * length / seconds["generate"]
            line["probe_error"] = max(r["probe_error"] for r in records)
            line["kl"] = records[-1]["kl"]  # it moves: other weights have arrived
            line["lags"] = [r["lag"] for r in records]
            tokens = batch * (0.75 * prompt + length)  # learned from and judged by the reference: 6 P and 2 P a token
            line["learner_tflops"] = 8 * parameters * tokens / (seconds["label"] + seconds["learn"]) / 1e12
            line["ok"] = True
        except BaseException as error:
            traceback.print_exc()
            line |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
        if cuda:
            line["learner_peak_mib"] = torch.cuda.max_memory_allocated() >> 20
            memory = engine_memory()
            line["learner_process_mib"] = memory.pop(os.getpid(), None)
            line["other_processes_mib"] = memory
        line["wall"] = round(time.time() - start, 1)
        with open(work / f"{name}.jsonl", "a") as f:
            print(json.dumps(line), file=f)
        print(json.dumps(line), flush=True)
        gc.unfreeze()
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    (work / f"{name}.done").touch()
    sys.stdout.flush()
    llm.llm_engine.engine_core.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
