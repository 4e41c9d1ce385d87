"""Slowly changing series, merged into the sequence by time: only where a run of values begins.

Each event holds the context of its session. Over the events of a sequence, in order, each context
feature is a series; an event whose value is known and differs from the last one known begins a run
and gets a token in front of it, of the time of what follows. So the first event that knows a value
begins a run too: what history was dropped before it does not matter.

Letters: B sequences, E events, L tokens without series, C tokens of series.

Source: feature unification of "Actions Speak Louder than Words" (arXiv 2402.17152), section 2.1.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipelines.batch import TokenKind
from pipelines.feature_columns import MISSING_NUMBER, UNKNOWN_ID, Slot
from pipelines.history import NUM_EVENTS, NUM_HISTORY, Ints
from pipelines.unify import Tokens

_ID, _NUMBER, _BAG = range(3)


class Series(NamedTuple):
    """Tokens that are merged in, in the order of their tokens."""

    feature: Ints
    """(C,) int64: index of the context feature."""
    event: Ints
    """(C,) int64: event of the batch that the token stands in front of, and whose value it has."""
    position: Ints
    """(C,) int64: token of the batch."""
    sequence: Ints
    """(C,) int64: sequence of the batch."""


def merge_series(
    tokens: Tokens, sequences: Ints, ints_EI: Ints, slots: tuple[Slot, ...]
) -> tuple[Tokens, Series]:
    """Return the tokens with those of the series among them.

    Args:
        tokens: of the events, without context.
        sequences: (B, *) int64, columns as in pipelines.history.
        ints_EI: (E, I) int64 events: history, then session, of each sequence.
        slots: columns of the series in `ints_EI`.
    """
    columns = np.array([_column(slot) for slot in slots], np.int64).reshape(-1, 3)
    lengths = sequences[:, NUM_HISTORY] + sequences[:, NUM_EVENTS]
    found = np.empty((2, len(slots) * len(ints_EI)), np.int64)
    count = _find_runs(np.ascontiguousarray(lengths), ints_EI, columns, found)
    feature, event = found[:, :count].copy()

    item_token = np.flatnonzero(tokens.kind != TokenKind.ACTION)  # of each event, in order
    before = item_token[event]
    owner = np.repeat(np.arange(len(sequences)), lengths)[event]
    time = tokens.timestamp[before]
    # A series token is of its session: the first token of the session is the first of these.
    first = tokens.offsets[:-1] + tokens.session_start
    return tokens._replace(
        offsets=tokens.offsets + np.searchsorted(before, tokens.offsets),
        kind=np.insert(tokens.kind, before, int(TokenKind.CONTEXT)),
        timestamp=np.insert(tokens.timestamp, before, time),
        query_time=np.insert(tokens.query_time, before, time),
        session_start=tokens.session_start
        + np.searchsorted(before, first)
        - np.searchsorted(before, tokens.offsets[:-1]),
        ranking_positions=_moved(tokens.ranking_positions, before),
        # Read in front of the target, which may be a series token now.
        retrieval_positions=_moved(tokens.retrieval_positions + 1, before) - 1,
    ), Series(feature, event, before + np.arange(count), owner)


def count_series(
    sequences: Ints, ints_EI: Ints, slots: tuple[Slot, ...], room_B: Ints, per_event: int
) -> tuple[Ints, Ints, Ints]:
    """Count the tokens of series, and find how many of the newest events fit with theirs.

    Args:
        sequences: (B, *) int64, columns as in pipelines.history.
        ints_EI: (E, I) int64 events: history, then session, of each sequence.
        slots: columns of the series in `ints_EI`.
        room_B: (B,) int64: most tokens of history and series.
        per_event: tokens of an event of history.

    Returns:
        (B,) int64 each: tokens of series of the whole sequence; most events of history, the newest,
        that fit; tokens of series with these. Where those of the session alone do not fit, no
        history does.
    """
    columns = np.array([_column(slot) for slot in slots], np.int64)
    found = np.empty((3, len(sequences)), np.int64)
    _count_series(sequences, ints_EI, columns, room_B, per_event, found)
    return found[0], found[1], found[2]


def _moved(positions: Ints, before: Ints) -> Ints:
    """Return where tokens are once others stand in front of the tokens `before`."""
    moved: Ints = positions + np.searchsorted(before, positions, side="right")
    return moved


def _column(slot: Slot) -> tuple[int, int, int]:
    kind = _BAG if slot.feature.is_bag else _NUMBER if slot.feature.is_number else _ID
    return kind, slot.first, slot.width


@njit(nogil=True, cache=True)
def _find_runs(lengths: Any, ints: Any, columns: Any, out: NDArray[np.int64]) -> Any:
    """Write (feature, event) of each run, by event and then feature; return how many."""
    count = event = 0
    last = np.empty(len(columns), np.int64)  # event that knew the value last, -1: none yet
    for b in range(len(lengths)):
        last[:] = -1
        for e in range(event, event + lengths[b]):
            for f in range(len(columns)):
                kind, first, width = columns[f]
                if _is_unknown(ints, e, kind, first, width):
                    continue
                begins = last[f] < 0 or _differ(ints, last[f], e, kind, first, width)
                last[f] = e
                if begins:
                    out[0, count], out[1, count] = f, e
                    count += 1
        event += lengths[b]
    return count


@njit(nogil=True, cache=True)
def _count_series(
    sequences: Any, ints: Any, columns: Any, room: Any, per_event: int, out: NDArray[np.int64]
) -> None:
    event = 0
    next_known = np.empty(len(columns), np.int64)
    for b in range(len(sequences)):
        n, m = sequences[b, NUM_HISTORY], sequences[b, NUM_EVENTS]
        next_known[:] = -1
        count = kept = kept_count = 0
        # From the newest on: an event in front adds a run of each feature that it knows otherwise.
        for taken in range(1, n + m + 1):
            e = event + n + m - taken
            for f in range(len(columns)):
                kind, first, width = columns[f]
                if not _is_unknown(ints, e, kind, first, width):
                    at = next_known[f]
                    count += at < 0 or _differ(ints, e, at, kind, first, width)
                    next_known[f] = e
            if taken <= m:
                kept_count = count
            elif (taken - m) * per_event + count <= room[b]:
                kept, kept_count = taken - m, count
        out[0, b], out[1, b], out[2, b] = count, kept, kept_count
        event += n + m


@njit(inline="always")
def _differ(ints: Any, a: Any, b: Any, kind: Any, first: Any, width: Any) -> Any:
    """Return whether two events that both know a feature have other values of it."""
    differs = False
    if kind == _BAG:  # values beyond those kept do not count
        differs = min(ints[a, first], width - 1) != min(ints[b, first], width - 1)
        first, width = first + 1, width - 1
    for c in range(first, first + width):
        differs |= ints[a, c] != ints[b, c]
    return differs


@njit(inline="always")
def _is_unknown(ints: Any, event: Any, kind: Any, first: Any, width: Any) -> Any:
    if kind == _ID:
        return ints[event, first] == UNKNOWN_ID
    if kind == _NUMBER:
        return ints[event, first] == MISSING_NUMBER
    kept = min(ints[event, first], width - 1)
    return kept == 1 and ints[event, first + 1] == UNKNOWN_ID
