"""Random numbers that are a function of a key: no rank, order or restart changes them."""

from enum import IntEnum

import numpy as np
from numba import njit

U = np.uint64
GOLDEN = U(0x9E3779B97F4A7C15)


class Purpose(IntEnum):
    """What a draw is for: part of the key, so that purposes are independent."""

    NEGATIVES = 1
    SAMPLED = 2
    STOCHASTIC_LENGTH = 3
    SELECTION = 4
    BALANCE = 5
    BALANCE_LAST = 6
    EPOCH_ORDER = 7
    SYNTHETIC = 101
    SYNTHETIC_ITEM = 102
    SYNTHETIC_USER = 103


@njit(inline="always")
def mix(x):  # type: ignore[no-untyped-def]
    """Return a 64-bit hash of x, which is the next output of SplitMix64 at state x.

    Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators (OOPSLA 2014).
    """
    z = U(x) + GOLDEN
    z = (z ^ (z >> U(30))) * U(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U(27))) * U(0x94D049BB133111EB)
    return z ^ (z >> U(31))


@njit(inline="always")
def sequence_key(seed, purpose, user_id, session_id, piece):  # type: ignore[no-untyped-def]
    """Return the uint64 key of the draws for one sequence; all arguments are int64."""
    key = mix(U(seed)) ^ U(purpose)
    key = mix(key) ^ U(user_id)
    key = mix(key) ^ U(session_id)
    return mix(mix(key) ^ U(piece))


@njit(inline="always")
def uniform(key):  # type: ignore[no-untyped-def]
    """Return a float64 in [0, 1) for a uint64 key."""
    return np.float64(mix(key) >> U(11)) * (1.0 / 9007199254740992.0)


@njit(nogil=True, cache=True)
def draw_items(user_id, session_id, piece, seed, purpose, num_items, out):  # type: ignore[no-untyped-def]
    """Fill each row of `out` with uniform draws, with replacement, from 0 .. num_items - 1.

    Args:
        user_id: (B,) int64.
        session_id: (B,) int64.
        piece: (B,) int64, number of the piece of the session.
        seed: int64 of the run.
        purpose: a Purpose.
        num_items: int64 > 0. The modulo favours no item by more than num_items / 2^64.
        out: (B, M) int64.
    """
    for b in range(out.shape[0]):
        key = sequence_key(seed, purpose, user_id[b], session_id[b], piece[b])
        for i in range(out.shape[1]):
            out[b, i] = np.int64(mix(key + U(i) * GOLDEN) % U(num_items))
