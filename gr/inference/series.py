"""Slowly changing series (data.context=merged) of a history whose beginning is cached.

A token of a series stands where a run of values begins (pipelines.context_series). Of the events
behind the cache, those that go on with the last run must not begin one again: they are made
unknown.

Letters: E events, I columns of an encoded event.
"""

from collections.abc import Sequence

import numpy as np

from pipelines.feature_columns import MISSING_NUMBER, UNKNOWN_ID, Flags, Slot
from pipelines.history import Ints


def hide(ints_EI: Ints, slot: Slot) -> None:
    """Make a feature unknown in rows of events, in place."""
    if slot.feature.is_bag:
        ints_EI[:, slot.first : slot.first + slot.width] = 0
        ints_EI[:, slot.first], ints_EI[:, slot.first + 1] = 1, UNKNOWN_ID
    else:
        ints_EI[:, slot.first] = MISSING_NUMBER if slot.feature.is_number else UNKNOWN_ID


def nothing_known(slots: Sequence[Slot], num_ints: int) -> Ints:
    """Return (I,) int64: a row of an event that knows none of these features."""
    row = np.zeros((1, num_ints), np.int64)
    for slot in slots:
        hide(row, slot)
    known: Ints = row[0]
    return known


def last_known(ints_EI: Ints, slots: Sequence[Slot], known_I: Ints) -> Ints:
    """Return (I,) int64: a row with the value that each feature had last.

    Args:
        ints_EI: events in order.
        slots: the features.
        known_I: what was known before them.
    """
    known = known_I.copy()
    for slot in slots:
        columns = slice(slot.first, slot.first + slot.width)
        knowing = np.flatnonzero(~_is_unknown(ints_EI, slot))
        if len(knowing):
            known[columns] = ints_EI[knowing[-1], columns]
    return known


def hide_repeated(ints_EI: Ints, slots: Sequence[Slot], known_I: Ints) -> None:
    """Make values unknown that go on with a run, up to the first that does not; in place.

    Args:
        ints_EI: events in order.
        slots: the features.
        known_I: what was known before them.
    """
    for slot in slots:
        if _is_unknown(known_I[None], slot)[0]:
            continue
        differs = ~_is_unknown(ints_EI, slot) & _differs(ints_EI, known_I, slot)
        first = int(differs.argmax()) if differs.any() else len(ints_EI)
        hide(ints_EI[:first], slot)


def _differs(ints_EI: Ints, known_I: Ints, slot: Slot) -> Flags:
    first, width = slot.first, slot.width
    values = slice(first, first + width)
    if not slot.feature.is_bag:
        differs: Flags = (ints_EI[:, values] != known_I[values]).any(axis=1)
        return differs
    most = width - 1  # values beyond those kept do not count
    differs = np.minimum(ints_EI[:, first], most) != min(known_I[first], most)
    values = slice(first + 1, first + width)
    differs |= (ints_EI[:, values] != known_I[values]).any(axis=1)
    return differs


def _is_unknown(ints_EI: Ints, slot: Slot) -> Flags:
    first = ints_EI[:, slot.first]
    unknown: Flags = first == (MISSING_NUMBER if slot.feature.is_number else UNKNOWN_ID)
    if slot.feature.is_bag:
        kept = np.minimum(first, slot.width - 1)
        unknown = (kept == 1) & (ints_EI[:, slot.first + 1] == UNKNOWN_ID)
    return unknown
