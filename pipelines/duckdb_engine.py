"""DuckDB as the engine of sessionize: embedded, out of core, and without a network."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines.config import SessionizeConfig
from pipelines.event_log import Kind, Source
from pipelines.location import protocols

if TYPE_CHECKING:
    import ibis.expr.types as ir

BATCH_ROWS = 1 << 17

# What a column of each kind is read as: NaN is no value, a timestamp becomes us since the epoch.
_SQL: dict[Kind, str] = {
    "bool": "{0}",
    "integer": "CAST({0} AS BIGINT)",
    "float": "CASE WHEN isnan({0}) THEN NULL ELSE CAST({0} AS DOUBLE) END",
    "string": "CAST({0} AS VARCHAR)",
    "timestamp": "epoch_us({0})",
    "integers": "CAST({0} AS BIGINT[])",
    "strings": "CAST({0} AS VARCHAR[])",
}


class DuckDBEngine:
    """Runs Ibis expressions over Parquet files."""

    def __init__(self, connection: Any, scratch: Path) -> None:
        """Wrap an Ibis connection to DuckDB, and a folder for files on their way."""
        self._connection = connection
        self._scratch = scratch

    def read(self, source: Source, name: str) -> "ir.Table":
        """Return the columns of a source, with `file` (index) and `row` (in the file).

        Args:
            source: the files.
            name: of the view that is made; used once.
        """
        filesystem = source.filesystem
        if filesystem is not None and not self._connection.con.filesystem_is_registered(
            protocols(filesystem)[0]
        ):
            self._connection.con.register_filesystem(filesystem)
        files = ", ".join("'" + file.replace("'", "''") + "'" for file in source.files)
        read = f"read_parquet([{files}], union_by_name = true, hive_partitioning = false)"
        query = self._connection.con.sql(f"DESCRIBE SELECT * FROM {read}")
        types = {column: kind for column, kind, *_ in query.fetchall()}
        columns = [
            f"{_expression(column, kind, types[column])} AS {_quoted('raw_' + column)}"
            for column, kind in source.kinds.items()
        ]
        self._connection.raw_sql(
            f"CREATE VIEW {_quoted(name)} AS SELECT {', '.join(columns)}, "
            'CAST(file_index AS BIGINT) AS "file", file_row_number AS "row" '
            f"FROM {read}"
        )
        table: ir.Table = self._connection.table(name)
        return table

    def hex_to_integer(self, digits: "ir.StringValue") -> "ir.IntegerValue":
        """Return the number that 8 hexadecimal digits stand for."""
        import ibis

        number: ir.IntegerValue = (ibis.literal("0x") + digits).cast("int64")
        return number

    def collect(self, table: "ir.Table") -> pa.Table:
        """Return all rows of an expression that has few."""
        return self._connection.to_pyarrow(table)

    def new_folder(self) -> Path:
        """Return an empty folder, which is gone when the log is written."""
        return Path(tempfile.mkdtemp(dir=self._scratch))

    def read_rows(self, files: Sequence[Path]) -> "ir.Table":
        """Return what Parquet files of our own hold."""
        rows: ir.Table = self._connection.read_parquet([str(file) for file in files])
        return rows

    def stream(self, table: "ir.Table") -> Iterator[pa.RecordBatch]:
        """Return the rows of an expression; what is not yet fetched is not in memory."""
        # ibis 12 calls a method that duckdb 2.0 no longer has, so DuckDB is asked directly.
        query = self._connection.con.sql(self._connection.compile(table))
        reader: Iterator[pa.RecordBatch] = query.to_arrow_reader(BATCH_ROWS)
        return reader


@contextmanager
def open_duckdb(config: SessionizeConfig, scratch: Path) -> Iterator[DuckDBEngine]:
    """Yield a DuckDB that keeps to its memory.

    Raises:
        ValueError: if memory_gb is too small, or a file cannot be decoded.
    """
    import duckdb
    import ibis

    options: dict[str, Any] = {
        "memory_limit": f"{round(config.memory_gb * 1000)}MB",
        "temp_directory": str(scratch),
        "autoinstall_known_extensions": False,
    }
    if config.threads:
        options["threads"] = config.threads
    connection = ibis.duckdb.connect(**options)
    try:
        connection.raw_sql("SET enable_progress_bar = false")
        # Parquet's bounds of a column leave NaN out, so DuckDB 2.0 takes isnan() for always false.
        connection.raw_sql("SET disabled_optimizers = 'statistics_propagation'")
        yield DuckDBEngine(connection, scratch)
    except duckdb.OutOfMemoryException as error:
        raise ValueError(
            f"memory_gb={config.memory_gb} is too little for this log: raise it, or lower threads "
            f"({error})"
        ) from error
    except (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException):
        raise  # An expression of ours that DuckDB does not take.
    except duckdb.Error as error:
        names = [config.input, config.history, *(join.path for join in config.joins)]
        raise ValueError(
            f"cannot decode one of the files {[x for x in names if x]}, or cannot write beside "
            f"output={config.output}: {error}"
        ) from error
    finally:
        connection.disconnect()


def _expression(column: str, kind: Kind, found: str) -> str:
    if kind == "timestamp" and found.endswith("_NS"):
        # DuckDB 2.0 has no epoch_us for nanoseconds with a time zone.
        return f"epoch_ns(CAST({_quoted(column)} AS TIMESTAMP_NS)) // 1000"
    return _SQL[kind].format(_quoted(column))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
