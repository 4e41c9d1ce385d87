"""The same run on a GPU: TorchRec's sharded tables and FBGEMM's fused row-wise AdamW."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from gr import metrics
from gr.runlog import read_lines
from gr.trainer import Trainer
from tests.dist import MANY_GPUS, run_distributed
from tests.e2e.toy import FP8, ULTRA, ULTRA_ALONE, run

ROOT = Path(__file__).parents[2]


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


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["all", *ULTRA_ALONE])
def test_ultra_learns_on_a_gpu_what_it_does_on_a_cpu_and_resumes(config, tmp_path, option):
    options = ULTRA if option == "all" else ULTRA_ALONE[option]
    cpu = run(config, f"run_dir={tmp_path / 'cpu'}", *options)
    gpu = run(config, f"run_dir={tmp_path / 'gpu'}", "device=cuda", *options)
    np.testing.assert_allclose(losses(cpu)[:2], losses(gpu)[:2], rtol=1e-4)
    np.testing.assert_allclose(losses(cpu), losses(gpu), rtol=5e-3)
    run(config, f"run_dir={tmp_path / 'cut'}", "device=cuda", *options, "max_steps=8")
    cut = run(config, f"run_dir={tmp_path / 'cut'}", "device=cuda", *options, "resume=true")
    np.testing.assert_array_equal(losses(gpu), losses(cut))


@pytest.mark.gpu
def test_all_of_ultra_learns_in_fp8_and_resumes(config, tmp_path):
    bf16 = run(config, f"run_dir={tmp_path / 'bf16'}", "device=cuda", *ULTRA, "precision=bf16")
    options = ("device=cuda", *ULTRA, *FP8)
    fp8 = run(config, f"run_dir={tmp_path / 'fp8'}", *options)
    # Sixteen columns of a few dozen steps: fp8 goes another way, and learns as much. They part at
    # the first update: AdamW steps by a gradient's direction, which in the smallest is rounding.
    np.testing.assert_allclose(losses(fp8)[0], losses(bf16)[0], rtol=2e-3)
    np.testing.assert_allclose(losses(fp8)[1], losses(bf16)[1], rtol=0.03)
    np.testing.assert_allclose(losses(fp8), losses(bf16), rtol=0.25)
    run(config, f"run_dir={tmp_path / 'cut'}", *options, "max_steps=8")
    cut = run(config, f"run_dir={tmp_path / 'cut'}", *options, "resume=true")
    np.testing.assert_array_equal(losses(fp8), losses(cut))


GRAPHS = ("model.hstu.graph_tokens=64", "model.hstu.dropout=0.2")


@pytest.mark.gpu
def test_layers_as_graphs_learn_what_launches_do_and_resume(config, tmp_path):
    plain = run(config, f"run_dir={tmp_path / 'plain'}", "device=cuda")
    graphs = run(config, f"run_dir={tmp_path / 'graphs'}", "device=cuda", GRAPHS[0])
    np.testing.assert_allclose(losses(graphs)[:2], losses(plain)[:2], rtol=1e-4)
    np.testing.assert_allclose(losses(graphs), losses(plain), rtol=5e-3)
    # What dropout draws does not depend on when a size was captured.
    whole = run(config, f"run_dir={tmp_path / 'whole'}", "device=cuda", *GRAPHS)
    run(config, f"run_dir={tmp_path / 'cut'}", "device=cuda", *GRAPHS, "max_steps=8")
    cut = run(config, f"run_dir={tmp_path / 'cut'}", "device=cuda", *GRAPHS, "resume=true")
    np.testing.assert_array_equal(losses(whole), losses(cut))


WHOLE_TABLES = ("embeddings.form=replicated", "embeddings.update_rule=adamw")


@pytest.mark.gpu
@pytest.mark.parametrize("tables", [(), WHOLE_TABLES], ids=["sharded", "replicated"])
def test_a_step_waits_nowhere_but_in_torchrec(config, tmp_path, monkeypatch, tables):
    """Values that the host reads while the device goes on (gr/outcome.py) do not count as waits.

    The state that a checkpoint is made of is there before the device has come to the end of a step.
    """
    was_busy = []

    def watch(name):
        method = getattr(Trainer, name)

        def watched(self, *args):
            slow = torch.cuda.Event()
            if name == "state":
                torch.cuda._sleep(10**9)  # half a second
                slow.record()
            torch.cuda.set_sync_debug_mode("warn" if self.progress.step >= 2 else "default")
            try:
                return method(self, *args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                if name == "state":
                    was_busy.append(not slow.query())

        monkeypatch.setattr(Trainer, name, watched)

    watch("train_step")
    watch("state")
    monkeypatch.setattr(metrics, "COMPACT_EVERY", 2)
    saving = ("checkpoint.every_steps=2", "checkpoint.asynchronous=true")
    overrides = ("device=cuda", "deterministic=false", "max_steps=10", *saving, *tables)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run(config, f"run_dir={tmp_path / 'run'}", *overrides)
    waits = {(x.filename, x.lineno) for x in found if "synchroniz" in str(x.message)}
    assert not {place for place in waits if Path(place[0]).is_relative_to(ROOT)}
    assert len(was_busy) >= 4
    assert was_busy[-1]  # at the first, kernels and page-locked memory are new


def train(config, folder, *overrides):
    run(Path(config), f"run_dir={folder}", "device=cuda", *overrides)


def on_many(ranks, config, folder, *overrides):
    args = (str(config), str(folder), *overrides)
    run_distributed(train, ranks, *args, backend="nccl", timeout_s=200)
    return losses(folder)


@pytest.mark.parametrize("ranks", MANY_GPUS)
def test_many_gpus_learn_what_one_does_with_and_without_overlap(config, tmp_path, ranks):
    one = losses(run(config, f"run_dir={tmp_path / 'one'}", "device=cuda"))
    plain = on_many(ranks, config, tmp_path / "plain", "overlap=false")
    np.testing.assert_allclose(plain[:2], one[:2], rtol=1e-4)
    np.testing.assert_allclose(plain, one, rtol=5e-3)
    ahead = on_many(ranks, config, tmp_path / "ahead", "overlap=true")
    np.testing.assert_array_equal(ahead, plain)
    graphs = on_many(ranks, config, tmp_path / "graphs", "overlap=true", GRAPHS[0])
    np.testing.assert_allclose(graphs[:2], plain[:2], rtol=1e-4)
    np.testing.assert_allclose(graphs, plain, rtol=5e-3)
