"""Folders of an event log that this project made: Parquet files and event_log.json.

OUTPUT/events/part-00000.parquet ...   one row an event: the input of `gr sessionize`
OUTPUT/history/part-00000.parquet ...  events before the log, where there are any
OUTPUT/event_log.json                  how it was made, with rows and SHA-256 of each file
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.location import Location
from pipelines.manifest import file_sha256

EVENTS_FOLDER = "events"
HISTORY_FOLDER = "history"
SUMMARY = "event_log.json"
FORMAT = "gr event log"
ROW_GROUP_EVENTS = 1 << 18


def is_event_log(folder: Location) -> bool:
    """Return whether `folder` holds an event log that this project made."""
    try:
        content = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def write_events(tables: Iterable[pa.Table], path: Path, schema: pa.Schema) -> int:
    """Write rows in order, and return their number; the sizes of the tables change no byte.

    Args:
        tables: with the columns of `schema`; types are cast.
        path: of the file; its folder is made.
        schema: of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    num_rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in _regroup(tables):
            writer.write_table(table.select(schema.names).cast(schema))
            num_rows += table.num_rows
    return num_rows


def _regroup(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield tables of ROW_GROUP_EVENTS rows, the last as it is."""
    held: list[pa.Table] = []
    num_held = 0
    for table in tables:
        held.append(table)
        num_held += table.num_rows
        while num_held >= ROW_GROUP_EVENTS:
            joined = pa.concat_tables(held)
            yield joined.slice(0, ROW_GROUP_EVENTS)
            held = [joined.slice(ROW_GROUP_EVENTS)]
            num_held -= ROW_GROUP_EVENTS
    if num_held:
        yield pa.concat_tables(held)


def write_summary(folder: Path, content: dict[str, Any]) -> None:
    """Write event_log.json: `content`, and rows and SHA-256 of every Parquet file of the folder."""
    files = {
        str(path.relative_to(folder)): {
            "num_rows": pq.read_metadata(path).num_rows,
            "sha256": file_sha256(path),
        }
        for path in sorted(folder.rglob("*.parquet"))
    }
    content = {"format": FORMAT, "version": 1, **content, "files": files}
    text = json.dumps(content, indent=1, ensure_ascii=True)
    (folder / SUMMARY).write_text(text + "\n", encoding="utf-8")
