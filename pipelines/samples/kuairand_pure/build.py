"""Make the Parquet files of this folder from KuaiRand-Pure; README.md says what was changed.

    python pipelines/samples/kuairand_pure/build.py --source FOLDER --output FOLDER

The source holds kuairand_pure_NAME.parquet for the names 0425_0508, sequences, user_features and
video_features_basic.
The same source and pyarrow version give the same bytes.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

FLAGS = (
    "is_click",
    "is_like",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
    "long_view",
    "is_profile_enter",
)
EVENTS = {
    "user_id": pa.int32(),
    "item_id": pa.int16(),
    "time_ms": pa.int64(),
    "tab": pa.int8(),
    **dict.fromkeys(FLAGS, pa.bool_()),
    "play_time_ms": pa.int32(),
    "profile_stay_time": pa.int32(),
    "comment_stay_time": pa.int32(),
}
HISTORY = {
    "user_id": pa.int32(),
    "item_id": pa.int16(),
    "time_ms": pa.int64(),
    "ts_exact": pa.bool_(),
    "is_like": pa.bool_(),
    "long_view": pa.bool_(),
}
DELTA_ENCODED = ("user_id", "time_ms", "video_id")


def build_events(source: Path) -> pa.Table:
    """Return the events of 25 April to 8 May 2022, ordered by user and time."""
    table = pq.read_table(source / "kuairand_pure_0425_0508.parquet", columns=list(EVENTS))
    return _ordered(table.cast(pa.schema(EVENTS)), ("user_id", "time_ms", "item_id"))


def build_history(source: Path) -> pa.Table:
    """Return the earlier videos of each user, ordered by user and time."""
    names = ["timestamp" if name == "time_ms" else name for name in HISTORY]
    table = pq.read_table(
        source / "kuairand_pure_sequences.parquet", columns=names, filters=[("src", "=", 0)]
    )
    time_ms = pc.multiply(table["timestamp"], 1000)
    table = table.set_column(names.index("timestamp"), "time_ms", time_ms)
    return _ordered(table.cast(pa.schema(HISTORY)), ("user_id", "time_ms"))


def build_users(source: Path) -> pa.Table:
    """Return the user features, whole numbers as integers."""
    table = pq.read_table(source / "kuairand_pure_user_features.parquet")
    return _ordered(_compact(table), ("user_id",))


def build_videos(source: Path) -> pa.Table:
    """Return the video features, whole numbers as integers, the tags in columns of their own."""
    table = pq.read_table(source / "kuairand_pure_video_features_basic.parquet")
    tags = pc.split_pattern(table["tag"], ",")
    table = table.drop_columns(["tag"])
    for index, name in enumerate(("tag", "tag_2", "tag_3")):
        values = [row[index] if row and len(row) > index else None for row in tags.to_pylist()]
        table = table.append_column(name, pc.cast(pa.array(values, pa.string()), pa.int8()))
    return _ordered(_compact(table), ("video_id",))


def _compact(table: pa.Table) -> pa.Table:
    """Return `table` with whole numbers in the smallest integer type that holds them."""
    columns = {}
    for name in table.column_names:
        values = table[name]
        if pa.types.is_large_string(values.type):
            values = values.cast(pa.string())
        elif not pa.types.is_string(values.type):
            values = values.cast(pa.int64())
            bounds = pc.min_max(values)
            values = values.cast(_smallest_type(bounds["min"].as_py(), bounds["max"].as_py()))
        columns[name] = values
    return pa.table(columns)


def _smallest_type(low: int, high: int) -> pa.DataType:
    for bits, kind in ((8, pa.int8()), (16, pa.int16()), (32, pa.int32())):
        if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1):
            return kind
    return pa.int64()


def _ordered(table: pa.Table, keys: tuple[str, ...]) -> pa.Table:
    """Return `table` sorted by `keys`; rows that agree in them keep their order."""
    position = pa.array(range(table.num_rows), pa.int64())
    keyed = table.select(list(keys)).append_column("position", position)
    return table.take(pc.sort_indices(keyed, [(name, "ascending") for name in keyed.column_names]))


def write(table: pa.Table, path: Path) -> None:
    """Write one small file that every Parquet reader understands."""
    delta = [name for name in table.column_names if name in DELTA_ENCODED]
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=19,
        use_dictionary=[name for name in table.column_names if name not in delta],
        column_encoding=dict.fromkeys(delta, "DELTA_BINARY_PACKED"),
        row_group_size=1 << 20,
        store_schema=False,
    )


def main() -> None:
    """Write the four files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--source", type=Path, required=True, help="folder of the Parquet files")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    write(build_events(options.source), options.output / "events.parquet")
    write(build_history(options.source), options.output / "history.parquet")
    write(build_users(options.source), options.output / "users.parquet")
    write(build_videos(options.source), options.output / "videos.parquet")


if __name__ == "__main__":
    main()
