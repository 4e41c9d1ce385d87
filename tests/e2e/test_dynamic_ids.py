"""Whole runs on tables whose ids come and go."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gr.checkpoint import CheckpointManager
from gr.config import TrainConfig
from gr.config_io import load_config
from gr.evaluate import evaluate, run_config
from gr.runlog import read_lines
from tests.dist import run_distributed
from tests.e2e.toy import run

DYNAMIC = (
    "embeddings.tables.item.ids=dynamic",
    "embeddings.tables.item.num_embeddings=16",
    "embeddings.tables.item.dynamic.admit_after=2",
    "data.num_items=0",
)
"""Fewer rows than the 24 items of the log: ids are evicted all the time."""


def weights(run_dir, step=None):
    checkpoints = CheckpointManager(run_dir / "checkpoints")
    step = step or checkpoints.latest()
    return checkpoints.read(step, "tables") | checkpoints.read(step, "vocabulary")


def measured(run_dir):
    return [
        {key: value for key, value in row.items() if not key.startswith("perf/")}
        for row in read_lines(run_dir / "metrics.jsonl")
    ]


def test_a_resumed_run_and_one_without_overlap_change_no_bit(config, tmp_path):
    np.save(tmp_path / "content.npy", np.random.default_rng(0).normal(size=(12, 4)))
    content = f"model.cold_start.path={tmp_path}/content.npy"
    whole = run(config, *DYNAMIC, content, f"run_dir={tmp_path}/whole")
    cut = (*DYNAMIC, content, f"run_dir={tmp_path}/cut", "overlap=false")
    run(config, *cut, "max_steps=8")
    resumed = run(config, *cut, "resume=true")
    assert measured(whole) == measured(resumed)
    for key, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[key]), key
    assert read_lines(whole / "eval.jsonl") == read_lines(resumed / "eval.jsonl")

    rows = measured(whole)
    last = {key.removeprefix("vocabulary/item/"): value for key, value in rows[-1].items()}
    assert last["admitted"] - last["evicted"] == round(last["occupancy"] * 15) == 15
    assert min(last["evicted"], last["refused"]) > 0
    assert 0 < last["unknown"] < 1
    assert rows[0]["vocabulary/item/unknown"] > last["unknown"]
    used = weights(whole)["item.last_step"] >= 0
    assert used.sum() == 15
    assert not weights(whole)["tables.item.weight"][1:][~used[1:]].any()

    kept = weights(whole)
    evaluate(run_config(whole), whole)
    after = weights(whole)
    assert all(torch.equal(tensor, after[key]) for key, tensor in kept.items())
    scored = read_lines(whole / "evaluate.jsonl")[-1]
    assert math.isfinite(scored["log_pplx"])
    # A target without a row is a miss at every cut-off, and misses are counted.
    assert scored["hr@50"] < 1  # of the 24 items 15 can be found
    assert scored["num_examples-retrieval"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.num_items=24",), "data.num_items must be 0"),
        (("loss.retrieval=full_softmax",), "full_softmax needs every row"),
        (("loss.position_negatives=5", "data.num_negatives=0"), "position_negatives=5 needs every"),
        (("embeddings.tables.item.ids=hashed",), "must be the number of items"),
    ],
)
def test_settings_that_contradict_dynamic_ids_are_refused(config, overrides, message):
    changes = [x for x in DYNAMIC if "dynamic.admit" not in x]
    with pytest.raises(ValueError, match=message):
        load_config(TrainConfig, config, [*changes, *overrides])


def _go_on(config: str, folder: str, name: str, stop: int) -> None:
    run(
        Path(config),
        *DYNAMIC,
        "embeddings.form=sharded",
        "embeddings.update_rule=row_wise_adagrad",
        "checkpoint.asynchronous=true",
        f"model.cold_start.path={folder}/content.npy",
        f"run_dir={folder}/{name}",
        f"max_steps={stop}",
        "resume=true",
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_come_and_go(config, tmp_path):
    """The map is the same to the bit on any number of ranks; rows differ by the order of sums."""
    np.save(tmp_path / "content.npy", np.random.default_rng(0).normal(size=(12, 4)))
    run_distributed(_go_on, 1, str(config), str(tmp_path), "whole", 0, timeout_s=200)
    for ranks, stop in ((4, 4), (2, 8), (1, 12), (4, 0)):
        run_distributed(_go_on, ranks, str(config), str(tmp_path), "cut", stop, timeout_s=400)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    for key in whole:
        if key.startswith("item.") and not key.endswith(("weight", "moment")):
            assert torch.equal(whole[key], cut[key]), key
    torch.testing.assert_close(
        whole["tables.item.weight"], cut["tables.item.weight"], rtol=0, atol=2e-3
    )
