"""manifest.json: what a session-end log holds, and the check that its files are those it names."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.location import Location, locate, open_input
from pipelines.portable_hash import PARTITION_HASH, STRING_HASH
from pipelines.schema import CONTEXT, MANIFEST, session_schema

FORMAT = "gr session-end log"
VERSION = 1

LIST = "list<int64>"
"""Type of a column that holds several values."""
_ANEW = "make the log anew with `gr sessionize CONFIG overwrite=true`"


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionFile:
    """One file of the log."""

    name: str
    """File name inside the folder."""
    num_sessions: int
    """Rows; of a history file: users."""
    num_events: int
    """Events of all rows."""
    first_end_ts: int | None
    """end_ts of the first row in s; None without rows."""
    last_end_ts: int | None
    """end_ts of the last row in s; None without rows."""
    num_bytes: int
    """Size of the file."""
    sha256: str
    """Of the file's bytes."""
    longest_session: int | None = None
    """Events of the longest session; None where the log was written before this was noted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a session-end log holds."""

    folder: Location
    """Where it lies; not in the file."""
    partitions: int
    """P."""
    partition_seed: int
    """Of portable_hash.partition_of(user_id)."""
    timezone: str
    """What hour, weekday and day mean."""
    actions: dict[str, str]
    """Action column of the event -> Arrow type."""
    features: dict[str, str]
    """Further column of the event (joined ones and counters included) -> Arrow type."""
    context: dict[str, str]
    """Column of the session's context -> Arrow type; without any, files have no column context."""
    parts: tuple[PartitionFile, ...]
    """part-00000.parquet ..., one a partition."""
    histories: tuple[PartitionFile, ...]
    """history-00000.parquet ..., one a partition; empty if users start with none."""
    start_ts: int
    """Earliest start_ts of the log in s."""
    end_ts: int
    """Latest end_ts of the log in s."""
    num_rows_read: int
    """Rows of the event log and of the history before it."""
    num_duplicates: int
    """Rows dropped because they repeat another, by the rule in config.duplicates."""
    rejects: dict[str, int]
    """Reason -> unusable rows; they are in rejects.parquet."""
    nulls: dict[str, int]
    """Column of the event or context -> nulls in the log, histories not counted."""
    config: dict[str, Any]
    """SessionizeConfig that made it."""

    @property
    def num_sessions(self) -> int:
        """Sessions of all partitions."""
        return sum(part.num_sessions for part in self.parts)

    @property
    def num_events(self) -> int:
        """Events of all sessions; starting histories not counted."""
        return sum(part.num_events for part in self.parts)

    @property
    def num_history_events(self) -> int:
        """Events of the starting histories."""
        return sum(part.num_events for part in self.histories)

    def schema(self) -> pa.Schema:
        """Return the Arrow schema of the log's files."""
        return log_schema(self.actions, self.features, self.context)


def log_schema(
    actions: dict[str, str], features: dict[str, str], context: dict[str, str]
) -> pa.Schema:
    """Return `session_schema` of columns given as name -> Arrow type.

    Parquet has no struct without fields, so a log without context has no column of that name.
    """
    schema = session_schema(
        actions=_types(actions), features=_types(features), context=_types(context)
    )
    return schema if context else schema.remove(schema.get_field_index(CONTEXT))


def _types(columns: dict[str, str]) -> Iterator[tuple[str, pa.DataType]]:
    return (
        (name, pa.list_(pa.int64()) if kind == LIST else pa.type_for_alias(kind))
        for name, kind in columns.items()
    )


def write_manifest(manifest: Manifest) -> None:
    """Write `manifest` into its folder."""
    content = asdict(replace(manifest, folder=Path()))
    del content["folder"]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "partition_hash": PARTITION_HASH,
        "string_hash": STRING_HASH,
        "num_sessions": manifest.num_sessions,
        "num_events": manifest.num_events,
        "num_history_events": manifest.num_history_events,
        **content,
    }
    assert isinstance(manifest.folder, Path)  # files are made locally, then sent
    path = manifest.folder / MANIFEST
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: str | Location, *, check_files: bool = True) -> Manifest:
    """Read the manifest of a session-end log and check that its files are there with their rows.

    Only the footers of the files are read; `verify_checksums` reads all.

    Args:
        folder: of the log: a path, or a URL that fsspec knows.
        check_files: false: the caller finds out about files that are missing or damaged.

    Raises:
        ValueError: if the folder is missing or is no such log; if a file is missing, is no Parquet
            or has another number of rows than the manifest says.
    """
    folder = locate(folder)
    if not folder.is_dir():
        raise ValueError(
            f"no session-end log at {folder}: there is no such folder. Make it with "
            "`gr sessionize CONFIG`, whose `output` names the folder."
        )
    content = _read_content(folder / MANIFEST)
    if content is None:
        raise ValueError(
            f"{folder} holds no {MANIFEST} of a session-end log. Make the log with "
            "`gr sessionize CONFIG`, or name another folder."
        )
    if content.get("version") != VERSION:
        raise ValueError(
            f"{folder / MANIFEST} has version {content.get('version')}, this release reads "
            f"{VERSION}: {_ANEW}"
        )
    for key, known in (("partition_hash", PARTITION_HASH), ("string_hash", STRING_HASH)):
        if content.get(key) != known:
            raise ValueError(
                f"{folder / MANIFEST}: {key} is {content.get(key)}, this release knows {known}: "
                f"{_ANEW}"
            )
    names = [name for name in Manifest.__dataclass_fields__ if name != "folder"]
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(f"{folder / MANIFEST} lacks {missing}, so it was cut or edited: {_ANEW}")
    values = {name: content[name] for name in names}
    for name in ("parts", "histories"):
        values[name] = tuple(PartitionFile(**file) for file in values[name])
    manifest = Manifest(folder=folder, **values)
    _check_counts(manifest)
    if check_files:
        for file in (*manifest.parts, *manifest.histories):
            check_file(manifest, file)
    return manifest


def is_session_log(folder: Location) -> bool:
    """Return whether `folder` holds a session-end log of any version."""
    return _read_content(folder / MANIFEST) is not None


def _read_content(path: Location) -> dict[str, Any] | None:
    """Return the content of a manifest; None if the file is missing or is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def _check_counts(manifest: Manifest) -> None:
    counts = {"parts": len(manifest.parts), "histories": len(manifest.histories)}
    if counts["parts"] != manifest.partitions or counts["histories"] not in (
        0,
        manifest.partitions,
    ):
        raise ValueError(
            f"{manifest.folder / MANIFEST} says {manifest.partitions} partitions but names "
            f"{counts}: {_ANEW}"
        )


def check_file(manifest: Manifest, file: PartitionFile) -> None:
    """Check that a file of the log is there and has its rows; only its footer is read.

    Raises:
        ValueError: if it is missing, is no Parquet or has another number of rows.
    """
    path = manifest.folder / file.name
    try:
        with open_input(path) as source:
            num_rows = pq.read_metadata(source).num_rows
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is missing, though {MANIFEST} names it with {file.num_sessions} rows: "
            f"restore it, or {_ANEW}"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a readable Parquet file ({error}): restore it, or {_ANEW}"
        ) from error
    if num_rows != file.num_sessions:
        raise ValueError(
            f"{path} has {num_rows} rows, {MANIFEST} says {file.num_sessions}: "
            f"restore it, or {_ANEW}"
        )


def verify_checksums(manifest: Manifest) -> None:
    """Read every file of the log and compare it with its checksum.

    Raises:
        ValueError: naming the first file whose bytes are not those that were written.
    """
    for file in (*manifest.parts, *manifest.histories):
        path = manifest.folder / file.name
        found = file_sha256(path)
        if found != file.sha256:
            raise ValueError(
                f"{path} has sha256 {found}, {MANIFEST} says {file.sha256}: the file was changed "
                f"or damaged. Restore it, or {_ANEW}"
            )


def file_sha256(path: Location) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
