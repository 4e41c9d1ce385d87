"""Which keys a query sees: the one definition that reference, kernels and FLOP count share.

A sequence of `length` tokens is, in this order: `num_context` contextual tokens, history, and
`num_candidates` candidates. Rows are queries, columns are keys, both counted from its start.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMask:
    """Visibility within a sequence.

    A candidate sees context, history and itself, whatever the window (but for
    `windowed_candidates`); nothing else sees it. The other rows are causal, but for the options
    below.

    Source: ULTRA-HSTU (arXiv 2602.16986) figure 3 for the window and its global rows; contextual
    prefix and candidates as in meta-recsys/generative-recommenders, where the contextual columns
    fall out of the window: here they never do.
    """

    num_context: int = 0
    """Contextual tokens at the head of every sequence; every later row sees them."""
    context: Literal["causal", "prefix", "prefix_sees_all"] = "causal"
    """What a contextual row sees: the context up to itself; all of the context and nothing else;
    context and history (which tells it the future: for predictions read at candidates only)."""
    local_window: int | None = None
    """K1: a history row sees the keys row - K1 .. row. None means every key up to itself."""
    global_rows: int = 0
    """K2: so many history rows, the newest, see every key up to themselves despite the window."""
    global_columns: int = 0
    """K2 by columns: so many keys, the first after the context, stay visible despite the window."""
    windowed_candidates: bool = False
    """Whether a candidate sees what a row of history would at the place that all candidates share:
    of inference on models whose sessions are history as they go on (hstu_attention_cached)."""

    def __post_init__(self) -> None:
        for name in ("num_context", "global_rows", "global_columns"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"AttentionMask.{name} must be at least 0, got {getattr(self, name)}"
                )
        if self.local_window is not None and self.local_window < 0:
            raise ValueError(
                "AttentionMask.local_window (K1) must be at least 0, or None for no window, got "
                f"{self.local_window}"
            )
        if self.context not in ("causal", "prefix", "prefix_sees_all"):
            raise ValueError(
                "AttentionMask.context must be 'causal', 'prefix' or 'prefix_sees_all', got "
                f"{self.context!r}"
            )
        if self.context != "causal" and self.num_context == 0:
            raise ValueError(
                f"AttentionMask.context={self.context!r} needs num_context > 0; without contextual "
                "tokens leave it at 'causal'"
            )
        if self.local_window is None and (self.global_rows or self.global_columns):
            raise ValueError(
                "AttentionMask.global_rows and global_columns except something from local_window; "
                f"got {self.global_rows} and {self.global_columns} with local_window=None"
            )
        if self.windowed_candidates and (self.local_window is None or self.global_rows):
            raise ValueError(
                "AttentionMask.windowed_candidates needs local_window, and no global_rows (it "
                f"would be one of them); got {self.local_window} and {self.global_rows}"
            )


def visible(
    row: Tensor, col: Tensor, length: Tensor, num_candidates: Tensor, mask: AttentionMask
) -> Tensor:
    """Return whether the query at `row` sees the key at `col`.

    Args:
        row: integer, 0 .. length - 1; all four arguments broadcast.
        col: integer, 0 .. length - 1. Pairs outside of 0 .. length - 1 give False.
        length: integer, tokens of the sequence.
        num_candidates: integer, 0 .. length.
        mask: what is visible.

    Returns:
        Boolean, of the broadcast shape.
    """
    history = length - num_candidates  # context included
    inside = (row >= 0) & (row < length) & (col >= 0) & (col < length)
    sees = col <= row
    if mask.local_window is not None:
        near = (row - col <= mask.local_window) | (col < mask.num_context + mask.global_columns)
        sees = sees & (near | (row >= history - mask.global_rows))
    if mask.context != "causal":
        seen = history
        if mask.context == "prefix":
            seen = history.clamp(max=mask.num_context)
        sees = torch.where(row < mask.num_context, col < seen, sees)
    candidate_sees = col < history
    if mask.windowed_candidates:
        assert mask.local_window is not None
        far = mask.num_context + mask.global_columns
        candidate_sees &= (history - col <= mask.local_window) | (col < far)
    candidate_sees = candidate_sees | (col == row)
    return inside & torch.where(row < history, sees, candidate_sees)


def num_visible(row: Tensor, length: Tensor, num_candidates: Tensor, mask: AttentionMask) -> Tensor:
    """Return how many keys the query at `row` sees: the sum of `visible` over all columns.

    Args:
        row: int64, 0 .. length - 1; the three tensors broadcast.
        length: int64, tokens of the sequence.
        num_candidates: int64, 0 .. length.
        mask: what is visible.

    Returns:
        int64, of the broadcast shape.
    """
    history = length - num_candidates
    count = row + 1
    if mask.local_window is not None:
        window_start = (row - mask.local_window).clamp(min=0)
        far = window_start.clamp(max=mask.num_context + mask.global_columns)
        count = torch.where(row >= history - mask.global_rows, count, count - window_start + far)
    if mask.context != "causal":
        seen = history
        if mask.context == "prefix":
            seen = history.clamp(max=mask.num_context)
        count = torch.where(row < mask.num_context, seen, count)
    of_candidate = history + 1
    if mask.windowed_candidates:
        assert mask.local_window is not None
        hidden = (history - mask.local_window).clamp(min=0)
        far = hidden.clamp(max=mask.num_context + mask.global_columns)
        of_candidate = of_candidate - hidden + far
    return torch.where(row < history, count, of_candidate)
