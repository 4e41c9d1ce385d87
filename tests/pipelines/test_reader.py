import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import DataConfig, FeatureConfig, TaskConfig
from pipelines.features import EventEncoder
from pipelines.reader import read_blocks, read_end_ts
from tests.pipelines.session_log import SCHEMA, session

ROWS = [
    session(1, 0, [{"t": 5, "item": 7, "click": True, "tab": 2}, {"t": 6, "item": 8}]),
    session(2, 1, [], start_ts=6, end_ts=6),
    session(2, 2, [{"t": 9, "item": 9, "click": False, "tab": None, "watch": 3.0}]),
]


def make_encoder():
    return EventEncoder(
        DataConfig(
            log="unused",
            num_items=10,
            tasks={"click": TaskConfig(action="click")},
            item_features={"place": FeatureConfig(column="tab")},
        )
    )


def write(path, schema=SCHEMA, rows=ROWS):
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def list_type(kind):
    events = SCHEMA.field("events").type.value_type
    return SCHEMA.set(SCHEMA.get_field_index("events"), pa.field("events", kind(events)))


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
@pytest.mark.parametrize("rows_per_block", [1, 2, 3, 10])
def test_blocks(tmp_path, kind, rows_per_block):
    write(tmp_path / "part.parquet", list_type(kind))
    blocks = list(
        read_blocks(tmp_path / "part.parquet", make_encoder(), rows_per_block=rows_per_block)
    )
    assert [b.first_row for b in blocks] == list(range(0, 3, rows_per_block))
    join = lambda parts: np.concatenate(list(parts)).tolist()  # noqa: E731
    assert join(b.sessions.user_id for b in blocks) == [1, 2, 2]
    assert join(np.diff(b.sessions.offsets) for b in blocks) == [2, 0, 1]
    assert join(b.sessions.reason for b in blocks) == [0, 2, 0]
    ints = np.concatenate([b.events.ints.reshape(-1, 3) for b in blocks])
    assert ints.tolist() == [[7, 5, 2], [8, 6, -1], [9, 9, -1]]
    labels = np.concatenate([b.events.floats for b in blocks])
    np.testing.assert_array_equal(labels, [1.0, np.nan, 0.0])


def test_only_the_columns_needed_are_decoded(tmp_path, monkeypatch):
    write(tmp_path / "part.parquet")
    asked = []
    whole = pq.ParquetFile.iter_batches

    def spy(self, *args, columns, **kwargs):
        asked.extend(columns)
        return whole(self, *args, columns=columns, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    list(read_blocks(tmp_path / "part.parquet", make_encoder(), rows_per_block=10))
    assert [path.split(".")[-1] for path in asked] == [
        "user_id",
        "session_id",
        "start_ts",
        "end_ts",
        "item_id",
        "timestamp",
        "click",
        "tab",
    ]


def test_a_null_end_ts_is_not_known(tmp_path):
    rows = [row | {"end_ts": end} for row, end in zip(ROWS, [None, 6, None], strict=True)]
    write(tmp_path / "part.parquet", rows=rows)
    assert read_end_ts(tmp_path / "part.parquet").tolist() == [-1, 6, -1]


def test_a_null_event_is_seen(tmp_path):
    rows = [ROWS[0] | {"events": [ROWS[0]["events"][0], None]}]
    write(tmp_path / "part.parquet", rows=rows)
    (block,) = read_blocks(tmp_path / "part.parquet", make_encoder(), rows_per_block=10)
    assert block.sessions.reason.tolist() == [3]
