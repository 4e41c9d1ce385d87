"""KuaiRand: one row a video shown, with twelve signals of what the user did.

Source: README of https://github.com/chongminggao/KuaiRand; files at
https://zenodo.org/records/10439422. The logs of the standard policies and of the random one are
read together: `is_rand` tells them apart.
"""

from pipelines.datasets.description import Column, Count, Dataset, TextFormat

_FLAGS = (
    "is_click",
    "is_like",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
    "long_view",
    "is_profile_enter",
)
_AMOUNTS = ("play_time_ms", "profile_stay_time", "comment_stay_time")
_FEATURES = ("duration_ms", "tab", "is_rand")
_COLUMNS = (
    Column(name="user_id", source="user_id", required=True),
    Column(name="item_id", source="video_id", required=True),
    Column(name="time_ms", source="time_ms", required=True),
    *(Column(name=name, source=name) for name in (*_FLAGS, *_AMOUNTS, *_FEATURES)),
)


def _variant(
    name: str, suffix: str, folder: str, parts: tuple[str, ...], rows: tuple[int, int], md5: str
) -> Dataset:
    """Rows: of the standard policies, of the random one."""
    standard = tuple(
        f"log_standard_{days}_{suffix}{part}.csv"
        for days in ("4_08_to_4_21", "4_22_to_5_08")
        for part in parts
    )
    random = f"log_random_4_22_to_5_08_{suffix}.csv"
    return Dataset(
        name=name,
        files=(*standard, random),
        format=TextFormat(delimiter=","),
        columns=_COLUMNS,
        counts=(
            Count(num_rows=rows[0], files=standard),
            Count(num_rows=rows[1], files=(random,)),
        ),
        counted_by="README of KuaiRand",
        url=f"https://zenodo.org/records/10439422/files/{folder}.tar.gz",
        md5=md5,
        terms="CC BY-SA 4.0",
        sessionize={
            "timestamp": "time_ms",
            "timestamp_unit": "ms",
            "timezone": "Asia/Shanghai",
            "actions": [*_FLAGS, *_AMOUNTS],
            "features": [*_FEATURES],
        },
    )


DATASETS = (
    _variant(
        "kuairand-pure",
        "pure",
        "KuaiRand-Pure",
        ("",),
        (1_436_609, 1_186_059),
        "0820331067a3784d9691136f772b35a7",
    ),
    _variant(
        "kuairand-1k",
        "1k",
        "KuaiRand-1K",
        ("",),
        (11_713_045, 43_028),
        "6b0b9c8222d67fcd4c676218edca3f1f",
    ),
    _variant(
        "kuairand-27k",
        "27k",
        "KuaiRand-27K",
        ("_part1", "_part2"),
        (322_278_385, 1_186_059),
        "3e3c799a24e2d23a4d2c757fbf9adf59",
    ),
)
