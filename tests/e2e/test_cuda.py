"""The same run on a GPU: TorchRec's sharded tables and FBGEMM's fused row-wise AdamW."""

import numpy as np
import pytest

from gr.runlog import read_lines
from tests.e2e.toy import run


def losses(run_dir):
    return np.array([row["train/loss"] for row in read_lines(run_dir / "metrics.jsonl")])


@pytest.mark.gpu
def test_a_gpu_learns_what_the_cpu_does(config, tmp_path):
    cpu = run(config, f"run_dir={tmp_path / 'cpu'}")
    gpu = run(config, f"run_dir={tmp_path / 'gpu'}", "device=cuda")
    np.testing.assert_allclose(losses(cpu)[:2], losses(gpu)[:2], rtol=1e-4)
    np.testing.assert_allclose(losses(cpu), losses(gpu), rtol=5e-3)


@pytest.mark.gpu
def test_a_resumed_gpu_run_repeats_bit_for_bit(config, tmp_path):
    whole = run(config, f"run_dir={tmp_path / 'whole'}", "device=cuda")
    run(config, f"run_dir={tmp_path / 'cut'}", "device=cuda", "max_steps=8")
    cut = run(config, f"run_dir={tmp_path / 'cut'}", "device=cuda", "resume=true")
    np.testing.assert_array_equal(losses(whole), losses(cut))
