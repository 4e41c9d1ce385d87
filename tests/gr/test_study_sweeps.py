"""The sweeps of many epochs on a toy log: each variant trains, no setting is without effect."""

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.config import TrainConfig
from gr.config_io import load_config
from gr.results import PageConfig, make_records
from gr.runs import Run, read_run
from gr.studies import make_study_records
from gr.train import train
from launch.config import SweepConfig
from launch.sweep import expand

NUM_USERS, NUM_ITEMS = 24, 60
TOY = (
    "device=cpu",
    "data.prefetch=0",
    "data.leave_one_out.epochs=3",
    "data.leave_one_out.eval_every=2",
    "data.leave_one_out.users_per_batch=12",
    f"data.num_items={NUM_ITEMS}",
    f"embeddings.tables.item.num_embeddings={NUM_ITEMS + 1}",
    "log_every=1",
)


@pytest.fixture(scope="module")
def events(tmp_path_factory) -> Path:
    """Return a log of users with 70 to 240 events, seconds, hours or days apart."""
    rng, rows = random.Random(3), []
    for user in range(NUM_USERS):
        time = rng.randrange(10**6)
        for _ in range(rng.randint(70, 240)):
            rows.append({"user_id": user, "item_id": rng.randrange(NUM_ITEMS), "timestamp": time})
            time += rng.choice((30, 4_000, 200_000))
    path = tmp_path_factory.mktemp("toy") / "events.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def runs_of(sweep: str, events: Path, folder: Path) -> dict[str, list[Run]]:
    """Train every member of a sweep at seed 0; return them by the name of their row."""
    config, _ = load_config(SweepConfig, f"configs/sweeps/{sweep}.yaml", ["seeds=[0]"])
    found: dict[str, list[Run]] = {}
    for member in expand(config):
        path = folder / member.run_dir.name
        overrides = (*member.overrides, *TOY, f"data.log={events}", f"run_dir={path}")
        run, resolved = load_config(TrainConfig, member.base, overrides)
        train(run, resolved, overrides)
        found.setdefault(path.name.rsplit("_s0_", 1)[0], []).append(read_run(path))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sweep", ["latest_small_time", "ml100k_time"])
def test_no_encoding_of_time_is_without_effect(sweep, events, tmp_path):
    runs = runs_of(sweep, events, tmp_path)
    page, _ = load_config(PageConfig, "configs/published/results.yaml")
    records = make_study_records(page, [run.path for (run,) in runs.values()])
    assert {r.row for r in records} == set(page.studies[sweep].rows)
    assert len(records) == 11
    assert all(set(page.studies[sweep].metrics) <= set(r.last) for r in records)
    losses = {name: [row["train/loss"] for row in run.steps] for name, (run,) in runs.items()}
    assert all(len(loss) == 6 for loss in losses.values())
    ends = sorted(loss[-1] for loss in losses.values())
    assert min(b - a for a, b in pairwise(ends)) > 1e-6


@pytest.mark.slow
def test_stochastic_length_shortens_training_but_not_scoring(events, tmp_path):
    runs = runs_of("ml1m_length", events, tmp_path)
    page, _ = load_config(PageConfig, "configs/published/results.yaml")
    records = {r.row: r for r in make_study_records(page, [run.path for (run,) in runs.values()])}
    tokens = {name: record.last["train/tokens"] for name, record in records.items()}
    users = Counter(pq.read_table(events)["user_id"].to_pylist())
    lengths = [min(201, num - 1) for num in users.values()]  # the last event is for the test
    assert tokens["ml1m_whole"] == 3 * sum(lengths)
    assert tokens["ml1m_length_1.6"] < tokens["ml1m_length_1.8"] < tokens["ml1m_whole"]
    assert tokens["ml1m_length_1.6"] == pytest.approx(tokens["ml1m_length_1.6_greedy"], rel=0.1)
    assert {r.last["num_examples-retrieval"] for r in records.values()} == {NUM_USERS}


@pytest.mark.slow
@pytest.mark.parametrize("sweep", ["published_small", "published_amazon"])
def test_each_model_makes_a_record(sweep, events, tmp_path):
    runs = runs_of(sweep, events, tmp_path)
    page, _ = load_config(PageConfig, "configs/published/results.yaml")
    records = make_records(page, [run.path for pair in runs.values() for run in pair])
    assert sorted(r.row for r in records) == sorted(runs)
    assert all(r.epochs == [2, 3] for r in records)
