"""Columns of a buffer that a kernel turns in passing, and the order that it wants them in.

Letters: L tokens, H heads, K dim of a head, P = K / 2 pairs.
"""

from typing import Any, NamedTuple

from torch import Tensor

from kernels.rotary.reference import Rotation


class Turn(NamedTuple):
    """Queries or keys in a buffer: H heads of K columns, pairs side by side."""

    first: int
    """Their first column."""
    num_heads: int
    rotation: Rotation
    """Of the rows of the buffer: cos and sin (L, 1 or H, P) float32, contiguous."""


def turn_arguments(*turns: Turn | None) -> tuple[list[Any], dict[str, Any]]:
    """Return what a kernel takes: cos, sin and first column of each, and constants of all.

    Those of None are None and 0; heads are the same in all.
    """
    some = next((turn for turn in turns if turn is not None), None)
    arguments: list[Any] = []
    for turn in turns:
        arguments += [None, None, 0] if turn is None else [*turn.rotation, turn.first]
    if some is None:
        return arguments, {"H": 1, "K": 2, "PER_HEAD": False}
    cos = some.rotation.cos
    return arguments, {"H": some.num_heads, "K": 2 * cos.shape[2], "PER_HEAD": cos.shape[1] > 1}


def interleave(x: Tensor, num_heads: int) -> Tensor:
    """Return x (..., H K) with column p + P of each head moved beside column p."""
    return _swap(x, num_heads, 2)


def deinterleave(x: Tensor, num_heads: int) -> Tensor:
    """Undo interleave."""
    return _swap(x, num_heads, x.shape[-1] // (2 * num_heads))


def _swap(x: Tensor, num_heads: int, rows: int) -> Tensor:
    """Return x with the columns of each head, `rows` by any, in the order of the transpose."""
    columns = x.shape[-1] // (num_heads * rows)
    parts = x.reshape(*x.shape[:-1], num_heads, rows, columns)
    return parts.transpose(-1, -2).reshape(x.shape)
