"""Tokens a second of SessionStream on a synthetic log: python -m pipelines.bench FOLDER."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import ActionConfig, DataConfig, FeatureConfig, TaskConfig
from pipelines.history import Ints
from pipelines.manifest import Manifest, PartitionFile, write_manifest
from pipelines.schema import history_name, part_name, session_schema
from pipelines.stream import SessionStream

ACTIONS = ("is_click", "long_view", "is_like", "play_time_ms")
FEATURES = ("author_id", "tag", "tab", "duration_ms")
DENSE = tuple(f"counter_{i}" for i in range(20))
CONTEXT = ("activity", "age", "follows", "fans", "registered")


def write_synthetic_log(
    folder: Path,
    *,
    partitions: int = 16,
    sessions: int = 120_000,
    users: int = 25_000,
    mean_events: float = 2.0,
    history: int = 32,
    skew: float = 0.0,
    four_columns: bool = False,
) -> None:
    """Write a log shaped like KuaiRand-Pure: two weeks, geometric sessions.

    Args:
        folder: of the log.
        partitions: of the log.
        sessions: in all.
        users: in all.
        mean_events: of a session.
        history: events of each user before the log; 0: no starting histories.
        skew: exponent of Zipf's law of how often users come; 0: all alike.
        four_columns: events of item_id, timestamp and the first two actions only.
    """
    actions = ACTIONS[: 2 if four_columns else None]
    features, dense = (FEATURES, DENSE) if not four_columns else ((), ())
    names = CONTEXT[: 1 if four_columns else None]
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    schema = session_schema(
        actions=[(name, pa.float32()) for name in actions],
        features=[(name, pa.int64()) for name in features]
        + [(name, pa.float32()) for name in dense],
        context=[(name, pa.int64()) for name in names],
    )

    def write(
        name: str, user_id: Ints, session_id: Ints, lengths: Ints, end_ts: Ints
    ) -> PartitionFile:
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        total = int(offsets[-1])
        start_ts = end_ts - 30 * (lengths - 1)
        place = np.arange(total) - np.repeat(offsets[:-1], lengths)
        columns = [
            rng.integers(0, 7500, total),
            np.repeat(start_ts, lengths) + 30 * place,
            *(rng.integers(0, 2, total).astype(np.float32) for _ in actions),
            *(rng.integers(0, 5000, total) for _ in features),
            *(rng.random(total, np.float32) for _ in dense),
        ]
        events = pa.StructArray.from_arrays(
            [pa.array(c) for c in columns], fields=list(schema.field("events").type.value_type)
        )
        context = pa.StructArray.from_arrays(
            [pa.array(rng.integers(0, 50, len(lengths))) for _ in names],
            fields=list(schema.field("context").type),
        )
        table = pa.Table.from_arrays(
            [
                pa.array(user_id),
                pa.array(session_id),
                pa.array(start_ts),
                pa.array(end_ts),
                context,
                pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), events),
            ],
            schema=schema,
        )
        pq.write_table(
            table,
            folder / name,
            row_group_size=16_384,
            compression="lz4",
            use_dictionary=False,
            write_page_checksum=True,
        )
        return PartitionFile(
            name=name,
            num_sessions=len(lengths),
            num_events=total,
            first_end_ts=None,
            last_end_ts=None,
            num_bytes=0,
            sha256="",
        )

    parts, histories = [], []
    for p in range(partitions):
        num = sessions // partitions
        weight = np.arange(1, users // partitions + 1) ** -skew
        user_id = rng.choice(len(weight), num, p=weight / weight.sum()) * partitions + p
        end_ts = np.sort(rng.integers(1_650_000_000, 1_650_000_000 + 14 * 86400, num))
        lengths = rng.geometric(1 / mean_events, num)
        parts.append(write(part_name(p), user_id, np.arange(num), lengths, end_ts))
        if history == 0:
            continue
        known = np.arange(users // partitions) * partitions + p
        histories.append(
            write(
                history_name(p),
                known,
                np.full(len(known), -1),
                np.full(len(known), history),
                np.full(len(known), 1_649_000_000),
            )
        )
    write_manifest(
        Manifest(
            folder=folder,
            partitions=partitions,
            partition_seed=0,
            timezone="UTC",
            actions={},
            features={},
            context={},
            parts=tuple(parts),
            histories=tuple(histories),
            start_ts=0,
            end_ts=0,
            num_rows_read=0,
            num_duplicates=0,
            rejects={},
            nulls={},
            config={},
        )
    )


def quickstart_like(folder: Path, **changes: Any) -> DataConfig:
    """Return a configuration with as many features as configs/quickstart.yaml."""
    fields: dict[str, Any] = {
        "log": str(folder),
        "max_history_tokens": 64,
        "context": "prefix",
        "num_items": 7500,
        "num_negatives": 64,
        "actions": {name: ActionConfig() for name in ACTIONS},
        "item_features": {
            "author_id": FeatureConfig(),
            "tag": FeatureConfig(),
            "tab": FeatureConfig(),
            "duration": FeatureConfig(column="duration_ms", boundaries=(100.0, 1000.0, 4000.0)),
        },
        "context_features": {name: FeatureConfig() for name in CONTEXT},
        "dense_features": DENSE,
        "tasks": {name: TaskConfig(action=name) for name in ACTIONS},
        "positive": ("is_click",),
    }
    return DataConfig(**(fields | changes))


def four_columns(folder: Path, **changes: Any) -> DataConfig:
    """Return a configuration of item, time, a flag and a strength, in the merged layout."""
    fields: dict[str, Any] = {
        "log": str(folder),
        "layout": "merged",
        "max_history_tokens": 512,
        "num_items": 7500,
        "actions": {name: ActionConfig() for name in ACTIONS[:2]},
        "sessions_per_partition": 128,
    }
    return DataConfig(**(fields | changes))


def measure(config: DataConfig, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Return seconds, tokens and rates of one pass; kernels are compiled before."""
    next(iter(SessionStream(config, seed=0)))
    start = clock()
    tokens = sequences = steps = 0
    for batch in SessionStream(config, seed=0):
        tokens += batch.num_tokens
        sequences += batch.num_sequences
        steps += 1
    seconds = clock() - start
    return {
        "seconds": seconds,
        "tokens": tokens,
        "sequences": sequences,
        "steps": steps,
        "tokens_per_s": tokens / seconds,
        "us_per_sequence": seconds / sequences * 1e6,
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if not folder.exists():
        write_synthetic_log(folder)
    for prefetch in (0, 4):
        print(prefetch, measure(quickstart_like(folder, prefetch=prefetch)))
