"""Load-balanced stochastic length: equal loads on all ranks, with no communication in a step.

Each rank decides which of its long sequences stay whole so that its load is the common target.

A rank's batch has the expected load  E(c) = sum_i [cut_i + min(1, c p_i) (whole_i - cut_i)],  p_i
the probability of stochastic length. c is chosen so that E(c) is the target, and the sequences that
stay whole are a sample with exactly the probabilities min(1, c p_i) whose load misses E(c) by one
sequence at most. The target is the mean of E(1) over all ranks, so c is 1 on average and sequences
stay whole as often as without balancing; within a factor of MOST_SHIFT in any one batch.

Source: ULTRA-HSTU (arXiv 2602.16986), load-balanced stochastic length: there the most important
    sequences stay whole first. The sample is the pivotal method (Deville and Tille, Unequal
    probability sampling without replacement through a splitting method, Biometrika 1998), with
    loads in place of probabilities in its exchange.
"""

from typing import Any

import numpy as np
from numba import njit

from pipelines.cost import CostRules, sequence_cost
from pipelines.history import NUM_EVENTS, NUM_HISTORY, PIECE, SESSION, USER, Ints
from pipelines.keyed_random import Purpose, sequence_key, uniform
from pipelines.stochastic_length import (
    Cuts,
    LengthRules,
    find_cuts,
    num_tokens,
    probability_whole,
)

MOST_SHIFT = 2.0
_BALANCE, _LAST = int(Purpose.BALANCE), int(Purpose.BALANCE_LAST)
_HALVINGS = 40


class LoadTarget:
    """Expected load of a session, over all ranks, measured anew every `period` steps.

    What is measured in a period holds two periods later: a stream that works ahead of training by
    less than a period finds it there, so that what it yields does not depend on how far ahead it
    is. The first two periods have no target.
    """

    def __init__(self, period: int) -> None:
        """Start without a target.

        Args:
            period: steps; more than a stream may be ahead.
        """
        self.period = period
        self._sums: dict[int, tuple[float, int]] = {}

    def record(self, step: int, load: float, num_sessions: int) -> None:
        """Add what all ranks found in a step.

        Args:
            step: global steps before it.
            load: sum over ranks of SequenceBatch.expected_load.
            num_sessions: SequenceBatch.num_sessions.
        """
        period = step // self.period
        before = self._sums.get(period, (0.0, 0))
        self._sums = {p: s for p, s in self._sums.items() if p > period - 3}
        self._sums[period] = (before[0] + load, before[1] + num_sessions)

    def at(self, step: int) -> float | None:
        """Return the expected load of a session, None without one."""
        load, num_sessions = self._sums.get(step // self.period - 2, (0.0, 0))
        return load / num_sessions if num_sessions else None

    def state(self) -> list[list[float]]:
        """Return what a checkpoint keeps."""
        return [[period, *sums] for period, sums in sorted(self._sums.items())]

    def load_state(self, state: list[list[float]]) -> None:
        """Restore what `state` returned."""
        self._sums = {int(period): (load, int(count)) for period, load, count in state}


def balance_lengths(
    sequences: Ints,
    lengths: LengthRules,
    costs: CostRules,
    target: float | None,
    cuts: Cuts | None = None,
) -> tuple[Ints, float]:
    """Draw which sequences stay whole.

    Args:
        sequences: (B, *) int64, columns as in pipelines.history.
        lengths: of stochastic length.
        costs: of a sequence.
        target: load that this batch should have; None: what it has on average.
        cuts: of the sequences; None: those without series.

    Returns:
        (B,) int64 events of history that each sequence keeps; E(1), in the unit of the costs.
    """
    num_sequences = len(sequences)
    cuts = cuts or find_cuts(sequences, lengths)
    kept = sequences[:, NUM_HISTORY].copy()
    chance, gain = np.empty(num_sequences), np.empty(num_sequences)
    base = _loads(sequences, lengths, costs, cuts, chance, gain)
    expected = base + float((chance * gain).sum())
    if target is not None:
        chance = _shifted(chance, gain, target - base)
    open_ = np.flatnonzero(gain > 0)
    order = open_[np.argsort(-gain[open_], kind="stable")]
    _decide(sequences, lengths, cuts, order, chance, gain, kept)
    return kept, expected


def _shifted(chance: Any, gain: Any, wanted: float) -> Any:
    """Return min(1, c chance) with sum of chance * gain nearest to `wanted`."""
    low, high = 1 / MOST_SHIFT, MOST_SHIFT
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if (np.minimum(1.0, middle * chance) * gain).sum() < wanted:
            low = middle
        else:
            high = middle
    return np.minimum(1.0, (low + high) / 2 * chance)


@njit(nogil=True, cache=True)
def _loads(sequences: Any, lengths: Any, costs: Any, cuts: Any, chance: Any, gain: Any) -> Any:
    """Fill chance p and gain (whole - cut) of each sequence; return the load with all cut."""
    base = 0.0
    for b in range(len(sequences)):
        n, m = sequences[b, NUM_HISTORY], sequences[b, NUM_EVENTS]
        length = num_tokens(n, m, lengths.tokens) + cuts.series[b]
        chance[b], gain[b] = probability_whole(length, lengths), 0.0
        whole = sequence_cost(n, m, costs, cuts.series[b])
        cut = whole
        if chance[b] < 1.0:
            cut = sequence_cost(cuts.num_kept[b], m, costs, cuts.kept_series[b])
            gain[b] = whole - cut
        base += cut
    return base


@njit(nogil=True, cache=True)
def _decide(
    sequences: Any, lengths: Any, cuts: Any, order: Any, chance: Any, gain: Any, kept: Any
) -> None:
    """Cut the sequences of `order` that the pivotal method leaves out."""
    # Two open sequences exchange load until one of them is decided; the chances of both, and so of
    # all, stay as they were on average. Falling gains leave a small one open at the end.
    tiny = 1e-12
    held = -1
    for b in order:
        if held < 0:
            held = b
        else:
            row = sequences[b]
            key = sequence_key(lengths.seed, _BALANCE, row[USER], row[SESSION], row[PIECE])
            mine, other = chance[held] * gain[held], chance[b] * gain[b]
            up = min(gain[held] - mine, other)
            down = min(mine, gain[b] - other)
            if uniform(key) * (up + down) < down:
                mine, other = mine + up, other - up
            else:
                mine, other = mine - down, other + down
            chance[held], chance[b] = mine / gain[held], other / gain[b]
            if chance[held] < tiny or chance[held] > 1 - tiny:
                held = b
                if chance[b] < tiny or chance[b] > 1 - tiny:
                    held = -1
    for b in order:
        row = sequences[b]
        stays_whole = chance[b] > 0.5
        if b == held:
            key = sequence_key(lengths.seed, _LAST, row[USER], row[SESSION], row[PIECE])
            stays_whole = uniform(key) < chance[b]
        if not stays_whole:
            kept[b] = cuts.num_kept[b]
