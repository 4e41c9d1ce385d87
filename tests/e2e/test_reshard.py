"""One run whose number of ranks changes on the way: 4, 2, 1 and 4 again, sharded tables."""

import os
from pathlib import Path

import numpy as np
import pytest

from gr.evaluate import evaluate, run_config
from gr.runlog import read_lines
from tests.dist import run_distributed
from tests.e2e.toy import run, write_config

SHARDED = ("embeddings.form=sharded", "embeddings.update_rule=row_wise_adagrad")
ASYNCHRONOUS = "checkpoint.asynchronous=true"
STAGES = ((4, 4), (2, 8), (1, 12), (4, 0))
"""Ranks, and the step at which they stop; 0 is the end of the log."""


def train_on(config: str, overrides: tuple[str, ...]) -> None:
    # Rank 0 holds whole tables in one stage, a part of each in the next.
    plan = "table_wise" if int(os.environ["WORLD_SIZE"]) == 2 else "row_wise"
    run(Path(config), *SHARDED, ASYNCHRONOUS, f"embeddings.sharding=[{plan}]", *overrides)


def evaluate_on(run_dir: str, step: int) -> None:
    evaluate(run_config(run_dir), run_dir, step=step)


def scores(run_dir: Path) -> list[dict]:
    # Sums of float32 in another order differ in the last digits, ties of ranks do not occur.
    return [
        {k: pytest.approx(v, rel=2e-6) if isinstance(v, float) else v for k, v in row.items()}
        for row in read_lines(run_dir / "evaluate.jsonl")
    ]


@pytest.mark.slow
def test_ranks_come_and_go(log, tmp_path):
    config = str(write_config(tmp_path, log))
    whole = tmp_path / "whole"
    run_distributed(train_on, 1, config, (f"run_dir={whole}",))
    cut = tmp_path / "cut"
    for ranks, stop in STAGES:
        overrides = (f"run_dir={cut}", f"max_steps={stop}", "checkpoint.every_steps=4")
        run_distributed(train_on, ranks, config, (*overrides, "resume=true", "checkpoint.keep=9"))
        step = stop or max(row["step"] for row in read_lines(cut / "metrics.jsonl"))
        run_distributed(evaluate_on, 4, str(cut), step)
        by_four = scores(cut)
        for other in (2, 1):
            run_distributed(evaluate_on, other, str(cut), step)
            assert read_lines(cut / "evaluate.jsonl") == by_four
    losses = [
        [row["train/loss"] for row in read_lines(folder / "metrics.jsonl")]
        for folder in (whole, cut)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)
    last = [read_lines(folder / "eval.jsonl")[-1] for folder in (whole, cut)]
    assert last[0]["num_examples-click"] == last[1]["num_examples-click"]
    assert last[0]["ne-click"] == pytest.approx(last[1]["ne-click"], rel=2e-3)
