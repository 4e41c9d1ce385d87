"""A small session-end log with overlaps and unknown values, its batches, and a run over it."""

import random
from pathlib import Path

import torch

from embeddings.config import EmbeddingsConfig, TableConfig
from embeddings.replicated import ReplicatedTables
from embeddings.vocabulary import Vocabulary
from gr.config import (
    EncodingConfig,
    HeadConfig,
    HSTUConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from pipelines.batch import SequenceBatch
from pipelines.stream import SessionStream
from tests.pipelines.logs import make_config
from tests.pipelines.session_log import session, write_log

NUM_ITEMS = 50
DIM = 8


def random_sessions(seed: int, *, partitions: int = 2) -> list[list[dict]]:
    """Return the rows of each partition: 3 users with 5 sessions each, some at the same time."""
    rng = random.Random(seed)
    parts = []
    for p in range(partitions):
        rows = []
        for number in range(15):
            time = 1_650_000_000 + rng.randrange(9) * 3_000
            events = []
            for _ in range(rng.randint(1, 4)):
                time += rng.choice([0, 7, 60, 2_500])
                events.append(
                    {
                        "t": time,
                        "item": rng.randrange(NUM_ITEMS),
                        "click": rng.choice([True, True, False, None]),
                        "watch": rng.choice([None, 0.0, 2.0, 7.5]),
                        "tab": rng.choice([None, 0, 3]),
                        "price": rng.choice([None, 0.5, 1.0, 9.0]),
                        "seen": rng.choice([None, 1.5]),
                        "genres": rng.choice([None, [], [3], [0, None, 4]]),
                    }
                )
            row = session(3 * p + number % 3, number, events)
            row["context"] = {
                "country": rng.choice([None, 4, 5]),
                "age": rng.choice([None, 30.0]),
                "creators": rng.choice([None, [], [1, 2], [2, 1, 0]]),
            }
            rows.append(row)
        parts.append(sorted(rows, key=lambda row: row["end_ts"]))
    return parts


def random_log(folder: Path, seed: int = 0) -> Path:
    write_log(folder, random_sessions(seed))
    return folder


def data_config(log: Path, mode: tuple[str, str, str, str], **changes):
    small = {"max_history_tokens": 12, "sessions_per_partition": 5, "window": "none"}
    return make_config(log, *mode, **(small | changes))


def train_config(data, *, loss=None, optim=None, **model) -> TrainConfig:
    tables = {
        "item": TableConfig(
            num_embeddings=NUM_ITEMS + 1,
            dim=DIM,
            features=("item_id", "target_item_id", "negative_item_id"),
            init_std=1.0,
        ),
        "bins": TableConfig(num_embeddings=9, dim=4, features=("tab", "price_bin"), init_std=1.0),
        "context": TableConfig(
            num_embeddings=7,
            dim=12,
            features=("age", "country", "user"),
            ids="hashed",
            init_std=1.0,
        ),
    }
    if "genres" in data.item_features:
        tables["genres"] = TableConfig(
            num_embeddings=6, dim=DIM, features=("genres", "genre_bins"), init_std=1.0
        )
        tables["creators"] = TableConfig(
            num_embeddings=4, dim=4, features=("creators",), init_std=1.0
        )
    defaults = {
        "dim": DIM,
        "hstu": HSTUConfig(
            num_heads=2, qk_dim=4, v_dim=4, scaling_length=8, bias="position_time", final_norm=True
        ),
        "encoding": EncodingConfig(
            position="from_session" if data.supervise == "session" else "from_start",
            position_buckets=32,
            time="log" if data.supervise == "session" else "none",
            periodic=("hour",),
        ),
        "head": HeadConfig(ranking_hidden=(6,)),
    }
    return TrainConfig(
        run_dir="none",
        device="cpu",
        data=data,
        embeddings=EmbeddingsConfig(tables=tables, form="replicated"),
        model=ModelConfig(**(defaults | model)),
        loss=loss or LossConfig(),
        optim=optim or OptimConfig(),
    )


def batches(data, *, rank: int = 0, world_size: int = 1) -> list[SequenceBatch]:
    """Return the batches of a pass, raw ids."""
    return list(SessionStream(data, seed=3, rank=rank, world_size=world_size))


def make_tables(config: TrainConfig) -> ReplicatedTables:
    return ReplicatedTables(config.embeddings, device=torch.device("cpu"), seed=0)


def look_up(config: TrainConfig, tables: ReplicatedTables, batch: SequenceBatch):
    """Map the ids of `batch` to rows, in place, and return the rows in float64."""
    batch.ids = Vocabulary(config.embeddings).rows(batch.ids)
    return {name: rows.double() for name, rows in tables.lookup(batch.ids).items()}
