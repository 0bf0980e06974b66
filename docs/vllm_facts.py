"""Ten facts about vLLM 0.32 on CPUs, to be seen: python docs/vllm_facts.py [NUMBER ...], about five minutes for all.

docs/vllm.md says what each of them means. The model is tiny and random, so nothing is downloaded.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

import psutil
import torch
from transformers import AutoModelForCausalLM

from tests import tiny

PROMPTS = [list(range(5, 60)) + [5 + i] * 40 for i in range(16)]  # 95 tokens each
PROBE = list(range(5, 60))


def engine(model: str, **options):
    """An engine in a process of its own."""
    from vllm import LLM
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    common = dict(dtype="float32", max_model_len=128, enforce_eager=True, skip_tokenizer_init=True, block_size=32)
    common |= dict(distributed_executor_backend=UniProcExecutor, disable_log_stats=True)
    return LLM(model=model, **common | options)


def sample(llm, prompts: list[list[int]], **options) -> list:
    from vllm import SamplingParams

    params = SamplingParams(**dict(max_tokens=1, temperature=0.0, logprobs=0, detokenize=False) | options)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def probe(llm) -> torch.Tensor:
    """Log-probabilities of the tokens of a fixed text."""
    values = sample(llm, [PROBE], prompt_logprobs=0)[0].prompt_logprobs[1:]
    return torch.tensor([next(iter(value.values())).logprob for value in values])


def other_weights(folder: str, tied: bool = True) -> str:
    """The same model with other weights, in a folder of its own."""
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/policy", dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    path = f"{folder}/other-{tied}"
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def processes() -> dict[int, str]:
    """vLLM's processes that this one has started, by number."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            found[child.pid] = " ".join(child.cmdline()).strip()
    return {pid: name for pid, name in found.items() if name.startswith("VLLM")}


def close(llm) -> None:
    llm.llm_engine.engine_core.shutdown()


def reload(llm, path: str) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_path": path})


def tied_output_layer(folder: str) -> None:
    for tied in (True, False):
        path = other_weights(folder, tied)
        fresh = engine(path)
        expected = probe(fresh)
        close(fresh)
        llm = engine(f"{folder}/policy", hf_overrides={"tie_word_embeddings": tied})
        reload(llm, path)
        difference = (probe(llm) - expected).abs().max().item()
        close(llm)
        print(f"tie_word_embeddings={tied}: after reload_weights log-probabilities are off by {difference:.6f}")


def seeds_and_half_read_prompts(folder: str) -> None:
    for chunked in (False, True):
        most = 128 if chunked else 2048  # tokens of one step: less than two prompts
        llm = engine(f"{folder}/policy", enable_chunked_prefill=chunked, max_num_batched_tokens=most)
        try:
            sample(llm, PROMPTS, temperature=1.0, seed=1)
            print(f"enable_chunked_prefill={chunked}: sampled with a seed for each request")
        except Exception as error:
            print(f"enable_chunked_prefill={chunked}: {type(error).__name__}, and the engine is dead")
        close(llm)


def executors(folder: str) -> None:
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    for backend in ("uni", UniProcExecutor):
        llm = engine(f"{folder}/policy", distributed_executor_backend=backend)
        print(f"distributed_executor_backend={backend}: processes {', '.join(processes().values())}")
        close(llm)


def an_engine_outlives_its_parent(folder: str) -> None:
    child = subprocess.Popen([sys.executable, __file__, "parent", folder], stdout=subprocess.PIPE, text=True)
    line = next(line for line in child.stdout if line.startswith("engine"))
    pid = int(line.split()[1])
    child.kill()
    child.wait()
    time.sleep(10)
    print(f"10 s after its parent was killed the engine is {'alive' if psutil.pid_exists(pid) else 'gone'}")
    if psutil.pid_exists(pid):
        os.kill(pid, signal.SIGKILL)


def parent(folder: str) -> None:
    llm = engine(f"{folder}/policy")
    print(f"engine {next(iter(processes()))}", flush=True)
    time.sleep(600)
    close(llm)


def a_death_that_is_not_told(folder: str) -> None:
    llm = engine(f"{folder}/policy")
    thread = threading.Thread(target=sample, args=(llm, PROMPTS * 64), kwargs=dict(max_tokens=30), daemon=True)
    thread.start()
    time.sleep(1)
    for pid in processes():
        os.kill(pid, signal.SIGKILL)
    thread.join(timeout=20)
    dead = llm.llm_engine.engine_core.resources.engine_dead
    print(f"20 s after the engine was killed: the thread waits {thread.is_alive()}; the flag engine_dead is {dead}")


def equal_batches(folder: str) -> None:
    from vllm import SamplingParams

    params = [SamplingParams(max_tokens=30, seed=i, logprobs=0, detokenize=False) for i in range(256)]
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS * 16]
    llm = engine(f"{folder}/policy", enable_chunked_prefill=False)

    def paused():
        llm.sleep(level=0, mode="keep")
        llm.enqueue(prompts, params, use_tqdm=False)
        llm.wake_up(tags=["scheduling"])
        return llm.wait_for_completion(use_tqdm=False)

    ways = {"generate": lambda: llm.generate(prompts, params, use_tqdm=False), "sleep, enqueue, wake_up": paused}
    for name, way in ways.items():
        runs = []
        for _ in range(3):
            llm.reset_prefix_cache()
            outputs = [output.outputs[0] for output in way()]
            runs.append([value.logprob for o in outputs for step in o.logprobs for value in step.values()])
        equal = sum(a == b for a, b in zip(runs[0], runs[1])), sum(a == b for a, b in zip(runs[0], runs[2]))
        print(f"{name}: of {len(runs[0])} log-probabilities {equal[0]} and {equal[1]} came again to the last bit")
    close(llm)


def prefix_cache_and_weights(folder: str) -> None:
    path, values = other_weights(folder, tied=False), {}
    llm = engine(f"{folder}/policy", hf_overrides={"tie_word_embeddings": False}, enable_prefix_caching=True)

    def first_token() -> float:
        return next(iter(sample(llm, PROMPTS[:1])[0].outputs[0].logprobs[0].values())).logprob

    values["old weights"] = first_token()
    reload(llm, path)
    values["new weights, old cache"] = first_token()
    llm.reset_prefix_cache()
    values["new weights, empty cache"] = first_token()
    close(llm)
    print("log-probability of the first token: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))


def which_logprobs(folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/policy", dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor(PROMPTS[:1])).logits[0, -1]
    for mode in ("raw_logprobs", "processed_logprobs"):
        llm = engine(f"{folder}/policy", logprobs_mode=mode)
        token, value = next(iter(sample(llm, PROMPTS[:1], temperature=0.5, seed=1)[0].outputs[0].logprobs[0].items()))
        plain, sampled = (torch.log_softmax(logits / t, 0)[token].item() for t in (1.0, 0.5))
        print(f"{mode}: {value.logprob:.4f}; softmax of logits {plain:.4f}, of logits / temperature {sampled:.4f}")
        close(llm)


def blocks_of_the_cache(folder: str) -> None:
    for size in (None, 32):
        llm = engine(f"{folder}/policy", block_size=size, enable_prefix_caching=True)
        sample(llm, PROMPTS[:1])
        cached = sample(llm, PROMPTS[:1])[0].num_cached_tokens
        print(f"block_size={size}: of the same prompt of {len(PROMPTS[0])} tokens {cached} were read from the cache")
        close(llm)


def the_script_runs_twice(folder: str) -> None:
    code = "import os\nprint('top level of the script as', __name__, flush=True)\n"
    code += f"if __name__ == '__main__':\n    import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code += f"    import vllm_facts\n    vllm_facts.close(vllm_facts.engine({folder + '/policy'!r}))\n"
    Path(folder, "script.py").write_text(code)
    done = subprocess.run([sys.executable, f"{folder}/script.py"], capture_output=True, text=True)
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("top level")))


FACTS = [tied_output_layer, prefix_cache_and_weights, which_logprobs, seeds_and_half_read_prompts, equal_batches]
FACTS += [executors, blocks_of_the_cache, a_death_that_is_not_told, an_engine_outlives_its_parent]
FACTS += [the_script_runs_twice]

if __name__ == "__main__":
    if sys.argv[1:2] == ["parent"]:
        parent(sys.argv[2])
    else:
        with tempfile.TemporaryDirectory() as folder:
            tiny.make(folder)
            for number in map(int, sys.argv[1:] or range(1, len(FACTS) + 1)):
                print(f"{number}. {FACTS[number - 1].__name__.replace('_', ' ')}", flush=True)
                FACTS[number - 1](folder)
