"""Writes small session-end logs for tests: sessions as plain dictionaries."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.manifest import Manifest, PartitionFile, write_manifest
from pipelines.schema import history_name, part_name, session_schema

ACTIONS = {"click": pa.bool_(), "watch": pa.float64()}
IDS = pa.list_(pa.int64())
FEATURES = {"tab": pa.int64(), "price": pa.float64(), "seen": pa.float32(), "genres": IDS}
CONTEXT = {"country": pa.int64(), "age": pa.float64(), "creators": IDS}
SCHEMA = session_schema(actions=ACTIONS.items(), features=FEATURES.items(), context=CONTEXT.items())


def write_log(
    folder: Path,
    partitions: list[list[dict]],
    histories: list[list[dict]] | None = None,
    *,
    schema: pa.Schema = SCHEMA,
    row_group_size: int = 3,
) -> None:
    """Write rows (keys as in the schema) of each partition, in the order given."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, rows: list[dict]) -> PartitionFile:
        pq.write_table(
            pa.Table.from_pylist(rows, schema=schema), folder / name, row_group_size=row_group_size
        )
        return PartitionFile(
            name=name,
            num_sessions=len(rows),
            num_events=0,
            first_end_ts=None,
            last_end_ts=None,
            num_bytes=0,
            sha256="",
        )

    parts = [write(part_name(p), rows) for p, rows in enumerate(partitions)]
    starts = [write(history_name(p), rows) for p, rows in enumerate(histories or [])]
    types = [{k: str(v) for k, v in c.items()} for c in (ACTIONS, FEATURES, CONTEXT)]
    write_manifest(
        Manifest(
            folder=folder,
            partitions=len(parts),
            partition_seed=0,
            timezone="UTC",
            actions=types[0],
            features=types[1],
            context=types[2],
            parts=tuple(parts),
            histories=tuple(starts),
            start_ts=0,
            end_ts=0,
            num_rows_read=0,
            num_duplicates=0,
            rejects={},
            nulls={},
            config={},
        )
    )


def session(user: int, session_id: int, events: list[dict], **changes) -> dict:
    """Return a row; `events` hold t, item and any further columns."""
    rows = [
        {
            "item_id": e["item"],
            "timestamp": e["t"],
            **{k: v for k, v in e.items() if k not in ("item", "t")},
        }
        for e in events
    ]
    times = [e["t"] for e in events] or [0]
    row = {
        "user_id": user,
        "session_id": session_id,
        "start_ts": times[0],
        "end_ts": times[-1],
        "context": {"country": None, "age": None},
        "events": rows,
    }
    return row | changes
