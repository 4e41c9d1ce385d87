"""Tables on a GPU that are cached, looked up ahead and resumed: the numbers stay the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from gr.config import CheckpointConfig, TrainConfig
from gr.runlog import read_lines
from gr.train import train
from tests.gr.batches import data_config, random_log, train_config

pytestmark = pytest.mark.gpu
MODE = ("interleaved", "event", "session", "none")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A configuration, and the losses of a run without any of it."""
    log = random_log(tmp_path_factory.mktemp("log") / "log")
    data = replace(data_config(log, MODE), sessions_per_partition=2, window="hour")
    config = train_config(data)
    config = replace(
        config,
        device="cuda",
        deterministic=True,
        overlap=False,
        log_every=1,
        embeddings=replace(config.embeddings, form="sharded"),
    )
    return config, run(config, tmp_path_factory.mktemp("plain"))


def run(config: TrainConfig, folder: Path, **changes) -> np.ndarray:
    config = replace(config, run_dir=str(folder / "run"), **changes)
    train(config, OmegaConf.structured(config))
    rows = read_lines(folder / "run" / "metrics.jsonl")
    assert len(rows) >= 5
    return np.array([row["train/loss"] for row in rows])


def cached(config: TrainConfig):
    item = config.embeddings.tables["item"]
    tables = config.embeddings.tables | {"item": replace(item, hbm_gb=51 * 8 * 4 / 3 / 2**30)}
    return replace(config.embeddings, tables=tables, momentum="host")


def test_looking_ahead_changes_no_bit(plain, tmp_path):
    config, losses = plain
    np.testing.assert_array_equal(run(config, tmp_path, overlap=True), losses)


def test_a_third_of_the_rows_in_hbm_and_a_resume_change_nothing(plain, tmp_path):
    config, losses = plain
    config = replace(config, overlap=True, embeddings=cached(config))
    np.testing.assert_allclose(run(config, tmp_path / "whole"), losses, rtol=1e-6)
    rows = read_lines(tmp_path / "whole" / "run" / "metrics.jsonl")
    # The last step fetches no further batch, so that none is asked of the cache.
    hits = [row["perf/cache_hits"] for row in rows[:-1]]
    assert all(0 <= share <= 1 for share in hits)
    assert any(0 < share < 1 for share in hits)
    checkpoint = CheckpointConfig(every_steps=3, asynchronous=True)
    run(config, tmp_path / "cut", max_steps=6, checkpoint=checkpoint)
    resumed = run(config, tmp_path / "cut", resume=True, checkpoint=checkpoint)
    np.testing.assert_allclose(resumed, losses, rtol=1e-6)


def test_whole_windows_scored_before_they_are_learnt_from(plain, tmp_path):
    config, losses = plain
    config = replace(config, embeddings=cached(config), eval=replace(config.eval, mode="frozen"))
    np.testing.assert_allclose(run(config, tmp_path, overlap=True), losses, rtol=1e-6)
