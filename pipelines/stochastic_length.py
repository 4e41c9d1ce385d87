"""Stochastic length: in training, long sequences keep a part of their history most of the time.

    T = floor(N_c^(alpha / 2))
    n <= T: the sequence stays whole
    n > T: whole with probability N_c^alpha / n^2, else cut to T tokens

so that the expected cost of attention is O(N_c^alpha) instead of O(n^2). n counts the tokens of the
sequence after layout. Only history is dropped, in whole events: the session and the context stay,
also where they alone are more than T tokens.

What is cut keeps the most events with which it has at most T tokens. Tokens of series depend on
which events stay: the newest are counted with theirs, a sample leaves room for all those of the
whole sequence, which no part of it exceeds.

Letters: B sequences, n events of history, k of them kept, f age of an event at the anchor.

Source: HSTU (arXiv 2402.17152) section 3.3 and its appendix on subsequence selection; N_c is a
setting here, not the longest sequence of the batch, so that batch-mates do not matter.
"""

import math
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipelines.config import DataConfig
from pipelines.context_series import count_series
from pipelines.feature_columns import Slot
from pipelines.gather import Gathered
from pipelines.history import (
    ANCHOR,
    NUM_EVENTS,
    NUM_HISTORY,
    PIECE,
    SESSION,
    TIMESTAMP,
    USER,
    Ints,
    copy_rows,
)
from pipelines.keyed_random import GOLDEN, Purpose, U, mix, sequence_key, uniform
from pipelines.unify import TokenCounts, token_counts

_BITS_32 = 1.0 / 4294967296.0


class Selection(IntEnum):
    """Which events of a history stay."""

    GREEDY = 0
    RANDOM = 1
    WEIGHTED = 2


_GREEDY, _RANDOM = int(Selection.GREEDY), int(Selection.RANDOM)
_KEEP, _SELECT = int(Purpose.STOCHASTIC_LENGTH), int(Purpose.SELECTION)


class LengthRules(NamedTuple):
    """What the kernels need to know of the configuration."""

    seed: int
    """Of the run."""
    selection: int
    """Selection."""
    threshold: int
    """T, tokens."""
    whole_weight: float
    """N_c^alpha: a sequence of n > T tokens stays whole with probability whole_weight / n^2."""
    tokens: TokenCounts
    """Tokens of what a sequence is made of."""
    max_events: int
    """Most events of a history."""
    supervise_history: bool
    """Events of history have labels."""


def threshold(max_length: int, alpha: float) -> int:
    """Return T = floor(N_c^(alpha / 2)).

    Args:
        max_length: N_c, tokens.
        alpha: from 1 to 2.
    """
    # A power that is whole in exact arithmetic (1024^0.9 = 512) may come out a rounding lower.
    exact: float = max_length ** (alpha / 2)
    return math.floor(exact * (1 + 1e-12))


def length_rules(config: DataConfig, seed: int) -> LengthRules | None:
    """Return the rules that a configuration stands for; None: every sequence stays whole.

    Args:
        config: of the data side.
        seed: of the run; keys every choice, together with user, session and piece.
    """
    settings = config.stochastic_length
    if settings.selection == "none":
        return None
    tokens = token_counts(config)
    max_length = settings.max_length or config.max_history_tokens
    return LengthRules(
        seed=seed,
        selection=int(Selection[settings.selection.upper()]),
        threshold=threshold(max_length, settings.alpha),
        whole_weight=float(max_length) ** settings.alpha,
        tokens=tokens,
        max_events=config.max_history_tokens // tokens.per_history_event,
        supervise_history=config.supervise != "session",
    )


class Cuts(NamedTuple):
    """What is left of each sequence if it is cut, and the tokens of series that it has."""

    num_kept: Ints
    """(B,) int64: events of history."""
    series: Ints
    """(B,) int64: tokens of series of the whole sequence."""
    kept_series: Ints
    """(B,) int64: of what is left; of a sample the most that there can be."""


def find_cuts(
    sequences: Ints, rules: LengthRules, ints_EI: Ints | None = None, slots: tuple[Slot, ...] = ()
) -> Cuts:
    """Return how sequences would be cut.

    Args:
        sequences: (B, *) int64, columns as in pipelines.history.
        rules: of the draw.
        ints_EI: (E, I) int64 events: history, then session, of each sequence; read for `slots`.
        slots: columns of the series that are merged in.
    """
    zeros = np.zeros(len(sequences), np.int64)
    cuts = Cuts(np.empty(len(sequences), np.int64), zeros, zeros)
    _find_cuts(sequences, rules, cuts)
    if not slots:
        return cuts
    assert ints_EI is not None
    room = rules.threshold - num_tokens(0, sequences[:, NUM_EVENTS], rules.tokens)
    per_event = rules.tokens.per_history_event
    series, num_kept, kept_series = count_series(sequences, ints_EI, slots, room, per_event)
    if rules.selection == _GREEDY:
        return Cuts(num_kept, series, kept_series)
    num_kept = np.minimum(sequences[:, NUM_HISTORY], np.maximum(room - series, 0) // per_event)
    return Cuts(num_kept, series, series)


def draw_lengths(sequences: Ints, rules: LengthRules, cuts: Cuts | None = None) -> Ints:
    """Return (B,) int64: events of history that each sequence keeps.

    Args:
        sequences: (B, *) int64, columns as in pipelines.history.
        rules: of the draw.
        cuts: of the sequences; None: those without series.
    """
    kept = sequences[:, NUM_HISTORY].copy()
    _draw_lengths(sequences, rules, cuts or find_cuts(sequences, rules), kept)
    return kept


def shorten(gathered: Gathered, kept_B: Ints, rules: LengthRules) -> Gathered:
    """Return the sequences with `kept_B` events of history each, in the memory of `gathered`.

    Args:
        gathered: whole sequences; not valid afterwards.
        kept_B: (B,) int64, at most the events of history of each.
        rules: which events stay.
    """
    num_events, num_supervised = _shorten(
        gathered.sequences,
        gathered.ints.reshape(-1),
        gathered.codes.reshape(-1),
        gathered.floats.reshape(-1),
        (gathered.ints.shape[1], gathered.codes.shape[1], gathered.floats.shape[1]),
        kept_B,
        rules,
        np.empty(rules.max_events // 64 + 1, np.uint64),
        np.empty(rules.max_events, np.int32),
    )
    return Gathered(
        sequences=gathered.sequences,
        ints=gathered.ints[:num_events],
        codes=gathered.codes[:num_events],
        floats=gathered.floats[:num_supervised],
        num_clipped=gathered.num_clipped,
    )


@njit(inline="always")
def num_tokens(n: Any, m: Any, tokens: Any) -> Any:
    """Return the tokens of a sequence with n events of history and m of the session."""
    return tokens.context + n * tokens.per_history_event + m * tokens.per_session_event


@njit(inline="always")
def num_kept_if_cut(n: Any, m: Any, rules: Any) -> Any:
    """Return the events of history that a sequence without series keeps if it is cut."""
    room = rules.threshold - num_tokens(0, m, rules.tokens)
    return min(n, max(room, 0) // rules.tokens.per_history_event)


@njit(inline="always")
def probability_whole(length: Any, rules: Any) -> Any:
    """Return the probability with which a sequence of `length` tokens stays whole."""
    return 1.0 if length <= rules.threshold else rules.whole_weight / (length * length)


@njit(inline="always")
def _is_cut(length: Any, user_id: Any, session_id: Any, piece: Any, rules: Any) -> Any:
    probability = probability_whole(length, rules)
    if probability == 1.0:
        return False
    return uniform(sequence_key(rules.seed, _KEEP, user_id, session_id, piece)) >= probability


@njit(inline="always")
def draw_kept(n: Any, m: Any, user_id: Any, session_id: Any, piece: Any, rules: Any) -> Any:
    """Return the events of history that a sequence without series keeps."""
    if _is_cut(num_tokens(n, m, rules.tokens), user_id, session_id, piece, rules):
        return num_kept_if_cut(n, m, rules)
    return n


@njit(nogil=True, cache=True)
def _find_cuts(sequences: Any, rules: Any, cuts: Any) -> None:
    for b in range(len(sequences)):
        row = sequences[b]
        cuts.num_kept[b] = num_kept_if_cut(row[NUM_HISTORY], row[NUM_EVENTS], rules)


@njit(nogil=True, cache=True)
def _draw_lengths(sequences: Any, rules: Any, cuts: Any, kept: NDArray[np.int64]) -> None:
    for b in range(len(sequences)):
        row = sequences[b]
        length = num_tokens(row[NUM_HISTORY], row[NUM_EVENTS], rules.tokens) + cuts.series[b]
        if _is_cut(length, row[USER], row[SESSION], row[PIECE], rules):
            kept[b] = cuts.num_kept[b]


@njit(nogil=True, cache=True)
def _shorten(
    sequences: Any,
    ints: Any,
    codes: Any,
    floats: Any,
    widths: Any,
    kept: Any,
    rules: Any,
    chosen: Any,
    places: Any,
) -> Any:
    """Close the gaps that dropped events leave; return how many events and rows of floats stay."""
    num_ints, num_codes, num_floats = widths
    # Read and write positions: all but the first sequence that is cut move down.
    event = supervised = to = to_supervised = 0
    for b in range(len(sequences)):
        row = sequences[b]
        n, m, k = row[NUM_HISTORY], row[NUM_EVENTS], kept[b]
        if k == n or rules.selection == _GREEDY or k == 0:
            first = n - k
            copy_rows(ints, to, ints, event + first, k + m, num_ints)
            copy_rows(codes, to, codes, event + first, k + m, num_codes)
            if rules.supervise_history:
                copy_rows(floats, to_supervised, floats, supervised + first, k, num_floats)
        else:
            key = sequence_key(rules.seed, _SELECT, row[USER], row[SESSION], row[PIECE])
            if rules.selection == _RANDOM:
                _choose_uniformly(n, k, key, chosen)
            else:
                _choose_by_age(n, k, key, row[ANCHOR], ints, event, num_ints, chosen)
            _list_bits(n, chosen, places)
            for i in range(k):
                place = np.int64(places[i])
                copy_rows(ints, to + i, ints, event + place, 1, num_ints)
                copy_rows(codes, to + i, codes, event + place, 1, num_codes)
            if rules.supervise_history:
                for i in range(k):
                    place = np.int64(places[i])
                    copy_rows(floats, to_supervised + i, floats, supervised + place, 1, num_floats)
            copy_rows(ints, to + k, ints, event + n, m, num_ints)
            copy_rows(codes, to + k, codes, event + n, m, num_codes)
        if rules.supervise_history:
            to_supervised += k
            supervised += n
        copy_rows(floats, to_supervised, floats, supervised, m, num_floats)
        event, to = event + n + m, to + k + m
        supervised, to_supervised = supervised + m, to_supervised + m
        row[NUM_HISTORY] = k
    return to, to_supervised


@njit(inline="always")
def _list_bits(n: Any, chosen: Any, places: Any) -> None:
    """Write the places of the bits set among the first n, ascending."""
    at = U(0)
    for i in range(U(n)):
        # Written whether set or not: a branch would be mispredicted every third time or so.
        places[at] = i
        at += (chosen[i >> U(6)] >> (i & U(63))) & U(1)


@njit(inline="always")
def _choose_uniformly(n: Any, k: Any, key: Any, chosen: Any) -> None:
    """Set k of the first n bits, each set of k equally likely.

    Source: Floyd's sampling (Bentley, Programming Pearls, CACM 30(9), 1987), of what is dropped
        where that is less.
    """
    size = min(k, n - k)
    chosen[: (n >> 6) + 1] = U(0)
    for i in range(n - size, n):
        # The product favours no event by more than n / 2^32.
        drawn = (mix(key + U(i) * GOLDEN) >> U(32)) * U(i + 1) >> U(32)
        if (chosen[drawn >> U(6)] >> (drawn & U(63))) & U(1):
            drawn = U(i)
        chosen[drawn >> U(6)] |= U(1) << (drawn & U(63))
    if size < k:
        for word in range((n >> 6) + 1):
            chosen[word] = ~chosen[word]


@njit(inline="always")
def _choose_by_age(
    n: Any, k: Any, key: Any, anchor: Any, ints: Any, event: Any, num_ints: Any, chosen: Any
) -> None:
    """Set k of the first n bits: one after another, with probability 1 - f_i / sum_j f_j.

    Each draw takes an event uniformly and accepts it with that probability, unless it is in
    already: no list of weights has to be kept up to date. All ages are positive and the weights sum
    to n - 1, so that two events that are left always share a weight of at least 1.
    """
    chosen[: (n >> 6) + 1] = U(0)
    total = np.float64(0.0)
    for i in range(event, event + n):
        total += np.float64(anchor - ints[i * num_ints + TIMESTAMP])
    done = 0
    draw = U(0)
    while done < k:
        bits = mix(key + draw * GOLDEN)
        draw += U(1)
        i = (bits >> U(32)) * U(n) >> U(32)
        if (chosen[i >> U(6)] >> (i & U(63))) & U(1):
            continue
        age = np.float64(anchor - ints[(U(event) + i) * U(num_ints) + U(TIMESTAMP)])
        if np.float64(bits & U(0xFFFFFFFF)) * _BITS_32 * total >= age:
            chosen[i >> U(6)] |= U(1) << (i & U(63))
            done += 1
