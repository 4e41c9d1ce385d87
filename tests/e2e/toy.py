"""A small log in which only the history tells what a user will click, and a run that learns it."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gr.config import TrainConfig
from gr.config_io import load_config
from gr.train import train
from pipelines.config import SessionizeConfig
from pipelines.sessionize import sessionize

NUM_ITEMS = 24
DAY = 86_400
START = 1_700_006_400  # midnight UTC

CONFIG = """
run_dir: {run_dir}
data:
  log: {log}
  max_history_tokens: 32
  actions: {{click: {{}}, watch_ms: {{thresholds: [1000, 5000]}}}}
  item_features: {{price: {{boundaries: [1, 2]}}}}
  tasks:
    click: {{action: click}}
    watch: {{action: watch_ms, type: regression, scale: 1000, maximum: 60, log1p: true}}
  positive: [click]
  num_items: 24
  num_negatives: 8
  sessions_per_partition: 4
embeddings:
  tables:
    item: {{num_embeddings: 25, dim: 16, features: [item_id, target_item_id, negative_item_id]}}
    price: {{num_embeddings: 5, dim: 8, features: [price]}}
  optimizer: {{lr: 0.02}}
model:
  dim: 16
  hstu: {{num_heads: 2, qk_dim: 8, v_dim: 8, scaling_length: 32, bias: position_time}}
  encoding: {{position_buckets: 64, periodic: [hour]}}
loss: {{retrieval_weight: 0.1, temperature: 0.2}}
optim: {{lr: 0.01}}
checkpoint: {{every_steps: 8}}
log_every: 4
deterministic: true
device: cpu
"""


def write_events(path: Path, *, users: int = 48, days: int = 3, seed: int = 0) -> None:
    """Write an event log: half of the users click nearly all they meet, the others nearly none."""
    rng = random.Random(seed)
    rows = []
    for user in range(users):
        rate = rng.choice([0.05, 0.95])
        for day in range(days):
            for session in range(2):
                time = START + day * DAY + session * 30_000 + rng.randrange(20_000)
                for _ in range(4):
                    item = rng.randrange(NUM_ITEMS)
                    click = rng.random() < rate
                    time += rng.randrange(5, 200)
                    rows.append(
                        {
                            "user_id": user,
                            "item_id": item,
                            "timestamp": time,
                            "click": click,
                            "watch_ms": rng.randrange(5_000, 60_000) if click else 500,
                            "price": float(item % 3),
                        }
                    )
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_log(folder: Path, *, partitions: int = 4, **changes: int) -> Path:
    """Write the session-end log of such events and return its folder."""
    write_events(folder / "events.parquet", **changes)
    sessionize(
        SessionizeConfig(
            input=str(folder / "events.parquet"),
            output=str(folder / "log"),
            actions=("click", "watch_ms"),
            features=("price",),
            partitions=partitions,
        )
    )
    return folder / "log"


def write_config(folder: Path, log: Path) -> Path:
    """Write run.yaml and return its path; the run directory is run beside it."""
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(run_dir=folder / "run", log=log))
    return path


def run(config: Path, *overrides: str) -> Path:
    """Train in this process and return the run directory."""
    loaded, resolved = load_config(TrainConfig, config, overrides)
    train(loaded, resolved, overrides)
    return Path(loaded.run_dir)
