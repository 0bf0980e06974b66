"""On NVIDIA GPUs: weights through CUDA IPC (one GPU) and NCCL (two). Not run yet: no machine with one was at hand."""

import numpy as np
import pytest
import torch

from tests.runs import command, metrics, start
from tests.test_torchrun import TORCHRUN, finish
from tests.test_torchrun import start as popen

pytestmark = pytest.mark.gpu
one = pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs exactly one GPU (CUDA_VISIBLE_DEVICES=0)")
three = pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three GPUs")
SCRIPTS = ["async_online_dpo.py", "async_rloo.py", "async_ppo.py", "sync_baseline.py"]


def check(folder):
    """Every batch was made by the right version, and generator and learner agreed about its weights."""
    records = [record for record in metrics(folder)[0] if "step" in record]
    assert [record["lag"] for record in records] == [min(t, 1) for t in range(6)]
    assert max(record["probe_error"] for record in records) < 0.5
    assert np.isfinite([value for record in records for value in record.values() if value is not None]).all()


@one
@pytest.mark.parametrize("name", SCRIPTS[:3])
def test_generator_and_learner_share_a_gpu(task, tmp_path, name):
    folder = str(tmp_path / "run")
    status, output = start(task, name=name, output_dir=folder, dtype="bfloat16")
    assert status == 0, output
    check(folder)


@one
def test_the_baseline_on_one_gpu(task, tmp_path):
    changes = dict(name=SCRIPTS[3], dtype="bfloat16", placement="colocate")
    status, output = start(task, output_dir=str(tmp_path / "run"), **changes)
    assert status == 0, output


@three
def test_two_learners_send_weights_to_a_third_gpu(task, tmp_path):
    folder = str(tmp_path / "run")
    _, *rest = command(task, output_dir=folder, dtype="bfloat16")
    finish(popen([*TORCHRUN, "--standalone", "--nproc_per_node=2", *rest]))
    check(folder)
