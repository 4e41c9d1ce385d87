"""Files of a user's log, Parquet or Arrow IPC, found and checked."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.location import Location, RemotePath, locate, open_input, protocols

Kind = Literal["bool", "integer", "float", "string", "timestamp", "integers", "strings"]

Format = Literal["parquet", "ipc_file", "ipc_stream"]
_MAGIC: dict[bytes, Format] = {
    b"PAR1": "parquet",
    b"ARRO": "ipc_file",
    b"\xff\xff\xff\xff": "ipc_stream",
}
_SUFFIXES = (".parquet", ".arrow", ".arrows", ".feather", ".ipc")

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
    """Files with the same columns."""

    setting: str
    """Key of the configuration that names them, for messages."""
    files: tuple[str, ...]
    """Paths or URLs of what is read."""
    names: tuple[str, ...]
    """Paths or URLs that they have for the user, ascending."""
    formats: tuple[Format, ...]
    """Of each file."""
    kinds: dict[str, Kind]
    """Kind of each column that is read."""
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
        url: file, folder or glob, Parquet or Arrow IPC (file or stream); a path or any URL that
            fsspec knows.
        setting: key of the configuration that names it.
        columns: column -> kinds that are allowed.
        optional: columns that may be missing.

    Raises:
        ValueError: if there is no such file, a file is neither Parquet nor Arrow IPC, or a column
            is missing, is of another kind, differs between files or has a namesake in other
            capitals.
    """
    filesystem, paths = _list_files(url, setting)
    kinds: dict[str, Kind] = {}
    first: dict[str, str] = {}
    formats = []
    local = "file" in protocols(filesystem)
    for path in paths:
        place = Path(path) if local else RemotePath(filesystem, path)
        found, schema = _read_schema(place, f"{setting}={path}")
        formats.append(found)
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
    files = tuple(paths if local else (filesystem.unstrip_protocol(path) for path in paths))
    filesystem = None if local else filesystem
    return Source(setting, files, files, tuple(formats), kinds, filesystem)


def as_parquet(source: Source, folder: Path) -> Source:
    """Return a source whose files are Parquet: what is Arrow IPC is copied, a batch at a time.

    Engines read a log more than once and in parallel, which a stream of batches does not allow.

    Args:
        source: the files.
        folder: where the copies go.

    Raises:
        ValueError: if a file cannot be read.
    """
    files: list[str] = []
    parquet: Format = "parquet"
    for i, (file, found) in enumerate(zip(source.files, source.formats, strict=True)):
        if found == "parquet":
            files.append(file)
            continue
        copy = folder / f"{source.setting}-{i}.parquet"
        names = list(source.kinds)
        with (
            _explain(f"{source.setting}={file}"),
            _open_ipc(locate(file), found) as (schema, batches),
        ):
            fields = [pa.field(name, _plain(schema.field(name).type)) for name in names]
            plain = pa.schema(fields)
            with pq.ParquetWriter(copy, plain, compression="lz4") as writer:
                for batch in batches:
                    writer.write_table(pa.table(batch).select(names).cast(plain))
        files.append(str(copy))
    return replace(source, files=tuple(files), formats=(parquet,) * len(files))


def read_tables(source: Source) -> Iterator[tuple[str, pa.Table]]:
    """Yield the name of each file and the columns of it that are read.

    Raises:
        ValueError: if a file cannot be read.
    """
    for name, found in zip(source.names, source.formats, strict=True):
        with _explain(f"{source.setting}={name}"):
            if found == "parquet":
                with open_input(locate(name)) as file:
                    table = pq.read_table(file, columns=list(source.kinds))
            else:
                with _open_ipc(locate(name), found) as (schema, batches):
                    table = pa.Table.from_batches(batches, schema).select(list(source.kinds))
        yield name, table


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return a type of the same values that every engine reads from Parquet."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_float16(kind):
        return pa.float32()
    if _is_list(kind):
        return pa.list_(_plain(kind.value_type))
    return kind


def _is_list(kind: pa.DataType) -> bool:
    return any(
        test(kind)
        for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    )


@contextmanager
def _open_ipc(
    path: Location, found: Format
) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Yield the schema and the batches of an Arrow IPC file or stream."""
    with open_input(path) as source:
        if found == "ipc_stream":
            with pa.ipc.open_stream(source) as stream:
                yield stream.schema, iter(stream)
            return
        with pa.ipc.open_file(source) as file:
            yield file.schema, (file.get_batch(i) for i in range(file.num_record_batches))


@contextmanager
def _explain(where: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{where} cannot be read as Arrow IPC or Parquet: {error}") from error


def _list_files(url: str, setting: str) -> tuple[Any, list[str]]:
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{setting}={url}: {error}") from error
    if any(character in path for character in "*?["):
        found = filesystem.glob(path)
    elif filesystem.isdir(path):
        found = [name for name in filesystem.find(path) if name.lower().endswith(_SUFFIXES)]
    elif filesystem.exists(path):
        found = [path]
    else:
        raise ValueError(
            f"{setting}={url}: there is no such file or folder. Expected a Parquet or Arrow IPC "
            "file, a folder of them or a glob; a relative path starts at the folder in which the "
            "command runs."
        )
    # Names that start with . or _ are other tools' own (_SUCCESS, .part-0.crc).
    files = sorted(name for name in found if not name.rsplit("/", 1)[-1].startswith((".", "_")))
    if not files:
        raise ValueError(
            f"{setting}={url}: found no Parquet file there, nor Arrow IPC (names that end in "
            f"{', '.join(_SUFFIXES)})"
        )
    return filesystem, files


def _read_schema(path: Location, where: str) -> tuple[Format, pa.Schema]:
    with _explain(where):
        with path.open("rb") as file:
            magic = file.read(4)
        found = _MAGIC.get(magic)
        if found is None:
            raise ValueError(
                f"{where} is not a readable Parquet file, nor Arrow IPC: it begins with {magic!r}"
            )
        if found != "parquet":
            with _open_ipc(path, found) as (schema, _):
                return found, schema
        with open_input(path) as source, pq.ParquetFile(source) as parquet:
            return found, parquet.schema_arrow


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
    if _plain(arrow) == pa.string():
        return "string"
    if _is_list(arrow):
        lists: dict[Kind | None, Kind] = {"integer": "integers", "string": "strings"}
        return lists.get(_kind(arrow.value_type))
    return "timestamp" if pa.types.is_timestamp(arrow) else None
