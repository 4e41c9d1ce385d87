"""KuaiRec: one row a video watched; the small matrix is observed in full.

Source: README of https://github.com/chongminggao/KuaiRec; archive at
https://zenodo.org/records/18164998. Rows of the small matrix without a time are kept, time null:
`gr sessionize` counts and rejects them.
"""

from pipelines.datasets.description import Column, Count, Dataset, TextFormat

_COLUMNS = (
    Column(name="user_id", source="user_id", required=True),
    Column(name="item_id", source="video_id", required=True),
    Column(name="time_ms", source="timestamp", kind="milliseconds"),
    Column(name="play_duration_ms", source="play_duration"),
    Column(name="watch_ratio", source="watch_ratio", kind="number"),
    Column(name="video_duration_ms", source="video_duration"),
)


def _variant(name: str, file: str, num_rows: int) -> Dataset:
    return Dataset(
        name=name,
        files=(file,),
        format=TextFormat(delimiter=","),
        columns=_COLUMNS,
        counts=(Count(num_rows=num_rows),),
        counted_by="README of KuaiRec",
        url="https://zenodo.org/records/18164998/files/KuaiRec.zip",
        md5="261550d472c48eff4990fb13c0e5bcf7",
        terms="CC BY-SA 4.0",
        sessionize={
            "timestamp": "time_ms",
            "timestamp_unit": "ms",
            "timezone": "Asia/Shanghai",
            "actions": ["play_duration_ms", "watch_ratio"],
            "features": ["video_duration_ms"],
            "max_reject_fraction": 0.05,
        },
    )


DATASETS = (
    _variant("kuairec", "big_matrix.csv", 12_530_806),
    _variant("kuairec-small", "small_matrix.csv", 4_676_570),
)
