"""Yambda: music; one row a listen, like, dislike or the withdrawal of one.

Times are seconds since an undisclosed start, in steps of 5. Source:
https://huggingface.co/datasets/yandex/yambda (flat/SIZE/multi_event.parquet); arXiv 2505.22238,
table 1, which counts listens, likes and dislikes; the other two kinds are not counted there, so not
checked.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.datasets.description import Column, Count, Dataset

_EVENTS = ("listen", "like", "dislike", "unlike", "undislike")
_COPIED = {
    "user_id": "uid",
    "item_id": "item_id",
    "timestamp": "timestamp",
    "played_ratio_pct": "played_ratio_pct",
    "is_organic": "is_organic",
    "track_length_seconds": "track_length_seconds",
}
_COLUMNS = (
    *(
        Column(name=name, source=source, required=name in ("user_id", "item_id", "timestamp"))
        for name, source in _COPIED.items()
    ),
    *(Column(name=f"is_{event}", source="event_type", required=True) for event in _EVENTS),
)


def batches(parquet: Any) -> Iterator[pa.RecordBatch]:
    """Yield rows with one 0/1 column a kind of event; all are null for a kind that is unknown."""
    names = [*_COPIED.values(), "event_type"]
    for batch in parquet.iter_batches(1 << 18, columns=names):
        kind = batch["event_type"].cast(pa.string())
        known = pc.is_in(kind, pa.array(_EVENTS))
        columns = {name: batch[source] for name, source in _COPIED.items()}
        for event in _EVENTS:
            flag = pc.cast(pc.equal(kind, event), pa.int64())
            columns[f"is_{event}"] = pc.if_else(known, flag, pa.scalar(None, pa.int64()))
        yield pa.RecordBatch.from_pydict(columns)


def _variant(size: str, rows: tuple[int, int, int]) -> Dataset:
    """Rows: of listens, likes and dislikes."""
    kinds = ("is_listen", "is_like", "is_dislike")
    return Dataset(
        name=f"yambda-{size}",
        files=("multi_event.parquet",),
        format=None,
        columns=_COLUMNS,
        counts=tuple(
            Count(num_rows=num_rows, where=kind) for num_rows, kind in zip(rows, kinds, strict=True)
        ),
        counted_by="arXiv 2505.22238, table 1",
        url=f"https://huggingface.co/datasets/yandex/yambda/resolve/main/flat/{size}/multi_event.parquet",
        terms="Apache-2.0",
        sessionize={
            "actions": [*(f"is_{event}" for event in _EVENTS), "played_ratio_pct"],
            "features": ["is_organic", "track_length_seconds"],
        },
        batches=batches,
    )


DATASETS = (
    _variant("50m", (46_467_212, 881_456, 107_776)),
    _variant("500m", (466_512_103, 9_033_960, 1_128_113)),
    _variant("5b", (4_649_567_411, 89_334_605, 11_579_143)),
)
