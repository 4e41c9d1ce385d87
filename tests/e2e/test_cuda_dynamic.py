"""Dynamic tables and content of items in whole runs on a GPU: overlap and resume change no bit."""

from dataclasses import replace

import numpy as np
import pytest
from omegaconf import OmegaConf

from embeddings.config import DynamicIdsConfig
from gr.config import CheckpointConfig, ColdStartConfig, TrainConfig
from gr.runlog import read_lines
from gr.train import train
from tests.dist import MANY_GPUS, run_distributed
from tests.gr.batches import data_config, random_sessions, train_config
from tests.pipelines.session_log import write_log

MODE = ("interleaved", "event", "session", "none")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    np.save(folder / "content.npy", np.random.default_rng(0).normal(size=(30, 5)))
    write_log(folder / "log", random_sessions(0, partitions=4))  # a rank owns whole ones
    data = replace(data_config(folder / "log", MODE), sessions_per_partition=2)
    content = ColdStartConfig(path=str(folder / "content.npy"))
    config = train_config(replace(data, num_negatives=3, window="hour"), cold_start=content)
    tables = dict(config.embeddings.tables)
    tables["item"] = replace(
        tables["item"],
        ids="dynamic",
        num_embeddings=14,
        dynamic=DynamicIdsConfig(admit_after=2, max_waiting=30, ttl_days=0.5),
    )
    return replace(
        config,
        device="cuda",
        deterministic=True,
        log_every=1,
        data=replace(config.data, num_items=0),
        embeddings=replace(config.embeddings, tables=tables, form="sharded"),
    )


def run(config: TrainConfig, folder, **changes) -> list[dict]:
    config = replace(config, run_dir=str(folder / "run"), **changes)
    train(config, OmegaConf.structured(config))
    return [
        {key: value for key, value in row.items() if not key.startswith("perf/")}
        for row in read_lines(folder / "run" / "metrics.jsonl")
    ]


def assert_same(rows: list[dict], expected: list[dict]) -> None:
    assert len(rows) == len(expected) >= 5
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            np.testing.assert_array_equal(value, other[key], err_msg=f"{key}, {row['step']}")


def assert_close(rows: list[dict], expected: list[dict]) -> None:
    """Compare the maps exactly, and losses up to what sums in another order make of twelve steps.

    Gradients of 1e-6 that should be 0 have moved them by 2 % (docs/lab.md, 2026-11-29).
    """
    assert len(rows) == len(expected) >= 5
    for row, other in zip(rows, expected, strict=True):
        for key, value in other.items():
            if key.startswith("vocabulary/"):
                assert row[key] == value, key
    losses = [np.array([row["train/loss"] for row in each]) for each in (rows, expected)]
    np.testing.assert_allclose(losses[0][:2], losses[1][:2], rtol=1e-4)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


@pytest.mark.gpu
def test_overlap_and_resume_change_no_bit(config, tmp_path):
    plain = run(config, tmp_path / "plain", overlap=False)
    assert plain[-1]["vocabulary/item/evicted"] > 0
    assert_same(run(config, tmp_path / "ahead"), plain)
    checkpoint = CheckpointConfig(every_steps=3)
    run(config, tmp_path / "cut", checkpoint=checkpoint, max_steps=3)
    assert_same(run(config, tmp_path / "cut", checkpoint=checkpoint, resume=True), plain)


@pytest.mark.gpu
def test_a_gpu_keeps_the_map_of_the_cpu_and_learns_what_it_does(config, tmp_path):
    on_cpu = replace(config, device="cpu", embeddings=replace(config.embeddings, form="replicated"))
    assert_close(run(config, tmp_path / "gpu"), run(on_cpu, tmp_path / "cpu"))


@pytest.mark.parametrize("ranks", MANY_GPUS)
def test_many_gpus_keep_the_map_of_one_and_learn_what_it_does(config, tmp_path, ranks):
    one = run_distributed(run, 1, config, tmp_path / "one", backend="nccl")[0]
    many = run_distributed(run, ranks, config, tmp_path / "many", backend="nccl")[0]
    assert_close(many, one)
