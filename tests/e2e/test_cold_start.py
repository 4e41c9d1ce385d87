"""Items that nobody met in training, ranked among all: by their content, and by a row at random."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.evaluate import evaluate, run_config
from gr.runlog import read_lines
from pipelines.config import SessionizeConfig
from pipelines.sessionize import sessionize
from tests.e2e.toy import DAY, START, run

CLUSTERS, OLD = 8, 10
NUM_ITEMS = CLUSTERS * (OLD + 1)
"""Item i is of cluster i % CLUSTERS; the last CLUSTERS are new: neither met nor negatives."""

CONFIG = """
run_dir: {folder}/run
data:
  log: {folder}/train
  max_history_tokens: 24
  actions: {{probe: {{}}}}
  num_items: {num_items}
  num_negatives: 16
  sessions_per_partition: 4
embeddings:
  tables:
    item:
      num_embeddings: {num_rows}
      dim: 16
      features: [item_id, target_item_id, negative_item_id]
  optimizer: {{lr: 0.02}}
model:
  dim: 16
  num_layers: 1
  hstu: {{num_heads: 2, qk_dim: 8, v_dim: 8, scaling_length: 32}}
  encoding: {{position_buckets: 64}}
loss: {{temperature: 0.2}}
optim: {{lr: 0.01}}
log_every: 20
device: cpu
"""
TOWER = ("embeddings.tables.item.init_std=0", "model.cold_start.hidden=[16]")


def write_log(folder: Path, name: str, rng: random.Random, *, users: int, sessions: int) -> None:
    """Every user has one cluster; in the log `test` each session ends with the new item of it."""
    rows = []
    for user in range(users):
        cluster = rng.randrange(CLUSTERS)
        for number in range(sessions):
            time = START + number * DAY + rng.randrange(20_000)
            for i in range(5):
                own = rng.random() < 0.9
                of = cluster if own else rng.randrange(CLUSTERS)
                rows.append((user, of + CLUSTERS * rng.randrange(OLD), time + 30 * i, False))
            if name == "test":
                rows.append((user, cluster + CLUSTERS * OLD, time + 200, True))
    columns = zip(*rows, strict=True)
    names = ("user_id", "item_id", "timestamp", "probe")
    events = folder / f"{name}.parquet"
    pq.write_table(pa.table({n: list(x) for n, x in zip(names, columns, strict=True)}), events)
    sessionize(
        SessionizeConfig(
            input=str(events), output=str(folder / name), actions=("probe",), partitions=4
        )
    )


def write_all(folder: Path, seed: int) -> Path:
    """Write logs, content and configuration; return the latter's path."""
    rng, g = random.Random(seed), np.random.default_rng(seed)
    write_log(folder, "train", rng, users=160, sessions=8)
    write_log(folder, "test", rng, users=100, sessions=1)
    centers = g.normal(size=(CLUSTERS, 12))
    content = centers[np.arange(NUM_ITEMS) % CLUSTERS] + 0.5 * g.normal(size=(NUM_ITEMS, 12))
    np.save(folder / "content.npy", content)
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(folder=folder, num_items=CLUSTERS * OLD, num_rows=NUM_ITEMS + 1))
    return path


def score_new_items(config: Path, *overrides: str) -> dict[str, float]:
    """Train, then rank the new item among all at the end of each session of the other log."""
    run_dir = run(config, *overrides)
    changes = [f"data.log={config.parent}/test", "data.positive=[probe]"]
    evaluate(run_config(run_dir, changes), run_dir, overrides=changes)
    row = read_lines(run_dir / "evaluate.jsonl")[-1]
    assert row["num_examples-retrieval"] == 100
    return row


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_new_item_ranks_higher_by_its_content_than_by_a_random_row(tmp_path):
    """Six seeds of data and model: a gain in each has probability 1/64 if content did nothing."""
    gains = []
    for seed in range(6):
        folder = tmp_path / str(seed)
        folder.mkdir()
        config = write_all(folder, seed)
        shared = (f"seed={seed}",)
        by_row = score_new_items(config, *shared, f"run_dir={folder}/row")
        by_content = score_new_items(
            config,
            *shared,
            *TOWER,
            f"model.cold_start.path={folder}/content.npy",
            f"run_dir={folder}/content",
        )
        gains.append(by_content["mrr"] - by_row["mrr"])
        print(seed, {k: (by_row[k], by_content[k]) for k in ("mrr", "hr@10", "log_pplx")})
    assert min(gains) > 0, gains
    assert np.mean(gains) > 0.1, gains
