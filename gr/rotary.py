"""Angles of position and time for queries and keys (TO-RoPE): kernels/rotary turns by them.

Letters: L tokens, G sets of angles (1, or one a head), P pairs of a head.
"""

import math

import torch
from torch import Tensor

from gr.config import RotaryConfig
from gr.sequence import SequenceInfo, sequence_index, token_places
from kernels.rotary import Rotation

BASE = 10_000.0


def rotations(
    config: RotaryConfig, info: SequenceInfo, *, num_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Rotation, Rotation]:
    """Return what queries and what keys are turned by.

    The score of a query and a key then depends on how many tokens lie between them, and on the
    seconds from the key to the time at which the query's prediction is made. Candidates share one
    position.

    Args:
        config: which angles there are.
        info: structure and times of the batch.
        num_heads: heads; matters with angles=split_heads only.
        head_dim: K.
        dtype: of the tokens; angles are of float32 at least.

    Source: 2510.20455: early fusion (sum), split by dims, split by heads.
    """
    num_tokens = info.timestamp.numel()
    sequence_L = sequence_index(info.offsets, num_tokens)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    position_LP = position_angles(token_places(info, sequence_L), head_dim)
    if config.angles == "position":
        shared = _rotation([position_LP], dtype)
        return shared, shared
    # Only differences count. Those to a time of the sequence's own keep their digits, and are the
    # same whenever the sequence happened.
    if info.before is None:
        first_L = info.timestamp[info.offsets[sequence_L]]
    else:
        first_L = info.before.first_time[sequence_L]
    query, key = (
        _mixed(
            config, position_LP, time_angles(time_L - first_L, head_dim, config.periods), num_heads
        )
        for time_L in (info.query_time, info.timestamp)
    )
    return _rotation(query, dtype), _rotation(key, dtype)


def position_angles(position_L: Tensor, head_dim: int) -> Tensor:
    """Return (L, P) float64 radians: position * 10000^(-p / P), p = 0 .. P - 1.

    Args:
        position_L: int64.
        head_dim: K = 2 P.

    Source: Su et al., "RoFormer", 2021, equation 15.
    """
    pair = torch.arange(0, head_dim, 2, device=position_L.device, dtype=torch.float64)
    return position_L.double()[:, None] * BASE ** (-pair / head_dim)


def time_angles(time_L: Tensor, head_dim: int, periods: tuple[float, float]) -> Tensor:
    """Return (L, P) float64 radians in [0, 2 pi): one turn in each of P periods.

    Args:
        time_L: int64 s since some moment.
        head_dim: K = 2 P.
        periods: the shortest and the longest, in s; those between grow by a constant factor.
    """
    pairs = head_dim // 2
    step = torch.arange(pairs, device=time_L.device, dtype=torch.float64) / max(1, pairs - 1)
    period_P = periods[0] * (periods[1] / periods[0]) ** step
    # Whole turns are left out in double, without rounding: float32 could not tell years of seconds
    # apart.
    return (2 * math.pi / period_P) * time_L.double()[:, None].remainder(period_P)


def _mixed(
    config: RotaryConfig, position_LP: Tensor, time_LP: Tensor, num_heads: int
) -> list[Tensor]:
    """Return the angles of each set."""
    if config.angles == "time":
        return [time_LP]
    if config.angles == "sum":
        return [position_LP + time_LP]
    if config.angles == "split_dims":
        # Every other pair, so that both have the whole range of frequencies.
        is_time = torch.arange(position_LP.shape[1], device=position_LP.device) % 2 == 1
        return [torch.where(is_time, time_LP, position_LP)]
    return [position_LP if head % 2 == 0 else time_LP for head in range(num_heads)]


def _rotation(angles: list[Tensor], dtype: torch.dtype) -> Rotation:
    angle_LGP = torch.stack(angles, dim=1)
    return Rotation(angle_LGP.cos().to(dtype), angle_LGP.sin().to(dtype))
