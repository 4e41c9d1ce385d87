"""Every kind of bad input: it costs itself, is counted and said, and too much of it stops."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.rejects import WHOLE_FILE
from pipelines.stream import SessionStream
from tests.pipelines.logs import MODES, make_config, take_apart
from tests.pipelines.session_log import SCHEMA, session, write_log

UNREADABLE = "part of the file cannot be read"
DISORDERED = "session out of the order of end_ts"
PART = "part-00001.parquet"


def two_partitions():
    """Return sessions 0 .. 11 of partition 0 and 100 .. 111 of partition 1, an event each."""
    return [
        [
            session(p, 100 * p + n, [{"t": 10 * n + 1, "item": n, "click": True, "watch": 1.0}])
            for n in range(12)
        ]
        for p in (0, 1)
    ]


def read(folder, **changes):
    """Return the ids of the sessions read, the counts of all batches, and the rejects."""
    rejects, counts, read = [], Counter(), []
    config = make_config(folder, *MODES[0], **changes)
    for batch in SessionStream(config, seed=0, on_reject=rejects.append):
        read += [s["session_id"] for s in take_apart(batch, config)]
        counts.update(batch.num_rejected)
    return sorted(read), dict(counts), rejects


def check(folder, lost, reason, *, rows, detail=""):
    """Check that just the sessions `lost` of partition 1 are skipped, and what is said of them."""
    found, counts, rejects = read(folder)
    assert found == [*range(12), *(n for n in range(100, 112) if n - 100 not in lost)]
    assert counts == {reason: len(lost)}
    assert {(r.partition, r.file, r.reason) for r in rejects} == {(1, PART, reason)}
    told = [r.row + i for r in rejects for i in range(r.num_sessions)]
    assert told == list(lost)
    assert rows is None or [(r.row, r.num_sessions) for r in rejects] == rows
    assert all(detail in r.detail for r in rejects)
    # Within bounds the run goes on; past them it stops and says where.
    share = len(lost) / 24
    assert read(folder, max_reject_fraction=share)[0] == found
    with pytest.raises(ValueError, match=rf"{PART}: .* of 24 sessions cannot be used, more than"):
        read(folder, max_reject_fraction=share - 0.01)


def spoil(folder, change):
    path = folder / PART
    path.write_bytes(change(path.read_bytes()))


WHOLE = [(0, 12)]


def test_a_partition_that_vanished(tmp_path):
    write_log(tmp_path, two_partitions())
    (tmp_path / PART).unlink()
    check(tmp_path, range(12), WHOLE_FILE, rows=WHOLE, detail="is missing")


@pytest.mark.parametrize("left", [0, 100, -10])
def test_a_truncated_file(tmp_path, left):
    write_log(tmp_path, two_partitions())
    spoil(tmp_path, lambda content: content[:left])
    check(tmp_path, range(12), WHOLE_FILE, rows=WHOLE, detail="not a readable Parquet file")


def test_a_file_of_another_run(tmp_path):
    write_log(tmp_path, two_partitions())
    table = pq.read_table(tmp_path / PART)
    pq.write_table(table.slice(0, 7), tmp_path / PART)
    check(tmp_path, range(12), WHOLE_FILE, rows=WHOLE, detail="has 7 rows")


@pytest.mark.parametrize("row_group", [0, 1, 3])
@pytest.mark.parametrize("column", ["user_id", "events.list.element.item_id", "end_ts"])
def test_a_corrupt_row_group_costs_that_row_group(tmp_path, row_group, column):
    write_log(tmp_path, two_partitions())
    metadata = pq.read_metadata(tmp_path / PART).row_group(row_group)
    (chunk,) = (
        metadata.column(i)
        for i in range(metadata.num_columns)
        if metadata.column(i).path_in_schema == column
    )
    start = chunk.dictionary_page_offset or chunk.data_page_offset

    def damage(content):
        return content[:start] + b"\xff" * 12 + content[start + 12 :]

    spoil(tmp_path, damage)
    first = 3 * row_group
    check(tmp_path, range(first, first + 3), UNREADABLE, rows=None)


def test_a_flipped_bit_that_decodes_is_caught_by_the_checksum_of_its_page(tmp_path):
    write_log(tmp_path, two_partitions())
    table = pq.read_table(tmp_path / PART)
    pq.write_table(
        table,
        tmp_path / PART,
        row_group_size=3,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    value = (107).to_bytes(8, "little")  # a session_id of the third row group
    spoil(tmp_path, lambda content: content.replace(value, (75).to_bytes(8, "little")))
    check(tmp_path, range(6, 9), UNREADABLE, rows=None)


def renamed(schema, name, other):
    fields = [pa.field(other, f.type) if f.name == name else f for f in schema]
    return pa.schema(fields)


def with_event_field(schema, name, kind):
    """Return the schema with a field of the events of another type, or without it (kind None)."""
    event = schema.field("events").type.value_type
    fields = [f for f in event if f.name != name or kind is not None]
    fields = [f.with_type(kind) if f.name == name else f for f in fields]
    place = schema.get_field_index("events")
    return schema.set(place, pa.field("events", pa.list_(pa.struct(fields))))


DRIFT = {
    "lacks an action": (with_event_field(SCHEMA, "watch", None), "needs the column 'watch'"),
    "string item id": (
        with_event_field(SCHEMA, "item_id", pa.string()),
        "'item_id' must be an int",
    ),
    "float item id": (
        with_event_field(SCHEMA, "item_id", pa.float64()),
        "'item_id' must be an int",
    ),
    "string action": (with_event_field(SCHEMA, "click", pa.string()), "'click' must be a number"),
    "string user": (
        SCHEMA.set(0, pa.field("user_id", pa.string())),
        "expected an integer column 'user_id'",
    ),
    "no end": (renamed(SCHEMA, "end_ts", "finish"), "expected an integer column 'end_ts'"),
    "no events": (renamed(SCHEMA, "events", "items"), "expected a column 'events'"),
}


@pytest.mark.parametrize("name", DRIFT)
def test_schema_drift_between_files(tmp_path, name):
    write_log(tmp_path, two_partitions())
    schema, message = DRIFT[name]
    empty = pa.table({f.name: pa.nulls(12, f.type) for f in schema})
    pq.write_table(empty, tmp_path / PART)
    check(tmp_path, range(12), WHOLE_FILE, rows=WHOLE, detail=message)


def test_narrower_types_are_no_drift(tmp_path):
    write_log(tmp_path, two_partitions())
    schema = with_event_field(SCHEMA, "item_id", pa.int32())
    schema = with_event_field(schema, "watch", pa.float32()).set(0, pa.field("user_id", pa.int16()))
    rows = pq.read_table(tmp_path / PART).to_pylist()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / PART)
    found, counts, _ = read(tmp_path)
    assert len(found) == 24
    assert counts == {}


def change_row(number, **changes):
    partitions = two_partitions()
    row = partitions[1][number]
    for key, value in changes.items():
        if key in row:
            row[key] = value
        else:
            row["events"][0][key] = value
    return partitions


ROWS = {
    "null user": ({"user_id": None}, "null user_id, session_id, start_ts or end_ts"),
    "null session": ({"session_id": None}, "null user_id, session_id, start_ts or end_ts"),
    "null end": ({"end_ts": None}, "null user_id, session_id, start_ts or end_ts"),
    "null events": ({"events": None}, "no events"),
    "null item": ({"item_id": None}, "null event, item_id or timestamp"),
    "null time": ({"timestamp": None}, "null event, item_id or timestamp"),
    "negative item": ({"item_id": -2}, "negative item_id"),
    "negative time": ({"timestamp": -5}, "timestamp before 1970 or after 9999"),
    "milliseconds": ({"timestamp": 10**15}, "timestamp before 1970 or after 9999"),
    "absurd end": ({"end_ts": 2**62}, "timestamp before 1970 or after 9999"),
    "negative end": ({"end_ts": -(2**62)}, "timestamp before 1970 or after 9999"),
    "event after the end": ({"timestamp": 99}, "event outside start_ts .. end_ts"),
    "infinite label": ({"watch": -5.0}, "label or dense feature not finite"),
    "infinite feature": ({"price": float("-inf")}, "label or dense feature not finite"),
    "too early": ({"end_ts": 1, "start_ts": 1, "timestamp": 1}, DISORDERED),
    "far ahead": ({"end_ts": 10**9, "start_ts": 51, "timestamp": 51}, DISORDERED),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_costs_that_row(tmp_path, name):
    changes, reason = ROWS[name]
    write_log(tmp_path, change_row(5, **changes))
    check(tmp_path, [5], reason, rows=[(5, 1)])


def test_only_rows_of_which_nothing_is_known_share_a_line(tmp_path):
    partitions = two_partitions()
    for row in (4, 5):  # of one step
        partitions[1][row]["session_id"] = None
    reason = ROWS["null session"][1]
    write_log(tmp_path / "known", partitions)
    check(tmp_path / "known", [4, 5], reason, rows=[(4, 1), (5, 1)])
    for row in (4, 5):  # of one step
        partitions[1][row]["user_id"] = None
    write_log(tmp_path / "unknown", partitions)
    check(tmp_path / "unknown", [4, 5], reason, rows=[(4, 2)])


@pytest.mark.parametrize("changes", [{"watch": float("nan")}, {"price": float("nan")}])
def test_nan_is_unknown(tmp_path, changes):
    write_log(tmp_path, change_row(5, **changes))
    found, counts, _ = read(tmp_path)
    assert len(found) == 24
    assert counts == {}


def test_rows_turned_round_cost_as_few_as_possible(tmp_path):
    partitions = two_partitions()
    partitions[1][3:6] = partitions[1][5], partitions[1][4], partitions[1][3]
    write_log(tmp_path, partitions)
    found, counts, _ = read(tmp_path)
    assert counts == {DISORDERED: 2}
    assert len(found) == 22


def test_a_bad_file_of_starting_histories(tmp_path):
    starts = [[session(p, -1, [{"t": 0, "item": 7}])] for p in (0, 1)]
    write_log(tmp_path, two_partitions(), starts)
    (tmp_path / "history-00001.parquet").write_bytes(b"PAR1")
    found, counts, (reject,) = read(tmp_path)
    assert len(found) == 24
    assert counts == {WHOLE_FILE: 1}
    assert (reject.file, reject.num_sessions) == ("history-00001.parquet", 1)
    with pytest.raises(ValueError, match=r"history-00001.parquet: 1 of 26 sessions"):
        read(tmp_path, max_reject_fraction=0.01)


def test_a_fault_is_reported_once_on_the_rank_that_owns_it(tmp_path):
    write_log(tmp_path, two_partitions())
    (tmp_path / PART).unlink()
    config = make_config(tmp_path, *MODES[0])
    told = {0: [], 1: []}
    streams = [
        SessionStream(config, seed=0, rank=r, world_size=2, on_reject=told[r].append)
        for r in (0, 1)
    ]
    batches = [list(stream) for stream in streams]
    assert len(batches[0]) == len(batches[1]) == 6
    assert (len(told[0]), len(told[1])) == (0, 1)
    later = SessionStream(
        config,
        seed=0,
        rank=1,
        world_size=2,
        position=batches[1][2].position,
        on_reject=told[0].append,
    )
    list(later)
    assert told[0] == []


def test_a_log_without_a_usable_file_is_a_mistake(tmp_path):
    write_log(tmp_path, two_partitions())
    for path in tmp_path.glob("part-*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"part-00000.parquet is missing"):
        SessionStream(make_config(tmp_path, *MODES[0]), seed=0)


@pytest.mark.parametrize(
    "count", [300_000, pytest.param(1_000_000, marks=pytest.mark.slow)], ids=str
)
def test_a_user_with_very_many_events(tmp_path, count):
    item = np.arange(count) % 50
    kind = SCHEMA.field("events").type.value_type
    columns = [pa.array(item), pa.array(np.arange(count) // 2)]
    columns += [pa.nulls(count, f.type) for f in list(kind)[2:]]
    events = pa.ListArray.from_arrays(
        pa.array([0, count - 10, count], pa.int32()),
        pa.StructArray.from_arrays(columns, fields=list(kind)),
    )
    table = pa.table(
        {
            "user_id": [7, 7],
            "session_id": [0, 1],
            "start_ts": [0, (count - 10) // 2],
            "end_ts": [(count - 11) // 2, (count - 1) // 2],
            "context": pa.nulls(2, SCHEMA.field("context").type),
            "events": events,
        },
        schema=SCHEMA,
    )
    write_log(tmp_path, [[session(7, 0, [{"t": 0, "item": 0}])] * 2])
    pq.write_table(table, tmp_path / "part-00000.parquet")
    config = make_config(
        tmp_path, *MODES[4], max_history_tokens=8, max_session_events=5000, num_negatives=0
    )
    supervised, last = 0, None
    for batch in SessionStream(config, seed=0):
        supervised += batch.num_events
        # Two rows a step, of 16 pieces of a session at most.
        assert batch.num_tokens <= 2 * 16 * (5000 + 8)
        last = take_apart(batch, config)[-1]
    assert supervised == count
    expected = item[count - 10 - 8 :].tolist()
    assert last["item_id"] == expected
