"""Runs in which a label depends on one kind of feature: each kind reaches the model, and a resume.

Every task has its own cause, which nothing else in the sequence tells: no action of a task is
encoded, items are drawn uniformly.
"""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.runlog import read_lines
from pipelines.config import SessionizeConfig
from pipelines.sessionize import sessionize
from tests.dist import run_distributed
from tests.e2e.test_train import assert_equal_runs
from tests.e2e.toy import DAY, START, run

# What the tests share takes long to make: one worker of pytest-xdist makes it.
pytestmark = pytest.mark.xdist_group("features")

NUM_ITEMS = 200
TASKS = ("bag", "attention", "zscore", "quantile", "series", "creators", "vector")
CONFIG = """
run_dir: {folder}/run
data:
  log: {folder}/log
  max_history_tokens: 4
  actions: {{seen: {{}}}}
  item_features:
    genres: {{max_values: 3}}
    tags: {{max_values: 2}}
    price: {{encoding: zscore}}
    age: {{encoding: quantile, bins: 4}}
    fading: {{counter: user_item, half_life_hours: 24, column: seen, encoding: quantile, bins: 4}}
  context: {context}
  context_features:
    country: {{}}
    creators: {{max_values: 2}}
  tasks: {{{tasks}}}
  num_items: 200
  sessions_per_partition: 4
embeddings:
  tables:
    item: {{num_embeddings: 201, dim: 16, features: [item_id, target_item_id]}}
    genre: {{num_embeddings: 6, dim: 16, features: [genres, creators]}}
    tag: {{num_embeddings: 50, dim: 8, ids: hashed, features: [tags]}}
    country: {{num_embeddings: 4, dim: 8, features: [country]}}
  optimizer: {{lr: 0.02}}
model:
  dim: 16
  hstu: {{num_heads: 2, qk_dim: 8, v_dim: 8, scaling_length: 4}}
  encoding: {{position_buckets: 64}}
  head: {{retrieval: false}}
  pooling: {{tags: attention}}
  pretrained: {{content: {{feature: item_id, path: {folder}/vectors.parquet}}}}
optim: {{lr: 0.01}}
checkpoint: {{every_steps: 8}}
log_every: 4
deterministic: true
device: cpu
"""


def write_log(folder: Path, *, users: int = 64, days: int = 4) -> None:
    rng = random.Random(0)
    rows = []
    countries = {user: rng.randrange(2) for user in range(users)}
    creators = {user: [rng.randrange(2)] for user in range(users)}
    for user in range(users):
        for day in range(days):
            if rng.random() < 0.2:
                countries[user], creators[user] = rng.randrange(2), rng.choice([[0], [1, 2]])
            for session in range(2):
                time = START + day * DAY + session * 30_000 + rng.randrange(20_000)
                for _ in range(4):
                    time += rng.randrange(5, 200)
                    genres = rng.choice([None, [], *([rng.sample(range(4), 2)] * 6)])
                    tags = rng.choice(["a|b|", "b", "c|a", "c"])
                    price, age = rng.lognormvariate(3, 2), rng.choice([None, 1.0, 2.0, 7.0])
                    item = rng.randrange(NUM_ITEMS)
                    rows.append(
                        {
                            "user_id": user,
                            "item_id": item,
                            "timestamp": time,
                            "seen": True,
                            "genres": genres,
                            "tags": tags,
                            "price": price,
                            "age": age,
                            "country": countries[user],
                            "creators": creators[user],
                            "bag": 0 in (genres or ()),
                            "attention": "a" in tags,
                            "zscore": price > 20,
                            "quantile": age in (None, 7.0),
                            "series": countries[user] == 1,
                            "creators_label": 0 in creators[user],
                            "vector": item % 2 == 0,
                        }
                    )
    pq.write_table(pa.Table.from_pylist(rows), folder / "events.parquet")
    sessionize(
        SessionizeConfig(
            input=str(folder / "events.parquet"),
            output=str(folder / "log"),
            actions=("seen", *(column(task) for task in TASKS)),
            features=("genres", "tags", "price", "age"),
            context=("country", "creators"),
            split={"tags": "|"},
            partitions=2,
        )
    )
    # Items 0 .. 9 have no vector.
    ids = list(range(10, NUM_ITEMS))
    vectors = [[1.0 - 2.0 * (i % 2), rng.random(), 1.0] for i in ids]
    pq.write_table(pa.table({"id": ids, "vector": vectors}), folder / "vectors.parquet")


def column(task: str) -> str:
    return "creators_label" if task == "creators" else task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("features")
    write_log(path)
    return path


def configure(folder: Path, at: Path, context: str) -> Path:
    tasks = ", ".join(f"{task}: {{action: {column(task)}}}" for task in TASKS)
    path = at / "run.yaml"
    path.write_text(CONFIG.format(folder=folder, context=context, tasks=tasks))
    return path


@pytest.fixture(scope="module")
def merged(folder, tmp_path_factory):
    at = tmp_path_factory.mktemp("merged")
    return run(configure(folder, at, "merged"), f"run_dir={at / 'run'}")


def test_every_kind_of_feature_is_learnt_from(merged):
    days = [row for row in read_lines(merged / "eval.jsonl") if row["window"] != "all"]
    aucs = {task: days[-1][f"auc-{task}"] for task in TASKS}
    assert min(aucs.values()) > 0.8, aucs


def test_what_lacks_is_counted(folder, merged):
    last = read_lines(merged / "metrics.jsonl")[-1]
    events = pq.read_table(folder / "events.parquet")
    assert last["data/without_vector/content"] == sum(
        item < 10 for item in events["item_id"].to_pylist()
    )
    assert "data/cut_bags" not in last


def test_a_resumed_run_has_the_statistics_of_one_that_went_through(folder, merged, tmp_path):
    config = configure(folder, tmp_path, "merged")
    where = f"run_dir={tmp_path / 'run'}"
    run(config, where, "max_steps=8")
    vectors = folder / "vectors.parquet"
    content = vectors.read_bytes()
    pq.write_table(pq.read_table(vectors).slice(0, 20), vectors)
    with pytest.raises(ValueError, match="other vectors than those that the checkpoint"):
        run(config, where, "resume=true")
    vectors.write_bytes(content)
    resumed = run(config, where, "resume=true")
    assert_equal_runs(merged, resumed)


ADAGRAD = "embeddings.update_rule=row_wise_adagrad"  # the sharded form has no AdamW on the CPU


def train_sharded(config: str, at: str) -> None:
    run(Path(config), f"run_dir={at}/sharded", ADAGRAD, "embeddings.form=sharded", "max_steps=8")


@pytest.mark.slow
def test_bags_of_sharded_tables_are_those_of_replicated_ones(folder, tmp_path):
    config = configure(folder, tmp_path, "merged")
    alone = run(config, f"run_dir={tmp_path}/replicated", ADAGRAD, "max_steps=8")
    run_distributed(train_sharded, 2, str(config), str(tmp_path))
    losses = [
        np.array([row["train/loss"] for row in read_lines(at / "metrics.jsonl")])
        for at in (alone, tmp_path / "sharded")
    ]
    assert len(losses[0]) >= 2
    # Sums in another order differ in the last bits of float32, and training spreads that.
    np.testing.assert_allclose(*losses, rtol=2e-3)
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("data.context=prefix",),
        ("data.layout=merged", "data.anchor=session"),
        ("data.layout=interleaved", "data.anchor=session", "data.context=prefix"),
        ("model.encoder=sasrec",),
    ],
    ids=lambda x: "-".join(x),
)
def test_in_every_layout(folder, tmp_path, overrides):
    config = configure(folder, tmp_path, "merged")
    found = run(config, f"run_dir={tmp_path / 'run'}", *overrides)
    days = [row for row in read_lines(found / "eval.jsonl") if row["window"] != "all"]
    aucs = {task: days[-1][f"auc-{task}"] for task in TASKS}
    assert min(aucs.values()) > 0.6, aucs
