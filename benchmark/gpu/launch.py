"""Run a script of the project with changes that none of its flags makes (fallbacks for a first run on a GPU):
    LAUNCH=eager,reload python3 .gpu/launch.py async_online_dpo.py [flags of the script]
LAUNCH, separated by commas:
  eager      vLLM without torch.compile and without CUDA graphs
  nocompile  vLLM with CUDA graphs of decoding, without torch.compile
  reload     weights by a file in /dev/shm that vLLM reads (as on the CPU), in place of CUDA IPC
  kv=GIB     a cache of so many GiB, and no profiling of memory while the learner loads beside it
  seqs=N     at most N sequences at once (smaller CUDA graphs: a quicker start)
  sync       no asynchronous scheduling in vLLM
  attn=NAME  an attention backend, such as TRITON_ATTN
  v1         vLLM's older model runner
  verbose    vLLM's own log
"""

import ctypes
import importlib.util
import os
import shutil
import signal
import sys

if __name__ == "__mp_main__":  # the engine's process: it ends with its parent
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(os.environ["ENGINE_PARENT"]):
        os._exit(1)
    os.environ["ENGINE_PARENT"] = str(os.getpid())
    os.setsid()

MODES = dict(item.partition("=")[::2] for item in os.environ.get("LAUNCH", "").split(",") if item)


def engine_options(cuda: bool) -> dict:
    """What LLM gets in place of what the script gives it."""
    options = {}
    if "eager" in MODES:
        options["enforce_eager"] = True
    if "nocompile" in MODES and cuda:
        options |= dict(enforce_eager=False, compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"})
    if "kv" in MODES:
        options["kv_cache_memory_bytes"] = int(float(MODES["kv"] or 4) * 2**30)
    if "seqs" in MODES:
        options["max_num_seqs"] = int(MODES["seqs"])
    if "sync" in MODES:
        options["async_scheduling"] = False
    if "attn" in MODES:
        options["attention_backend"] = MODES["attn"]
    return options


def reload_sender(llm, devices):
    """In place of cuda_sender: write a snapshot where the CPU path has it, and let vLLM read it."""
    from safetensors.torch import save_file

    def send_weights(weights) -> None:
        shutil.copytree(
            llm.llm_engine.model_config.model, weights.folder, ignore=shutil.ignore_patterns("*.safetensors")
        )
        tensors = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}
        save_file(tensors, weights.folder / "model.safetensors")
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights.folder)})

    return send_weights


def load(script: str):
    """The script as a module, with the changes that LAUNCH names."""
    sys.path[:0] = [os.getcwd()]
    if "v1" in MODES:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if "verbose" in MODES:
        os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
    name = os.path.splitext(os.path.basename(script))[0]
    spec = importlib.util.spec_from_file_location(name, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    start_engine = module.start_engine

    def started(args, devices, weights):
        import vllm

        real, options = vllm.LLM, engine_options(devices.device.type == "cuda")
        if "reload" in MODES:
            options["weight_transfer_config"] = None
        vllm.LLM = lambda **given: real(**given | options)
        try:
            return start_engine(args, devices, weights)
        finally:
            vllm.LLM = real

    module.start_engine = started
    if "reload" in MODES:
        module.cuda_sender = reload_sender
    return module


if __name__ == "__main__":
    module = load(sys.argv[1])
    sys.argv = sys.argv[1:]
    import tyro

    module.main(tyro.cli(module.Args))
