import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pipelines import session_writer
from pipelines.config import CounterConfig, JoinConfig, SessionizeConfig
from pipelines.manifest import read_manifest, verify_checksums
from pipelines.schema import history_name, part_name
from pipelines.sessionize import REJECTS, sessionize
from tests.pipelines import event_log_oracle as oracle

ITEMS = {
    "item": pa.int64(),
    "author": pa.string(),
    "price": pa.float32(),
}
COUNTERS = {
    "item": CounterConfig(keys=("i",), actions=("click", "watch"), known=("click",)),
    "user_author": CounterConfig(keys=("u", "author"), actions=("watch",)),
    "tab_day": CounterConfig(keys=("tab",), actions=("click",), days=1),
}


def one_of(*values):
    return st.sampled_from(values)


@st.composite
def event_logs(draw):
    """Few users, items and times, so that ties, repeats and long sessions are common."""
    strings = draw(st.booleans())
    unit = draw(one_of("s", "ms", "us"))
    scale = {"s": 1, "ms": 1000, "us": 10**6}[unit]
    users = ("ann", "b", "Zoe\u00e9") if strings else (7, -3, 2**62 + 5)
    times = [10**9 * scale + x for x in (0, 1, scale, 1800 * scale, 1800 * scale + 1, 9000 * scale)]
    times += [(10**9 + 86400) * scale, (10**9 + 86400) * scale + 1]
    rare = st.integers(0, 30).map(lambda x: x == 0)

    def row():
        return {
            "u": draw(one_of(*users)) if not draw(rare) else None,
            "i": draw(one_of(0, 1, 2)) if not draw(rare) else draw(one_of(None, -1)),
            "t": draw(one_of(*times)) if not draw(rare) else draw(one_of(None, -1, 2**62)),
            "seq": draw(one_of(None, 0, 1, 2)),
            "visit": draw(one_of("x", "y")) if not draw(rare) else None,
            "click": draw(one_of(None, True, False)),
            "watch": draw(one_of(None, 0.0, 1.5, -2.0, math.nan)),
            "tab": draw(one_of(None, 4, 5)),
            "place": draw(one_of(None, "home", "")),
            "tags": draw(one_of(None, [], ["a"], ["b", None, "a"])),
            "codes": draw(one_of(None, [], [3, None])),
            "genres": draw(one_of(None, "", "x", "x.y", "y..x.")),
        }

    log = [row() for _ in range(draw(st.integers(1, 40)))]
    log.append({**row(), "u": users[0], "i": 1, "t": times[0], "visit": "x"})
    history = [row() for _ in range(draw(st.integers(0, 12)))]
    for x in history:
        del x["click"], x["place"], x["visit"], x["tags"]
    return log, history, unit, strings


def arrow_schema(strings, unit, as_timestamp):
    return {
        "u": pa.string() if strings else pa.int64(),
        "i": pa.int32(),
        "t": pa.timestamp(unit, "UTC") if as_timestamp else pa.int64(),
        "seq": pa.int8(),
        "visit": pa.string(),
        "click": pa.bool_(),
        "watch": pa.float64(),
        "tab": pa.int16(),
        "place": pa.dictionary(pa.int32(), pa.string()),
        "tags": pa.list_(pa.string()),
        "codes": pa.large_list(pa.int16()),
        "genres": pa.string(),
    }


def write(path, rows, schema):
    names = [x for x in schema if not rows or x in rows[0]]
    table = pa.table({x: pa.array([r[x] for r in rows], schema[x]) for x in names})
    pq.write_table(table, path)


def read_back(folder, name, partitions):
    return [pq.read_table(folder / name(p)).to_pylist() for p in range(partitions)]


# Each example runs the engine, so shrinking would take minutes.
@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    drawn=event_logs(),
    duplicates=one_of("exact", "event", "keep"),
    order=st.booleans(),
    named=st.booleans(),
    group=one_of(1, 2, 8192),
    sorted_by=one_of("memory", "files", "engine"),
    plain=st.booleans(),
)
def test_equals_the_plain_python_oracle(
    drawn, duplicates, order, named, group, sorted_by, plain, tmp_path_factory
):
    # plain: no counters, before which the engine drops repeats, and no lists.
    log, history, unit, strings = drawn
    tmp = tmp_path_factory.mktemp("log")
    schema = arrow_schema(strings, unit, as_timestamp=False)
    half = len(log) // 2
    (tmp / "log").mkdir()
    # Two files: the order of the files is part of the place.
    write(tmp / "log/a.parquet", log[:half], schema)
    write(tmp / "log/b.parquet", log[half:], schema)
    if history:
        write(tmp / "history.parquet", history, schema)
    items = {0: {"a": "someone", "p": 1.5}, 1: {"a": None, "p": None}}
    right = {"item": [0, 1, None, None], "a": ["someone", None, "x", "y"], "p": [1.5, None, 1.0, 1]}
    pq.write_table(pa.table(right), tmp / "items.parquet")
    people = {("ann" if strings else 7): {"land": 3}}
    pq.write_table(pa.table({"u": list(people), "land": [3]}), tmp / "people.parquet")
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
        features=("tab",) if plain else ("tab", "tags", "genres"),
        context=("place",) if plain else ("place", "codes"),
        split={} if plain else {"genres": "."},
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
        counters={} if plain else COUNTERS,
        partitions=3,
        partition_seed=11,
        threads=1,
        max_reject_fraction=1.0,
    )
    tables = (items, people)
    parts, histories, rejects, repeats = oracle.session_log(config, log, history, tables)
    joined = [e for part in parts for row in part for e in row["events"]]
    matched = any(e["author"] is not None for e in joined) and any(
        row["context"]["land"] is not None for part in parts for row in part
    )
    if not matched:
        with pytest.raises(ValueError, match="all columns are null"):
            sessionize(config)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_writer, "ROW_GROUP_SESSIONS", group)
        patch.setattr("pipelines.duckdb_engine.BATCH_ROWS", 2048)
        if sorted_by != "memory":
            patch.setattr("pipelines.sessionize.HELD_SHARE", 0.0)
        if sorted_by == "engine":
            patch.setattr("pipelines.session_cutter._WORK", 10**12)
        manifest = sessionize(config)
    assert read_back(tmp / "out", part_name, 3) == parts
    if history:
        assert read_back(tmp / "out", history_name, 3) == histories
    else:
        assert not (tmp / "out" / history_name(0)).exists()
    assert manifest.rejects == rejects
    assert manifest.num_duplicates == repeats
    assert manifest.num_rows_read == len(log) + len(history)
    assert manifest.num_sessions == sum(map(len, parts))
    assert manifest.num_events == len(joined)
    assert manifest.start_ts == min(r["start_ts"] for part in parts for r in part)
    assert manifest.end_ts == max(r["end_ts"] for part in parts for r in part)
    assert manifest.nulls["watch"] == sum(e["watch"] is None for e in joined)
    assert manifest == read_manifest(tmp / "out")
    verify_checksums(manifest)
    assert pq.read_schema(tmp / "out" / part_name(0)).equals(manifest.schema())
    if rejects:
        reasons = pq.read_table(tmp / "out" / REJECTS)["reason"].to_pylist()
        assert {x: reasons.count(x) for x in reasons} == rejects
    else:
        assert not (tmp / "out" / REJECTS).exists()


def simple(tmp_path, **changes):
    settings = {"input": str(tmp_path / "log.parquet"), "output": str(tmp_path / "out")}
    settings |= {"actions": ("click",), "partitions": 2, "threads": 1} | changes
    return SessionizeConfig(**settings)


def write_simple(path, **columns):
    base = {"user_id": [1, 1, 2], "item_id": [5, 6, 5], "timestamp": [10, 20, 30]}
    pq.write_table(pa.table(base | {"click": [True, False, None]} | columns), path)


@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Shanghai"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_an_arrow_timestamp_is_read_in_its_own_unit(tmp_path, unit, zone):
    seconds = np.array([1_650_000_000, 1_650_000_001, 253_402_300_799])
    if unit == "ns":
        seconds[2] = 9_000_000_000
    times = seconds.astype("datetime64[s]").astype(f"datetime64[{unit}]")
    times = pa.array(times).cast(pa.timestamp(unit, zone))
    write_simple(tmp_path / "log.parquet", timestamp=times)
    manifest = sessionize(simple(tmp_path))
    rows = [r for part in read_back(tmp_path / "out", part_name, 2) for r in part]
    found = sorted(e["timestamp"] for r in rows for e in r["events"])
    assert found == seconds.tolist()
    assert (manifest.start_ts, manifest.end_ts) == (seconds[0], seconds[2])


def test_a_late_integer_time_keeps_its_second(tmp_path):
    # Microseconds of the year 9999 do not fit a float64.
    late = [253_402_300_799_999_999, 253_402_300_798_999_999, 253_402_300_798_000_001]
    write_simple(tmp_path / "log.parquet", timestamp=late)
    sessionize(simple(tmp_path, timestamp_unit="us"))
    rows = [r for part in read_back(tmp_path / "out", part_name, 2) for r in part]
    found = sorted(e["timestamp"] for r in rows for e in r["events"])
    assert found == [253_402_300_798, 253_402_300_798, 253_402_300_799]


def test_nan_is_unknown_also_where_the_file_says_that_all_values_are_equal(tmp_path):
    write_simple(tmp_path / "log.parquet", click=[0.0, math.nan, 0.0])
    sessionize(simple(tmp_path))
    rows = [r for part in read_back(tmp_path / "out", part_name, 2) for r in part]
    clicks = {e["item_id"]: e["click"] for r in rows for e in r["events"]}
    assert clicks == {5: 0.0, 6: None}


def test_minus_zero_repeats_zero(tmp_path):
    # Engines group them as one value.
    same = {"user_id": [1, 1, 1], "item_id": [5, 5, 5], "timestamp": [3, 3, 3]}
    write_simple(tmp_path / "log.parquet", **same, click=[-0.0, 0.0, 1.0])
    assert sessionize(simple(tmp_path)).num_duplicates == 1


def test_each_way_to_sort_gives_the_same_bytes(tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    n = 20_000
    write_simple(
        tmp_path / "log.parquet",
        user_id=rng.integers(0, 99, n),
        item_id=rng.integers(0, 3, n),
        timestamp=rng.integers(0, 10**5, n),
        click=rng.random(n) < 0.5,
        seq=[None if x == 9 else f"{x}" for x in rng.integers(0, 10, n)],
    )
    config = simple(tmp_path, order="seq", gap_seconds=300, overwrite=True)
    monkeypatch.setattr("pipelines.duckdb_engine.BATCH_ROWS", 2048)
    in_memory = sessionize(config)
    assert 0 < in_memory.num_duplicates < 1000
    monkeypatch.setattr("pipelines.sessionize.HELD_SHARE", 1e-5)  # a few batches
    assert sessionize(config).parts == in_memory.parts
    monkeypatch.setattr("pipelines.session_cutter._WORK", 10**12)
    monkeypatch.setattr("pipelines.session_cutter.cut_sessions", None)
    assert sessionize(config).parts == in_memory.parts


def test_a_remote_log_is_read_through_fsspec(tmp_path):
    import fsspec

    filesystem = fsspec.filesystem("memory")
    with filesystem.open("/day/log.parquet", "wb") as file:
        table = {"user_id": [1, 2], "item_id": [5, 6], "timestamp": [3, 4], "click": [True, None]}
        pq.write_table(pa.table(table), file)
    manifest = sessionize(simple(tmp_path, input="memory://day"))
    assert manifest.num_events == 2
    filesystem.rm("/day", recursive=True)


def test_a_session_longer_than_a_batch_and_row_groups_of_a_large_partition(tmp_path):
    rng = np.random.default_rng(0)
    n = 40_000
    user = np.where(rng.random(n) < 0.5, 0, rng.integers(1, 9000, n))
    time = np.arange(n)
    write_simple(
        tmp_path / "log.parquet",
        user_id=user,
        item_id=rng.integers(0, 50, n),
        timestamp=time,
        click=rng.random(n) < 0.5,
    )
    manifest = sessionize(simple(tmp_path, gap_seconds=n, partitions=1))
    parquet = pq.ParquetFile(tmp_path / "out" / part_name(0))
    sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    users = len(np.unique(user))
    assert manifest.num_sessions == users
    assert sizes == [8192] * (users // 8192) + [users % 8192]
    rows = parquet.read(columns=["user_id", "events.list.element.timestamp"]).to_pylist()
    longest = next(r for r in rows if r["user_id"] == 0)
    assert [e["timestamp"] for e in longest["events"]] == time[user == 0].tolist()


def test_the_same_log_gives_the_same_bytes_on_any_number_of_threads(tmp_path):
    rng = np.random.default_rng(1)
    n = 150_000
    write_simple(
        tmp_path / "log.parquet",
        user_id=rng.integers(0, 5000, n),
        item_id=rng.integers(0, 500, n),
        timestamp=rng.integers(0, 10**6, n),
        click=rng.random(n) < 0.5,
    )
    counters = {"item": CounterConfig(keys=("item_id",), actions=("click",))}
    one = sessionize(simple(tmp_path, counters=counters))
    two = sessionize(simple(tmp_path, counters=counters, threads=2, overwrite=True))
    assert one.parts == two.parts


def test_encoding_and_files_of_a_log_without_context(tmp_path):
    write_simple(tmp_path / "log.parquet")
    manifest = sessionize(simple(tmp_path))
    assert "context" not in manifest.schema().names
    names = sorted(x.name for x in (tmp_path / "out").iterdir())
    assert names == ["manifest.json", part_name(0), part_name(1)]
    assert [x.name for x in tmp_path.iterdir() if x.name.startswith(".")] == []
    group = pq.ParquetFile(tmp_path / "out" / part_name(0)).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert all(x.compression == "LZ4" for x in columns.values())
    assert "DELTA_BINARY_PACKED" in columns["events.list.element.timestamp"].encodings
    assert "PLAIN" in columns["events.list.element.item_id"].encodings
    assert not columns["events.list.element.item_id"].has_dictionary_page


def test_lists_tell_repeats_apart(tmp_path):
    lists = [[1], [1], None, [None], [], [1], None]
    table = {
        "user_id": [7] * 7,
        "item_id": [3] * 7,
        "timestamp": [10] * 7,
        "click": [True] * 7,
        "tags": pa.array(lists, pa.list_(pa.int64())),
    }
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    config = SessionizeConfig(
        input=str(tmp_path / "log.parquet"),
        output=str(tmp_path / "out"),
        actions=("click",),
        features=("tags",),
        partitions=1,
    )
    assert sessionize(config).num_duplicates == 3
    ((row,),) = read_back(tmp_path / "out", part_name, 1)
    assert [e["tags"] for e in row["events"]] == [[1], None, [None], []]
