"""Sizes at which layers are captured, and the memory that their graphs read and write.

Letters: L tokens, C tokens of a graph, R rows of the result, B sequences, S sequences of a graph,
D model dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gr.sequence import SequenceInfo

SEQUENCES = 8
"""Sequences are rounded up to a multiple of this; those that are added are empty."""


class Size(NamedTuple):
    """What graphs are captured for."""

    layers: int
    """The first so many of the stack."""
    tokens: int
    """C."""
    rows: int
    """Of the result: C, or of tails."""
    sequences: int
    """S."""
    max_len: int
    """At least the longest sequence: a power of 2."""
    max_tail_len: int
    """At least the longest tail, likewise; 0 where the last layer computes all rows."""
    num_context: int
    dtype: torch.dtype
    autocast: torch.dtype | None
    """None where it is off."""
    fp8: tuple[tuple[str, ...], ...]
    """Products in fp8 of each layer, which a run may turn off."""


def size_of(
    x_LD: Tensor,
    info: SequenceInfo,
    fp8: Sequence[tuple[str, ...]],
    multiple: int,
    *,
    of_tails: bool,
) -> Size:
    """Return the size that a batch is rounded up to.

    Args:
        x_LD: its tokens.
        info: its structure.
        fp8: products in fp8 of each layer that is captured.
        multiple: of which tokens and rows are.
        of_tails: whether the last layer computes those alone.
    """
    # One more of each: the sequence that is added, and its tail, have at least one token.
    device = x_LD.device.type
    L, R = x_LD.shape[0], info.num_rows if of_tails else x_LD.shape[0]
    rows = round_up(R + 1, multiple)
    tokens = round_up(L + rows - R, multiple)  # room for that tail
    return Size(
        layers=len(fp8),
        tokens=tokens,
        rows=rows if of_tails else tokens,
        sequences=round_up(info.offsets.numel(), SEQUENCES),
        max_len=power_of_2(max(info.max_len, 2 * multiple)),  # what is added may be so long
        max_tail_len=power_of_2(max(info.max_tail_len, multiple)) if of_tails else 0,
        num_context=info.num_context,
        dtype=x_LD.dtype,
        autocast=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        fp8=tuple(fp8),
    )


class Structure(NamedTuple):
    """Where graphs read which tokens are of which sequence."""

    offsets: Tensor
    """(S + 1,) int64."""
    tail_offsets: Tensor
    """(S + 1,) int64."""
    num_candidates: Tensor
    """(S,) int64."""


class Buffers:
    """Memory that graphs of all sizes read and write.

    Args:
        like: (., D), for its dtype and device.
        num_tokens: most that there is room for.
        turned: cosines and sines of queries and of keys, (., G, P), for their shapes; or nothing.
    """

    def __init__(self, like: Tensor, num_tokens: int, turned: Sequence[Tensor]) -> None:
        def rows() -> Tensor:
            return torch.zeros(num_tokens, like.shape[1], dtype=like.dtype, device=like.device)

        self.num_tokens = num_tokens
        self.x, self.y, self.dx, self.dy = rows(), rows(), rows(), rows()
        times = torch.zeros(2, num_tokens, dtype=torch.int64, device=like.device)
        self.timestamp, self.query_time = times
        self.turned = [x.new_zeros(num_tokens, *x.shape[1:]) for x in turned]


def round_up(n: int, multiple: int) -> int:
    """Return the least multiple that is at least n."""
    return -(-n // multiple) * multiple


def power_of_2(n: int) -> int:
    """Return the least power of 2 that is at least n, for n > 0."""
    return 1 << (n - 1).bit_length()
