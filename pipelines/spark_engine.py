"""Spark as the engine of sessionize, for logs that outgrow one machine.

The expression is the one that DuckDB runs. Spark sorts and writes it as Parquet files into the
scratch folder beside the output, which its workers and this process must share; from there the
partitions are written as with DuckDB.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import SessionizeConfig
from pipelines.event_log import Source

if TYPE_CHECKING:
    import ibis.expr.types as ir

BATCH_ROWS = 1 << 17

_SQL = {
    "bool": "{0}",
    "integer": "CAST({0} AS BIGINT)",
    "float": "CASE WHEN isnan({0}) THEN NULL ELSE CAST({0} AS DOUBLE) END",
    "string": "CAST({0} AS STRING)",
    "integers": "CAST({0} AS ARRAY<BIGINT>)",
    "strings": "CAST({0} AS ARRAY<STRING>)",
}


class SparkEngine:
    """Runs Ibis expressions over Parquet files."""

    def __init__(self, session: Any, scratch: Path) -> None:
        """Wrap a Spark session; sorted rows go into `scratch` on their way."""
        import ibis

        self._session = session
        self._scratch = scratch
        self._connection = ibis.pyspark.connect(session)
        self._num_streams = 0

    def read(self, source: Source, name: str) -> "ir.Table":
        """Return the columns of a source, with `file` (index) and `row` (in the file).

        Args:
            source: the files.
            name: of the view that is made; used once.
        """
        from pyspark.sql import functions as f

        frame = self._session.read.parquet(*(_literal(file) for file in source.files[:1]))
        schema = _read_schema(frame.schema, source)
        frame = self._session.read.schema(schema).parquet(*map(_literal, source.files))
        index = {_plain(file): i for i, file in enumerate(source.files)}
        # As Spark writes them: percent-encoded, and with one slash or three behind the scheme.
        files = {_path(uri): index[_plain(uri)] for uri in frame.inputFiles()}
        pairs = [f.lit(x) for pair in files.items() for x in pair]
        columns = [
            f.expr(_expression(frame.schema, column, kind)).alias("raw_" + column)
            for column, kind in source.kinds.items()
        ]
        path = f.regexp_replace(f.col("_metadata.file_path"), "^[A-Za-z0-9+.-]+:/+", "/")
        frame = frame.select(
            *columns,
            f.element_at(f.create_map(*pairs), path).cast("bigint").alias("file"),
            f.col("_metadata.row_index").alias("row"),
        )
        frame.createOrReplaceTempView(name)
        table: ir.Table = self._connection.table(name)
        return table

    def hex_to_integer(self, digits: "ir.StringValue") -> "ir.IntegerValue":
        """Return the number that 8 hexadecimal digits stand for."""
        number: ir.IntegerValue = _conv()(digits, 16, 10).cast("int64")
        return number

    def collect(self, table: "ir.Table") -> pa.Table:
        """Return all rows of an expression that has few."""
        return self._frame(table).toArrow()

    def stream(self, table: "ir.Table") -> Iterator[pa.RecordBatch]:
        """Yield the rows of an ordered expression."""
        folder = self._scratch / f"sorted_{self._num_streams}"
        self._num_streams += 1
        self._frame(table).write.parquet(str(folder.absolute()))
        # A sort cuts the rows into ranges, and the files are numbered as these are.
        for path in sorted(folder.glob("part-*.parquet")):
            with pq.ParquetFile(path) as parquet:
                yield from parquet.iter_batches(BATCH_ROWS)
            path.unlink()

    def _frame(self, table: "ir.Table") -> Any:
        return self._session.sql(self._connection.compile(table))


@contextmanager
def open_spark(config: SessionizeConfig, scratch: Path) -> Iterator[SparkEngine]:
    """Yield a Spark session: the one that is active, else one of config.spark, stopped at the end.

    Raises:
        ValueError: if pyspark or Java is missing, Spark cannot start, or a file cannot be read.
    """
    try:
        from pyspark.errors import AnalysisException, ParseException, PySparkException
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise ValueError(
            f"engine=spark needs pyspark ({error}): pip install -r requirements/spark.txt, and "
            "Java 17"
        ) from error
    active = SparkSession.getActiveSession()
    session = active or _start(config, SparkSession)
    before: dict[str, Any] = {name: session.conf.get(name, None) for name in _SETTINGS}
    try:
        for name, value in _SETTINGS.items():
            session.conf.set(name, value)
        yield SparkEngine(session, scratch)
    except (AnalysisException, ParseException):
        raise  # An expression of ours that Spark does not take.
    except PySparkException as error:
        raise ValueError(_explain(config, error)) from error
    except Exception as error:
        if type(error).__module__.startswith("py4j"):
            raise ValueError(_explain(config, error)) from error
        raise
    finally:
        if active is None:
            session.stop()
        else:
            for name, value in before.items():
                session.conf.unset(name) if value is None else session.conf.set(name, value)


# Times are UTC; Parquet's nanoseconds are read as numbers, for Spark has no type for them.
_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.legacy.parquet.nanosAsLong": "true",
}


def _start(config: SessionizeConfig, builder: Any) -> Any:
    threads = str(config.threads) if config.threads else "*"
    settings = {
        "spark.master": f"local[{threads}]",
        "spark.driver.memory": f"{round(config.memory_gb * 1000)}m",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        **config.spark,
    }
    made = builder.builder.appName("gr sessionize")
    for name, value in settings.items():
        made = made.config(name, value)
    try:
        return made.getOrCreate()
    except Exception as error:  # JAVA_GATEWAY_EXITED is a PySparkRuntimeError, others are of py4j.
        raise ValueError(
            f"engine=spark could not start Spark with {settings} ({error}). Spark 4 needs Java 17 "
            "or 21 in PATH or JAVA_HOME."
        ) from error


def _explain(config: SessionizeConfig, error: Exception) -> str:
    names = [config.input, config.history, *(join.path for join in config.joins)]
    text = str(error).split("\n", 1)[0]
    return (
        f"Spark cannot decode one of the files {[x for x in names if x]}, ran out of memory "
        f"(memory_gb={config.memory_gb}), or cannot write beside output={config.output}: {text}"
    )


def _read_schema(found: Any, source: Source) -> Any:
    """Return the types to read columns as: wide ones, for files may differ in width."""
    from pyspark.sql import types as t

    wide = {"bool": t.BooleanType(), "integer": t.LongType(), "float": t.DoubleType()}
    wide["string"] = t.StringType()
    wide["integers"] = t.ArrayType(t.LongType())
    wide["strings"] = t.ArrayType(t.StringType())
    fields = [
        t.StructField(column, wide.get(kind) or found[column].dataType)
        for column, kind in source.kinds.items()
    ]
    return t.StructType(fields)


def _expression(schema: Any, column: str, kind: str) -> str:
    quoted = "`" + column.replace("`", "``") + "`"
    if kind != "timestamp":
        return _SQL[kind].format(quoted)
    if schema[column].dataType.simpleString() == "bigint":  # nanoseconds, by _SETTINGS
        return f"CAST(floor({quoted} / 1000BD) AS BIGINT)"
    return f"unix_micros(CAST({quoted} AS TIMESTAMP))"


def _literal(file: str) -> str:
    """Return a path in which no character stands for others."""
    return "".join("\\" + c if c in "*?[]{}\\" else c for c in file)


def _plain(file: str) -> str:
    """Return the path of a file, whether it is given as a path or as Spark's URI."""
    if "://" in file or file.startswith("file:"):
        parts = urlsplit(file)
        return "/" + (parts.netloc + unquote(parts.path)).lstrip("/")
    return str(Path(file).absolute())


def _path(uri: str) -> str:
    """Return Spark's URI without scheme, still percent-encoded, with one slash in front."""
    return "/" + uri.split(":", 1)[1].lstrip("/")


def _conv() -> Any:
    """Return Spark's conv(digits, from base, to base)."""
    import ibis

    @ibis.udf.scalar.builtin
    def conv(digits: str, from_base: int, to_base: int) -> str:  # type: ignore[empty-body]
        """Of Spark."""

    return conv
