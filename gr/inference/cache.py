"""Keys and values of histories in pages, and whose they are.

Letters: C rows of the store, B sequences, G pages of a sequence at most, H heads, K and V dims.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.hstu_attention import CachedKeys
from kernels.hstu_attention.cached import PAGE
from kernels.hstu_attention.laid_out import keep_rows
from pipelines.history import Ints


class LayerShape(NamedTuple):
    """What a layer keeps of a token."""

    num_heads: int
    qk_dim: int
    v_dim: int


class KeyValueStore:
    """Pages of keys and values of every layer, handed out and taken back.

    Attention truncation lays tokens out anew in its layers: times are kept for either layout.

    Args:
        layers: of the stack, in order.
        num_pages: pages of PAGE tokens; one of them, page 0, is handed out to nobody.
        dtype: of keys and values.
        device: where they lie.
        layouts: 2 with attention truncation, else 1.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_pages: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        layouts: int = 1,
    ) -> None:
        rows = num_pages * PAGE
        self.num_pages = num_pages
        # Zeros: a hidden key's weight is zero, and so must its product with whatever lies here be.
        self.k = [
            torch.zeros(rows, x.num_heads, x.qk_dim, dtype=dtype, device=device) for x in layers
        ]
        self.v = [
            torch.zeros(rows, x.num_heads, x.v_dim, dtype=dtype, device=device) for x in layers
        ]
        self.time = [torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(layouts)]
        # Page 0 is nobody's: graphs write there what is not to be kept.
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def num_free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def allocate(self, num_pages: int) -> list[int]:
        """Return pages; there must be as many."""
        assert num_pages <= len(self._free)
        return [self._free.pop() for _ in range(num_pages)]

    def allocate_for(self, num_tokens: int) -> list[int]:
        """Return pages for so many tokens; there must be as many."""
        return self.allocate(pages_for(num_tokens))

    def release(self, pages: Sequence[int]) -> None:
        """Take pages back."""
        self._free.extend(pages)

    def write(self, layer: int, rows_n: Tensor, k_nHK: Tensor, v_nHV: Tensor) -> None:
        """Keep keys and values of a layer in these rows."""
        keep_rows(k_nHK, v_nHV, rows_n, self.k[layer], self.v[layer])

    def keys(
        self, layer: int, layout: int, pages_BG: Tensor, lengths_B: Tensor, max_len: int
    ) -> CachedKeys:
        """Return what the attention of a layer reads."""
        return CachedKeys(
            self.k[layer], self.v[layer], self.time[layout], pages_BG, lengths_B, max_len
        )


def page_bytes(layers: Sequence[LayerShape], dtype: torch.dtype, layouts: int = 1) -> int:
    """Return the bytes of one page over all layers."""
    numbers = sum(x.num_heads * (x.qk_dim + x.v_dim) for x in layers)
    return int(PAGE * (numbers * dtype.itemsize + 8 * layouts))


def pages_for(num_tokens: int) -> int:
    """Return how many pages so many tokens take."""
    return -(-num_tokens // PAGE)


def page_table(pages: Sequence[Sequence[int]]) -> Tensor:
    """Return (B, G) int32 in host memory; short rows are filled with their own or page 0."""
    longest = max((len(x) for x in pages), default=0)
    table = torch.zeros(len(pages), max(1, longest), dtype=torch.int32)
    view = table.numpy()
    for b, mine in enumerate(pages):
        view[b, : len(mine)] = mine
    return table


def rows_in_pages(
    pages: Sequence[Sequence[int]], first: Sequence[int], counts: Sequence[int]
) -> Ints:
    """Return (sum of counts,) int64: rows of the store of tokens of some sequences.

    Args:
        pages: of each sequence.
        first: of each, a token.
        counts: of each, how many from there on.
    """
    rows = []
    for mine, begin, count in zip(pages, first, counts, strict=True):
        page, end = begin // PAGE, begin + count
        used = np.array(mine[page : pages_for(end)], np.int64)
        whole = (used[:, None] * PAGE + np.arange(PAGE)).reshape(-1)
        rows.append(whole[begin - page * PAGE :][:count])
    return rows[0] if len(rows) == 1 else np.concatenate(rows)
