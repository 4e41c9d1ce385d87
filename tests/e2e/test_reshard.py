"""One run whose number of ranks changes on the way, say 4, 2, 1 and 4 again; sharded tables."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from gr.evaluate import evaluate, run_config
from gr.runlog import read_lines
from tests.dist import run_distributed
from tests.e2e.toy import run, write_config, write_log

SHARDED = ("embeddings.form=sharded", "checkpoint.asynchronous=true")
ON_CPUS = (*SHARDED, "embeddings.update_rule=row_wise_adagrad")
ON_GPUS = (*SHARDED, "device=cuda")
STAGES = ((4, 4), (2, 8), (1, 12), (4, 0))
"""Ranks, and the step at which they stop; 0 is the end of the log."""
STAGES_OF_TWO = ((2, 4), (1, 8), (2, 0))
STAGES_OF_EIGHT = ((8, 4), (4, 8), (1, 0))
ON_EIGHT_CPUS = (*ON_CPUS, "data.sessions_per_partition=2")


def go_on(config: str, run_dir: str, stop: int, overrides: tuple[str, ...]) -> list[list[dict]]:
    """Score the checkpoint that is there, train on to a step, and score the new one."""
    # A table is whole on a rank of one stage, and spread over all in the next.
    plan = "table_wise" if int(os.environ["WORLD_SIZE"]) == 2 and stop else "row_wise"
    is_begun = Path(run_dir).exists()
    dist.barrier()  # or a fast rank makes the folder before a slow one has looked
    before = scores(run_dir) if is_begun else []
    run(
        Path(config),
        *overrides,
        f"embeddings.sharding=[{plan}]",
        f"run_dir={run_dir}",
        f"max_steps={stop}",
        "resume=true",
    )
    return [before, scores(run_dir)]


def scores(run_dir: str) -> list[dict]:
    evaluate(run_config(run_dir), run_dir)
    dist.barrier()
    return read_lines(Path(run_dir, "evaluate.jsonl"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("stages", "overrides", "backend", "rounding"),
    [
        # Sums of float32 in another order differ in the last digits.
        pytest.param(STAGES, ON_CPUS, "gloo", 2e-6, id="cpus", marks=pytest.mark.slow),
        pytest.param(
            *(STAGES_OF_EIGHT, ON_EIGHT_CPUS, "gloo", 2e-6), id="8_cpus", marks=pytest.mark.slow
        ),
        pytest.param(STAGES_OF_TWO, ON_GPUS, "nccl", 2e-5, id="gpus", marks=pytest.mark.multi_gpu),
        pytest.param(STAGES, ON_GPUS, "nccl", 2e-5, id="4_gpus", marks=pytest.mark.multi_gpu(4)),
    ],
)
def test_ranks_come_and_go(stages, overrides, backend, rounding, log, tmp_path):
    partitions = max(ranks for ranks, _ in stages)  # a rank owns whole ones
    if partitions > 4:
        log = write_log(tmp_path / "log", partitions=partitions)
    config = str(write_config(tmp_path, log))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ways = {"backend": backend, "timeout_s": 400}
    run_distributed(go_on, 1, config, str(whole), 0, overrides, **ways)
    by_last: list[dict] = []
    for ranks, stop in stages:
        results = run_distributed(go_on, ranks, config, str(cut), stop, overrides, **ways)
        by_these, after = results[0]
        assert len(by_these) == len(by_last)
        for row, other in zip(by_these, by_last, strict=True):
            assert row.keys() == other.keys()
            for key, value in row.items():
                expected = other[key]
                if isinstance(expected, float):
                    expected = pytest.approx(expected, rel=rounding)
                assert value == expected, key
        by_last = after
    losses = [
        [row["train/loss"] for row in read_lines(folder / "metrics.jsonl")]
        for folder in (whole, cut)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)
    last = [read_lines(folder / "eval.jsonl")[-1] for folder in (whole, cut)]
    assert last[0]["num_examples-click"] == last[1]["num_examples-click"]
    assert last[0]["ne-click"] == pytest.approx(last[1]["ne-click"], rel=2e-3)
