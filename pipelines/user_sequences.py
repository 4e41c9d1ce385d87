"""A whole event log as one sequence of events a user, in memory: for many epochs over small data.

Letters: U users, E events, I columns of integers, S action signals, G labels and dense features.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.config import DataConfig
from pipelines.event_log import Kind, find_source, read_tables
from pipelines.features import Column, EventEncoder
from pipelines.history import Ints
from pipelines.schema import EVENT_ITEM_ID, EVENT_TIMESTAMP, USER_ID

LEAST_EVENTS = 3
"""Events of a user that is used: one to predict from, one to learn, one held out."""
_SETTING = "data.log"
_FLAGS: tuple[Kind, ...] = ("bool", "integer")
_KINDS: dict[str, tuple[Kind, ...]] = {
    "integer": _FLAGS,
    "number": (*_FLAGS, "float"),
    "integers": ("integers",),
    "numbers": ("integers",),
}


@dataclass(frozen=True, slots=True)
class UserSequences:
    """The events of all users that are used, user after user, in order of time."""

    offsets: Ints
    """(U + 1,) int64: events of user u are offsets[u]:offsets[u + 1], at least LEAST_EVENTS."""
    ints: Ints
    """(E, I) int64, as EventEncoder makes them. Items are numbered 0, 1, ... in the order of their
    ids, so that a table has a row for each item of the log and no other."""
    codes: NDArray[np.uint8]
    """(E, S + 1)."""
    floats: NDArray[np.float32]
    """(E, G)."""
    num_items: int
    fingerprint: str
    """SHA-256 of every sequence of raw ids: users in the order of their ids, a line each, the id of
    the user, a tab, the ids of the items with spaces between. Times are not part of it."""
    left_out: dict[str, int]
    """Reason -> events of the log that are not used, where there are any."""

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.offsets) - 1

    def describe(self) -> str:
        """Return one line: what there is, and what of the log was left out."""
        missing = "".join(f", {n:,} events left out ({why})" for why, n in self.left_out.items())
        return (
            f"{len(self.ints):,} events of {self.num_users:,} users with {self.num_items:,} items, "
            f"sequences {self.fingerprint[:16]}{missing}"
        )


def read_user_sequences(config: DataConfig) -> UserSequences:
    """Read an event log (Parquet with user_id, item_id, timestamp) and sort it by user and time.

    Events of one user at one time stay in the order of the files. Users and items with fewer events
    than data.leave_one_out.min_events in the log as it is are left out, both counted before either
    is; then users with fewer than LEAST_EVENTS.

    Args:
        config: data.log names the files, the rest the columns of the events.

    Raises:
        ValueError: if there is no such log, a column is missing, of another type or null, nothing
            is left, or data.num_items is not the number of items.

    Source: the filter is that of Kang & McAuley, "Self-Attentive Sequential Recommendation", 2018.
    """
    encoder = EventEncoder(config)
    table = _read(config.log, [x for x in encoder.columns if x.place == "events"])
    users, user_E = _numbered(table[USER_ID])
    items, item_E = _numbered(table[EVENT_ITEM_ID])
    time_E = _seconds(table[EVENT_TIMESTAMP])
    least = config.leave_one_out.min_events
    is_kept_E = (np.bincount(user_E)[user_E] >= least) & (np.bincount(item_E)[item_E] >= least)
    left_out = {f"user or item with fewer than {least}": int((~is_kept_E).sum())}
    length_U = np.bincount(user_E[is_kept_E], minlength=len(users))
    is_long_E = length_U[user_E] >= LEAST_EVENTS
    left_out[f"user with fewer than {LEAST_EVENTS} left"] = int((is_kept_E & ~is_long_E).sum())
    (kept,) = np.nonzero(is_kept_E & is_long_E)
    if not len(kept):
        raise ValueError(
            f"{_SETTING}={config.log}: nothing is left of {len(user_E)} events: "
            f"{left_out}. Lower data.leave_one_out.min_events, or give a larger log."
        )
    kept = kept[np.lexsort((time_E[kept], user_E[kept]))]  # stable: ties stay as they are
    user_E, item_E, table = user_E[kept], item_E[kept], table.take(kept)
    used, number_E = np.unique(item_E, return_inverse=True)
    _check_num_items(config, len(used))
    length_U = np.bincount(user_E, minlength=len(users))
    lengths = length_U[length_U > 0]
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    columns[EVENT_TIMESTAMP] = pa.array(time_E[kept])
    rows = encoder.encode(
        columns, number_E.astype(np.int64), np.empty((len(lengths), 0), np.int64), offsets
    )
    num_events = len(kept)
    return UserSequences(
        offsets=offsets,
        ints=rows.ints.reshape(num_events, encoder.num_ints),
        codes=rows.codes.reshape(num_events, encoder.num_codes),
        floats=rows.floats.reshape(num_events, encoder.num_floats),
        num_items=len(used),
        fingerprint=_fingerprint(
            users.take(user_E[offsets[:-1]]).to_pylist(), items.to_pylist(), item_E, offsets
        ),
        left_out={reason: count for reason, count in left_out.items() if count},
    )


def _read(log: str, columns: Sequence[Column]) -> pa.Table:
    ids: tuple[Kind, ...] = ("integer", "string")
    allowed: dict[str, tuple[Kind, ...]] = {x.name: _KINDS[x.kind] for x in columns}
    allowed |= {USER_ID: ids, EVENT_ITEM_ID: ids, EVENT_TIMESTAMP: ("integer", "timestamp")}
    source = find_source(log, _SETTING, allowed)
    parts = []
    for path, table in read_tables(source):
        parts.append(table)
        for name in (USER_ID, EVENT_ITEM_ID, EVENT_TIMESTAMP):
            if parts[-1][name].null_count:
                row = int(np.flatnonzero(pc.is_null(parts[-1][name]).to_numpy())[0])
                raise ValueError(
                    f"{_SETTING}={path}: {name} is null in {parts[-1][name].null_count} row(s), "
                    f"the first is row {row}: remove them, or let gr dataset make the event log"
                )
    return pa.concat_tables(parts, promote_options="permissive")


def _numbered(column: pa.ChunkedArray) -> tuple[pa.Array, Ints]:
    """Return the distinct values, ascending, and the number of each value among them."""
    encoded = column.combine_chunks().dictionary_encode()
    order = pc.array_sort_indices(encoded.dictionary)
    place = np.empty(len(order), np.int64)
    place[order.to_numpy()] = np.arange(len(order))
    return encoded.dictionary.take(order), place[encoded.indices.to_numpy()]


def _seconds(column: pa.ChunkedArray) -> Ints:
    if pa.types.is_timestamp(column.type):
        column = pc.cast(column, pa.timestamp("s"), safe=False)
    return np.asarray(pc.cast(column, pa.int64()).to_numpy())


def _check_num_items(config: DataConfig, num_items: int) -> None:
    if config.num_items != num_items:
        raise ValueError(
            f"{_SETTING}={config.log} has {num_items} items after the filter, data.num_items is "
            f"{config.num_items}: set data.num_items={num_items}, and num_embeddings of the item "
            f"table to {num_items + 1}"
        )


def _fingerprint(users: Sequence[object], items: Sequence[object], item_E: Ints, at: Ints) -> str:
    digest = hashlib.sha256()
    for number, user in enumerate(users):
        sequence = " ".join(str(items[i]) for i in item_E[at[number] : at[number + 1]])
        digest.update(f"{user}\t{sequence}\n".encode())
    return digest.hexdigest()
