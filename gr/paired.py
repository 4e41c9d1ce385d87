"""Tests of differences between runs at the same seeds. Free of torch."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtr

from gr.runs import mean_interval


@dataclass(frozen=True, slots=True)
class Difference:
    """Of pairs that share a seed."""

    mean: float
    half: float
    """Half width of the 95 % t-interval."""
    p: float
    """Of Student's paired t-test, both sides."""
    num: int
    """Pairs."""


def paired_difference(differences: Sequence[float]) -> Difference | None:
    """Return what the differences of pairs say; None for fewer than two.

    Pairs that all differ by the same amount are not evidence that a t-test can weigh: p is then 0,
    or 1 if the amount is 0.
    """
    found = mean_interval(differences)
    if found is None or found[2] < 2:
        return None
    mean, half, num = found
    error = statistics.stdev(differences) / math.sqrt(num)
    if error == 0:
        return Difference(mean, half, 1.0 if mean == 0 else 0.0, num)
    return Difference(mean, half, float(2 * stdtr(num - 1, -abs(mean / error))), num)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for so many tests: below 0.05 with probability 5 % if all are null.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def compare(
    rows: dict[str, dict[int, float]], baseline: str
) -> dict[str, tuple[Difference, float]]:
    """Return row -> (difference from the baseline at the same seeds, p after Holm).

    Args:
        rows: row -> seed -> value.
        baseline: one of them; rows that share fewer than two seeds with it are left out.
    """
    base = rows.get(baseline, {})
    found = {}
    for name, values in rows.items():
        pairs = [value - base[seed] for seed, value in values.items() if seed in base]
        if name != baseline and (difference := paired_difference(pairs)) is not None:
            found[name] = difference
    adjusted = holm([d.p for d in found.values()])
    return {name: (d, p) for (name, d), p in zip(found.items(), adjusted, strict=True)}
