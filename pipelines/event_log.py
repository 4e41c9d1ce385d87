"""Parquet files of a user's log, found and checked."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

Kind = Literal["bool", "integer", "float", "string", "timestamp", "integers", "strings"]

IBIS_TYPES = {
    "bool": "boolean",
    "integer": "int64",
    "float": "float64",
    "string": "string",
    "timestamp": "int64",
    "integers": "array<int64>",
    "strings": "array<string>",
}


@dataclass(frozen=True, slots=True)
class Source:
    """Parquet files with the same columns."""

    setting: str
    """Key of the configuration that names them, for messages."""
    files: tuple[str, ...]
    """Paths or URLs, ascending."""
    kinds: dict[str, Kind]
    """Kind of each column that is read."""
    num_rows: int
    """Rows of all files."""
    filesystem: Any
    """fsspec file system of the files; None if they are local."""


def find_source(
    url: str,
    setting: str,
    columns: Mapping[str, Collection[Kind]],
    *,
    optional: Collection[str] = (),
) -> Source:
    """Find the files and check the columns that will be read.

    Args:
        url: Parquet file, folder or glob; a path or any URL that fsspec knows.
        setting: key of the configuration that names it.
        columns: column -> kinds that are allowed.
        optional: columns that may be missing.

    Raises:
        ValueError: if there is no such file, a file is no Parquet, or a column is missing, is of
            another kind, differs between files or has a namesake in other capitals.
    """
    filesystem, paths = _list_files(url, setting)
    kinds: dict[str, Kind] = {}
    first: dict[str, str] = {}
    num_rows = 0
    for path in paths:
        schema, rows = _read_footer(filesystem, path, setting)
        num_rows += rows
        where = f"{setting}={path}"
        for name, allowed in columns.items():
            if name not in schema.names:
                if name in optional and len(paths) == 1:
                    continue
                raise ValueError(f"{where} has no column {name}; it has {schema.names}")
            namesakes = [x for x in schema.names if x != name and x.lower() == name.lower()]
            if namesakes:
                raise ValueError(
                    f"{where} has columns {name} and {namesakes}, which differ in capitals only: "
                    "rename one of them"
                )
            kind = _kind(schema.field(name).type)
            if kind is None or kind not in allowed:
                raise ValueError(
                    f"{where}: column {name} has type {schema.field(name).type}, expected one of "
                    f"{sorted(allowed)}: cast it in the file"
                )
            if kinds.setdefault(name, kind) != kind:
                raise ValueError(
                    f"{where}: column {name} is {kind}, but {kinds[name]} in {first[name]}: the "
                    f"files of {setting} must agree"
                )
            first.setdefault(name, path)
    local = "file" in protocols(filesystem)
    files = tuple(paths if local else (filesystem.unstrip_protocol(path) for path in paths))
    return Source(setting, files, kinds, num_rows, None if local else filesystem)


def protocols(filesystem: Any) -> tuple[str, ...]:
    """Return the names of a file system in URLs."""
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _list_files(url: str, setting: str) -> tuple[Any, list[str]]:
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{setting}={url}: {error}") from error
    if any(character in path for character in "*?["):
        found = filesystem.glob(path)
    elif filesystem.isdir(path):
        found = filesystem.glob(f"{path}/**/*.parquet")
    elif filesystem.exists(path):
        found = [path]
    else:
        raise ValueError(
            f"{setting}={url}: there is no such file or folder. Expected a Parquet file, a folder "
            "of them or a glob; a relative path starts at the folder in which the command runs."
        )
    # Names that start with . or _ are other tools' own (_SUCCESS, .part-0.crc).
    files = sorted(name for name in found if not name.rsplit("/", 1)[-1].startswith((".", "_")))
    if not files:
        raise ValueError(f"{setting}={url}: found no Parquet file there")
    return filesystem, files


def _read_footer(filesystem: Any, path: str, setting: str) -> tuple[pa.Schema, int]:
    try:
        with filesystem.open(path, "rb") as file, pq.ParquetFile(file) as parquet:
            return parquet.schema_arrow, parquet.metadata.num_rows
    except pa.ArrowInvalid as error:
        raise ValueError(f"{setting}={path} is not a readable Parquet file: {error}") from error


def _kind(arrow: pa.DataType) -> Kind | None:
    """Return the kind of a type; None for one that has no use here (uint64 would not fit int64)."""
    if pa.types.is_dictionary(arrow):
        arrow = arrow.value_type
    if pa.types.is_boolean(arrow):
        return "bool"
    if pa.types.is_integer(arrow) and arrow != pa.uint64():
        return "integer"
    if pa.types.is_floating(arrow):
        return "float"
    if pa.types.is_string(arrow) or pa.types.is_large_string(arrow):
        return "string"
    if pa.types.is_list(arrow) or pa.types.is_large_list(arrow):
        lists: dict[Kind | None, Kind] = {"integer": "integers", "string": "strings"}
        return lists.get(_kind(arrow.value_type))
    return "timestamp" if pa.types.is_timestamp(arrow) else None
