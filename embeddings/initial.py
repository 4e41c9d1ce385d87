"""The rows that tables start with, and those of ids that get a row later.

Letters: E rows of a table, D width of a row, n ids.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from embeddings.config import TableConfig
from embeddings.hashing import hash_ids

BLOCK_ROWS = 4096
"""Rows that one generator draws; a part of how the rows of a seed are defined, so never changed."""


def initial_rows(config: TableConfig, *, table: str, seed: int, first: int, last: int) -> Tensor:
    """Return rows first .. last - 1 of a new table, (last - first, dim) float32 on the CPU.

    Normal with standard deviation config.init_std, truncated at two of it. Row 0 (unknown) is drawn
    like the others. A row depends on (seed, table, row, dim) only, so that every form, plan and
    number of ranks starts alike: each block of BLOCK_ROWS rows has a generator of its own. With
    `ids: dynamic` the other rows are zero: they get a value with their id (rows_of_ids).
    """
    rows = torch.zeros(last - first, config.dim)
    num_drawn = 1 if config.ids == "dynamic" else config.num_embeddings
    if config.init_std == 0 or first >= num_drawn:
        return rows
    for block in range(first // BLOCK_ROWS, -(-min(last, num_drawn) // BLOCK_ROWS)):
        start = block * BLOCK_ROWS
        stop = min(start + BLOCK_ROWS, num_drawn)
        generator = torch.Generator().manual_seed(_seed_of(f"{seed}/{table}/{block}"))
        drawn = torch.empty(stop - start, config.dim)
        std = config.init_std
        nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std, generator=generator)
        lo, hi = max(start, first), min(stop, last)
        rows[lo - first : hi - first] = drawn[lo - start : hi - start]
    return rows


def rows_of_ids(config: TableConfig, ids_n: Tensor, *, table: str, seed: int) -> Tensor:
    """Return the first rows of new ids, (n, dim) float32 on their device.

    Distributed as `initial_rows`. A row depends on (seed, table, id, dim) only: not on when the id
    came, on which row it got, or on the number of ranks.
    """
    if config.init_std == 0:
        return torch.zeros(len(ids_n), config.dim, device=ids_n.device)
    # A hash of the seed and the id, then of that and the column, as 53 random bits.
    key_n1 = hash_ids(ids_n ^ (_seed_of(f"{seed}/{table}/ids") >> 1))[:, None]
    bits_nD = hash_ids(key_n1 + torch.arange(config.dim, device=ids_n.device)) >> 10
    uniform_nD = (bits_nD.double() + 0.5) * 2.0**-53
    # Inverse of the distribution function, between two standard deviations.
    bound = math.erf(2 / math.sqrt(2))
    normal_nD = torch.erfinv((2 * uniform_nD - 1) * bound) * math.sqrt(2)
    return (config.init_std * normal_nD).float()


def _seed_of(text: str) -> int:
    """Return 64 bits of a hash."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
