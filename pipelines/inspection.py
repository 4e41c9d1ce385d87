"""Statistics of a session-end log, one partition in memory at a time.

Letters: S sessions of a partition, E events of a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.manifest import Manifest
from pipelines.reader import explain_corruption, open_parquet
from pipelines.schema import (
    END_TS,
    EVENT_ITEM_ID,
    EVENT_TIMESTAMP,
    EVENTS,
    START_TS,
    USER_ID,
    history_name,
)
from pipelines.stochastic_length import threshold

Ints = NDArray[np.int64]

_BATCH_SESSIONS = 8192
BINS_PER_OCTAVE = 2
_NUM_BINS = 64 * BINS_PER_OCTAVE
SECONDS_PER_DAY = 86_400


@dataclass
class ActionStatistics:
    """Of one action column over the events of the log, histories not counted."""

    known: int = 0
    """Events that know it."""
    positive: int = 0
    """Events at which it is above 0."""
    total: float = 0.0
    """Sum over the events that know it."""
    least: float = float("inf")
    most: float = float("-inf")

    def add(self, values: pa.Array) -> None:
        """Add the values of some events."""
        known = pc.drop_null(values.cast(pa.float64()))
        numbers = known.to_numpy(zero_copy_only=False)
        if len(numbers):
            self.known += len(numbers)
            self.positive += int((numbers > 0).sum())
            self.total += float(numbers.sum())
            self.least = min(self.least, float(numbers.min()))
            self.most = max(self.most, float(numbers.max()))


def _bins() -> Ints:
    return np.zeros(_NUM_BINS, np.int64)


@dataclass
class LogStatistics:
    """What `inspect_log` found."""

    num_sessions: int = 0
    num_events: int = 0
    """Of the sessions."""
    num_history_events: int = 0
    """Of the starting histories."""
    num_users: int = 0
    """With at least one session."""
    num_items: int = 0
    """Distinct items of sessions and histories."""
    max_item_id: int = -1
    session_lengths: dict[int, int] = field(default_factory=dict)
    """Events -> sessions with so many."""
    user_lengths: dict[int, int] = field(default_factory=dict)
    """Events, starting history included -> users with so many."""
    examples: dict[tuple[int, int], int] = field(default_factory=dict)
    """(events before the session, events of it) -> sessions. Sessions that overlap count in the
    order of their ends."""
    event_gaps: Ints = field(default_factory=_bins)
    """Seconds between successive events of a session, by `gap_bin`."""
    session_gaps: Ints = field(default_factory=_bins)
    """Seconds from the end of a user's session to the start of the next, by `gap_bin`; those that
    overlap are in bin 0."""
    events_by_day: dict[int, int] = field(default_factory=dict)
    """Day since 1970 in the given offset -> events."""
    actions: dict[str, ActionStatistics] = field(default_factory=dict)


def gap_bin(seconds: Ints) -> Ints:
    """Return the bin of each gap: 0 for less than 1 s, then BINS_PER_OCTAVE a doubling."""
    safe = np.maximum(seconds, 1).astype(np.float64)
    bins = 1 + np.floor(np.log2(safe) * BINS_PER_OCTAVE + 1e-9).astype(np.int64)
    return np.where(seconds < 1, 0, np.minimum(bins, _NUM_BINS - 1))


def gap_edges() -> NDArray[np.float64]:
    """Return the lower edge of each bin of `gap_bin`, in s."""
    edges = 2.0 ** ((np.arange(_NUM_BINS) - 1) / BINS_PER_OCTAVE)
    edges[0] = 0.0
    return edges


def inspect_log(manifest: Manifest, *, day_offset_seconds: int = 0) -> LogStatistics:
    """Read a log and return its statistics.

    Args:
        manifest: of the log.
        day_offset_seconds: of the local time in which days are counted.

    Raises:
        ValueError: if a file cannot be read.
    """
    found = LogStatistics(actions={name: ActionStatistics() for name in manifest.actions})
    items = np.empty(0, np.int64)
    for p, part in enumerate(manifest.parts):
        history = _Column()
        if manifest.histories:
            for batch in _batches(manifest, history_name(p), [USER_ID, _leaf(EVENT_ITEM_ID)]):
                history.add(batch)
                events = batch.column(EVENTS).flatten()
                items = _union(items, _ids(events))
                found.num_history_events += len(events)
        sessions = _Column()
        columns = [USER_ID, START_TS, END_TS, _leaf(EVENT_ITEM_ID), _leaf(EVENT_TIMESTAMP)]
        columns += [_leaf(name) for name in manifest.actions]
        for batch in _batches(manifest, part.name, columns):
            lengths = sessions.add(batch)
            events = batch.column(EVENTS).flatten()
            items = _union(items, _ids(events))
            _add_times(found, events, lengths, day_offset_seconds)
            for name, statistics in found.actions.items():
                statistics.add(events.field(name))
        _add_users(found, sessions, history)
    found.num_items = len(items)
    found.max_item_id = int(items[-1]) if len(items) else -1
    return found


def expected_tokens(
    history: Ints, session: Ints, *, per_event: int, max_history_tokens: int, alpha: float
) -> NDArray[np.float64]:
    """Return the expected tokens of examples under stochastic length; alpha 0 means without it.

    The rule of pipelines.stochastic_length with N_c = max_history_tokens: a sequence of n > T
    tokens stays whole with probability min(1, N_c^alpha / n^2); else only so much history stays, in
    whole events, that it has at most T tokens.

    Args:
        history: (S,) events before each session.
        session: (S,) events of each session.
        per_event: tokens of an event.
        max_history_tokens: tokens of history kept at most.
        alpha: of the rule.
    """
    kept = np.minimum(history, max_history_tokens // per_event) * per_event
    own = session * per_event
    tokens = kept + own
    if not alpha:
        return tokens.astype(np.float64)
    most = threshold(max_history_tokens, alpha)
    whole = np.minimum(1.0, max_history_tokens**alpha / np.maximum(tokens, 1).astype(float) ** 2)
    cut = own + np.minimum(kept, np.maximum(0, most - own) // per_event * per_event)
    return np.where(tokens <= most, tokens, whole * tokens + (1 - whole) * cut)


class _Column:
    """User, start, end and number of events of each session of a file."""

    def __init__(self) -> None:
        self._parts: list[tuple[Ints, ...]] = []

    def add(self, batch: pa.RecordBatch) -> Ints:
        """Add a batch, and return its numbers of events."""
        lengths = batch.column(EVENTS).value_lengths().fill_null(0)
        names = [name for name in (USER_ID, START_TS, END_TS) if name in batch.schema.names]
        columns = [_numbers(batch.column(name)) for name in names]
        self._parts.append((*columns, _numbers(lengths)))
        return self._parts[-1][-1]

    def column(self, index: int) -> Ints:
        """Return a column of all batches; -1 is the number of events."""
        return np.concatenate([np.empty(0, np.int64), *(part[index] for part in self._parts)])


def _add_users(found: LogStatistics, sessions: _Column, history: _Column) -> None:
    """Add what is seen only over all sessions of a user."""
    user, start, end, length = (sessions.column(i) for i in (0, 1, 2, -1))
    found.num_sessions += len(user)
    found.num_events += int(length.sum())
    _count(found.session_lengths, length)
    order = np.argsort(user, kind="stable")
    user, start, end, length = user[order], start[order], end[order], length[order]
    is_first = np.ones(len(user), bool)
    is_first[1:] = user[1:] != user[:-1]
    later = ~is_first[1:]
    gaps = (start[1:] - end[:-1])[later]
    found.session_gaps += np.bincount(gap_bin(gaps), minlength=_NUM_BINS)
    found.num_users += int(is_first.sum())

    users, place = np.unique(user, return_inverse=True)
    known, before = history.column(0), history.column(-1)
    starting = np.zeros(len(users), np.int64)
    spot = np.searchsorted(users, known)
    has_session = spot < len(users)
    has_session[has_session] = users[spot[has_session]] == known[has_session]
    np.add.at(starting, spot[has_session], before[has_session])
    so_far = np.cumsum(length) - length
    base = so_far[is_first][place] if len(user) else so_far
    earlier = starting[place] + so_far - base
    totals = starting + np.bincount(place, weights=length, minlength=len(users)).astype(np.int64)
    _count(found.user_lengths, totals)
    silent = before[~has_session]
    _count(found.user_lengths, silent)
    pairs, counts = np.unique(np.stack([earlier, length], axis=1), axis=0, return_counts=True)
    for (n, m), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        found.examples[n, m] = found.examples.get((n, m), 0) + count


def _add_times(found: LogStatistics, events: Any, lengths: Ints, offset: int) -> None:
    times = _numbers(events.field(EVENT_TIMESTAMP))
    gaps = np.diff(times)
    ends = np.cumsum(lengths)[:-1] - 1  # no gap from a session to the next
    inside = np.ones(len(gaps), bool)
    inside[ends[(ends >= 0) & (ends < len(gaps))]] = False
    found.event_gaps += np.bincount(gap_bin(gaps[inside]), minlength=_NUM_BINS)
    _count(found.events_by_day, (times + offset) // SECONDS_PER_DAY)


def _batches(manifest: Manifest, name: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    path = manifest.folder / name
    with open_parquet(path) as parquet, explain_corruption(path):
        yield from parquet.iter_batches(_BATCH_SESSIONS, columns=columns)


def _leaf(name: str) -> str:
    return f"{EVENTS}.list.element.{name}"


def _numbers(values: Any) -> Ints:
    filled = values.cast(pa.int64()).fill_null(0)
    return np.asarray(filled.to_numpy(zero_copy_only=False))


def _ids(events: Any) -> Ints:
    return _numbers(pc.drop_null(events.field(EVENT_ITEM_ID)))


def _union(items: Ints, more: Ints) -> Ints:
    return np.union1d(items, more)


def _count(into: dict[int, int], values: Ints) -> None:
    for value, count in zip(
        *(x.tolist() for x in np.unique(values, return_counts=True)), strict=True
    ):
        into[value] = into.get(value, 0) + count
