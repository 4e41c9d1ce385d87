"""Features as columns of int64: how histories and sessions hold ids, bags of ids and numbers.

An id takes one column. A number takes one: the bits of its float64. A bag takes 1 + max_values: how
many values the log has, then the first max_values ids, zeros behind them.

Letters: n rows (events or sessions), W columns of a feature.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.config import FeatureConfig
from pipelines.history import Ints

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

UNKNOWN_ID = -1
MISSING_NUMBER = int(np.array(np.nan).view(np.int64))


class Slot(NamedTuple):
    """Columns that a feature takes in a row."""

    name: str
    feature: FeatureConfig
    first: int
    width: int


class Bags(NamedTuple):
    """Bags of n rows."""

    lengths: Ints
    """(n,) int64: ids kept."""
    ids: Ints
    """(sum of lengths,) int64, row after row."""


def slots(features: Mapping[str, FeatureConfig], first: int) -> tuple[Slot, ...]:
    """Return the columns of features that follow one another from column `first` on."""
    found = []
    for name, feature in features.items():
        width = 1 + feature.max_values if feature.is_bag else 1
        found.append(Slot(name, feature, first, width))
        first += width
    return tuple(found)


def end_of(placed: tuple[Slot, ...], first: int) -> int:
    """Return the column after the last; `first` if there is none."""
    return placed[-1].first + placed[-1].width if placed else first


def fill_columns(values: pa.Array, slot: Slot, out: Ints) -> None:
    """Write a feature's columns.

    Args:
        values: (n,) ids, numbers or lists; null is unknown.
        slot: which columns.
        out: (n, all columns) int64.
    """
    if slot.feature.is_bag:
        _fill_bags(values, slot, out)
    elif slot.feature.is_number:
        out[:, slot.first] = _number_bits(values)
    else:
        out[:, slot.first] = feature_ids(values, slot.feature)


def read_numbers(rows: Ints, slot: Slot) -> Floats:
    """Return (n,) float64 of a number's column; missing is NaN."""
    return np.ascontiguousarray(rows[:, slot.first]).view(np.float64)


def read_bags(rows: Ints, slot: Slot) -> Bags:
    """Return the bags of a column."""
    lengths = np.minimum(rows[:, slot.first], slot.width - 1)
    ids = rows[:, slot.first + 1 : slot.first + slot.width]
    return Bags(lengths, ids[np.arange(slot.width - 1) < lengths[:, None]])


def is_cut(rows: Ints, slot: Slot) -> Flags:
    """Return (n,) whether the log has more values than the bag keeps."""
    flags: Flags = rows[:, slot.first] > slot.width - 1
    return flags


def feature_ids(values: pa.Array, feature: FeatureConfig) -> Ints:
    """Return the id of each value: itself, or the number of boundaries <= value; null is -1."""
    if not feature.boundaries:
        return integers(values)
    numeric = numbers(values)
    ids = np.searchsorted(feature.boundaries, numeric, side="right")
    ids[np.isnan(numeric)] = UNKNOWN_ID
    return ids


def integers(values: pa.Array) -> Ints:
    """Return int64 values, -1 where null."""
    if values.type != pa.int64():
        values = pc.cast(values, pa.int64())
    if values.null_count:
        values = values.fill_null(UNKNOWN_ID)
    return np.asarray(values.to_numpy(zero_copy_only=False))


def numbers(values: pa.Array) -> Floats:
    """Return float64 values, NaN where null."""
    if values.type != pa.float64():
        values = pc.cast(values, pa.float64(), safe=False)
    return np.asarray(values.to_numpy(zero_copy_only=False))


def _number_bits(values: pa.Array) -> Ints:
    with np.errstate(over="ignore"):  # too large for float32 is infinite, which the reader refuses
        rounded = numbers(values).astype(np.float32).astype(np.float64)
    rounded += 0.0  # one zero and one NaN, so that equal values have equal bits
    bits = rounded.view(np.int64)
    bits[np.isnan(rounded)] = MISSING_NUMBER
    return bits


def _fill_bags(values: pa.Array, slot: Slot, out: Ints) -> None:
    count, most = len(values), slot.width - 1
    lengths = integers(values.value_lengths().fill_null(0))
    ids = feature_ids(values.flatten(), slot.feature)
    row = np.repeat(np.arange(count), lengths)
    place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    kept = place < most
    bags = np.zeros((count, slot.width), np.int64)
    bags[:, 0] = lengths
    bags[row[kept], 1 + place[kept]] = ids[kept]
    if values.null_count:
        unknown = values.is_null().to_numpy(zero_copy_only=False)
        bags[unknown, 0], bags[unknown, 1] = 1, UNKNOWN_ID
    out[:, slot.first : slot.first + slot.width] = bags
