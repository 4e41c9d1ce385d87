"""Hashes that are the same in every engine: the partition of a user, the id of a string.

Not xxHash, the faster choice: DuckDB 2.0 has none (its `hash` is its own and may change), Spark's
has a fixed seed, Python's is another package. MD5 is in all; docs/design.md has what it costs.

The partition uses & >> ^ * % + on non-negative values below 2^62 only, so that one text serves
Python integers, numpy arrays and Ibis columns, and no engine overflows.
"""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import ibis.expr.types as ir

PARTITION_HASH = "portable-31"
STRING_HASH = "md5-63"

_P31 = 2**31 - 1
_P63 = 2**63 - 1

Int = TypeVar("Int", int, npt.NDArray[np.int64], "ir.IntegerColumn")


def partition_of(user_id: Int, seed: int, partitions: int) -> Int:
    """Return the partition of each user.

        p = 2^31 - 1
        h = ((x & p) * 1103515245 % p + (x >> 31 & p) * 1664525017 % p + (x >> 62 & 3) * 69069931
             + seed % p) % p
        h = (h ^ h >> 15) * 747796405 % p;  h = (h ^ h >> 13) * 1597334677 % p
        partition = (h ^ h >> 16) % partitions

    Args:
        user_id: int64 (any value): Python integer, numpy array or Ibis column.
        seed: of the log; in its manifest.
        partitions: number of partitions.

    Returns:
        0 .. partitions - 1, of the kind of `user_id`.
    """
    h = (user_id & _P31) * 1_103_515_245 % _P31
    h = h + ((user_id >> 31) & _P31) * 1_664_525_017 % _P31
    h = (h + ((user_id >> 62) & 3) * 69_069_931 + seed % _P31) % _P31
    h = ((h ^ (h >> 15)) * 747_796_405) % _P31
    h = ((h ^ (h >> 13)) * 1_597_334_677) % _P31
    return (h ^ (h >> 16)) % partitions


def string_id(text: str) -> int:
    """Return the id of a string: the first 8 bytes of the MD5 of its UTF-8.

    They are read big-endian and the top bit is cleared.

    Returns:
        0 .. 2^63 - 1; two of n strings share one with a probability of about n^2 / 2^64.
    """
    digest = hashlib.md5(text.encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "big") & _P63


def string_id_column(
    text: "ir.StringColumn", hex_to_integer: "Callable[[ir.StringValue], ir.IntegerValue]"
) -> "ir.IntegerColumn":
    """Return `string_id` of an Ibis column of strings; null stays null.

    Args:
        text: the strings.
        hex_to_integer: the engine's way to read 8 hexadecimal digits: no SQL is common to all.
    """
    digits = text.hexdigest("md5")
    high, low = (hex_to_integer(digits.substr(start, 8)) for start in (0, 8))
    column: ir.IntegerColumn = (high & _P31) * 2**32 + low
    return column
