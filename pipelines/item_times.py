"""When each item of a log had its k-th event: what tells new items from known ones at any time."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.location import Location
from pipelines.reader import explain_corruption, open_parquet
from pipelines.schema import EVENT_ITEM_ID, EVENT_TIMESTAMP, EVENTS, history_name
from pipelines.segments import read_manifests

NEVER = np.iinfo(np.int64).max
_BATCH_SESSIONS = 8192
_COLUMNS = [f"{EVENTS}.list.element.{name}" for name in (EVENT_ITEM_ID, EVENT_TIMESTAMP)]


def kth_event_times(log: str | Location, *, k: int, num_items: int) -> NDArray[np.int64]:
    """Return (num_items,) int64 s: when the k-th event of each item was, NEVER without so many.

    An item has fewer than k events before a time t, those at t itself not counted, if t is not
    later than its k-th. Events of starting histories count. 16 bytes an event are held.

    Args:
        log: a session-end log, or a folder of its segments.
        k: at least 1.
        num_items: ids are 0 .. num_items - 1; other ids are passed over.

    Raises:
        ValueError: if there is no log, or a file cannot be read.
    """
    items, times = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for manifest in read_manifests(log):
        names = [part.name for part in manifest.parts]
        if manifest.histories:
            names += [history_name(p) for p in range(len(manifest.parts))]
        for name in names:
            path = manifest.folder / name
            with open_parquet(path) as parquet, explain_corruption(path):
                for batch in parquet.iter_batches(_BATCH_SESSIONS, columns=_COLUMNS):
                    events = batch.column(EVENTS).flatten()
                    items.append(_numbers(events.field(EVENT_ITEM_ID)))
                    times.append(_numbers(events.field(EVENT_TIMESTAMP)))
    item_E, time_E = np.concatenate(items), np.concatenate(times)
    inside = (item_E >= 0) & (item_E < num_items)
    item_E, time_E = item_E[inside], time_E[inside]
    order = np.lexsort((time_E, item_E))
    counts = np.bincount(item_E, minlength=num_items)
    first = np.cumsum(counts) - counts
    found = np.full(num_items, NEVER)
    has_k = counts >= k
    found[has_k] = time_E[order][first[has_k] + k - 1]
    return found


def _numbers(values: pa.Array) -> NDArray[np.int64]:
    filled = values.cast(pa.int64()).fill_null(-1)
    return np.asarray(filled.to_numpy(zero_copy_only=False))
