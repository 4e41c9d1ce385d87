"""Every mistake of a user is one message that names it, and leaves nothing behind."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import CounterConfig, JoinConfig, SessionizeConfig
from pipelines.manifest import read_manifest
from pipelines.schema import part_name
from pipelines.sessionize import REJECTS, sessionize

LOG = {
    "user_id": [1, 1, 2],
    "item_id": [5, 6, 5],
    "timestamp": [10, 20, 30],
    "click": [True, False, None],
}
ITEMS = {"item_id": [5, 6], "author": [1, 2], "name": ["a", "b"]}


@pytest.fixture
def folder(tmp_path):
    pq.write_table(pa.table(LOG), tmp_path / "log.parquet")
    pq.write_table(pa.table(ITEMS), tmp_path / "items.parquet")
    return tmp_path


def configured(folder, **changes):
    settings = {"input": str(folder / "log.parquet"), "output": str(folder / "out")}
    settings |= {"actions": ("click",), "partitions": 2, "threads": 1} | changes
    return SessionizeConfig(**settings)


def join(folder, **changes):
    settings = {"path": str(folder / "items.parquet"), "key": "item_id"}
    return JoinConfig(**(settings | {"columns": {"author": "author"}} | changes))


def rewrite(folder, name="log", **columns):
    table = {"log": LOG, "items": ITEMS}[name] | columns
    table = {key: value for key, value in table.items() if value is not None}
    pq.write_table(pa.table(table), folder / f"{name}.parquet")


def refused(folder, match, **changes):
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=match):
        sessionize(configured(folder, **changes))
    assert sorted(folder.iterdir()) == before


def test_missing_files(folder):
    refused(folder, r"input=.*no\.parquet: there is no such file", input=str(folder / "no.parquet"))
    refused(folder, r"history=.*: there is no such file", history=str(folder / "no.parquet"))
    refused(folder, r"input=.*\*\.csv: found no Parquet file", input=str(folder / "*.csv"))
    refused(folder, r"joins\.0\.path=.*no: there", joins=(join(folder, path=str(folder / "no")),))
    refused(folder, r"input=nope://x: Protocol not known", input="nope://x")


def test_files_that_are_no_parquet(folder):
    (folder / "log.parquet").write_text("user_id,item_id\n1,2\n")
    refused(folder, r"input=.*log\.parquet is not a readable Parquet file")


def test_pages_that_cannot_be_decoded(folder):
    pq.write_table(
        pa.table({key: (value * 9000)[:20_000] for key, value in LOG.items()}),
        folder / "log.parquet",
        compression="zstd",
    )
    content = bytearray((folder / "log.parquet").read_bytes())
    column = pq.read_metadata(folder / "log.parquet").row_group(0).column(2)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    (folder / "log.parquet").write_bytes(content)
    refused(folder, r"cannot decode one of the files \[.*log\.parquet")


def test_missing_columns_name_those_that_exist(folder):
    has = re.escape("it has ['user_id', 'item_id', 'timestamp', 'click']")
    refused(folder, rf"input=.*log\.parquet has no column like; {has}", actions=("like",))
    refused(folder, rf"has no column uid; {has}", user_id="uid")
    refused(folder, rf"has no column seq; {has}", order="seq")
    refused(folder, rf"has no column visit; {has}", session_id="visit")
    refused(folder, rf"has no column tab; {has}", features=("tab",))
    refused(folder, rf"has no column country; {has}", context=("country",))
    refused(
        folder,
        r"joins\.0\.path=.*items\.parquet has no column vid; it has \['item_id'",
        joins=(join(folder, right_key="vid"),),
    )
    refused(folder, r"joins\.0\.path=.*no column x;", joins=(join(folder, columns={"y": "x"}),))
    rewrite(folder, item_id=None)
    history = str(folder / "items.parquet")
    refused(folder, r"input=.* has no column item_id")
    rewrite(folder)
    refused(folder, r"history=.*items\.parquet has no column user_id", history=history)


def test_column_types(folder):
    for column, values in (
        ("user_id", [1.0, 2.0, 3.0]),
        ("item_id", pa.array([1, 2, 3], pa.uint64())),
        ("timestamp", ["a", "b", "c"]),
        ("click", [[1], [2], [3]]),
    ):
        rewrite(folder, **{column: values})
        refused(folder, rf"input=.*log\.parquet: column {column} has type .*: cast it in the file")
    rewrite(folder)
    refused(folder, r"column timestamp is integer in history=.* but|column .* is string in history",
            history=str(write_history(folder, item_id=["a", "b", "c"])))  # fmt: skip
    rewrite(folder, "items", item_id=["5", "6"])
    refused(
        folder,
        r"joins\.0: column item_id of .* is string, but column item_id of the events is integer",
        joins=(join(folder),),
    )


def write_history(folder, **columns):
    pq.write_table(pa.table(LOG | columns), folder / "history.parquet")
    return folder / "history.parquet"


def test_files_of_one_log_must_agree(folder):
    (folder / "log").mkdir()
    pq.write_table(pa.table(LOG), folder / "log/a.parquet")
    pq.write_table(pa.table(LOG | {"click": [0.5, 1.0, 2.0]}), folder / "log/b.parquet")
    refused(
        folder,
        r"log/b\.parquet: column click is float, but bool in .*a\.parquet",
        input=str(folder / "log"),
    )


def test_columns_that_differ_in_capitals(folder):
    rewrite(folder, CLICK=[1, 2, 3])
    refused(folder, r"has columns click and \['CLICK'\], which differ in capitals only")


def test_names_that_clash(folder):
    refused(folder, "two event columns are named click", features=("click",))
    refused(folder, "two event columns are named Item_ID", features=("Item_ID",))
    refused(folder, r"joins add column\(s\) \['click'\]",
            joins=(join(folder, columns={"click": "author"}),))  # fmt: skip
    refused(folder, "two event columns are named Author",
            joins=(join(folder, columns={"author": "author", "Author": "name"}),))  # fmt: skip
    refused(folder, "two event columns are named c_count", features=("c_count",),
            counters={"c": CounterConfig(keys=("user_id",))})  # fmt: skip
    refused(folder, "actions is empty", actions=())
    refused(folder, "adds nothing", joins=(join(folder, columns={}),))


def test_counters_of_unknown_columns(folder):
    counter = CounterConfig(keys=("author",))
    refused(
        folder, r"counters\.c\.keys names \['author'\], expected some of", counters={"c": counter}
    )
    counter = CounterConfig(keys=("user_id",), actions=("like",))
    refused(folder, r"counters\.c\.actions names \['like'\].*click", counters={"c": counter})
    counter = CounterConfig(keys=("user_id",), known=("like",))
    refused(folder, r"counters\.c\.known names \['like'\].*click", counters={"c": counter})


def test_an_empty_log(folder):
    pq.write_table(pa.table(LOG).slice(0, 0), folder / "log.parquet")
    refused(folder, r"input=.*log\.parquet is empty: it has no row")


def test_too_many_unusable_events(folder):
    rewrite(folder, user_id=[1, None, 2])
    refused(folder, r"1 of 3 events are unusable.*max_reject_fraction=0.01 allows: "
            r"\{'user_id is null': 1\}. The first is row 1 of .*log\.parquet")  # fmt: skip
    manifest = sessionize(configured(folder, max_reject_fraction=0.34))
    assert manifest.rejects == {"user_id is null": 1}
    rejects = pq.read_table(folder / "out" / REJECTS).to_pylist()
    assert rejects == [
        {
            "reason": "user_id is null",
            "file": str(folder / "log.parquet"),
            "row": 1,
            "user_id": None,
            "item_id": 6,
            "timestamp": 20,
        }
    ]


def test_a_time_in_a_finer_unit_is_noticed(folder):
    rewrite(folder, timestamp=[1_650_000_000_000] * 3)
    refused(
        folder, r"timestamp is after the year 9999 in timestamp_unit=s", max_reject_fraction=1.0
    )
    assert sessionize(configured(folder, timestamp_unit="ms")).start_ts == 1_650_000_000


def test_a_joined_file_with_a_repeated_key(folder):
    rewrite(folder, "items", item_id=[5, 5])
    refused(
        folder,
        r"joins\.0\.path=.*items\.parquet: item_id=5 stands in 2 rows",
        joins=(join(folder),),
    )


def test_a_join_that_matches_nothing(folder):
    rewrite(folder, "items", item_id=[50, 60])
    refused(folder, r"joins\.0: all columns are null.*no item_id of the log", joins=(join(folder),))


def test_a_join_by_a_later_join(folder):
    refused(folder, r"joins\.0\.key=author is neither",
            joins=(join(folder, key="author", columns={"x": "name"}), join(folder)))  # fmt: skip


def test_a_join_by_an_earlier_join(folder):
    pq.write_table(pa.table({"author": [1, 2], "land": [7, 8]}), folder / "authors.parquet")
    lands = JoinConfig(path=str(folder / "authors.parquet"), key="author", columns={"land": "land"})
    manifest = sessionize(configured(folder, joins=(join(folder), lands)))
    rows = [pq.read_table(folder / "out" / part_name(p)).to_pylist() for p in range(2)]
    events = [e for part in rows for r in part for e in r["events"]]
    assert sorted((e["item_id"], e["land"]) for e in events) == [(5, 7), (5, 7), (6, 8)]
    assert list(manifest.features) == ["author", "land"]


def test_an_unknown_timezone(folder):
    refused(folder, "timezone=Mars is not known; expected an IANA name", timezone="Mars")


def test_values_out_of_range(folder):
    for changes, match in (
        ({"partitions": 0}, "partitions must be at least 1, got 0"),
        ({"gap_seconds": -1}, "gap_seconds must be at least 0, got -1"),
        ({"partition_seed": -1}, "partition_seed must be at least 0"),
        ({"threads": -1}, "threads must be at least 0"),
        ({"memory_gb": 0.0}, "memory_gb must be positive"),
        ({"max_reject_fraction": 1.5}, "max_reject_fraction must be within 0 and 1"),
    ):
        with pytest.raises(ValueError, match=match):
            configured(folder, **changes)
    with pytest.raises(ValueError, match="keys of a counter"):
        CounterConfig(keys=())
    with pytest.raises(ValueError, match="days of a counter"):
        CounterConfig(keys=("user_id",), days=-1)


def test_an_existing_output(folder):
    config = configured(folder)
    sessionize(config)
    with pytest.raises(ValueError, match=r"holds a session-end log already: set overwrite=true"):
        sessionize(config)
    (folder / "out" / "stale").write_text("x")
    rewrite(folder, user_id=[1, 3, 2])
    assert sessionize(configured(folder, overwrite=True)).num_sessions == 3
    assert not (folder / "out" / "stale").exists()
    assert read_manifest(folder / "out").num_sessions == 3
    assert sorted(x.name for x in folder.iterdir()) == ["items.parquet", "log.parquet", "out"]


def test_a_folder_or_file_that_is_no_log_is_never_replaced(folder):
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("x")
    output = str(folder / "mine")
    refused(folder, "is no session-end log, so it is not replaced", output=output, overwrite=True)
    output = str(folder / "log.parquet")
    refused(folder, "exists and is no folder", output=output, overwrite=True)
    assert (folder / "mine" / "thesis.txt").read_text() == "x"


def test_a_failure_keeps_the_log_that_was_there(folder):
    sessionize(configured(folder))
    rewrite(folder, "items", item_id=[50, 60])
    refused(folder, "all columns are null", overwrite=True, joins=(join(folder),))
    assert read_manifest(folder / "out").num_events == 3


def test_too_little_memory(folder):
    n = 400_000
    pq.write_table(
        pa.table(
            {"user_id": range(n), "item_id": range(n), "timestamp": range(n), "click": [1] * n}
        ),
        folder / "log.parquet",
    )
    refused(folder, r"memory_gb=0\.005 is too little for this log: raise it", memory_gb=0.005)
