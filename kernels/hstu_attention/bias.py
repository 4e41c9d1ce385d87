"""Relative bias of attention: by distance in position and in time, shared by the heads."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

TIME_BUCKET_WIDTH = 0.301
"""Of the natural logarithm of seconds: about one bucket for each factor 1.35."""


@dataclass(frozen=True, slots=True)
class RelativeBias:
    """What is added to alpha * q k before the activation.

        bias[i, j] = position_table[clamp(p_i - p_j, -(M-1), M-1) + M-1] + time_table[bucket_ij]
        bucket_ij  = clamp(floor(ln(max(1, |query_time_i - key_time_j|)) / 0.301), 0, T)

    p is the position within the sequence; all candidates stand at the end of the history.

    Source: HSTU (arXiv 2402.17152) rab^{p,t}, buckets as in the research code of
    meta-recsys/generative-recommenders; there candidates do not share a position.
    """

    position_table: Tensor
    """(2 * M - 1,) floating."""
    time_table: Tensor | None = None
    """(T + 1,) floating, or None for no bias by time."""
    query_time: Tensor | None = None
    """(R,) int64 s, when the prediction of each query is made; with time_table only."""
    key_time: Tensor | None = None
    """(L,) int64 s, when each key happened; with time_table only."""


def position_index(row: Tensor, col: Tensor, history: Tensor, table_size: int) -> Tensor:
    """Return the row of the position table for each pair.

    Args:
        row: int64, position of the query; the three tensors broadcast.
        col: int64, position of the key.
        history: int64, length of the sequence without its candidates.
        table_size: 2 * M - 1.
    """
    reach = table_size // 2
    distance = torch.minimum(row, history) - torch.minimum(col, history)
    return distance.clamp(-reach, reach) + reach


@functools.cache
def time_thresholds(num_buckets: int) -> tuple[int, ...]:
    """Return the smallest difference (s) of each bucket 1 .. num_buckets, as exact integers.

    Comparing integers makes the bucket the same on every device: a float32 logarithm is off by one
    beside a threshold, and cannot tell seconds apart from 2^24 on. Beyond int64 they are capped.
    """
    largest = 2**63 - 1
    exact = (math.exp(TIME_BUCKET_WIDTH * k) for k in range(1, num_buckets + 1))
    return tuple(math.ceil(x) if x < largest else largest for x in exact)


def time_bucket(query_time: Tensor, key_time: Tensor, num_buckets: int) -> Tensor:
    """Return floor(ln(max(1, |query_time - key_time|)) / 0.301), at most `num_buckets`.

    Args:
        query_time: int64 s; broadcasts with key_time.
        key_time: int64 s.
        num_buckets: T, the last bucket.
    """
    thresholds = torch.tensor(
        time_thresholds(num_buckets), dtype=torch.int64, device=key_time.device
    )
    return torch.bucketize((query_time - key_time).abs(), thresholds, right=True)
