"""What every form of the tables offers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import EmbeddingsConfig, TableConfig
from embeddings.distinct import row_is_finite


class Tables(nn.Module, ABC):
    """All embedding tables of a run, with their optimizer.

    A training step is `lookup`, backward, `optimizer_step`, on every rank alike: a rank without
    data looks up an empty batch and still takes part. Gradients are averaged over the ranks. One
    form updates rows inside backward, the other in `optimizer_step`; the next lookup sees the same.

    Attributes:
        config: what the tables were built from.
        device: where `lookup` expects its rows.
        steps: optimizer steps taken.
        exchange: stream in which a form brings ids to other ranks, beside the device's other work;
            None where there is none.
    """

    config: EmbeddingsConfig
    device: torch.device
    steps: int

    def __init__(self, config: EmbeddingsConfig, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.device = device
        self.exchange: torch.cuda.Stream | None = None
        self._num_nonfinite = torch.zeros((), dtype=torch.int64, device=device)

    @abstractmethod
    def lookup(self, rows: "KeyedJaggedTensor | PendingLookup") -> dict[str, Tensor]:
        """Return the rows of each feature, differentiably.

        A gradient row that is not finite is taken as zeros, and counted.

        Args:
            rows: row numbers by feature (Vocabulary.rows), any stride; may hold no values. Or what
                `send` returned; lookups are then in the order of the sends.

        Returns:
            Feature -> (number of its values, dim of its table) float32, in the order of `rows`.

        Raises:
            ValueError: if no table serves a feature.
        """

    def send(self, rows: KeyedJaggedTensor) -> "PendingLookup":
        """Let the row numbers of a later lookup travel to the ranks that hold the rows.

        What is looked up is the rows as they are at `lookup`, so that sending early changes no bit.
        On every rank alike, as `lookup` is.

        Raises:
            ValueError: if no table serves a feature.
        """
        self.check_served(rows.keys())
        return PendingLookup(rows)

    def take_num_nonfinite(self) -> Tensor:
        """Return how many gradient rows were not finite since the last call, () int64.

        Of this rank, counted once for each id that a row was looked up for.
        """
        count, self._num_nonfinite = self._num_nonfinite, torch.zeros_like(self._num_nonfinite)
        return count

    def take_cache_hits(self) -> tuple[int, int]:
        """Return how many distinct rows lookups found in HBM caches, of how many they asked for.

        Since the last call, on this rank, of cached tables only (hbm_gb): else nothing was asked.
        """
        return 0, 0

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

    def local_weight(self, table: str) -> Tensor | None:
        """Return (rows, dim), the live rows, where this process reads all of them by itself.

        None where they are spread over ranks, or a cache stands before them.
        """
        self.table_config(table)
        return None

    @abstractmethod
    def set_rows(self, table: str, rows_U: Tensor, values_UD: Tensor) -> None:
        """Give rows new values, and moments of zero. On all ranks alike, between steps.

        Args:
            table: its name.
            rows_U: (U,) int64, distinct, on the device.
            values_UD: (U, D).
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

    def guard(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        """Return looked-up rows whose gradients are made finite on their way back."""
        guarded: tuple[Tensor, ...] = _Guard.apply(self, *vectors)  # type: ignore[no-untyped-call]
        return guarded

    def count_nonfinite(self, bad_n: Tensor) -> None:
        """Add (n,) bool gradient rows to what `take_num_nonfinite` returns."""
        self._num_nonfinite = self._num_nonfinite + bad_n.sum()

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


class PendingLookup:
    """Row numbers on their way (Tables.send). This base holds them for forms that send nothing.

    Attributes:
        rows: row numbers by feature.
    """

    def __init__(self, rows: KeyedJaggedTensor) -> None:
        self.rows = rows

    def advance(self) -> None:
        """Go as far as can be gone before the lookup; on every rank alike, at most once."""


class _Guard(torch.autograd.Function):
    """The identity on several tensors, behind one autograd node.

    Whichever of them a loss uses, each rank then runs the same collectives in backward: a tensor
    without a gradient gets one of zeros. A gradient row that is not finite becomes zeros: the fused
    optimizer would write it into the table and into the moments, for good.
    """

    @staticmethod
    def forward(ctx: Any, tables: Tables, *vectors: Tensor) -> tuple[Tensor, ...]:
        ctx.tables = tables
        return tuple(x.view_as(x) for x in vectors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        finite = []
        for grad_nD in grads:
            bad_n = ~row_is_finite(grad_nD)
            ctx.tables.count_nonfinite(bad_n)
            finite.append(grad_nD.masked_fill(bad_n[:, None], 0.0))
        return None, *finite


def stream_of_its_own(device: torch.device) -> "torch.cuda.Stream":
    """Return a stream that nothing else of a run works in.

    Torch deals the same 32 streams to all who ask, NCCL's communicators among them, in turns: in
    one of those, ids would now and then wait for gradients. For high priority nobody else asks.
    """
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call,no-any-return]
