"""Fixtures: the tiny task, one real vLLM engine for all tests of a session, and main() of a script with that engine."""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import async_online_dpo as script
from tests import tiny
from tests.runs import flags


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    return tiny.make(str(tmp_path_factory.mktemp("tiny")))


class SharedEngine:
    """One real engine for many runs: a run may use it as its own, but not shut it down."""

    def __init__(self, llm):
        self.llm, self.llm_engine = llm, SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None))

    def __getattr__(self, name):
        return getattr(self.llm, name)


@contextlib.contextmanager
def real_engine(args, folder):
    """(llm, send_weights) of a real vLLM in its default layout: engine in a child process, on its own cores."""
    affinity, threads = os.sched_getaffinity(0), torch.get_num_threads()
    plan = script.device_plan(args)
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    weights = script.snapshot_weights(policy, 0, [5, 6, 7], args, folder)
    os.environ.update(plan.engine_env)
    llm, send_weights = script.start_engine(args, plan, weights)
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
    rollouts, make_batch, check = [], module.make_batch, module.check_rollout

    def start_engine(args, plan, weights):
        send_weights(weights)

        def send(weights):
            before_load(weights)
            send_weights(weights)

        return llm, send

    def slow_batch(*args):
        before_label()
        return make_batch(*args)

    def record(rollout, expected, args):
        check(rollout, expected, args)
        if rollout.name.startswith("batch"):
            rollouts.append(rollout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "start_engine", start_engine)
        patch.setattr(module, "make_batch", slow_batch)
        patch.setattr(module, "check_rollout", record)
        try:
            module.main(args)
        finally:
            os.sched_setaffinity(0, affinity)
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
