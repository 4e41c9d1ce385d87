"""DuckDB and Spark run the same expression: their logs agree row by row.

pytest -m slow tests/pipelines/test_spark.py      # needs requirements/spark.txt and Java 17
"""

import importlib.util
import re
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gr.config_io import load_config
from pipelines.config import JoinConfig, SessionizeConfig
from pipelines.manifest import verify_checksums
from pipelines.sessionize import sessionize
from tests.pipelines.test_sessionize import COUNTERS, arrow_schema, event_logs, one_of, write

MISSING = [
    name
    for name, there in (
        ("pyspark", importlib.util.find_spec("pyspark") is not None),
        ("Java", shutil.which("java") is not None),
    )
    if not there
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"),
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def spark():
    """Start Spark once: sessionize uses the session that is active."""
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    builder = builder.config("spark.sql.shuffle.partitions", "3")
    session = builder.config("spark.driver.memory", "2g").getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()


def assert_same_log(config):
    """Run both engines and compare every file, row by row, and what the manifests say."""
    duck = sessionize(replace(config, output=config.output + "_duckdb"))
    spark = sessionize(replace(config, output=config.output + "_spark", engine="spark"))
    verify_checksums(spark)
    for a, b in zip((*duck.parts, *duck.histories), (*spark.parts, *spark.histories), strict=True):
        one, two = pq.read_table(duck.folder / a.name), pq.read_table(spark.folder / b.name)
        assert one.schema == two.schema
        assert one.to_pylist() == two.to_pylist()
    assert spark.parts == duck.parts  # the same bytes
    for name in ("num_rows_read", "num_duplicates", "rejects", "nulls", "start_ts", "end_ts"):
        assert getattr(duck, name) == getattr(spark, name)
    if duck.rejects:
        tables = [pq.read_table(m.folder / "rejects.parquet") for m in (duck, spark)]
        assert tables[0].to_pylist() == tables[1].to_pylist()
    return duck


@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    drawn=event_logs(),
    duplicates=one_of("exact", "event", "keep"),
    order=st.booleans(),
    named=st.booleans(),
    as_timestamp=st.booleans(),
)
def test_drawn_logs(spark, drawn, duplicates, order, named, as_timestamp, tmp_path_factory):
    log, history, unit, strings = drawn
    tmp = tmp_path_factory.mktemp("a log, #1 50% [x]")
    for row in (*log, *history):
        if as_timestamp and row["t"] is not None and not 0 <= row["t"] < 2**40:
            row["t"] = None  # no engine's timestamp holds it
    schema = arrow_schema(strings, unit, as_timestamp=as_timestamp)
    (tmp / "log").mkdir()
    half = len(log) // 2
    write(tmp / "log/a.parquet", log[:half], schema)
    # Files may differ in width.
    write(tmp / "log/b.parquet", log[half:], schema | {"i": pa.int64(), "watch": pa.float32()})
    if history:
        write(tmp / "history.parquet", history, schema)
    pq.write_table(
        pa.table({"item": [0, 1, None], "a": ["someone", None, "x"], "p": [1.5, None, 1.0]}),
        tmp / "items.parquet",
    )
    people = {"u": ["ann" if strings else 7], "land": [3]}
    pq.write_table(pa.table(people), tmp / "people.parquet")
    config = SessionizeConfig(
        input=str(tmp / "log"),
        history=str(tmp / "history.parquet") if history else "",
        output=str(tmp / "out"),
        user_id="u",
        item_id="i",
        timestamp="t",
        timestamp_unit=unit,
        order="seq" if order else "",
        session_id="visit" if named else "",
        duplicates=duplicates,
        actions=("click", "watch"),
        features=("tab", "tags", "genres"),
        context=("place", "codes"),
        split={"genres": "."},
        joins=(
            JoinConfig(
                path=str(tmp / "items.parquet"),
                key="i",
                right_key="item",
                columns={"author": "a", "price": "p"},
            ),
            JoinConfig(
                path=str(tmp / "people.parquet"), key="u", columns={"land": "land"}, into="context"
            ),
        ),
        counters=COUNTERS,
        partitions=3,
        partition_seed=11,
        threads=1,
        max_reject_fraction=1.0,
    )
    try:
        sessionize(replace(config, output=config.output + "_first"))
    except ValueError as error:  # nothing usable, or a join that matched nothing
        with pytest.raises(ValueError, match=re.escape(str(error))):
            sessionize(replace(config, engine="spark"))
        return
    assert_same_log(config)


def test_bundled_data(spark, tmp_path):
    config, _ = load_config(SessionizeConfig, "configs/quickstart_log.yaml")
    # Without counters: their windows over a few keys take Spark minutes on one machine.
    config = replace(config, output=str(tmp_path / "log"), partitions=4, counters={})
    assert assert_same_log(config).num_events == 222_444


def test_ties_duplicates_and_late_events_in_number(spark, tmp_path):
    rng = np.random.default_rng(3)
    n = 30_000
    table = {
        "user_id": rng.integers(0, 40, n),
        "item_id": rng.integers(0, 5, n),
        "timestamp": rng.integers(0, 4000, n) * 10,  # in no order, most of them tied
        "click": rng.random(n) < 0.5,
    }
    pq.write_table(pa.table(table), tmp_path / "log.parquet", row_group_size=1000)
    config = SessionizeConfig(
        input=str(tmp_path / "log.parquet"),
        output=str(tmp_path / "out"),
        actions=("click",),
        gap_seconds=60,
        partitions=4,
        threads=1,
    )
    manifest = assert_same_log(config)
    assert manifest.num_duplicates > 200
    assert manifest.num_sessions > 1000


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC"])
def test_timestamps_of_every_unit(spark, unit, zone, tmp_path):
    times = np.array([1_650_000_000, 1_650_000_001, 9_000_000_000]).astype("datetime64[s]")
    kind = pa.timestamp(unit, zone)
    table = {"user_id": [1, 1, 2], "item_id": [5, 6, 5], "click": [True, None, False]}
    table["timestamp"] = pa.array(times.astype(f"datetime64[{unit}]")).cast(kind)
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    config = SessionizeConfig(
        input=str(tmp_path / "log.parquet"),
        output=str(tmp_path / "out"),
        actions=("click",),
        partitions=2,
    )
    assert_same_log(config)


def test_arrow_ipc(spark, tmp_path):
    table = pa.table(
        {
            "user_id": pa.array(["a", "b", "a"] * 40).dictionary_encode(),
            "item_id": pa.array(range(120)),
            "timestamp": pa.array([1_650_000_000 + 700 * n for n in range(120)]),
            "click": pa.array([True, None, False] * 40),
        }
    )
    with (
        pa.OSFile(str(tmp_path / "log.arrows"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=50)
    config = SessionizeConfig(
        input=str(tmp_path / "log.arrows"),
        output=str(tmp_path / "out"),
        actions=("click",),
        partitions=2,
    )
    assert assert_same_log(config).num_events == 120


def test_a_damaged_file_is_one_message(spark, tmp_path):
    table = pa.table({"user_id": [1] * 999, "item_id": [5] * 999, "timestamp": range(999)})
    path = tmp_path / "log.parquet"
    pq.write_table(table.append_column("click", pa.array(range(999))), path, compression="none")
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    config = SessionizeConfig(
        input=str(path), output=str(tmp_path / "out"), actions=("click",), engine="spark"
    )
    with pytest.raises(ValueError, match=r"Spark cannot decode one of the files .*log\.parquet"):
        sessionize(config)
    assert [x.name for x in tmp_path.iterdir()] == ["log.parquet"]
