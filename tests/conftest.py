"""Fixtures: the tiny task, one real vLLM engine for all tests of a session, and main() of a script with that engine."""

import contextlib
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import async_online_dpo as script
from tests import tiny
from tests.runs import flags

os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}
ON_CPUS = ("test_run", "test_failures", "test_torchrun", "test_paper")  # float32 to the bit, engines in /proc, cores


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also the slow, random and repeated tests")


def pytest_collection_modifyitems(config, items):
    """Leave out the long tests, unless asked for; on a machine with GPUs those that need a vLLM on CPUs."""
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="long: make test-long"))
        if torch.cuda.is_available() and item.module.__name__.rpartition(".")[2] in ON_CPUS:
            item.add_marker(pytest.mark.skip(reason="needs vLLM's build for CPUs"))


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    return tiny.make(str(tmp_path_factory.mktemp("tiny")))


class SharedEngine:
    """One real engine for many runs."""

    def __init__(self, llm):
        alive = SimpleNamespace(engine_dead=False)
        self.llm, self.llm_engine = llm, SimpleNamespace(engine_core=SimpleNamespace(resources=alive))

    def __getattr__(self, name):
        return getattr(self.llm, name)


@contextlib.contextmanager
def real_engine(args, folder):
    """(llm, send_weights) of a real vLLM in its default layout: engine in a child process, on its own cores."""
    affinity, threads = os.sched_getaffinity(0), torch.get_num_threads()
    devices = script.Devices(args)
    weights = script.snapshot(script.Policy(args), 0, [5, 6, 7], args, devices, Path(folder))
    llm, send_weights = script.start_engine(args, devices, weights)
    os.sched_setaffinity(0, affinity)
    yield SharedEngine(llm), send_weights
    llm.llm_engine.engine_core.shutdown()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def engine(task, tmp_path_factory):
    with real_engine(script.Args(**flags(task)), str(tmp_path_factory.mktemp("weights"))) as engine:
        yield engine


def run_main(engine, module, args, before_load=lambda weights: None, before_label=lambda: None):
    """main() of a script with a shared engine. Returns the rollouts as they were received."""
    llm, send_weights = engine
    affinity = os.sched_getaffinity(0)
    rollouts, make_batch = [], module.make_batch
    receive = module.Generator.receive

    def send(weights):
        before_load(weights)
        send_weights(weights)

    def slow_batch(*args):
        before_label()
        return make_batch(*args)

    def record(generator, request, version):
        rollout = receive(generator, request, version)
        if request.name.startswith("batch"):
            rollouts.append(rollout)
        return rollout

    def close_and_wait(generator):
        generator.devices.requests.queue.clear()
        generator.devices.requests.put(None)  # close() would end the engine too, and the next test needs it
        if generator.is_alive():  # else the run ended before its start
            generator.join(60)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "start_engine", lambda *_: (llm, send))
        patch.setattr(module, "make_batch", slow_batch)
        patch.setattr(module.Generator, "receive", record)
        patch.setattr(module.Generator, "close", close_and_wait)
        try:
            module.main(args)
        finally:
            os.sched_setaffinity(0, affinity)
            assert not [thread for thread in threading.enumerate() if thread.name == "generator"]
    return rollouts


@pytest.fixture
def run(task, engine, tmp_path):
    """run(**changes) -> (output folder, rollouts): main() of a script on the tiny task, with the shared engine."""
    hooks = ("before_load", "before_label")

    def run(name="run", module=script, **changes):
        folder = str(tmp_path / name)
        given = {name: changes.pop(name) for name in hooks if name in changes}
        args = module.Args(**flags(task, output_dir=folder) | changes)
        return folder, run_main(engine, module, args, **given)

    return run
