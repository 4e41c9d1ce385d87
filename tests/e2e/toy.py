"""A small log in which only the history tells what a user will click, and a run that learns it."""

import random
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gr.config import TrainConfig
from gr.config_io import load_config
from gr.train import train
from pipelines.manifest import Manifest, log_schema, write_manifest
from pipelines.portable_hash import partition_of
from pipelines.schema import part_name
from pipelines.session_writer import WrittenFiles, check_file, write_sessions

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


ULTRA = (
    "model.num_layers=3",
    "model.hstu.bias=none",
    "data.layout=merged",
    "data.anchor=session",
    "data.action_context=[price]",
    "model.hstu.semi_local={window: 6, global_rows: 3, global_columns: 2}",
    "model.hstu.truncation={layers: 2, history: 10}",
    "model.mixture={newest: {history: 8}, clicked: {actions: {click: 0.5}}}",
    "data.stochastic_length={selection: weighted, max_length: 16}",
)
"""Every component of ULTRA-HSTU: an action is its click, its length and the price of the item."""

CANDIDATES = ("data.anchor=session",)
THREE_LAYERS = ("model.num_layers=3", "model.hstu.bias=none")
ULTRA_ALONE = {
    "rows": (*CANDIDATES, "model.hstu.semi_local={window: 6, global_rows: 3}"),
    "columns": ("model.hstu.semi_local={window: 6, global_columns: 2}",),
    "truncation": (*THREE_LAYERS, "model.hstu.truncation={layers: 2, history: 10}"),
    "mixture": ("model.mixture={newest: {history: 8}, clicked: {actions: {click: 0.5}}}",),
    "merged": (*CANDIDATES, "data.layout=merged", "model.hstu.bias=none"),
    "actions": ("data.action_context=[price]",),
    "length": ("data.stochastic_length={selection: weighted, max_length: 24}",),
    "balanced": ("data.stochastic_length={selection: weighted, max_length: 24, balance: true}",),
    "nothing_recomputed": ("model.hstu.recompute=[]",),
    "attended_recomputed": ("model.hstu.recompute=[normed,gated,silu,attended]",),
}
"""Each by itself."""
FP8 = ("precision=bf16", "model.hstu.precision=fp8")

ACTIONS = {"click": "bool", "watch_ms": "int64"}
FEATURES = {"price": "double"}


def events(*, users: int = 48, days: int = 3, seed: int = 0) -> list[dict]:
    """Return events, one a row: half of the users click nearly all they meet, others nearly none.

    Each user has two sessions a day.
    """
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
                            "session_id": 2 * day + session,
                        }
                    )
    return rows


def write_events(path: Path, **changes: int) -> None:
    """Write an event log, which does not name the sessions."""
    rows = [{k: v for k, v in row.items() if k != "session_id"} for row in events(**changes)]
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_log(folder: Path, *, partitions: int = 4, **changes: int) -> Path:
    """Write the session-end log of such events and return its folder.

    As `gr sessionize` does (test_train.py compares them), but without its engine, which a machine
    that only trains need not have.
    """
    log = folder / "log"
    log.mkdir(parents=True)
    schema = log_schema(ACTIONS, FEATURES, {})
    sessions = []
    for (user, number), rows in groupby(events(**changes), itemgetter("user_id", "session_id")):
        own = [{k: v for k, v in row.items() if k not in ("user_id", "session_id")} for row in rows]
        times = {"start_ts": own[0]["timestamp"], "end_ts": own[-1]["timestamp"]}
        sessions.append({"user_id": user, "session_id": number, **times, "events": own})
    sessions.sort(key=itemgetter("end_ts", "user_id"))
    written = WrittenFiles()
    parts = []
    for p in range(partitions):
        own = [row for row in sessions if partition_of(row["user_id"], 0, partitions) == p]
        write_sessions(iter([pa.Table.from_pylist(own, schema=schema)]), log / part_name(p), schema)
        parts.append(check_file(log / part_name(p), p, partitions, 0, written))
    columns = ("item_id", "timestamp", *ACTIONS, *FEATURES)
    write_manifest(
        Manifest(
            folder=log,
            partitions=partitions,
            partition_seed=0,
            timezone="UTC",
            actions=ACTIONS,
            features=FEATURES,
            context={},
            parts=tuple(parts),
            histories=(),
            start_ts=written.start_ts,
            end_ts=written.end_ts,
            num_rows_read=sum(part.num_events for part in parts),
            num_duplicates=0,
            rejects={},
            nulls=dict.fromkeys(columns, 0),
            config={},
        )
    )
    return log


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
