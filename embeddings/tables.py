"""What every form of the tables offers, and the rows that they start with."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import EmbeddingsConfig, TableConfig

BLOCK_ROWS = 4096
"""Rows that one generator draws; a part of how the rows of a seed are defined, so never changed."""


class Tables(nn.Module, ABC):
    """All embedding tables of a run, with their optimizer.

    A training step is `lookup`, backward, `optimizer_step`, on every rank alike: a rank without
    data looks up an empty batch and still takes part. Gradients are averaged over the ranks. One
    form updates rows inside backward, the other in `optimizer_step`; the next lookup sees the same.

    Attributes:
        config: what the tables were built from.
        device: where `lookup` expects its rows.
        steps: optimizer steps taken.
    """

    config: EmbeddingsConfig
    device: torch.device
    steps: int

    @abstractmethod
    def lookup(self, rows: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Return the rows of each feature, differentiably.

        Args:
            rows: row numbers by feature (Vocabulary.rows), any stride; may hold no values.

        Returns:
            Feature -> (number of its values, dim of its table) float32, in the order of `rows`.

        Raises:
            ValueError: if no table serves a feature.
        """

    @abstractmethod
    def all_rows(self, table: str, chunk_rows: int = 65536) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, (at most chunk_rows, dim) float32) over all rows of `table`.

        Every rank gets every row, without gradient; all ranks must iterate together. A chunk is
        valid until the next one is asked for.
        """

    @abstractmethod
    def full_weight(self, table: str) -> Tensor:
        """Return (rows, dim), the whole table, differentiably.

        Raises:
            ValueError: if the form does not hold the whole table on this rank.
        """

    @abstractmethod
    def optimizer_zero_grad(self) -> None:
        """Forget gradients that no step has used."""

    @abstractmethod
    def optimizer_step(self) -> None:
        """Finish the update with the gradients of all ranks, and count it."""

    @abstractmethod
    def set_lr(self, lr: float) -> None:
        """Set the step size of the next backward and step."""

    @abstractmethod
    def checkpoint_state(self) -> dict[str, Any]:
        """Return tensors for torch.distributed.checkpoint, to be saved or loaded in place.

        {"tables": {name: {"weight", "first_moment", "second_moment"}}, "steps"}; no first_moment
        under row_wise_adagrad. The layout is the same for every form, plan and number of ranks.
        """

    @abstractmethod
    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Take over a state that `checkpoint_state` returned and a loader filled."""

    @abstractmethod
    def plan_summary(self) -> str:
        """Return one line a table: rows x dim, form, sharding, ranks, bytes with moments."""

    def check_served(self, features: list[str]) -> None:
        """Refuse features that no table serves.

        Raises:
            ValueError: naming them.
        """
        served = {f for table in self.config.tables.values() for f in table.features}
        unserved = [feature for feature in features if feature not in served]
        if unserved:
            raise ValueError(
                f"no embedding table serves feature(s) {unserved}: add them to "
                "embeddings.tables.NAME.features"
            )

    def table_config(self, table: str) -> TableConfig:
        """Return the configuration of `table`.

        Raises:
            ValueError: if there is no such table.
        """
        if table not in self.config.tables:
            raise ValueError(f"expected a table of {sorted(self.config.tables)}, got {table!r}")
        return self.config.tables[table]


def initial_rows(config: TableConfig, *, table: str, seed: int, first: int, last: int) -> Tensor:
    """Return rows first .. last - 1 of a new table, (last - first, dim) float32 on the CPU.

    Normal with standard deviation config.init_std, truncated at two of it. Row 0 (unknown) is drawn
    like the others. A row depends on (seed, table, row, dim) only, so that every form, plan and
    number of ranks starts alike: each block of BLOCK_ROWS rows has a generator of its own.
    """
    rows = torch.zeros(last - first, config.dim)
    if config.init_std == 0:
        return rows
    for block in range(first // BLOCK_ROWS, -(-last // BLOCK_ROWS)):
        start = block * BLOCK_ROWS
        stop = min(start + BLOCK_ROWS, config.num_embeddings)
        digest = hashlib.blake2b(f"{seed}/{table}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        drawn = torch.empty(stop - start, config.dim)
        std = config.init_std
        nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std, generator=generator)
        lo, hi = max(start, first), min(stop, last)
        rows[lo - first : hi - first] = drawn[lo - start : hi - start]
    return rows
