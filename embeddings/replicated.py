"""Tables as plain modules, the same rows on every rank, with the reference optimizer.

Letters: E rows of a table, U touched rows, D width of a row, n rows with repeats.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import EmbeddingsConfig
from embeddings.initial import initial_rows
from embeddings.optim import build_optimizer, row_gradient, sum_duplicates
from embeddings.tables import PendingLookup, Tables, stream_of_its_own


class ReplicatedTables(Tables):
    """Every rank holds every table; gradients are exchanged as rows; the ranks stay bit-identical.

    Args:
        config: the tables and their optimizer; weights must be fp32.
        device: where the tables live.
        seed: of the initial rows.
        process_group: ranks that train together; None means the default group, if there is one.

    Raises:
        ValueError: for options that only the sharded form has.
    """

    def __init__(
        self,
        config: EmbeddingsConfig,
        *,
        device: torch.device,
        seed: int,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(config, device)
        _check_replicable(config)
        self.group = process_group
        self.weights = nn.ParameterDict()
        for name, table in config.tables.items():
            rows = initial_rows(table, table=name, seed=seed, first=0, last=table.num_embeddings)
            self.weights[name] = nn.Parameter(rows.to(device))
        self.optimizer = build_optimizer(dict(self.weights.items()), config)
        if device.type == "cuda":
            # Batches come beside the work of the device.
            self.exchange = stream_of_its_own(device)
        self.is_dense = config.update_rule == "adamw"

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Optimizer steps taken."""
        return self.optimizer.steps

    def lookup(self, rows: KeyedJaggedTensor | PendingLookup) -> dict[str, Tensor]:
        """Return the rows of each feature (see Tables)."""
        rows = rows.rows if isinstance(rows, PendingLookup) else rows
        self.check_served(rows.keys())
        bounds = rows.offset_per_key()
        values = {f: rows.values()[bounds[i] : bounds[i + 1]] for i, f in enumerate(rows.keys())}
        found: dict[str, Tensor] = {}
        for name, table in self.config.tables.items():
            features = [feature for feature in table.features if feature in values]
            if not features:
                continue
            # One autograd node for the features that share a table: its gradient is summed once.
            lots = [values[feature] for feature in features]
            vectors = self.guard(*_look_up(self.weights[name], lots, dense=self.is_dense))
            found.update(zip(features, vectors, strict=True))
        return {feature: found[feature] for feature in values}

    def all_rows(self, table: str, chunk_rows: int = 65536) -> Iterator[tuple[int, Tensor]]:
        """Yield views of consecutive rows (see Tables)."""
        self.table_config(table)
        weight_ED = self.weights[table].detach()
        for first in range(0, weight_ED.shape[0], chunk_rows):
            yield first, weight_ED[first : first + chunk_rows]

    def full_weight(self, table: str) -> Tensor:
        """Return the parameter itself; its gradient then touches every row (see Tables)."""
        self.table_config(table)
        weight: Tensor = self.weights[table]
        return weight

    def local_weight(self, table: str) -> Tensor | None:
        """Return the rows (see Tables)."""
        self.table_config(table)
        weight: Tensor = self.weights[table].detach()
        return weight

    @torch.no_grad()
    def set_rows(self, table: str, rows_U: Tensor, values_UD: Tensor) -> None:
        """Give rows new values, and moments of zero (see Tables)."""
        self.weights[table].index_copy_(0, rows_U, values_UD)
        for moment in self.optimizer.state[table].values():
            moment.index_fill_(0, rows_U, 0.0)

    def optimizer_zero_grad(self) -> None:
        """Forget gradients that no step has used."""
        for weight in self.weights.values():
            weight.grad = None

    def optimizer_step(self) -> None:
        """Average the gradients over the ranks, update, and forget the gradients."""
        self.optimizer.step(self._average_gradients())
        self.optimizer_zero_grad()

    def set_lr(self, lr: float) -> None:
        """Set the step size of the next step."""
        self.optimizer.lr = lr

    def checkpoint_state(self) -> dict[str, Any]:
        """Return the live tensors (see Tables): loading in place is enough, save for the steps."""
        tables = {
            name: {"weight": weight.detach(), **self.optimizer.state[name]}
            for name, weight in self.weights.items()
        }
        return {"tables": tables, "steps": torch.tensor(self.optimizer.steps)}

    @torch.no_grad()
    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Take over a state that `checkpoint_state` returned and a loader filled."""
        for name, live in self.checkpoint_state()["tables"].items():
            for part, tensor in live.items():
                tensor.copy_(state["tables"][name][part])
        self.optimizer.steps = int(state["steps"])

    def plan_summary(self) -> str:
        """Return one line a table (see Tables)."""
        lines = []
        for name, weight in self.weights.items():
            tensors = [weight, *self.optimizer.state[name].values()]
            num_bytes = sum(x.numel() * x.element_size() for x in tensors)
            rows, dim = weight.shape
            lines.append(
                f"{name}: {rows} x {dim}, replicated, every rank, {num_bytes} bytes a rank"
            )
        return "\n".join(lines)

    def _average_gradients(self) -> dict[str, Tensor]:
        """Return the gradient of each table that any rank touched, the same on every rank.

        Dense, or sparse: the optimizer then knows its rows, and need not look for equal ones, for
        which the host would wait for a GPU.
        """
        if not dist.is_initialized() or dist.get_world_size(self.group) == 1:
            return {
                name: weight.grad
                for name, weight in self.weights.items()
                if weight.grad is not None
            }
        averaged = {}
        for (name, weight), counts in zip(
            self.weights.items(), self._gather_counts().tolist(), strict=True
        ):
            if DENSE in counts:
                averaged[name] = self._average_dense(weight)
            elif max(counts) > 0:
                averaged[name] = self._average_sparse(weight, counts)
        return averaged

    def _gather_counts(self) -> Tensor:
        """Return (tables, ranks) int64: touched rows, or DENSE."""
        counts = []
        for weight in self.weights.values():
            if weight.grad is None:
                counts.append(0)
            elif weight.grad.is_sparse:
                weight.grad = weight.grad if weight.grad.is_coalesced() else _coalesce(weight.grad)
                counts.append(weight.grad.values().shape[0])
            else:
                counts.append(DENSE)
        local = torch.tensor(counts, device=self.device)
        gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, local, group=self.group)
        return torch.stack(gathered, 1)

    def _average_sparse(self, weight: Tensor, counts: list[int]) -> Tensor:
        # Ranks send equally many rows, as all_gather wants; what is past a count is cut again.
        rows_n = torch.zeros(max(counts), dtype=torch.int64, device=weight.device)
        grads_nD = weight.new_zeros(max(counts), weight.shape[1])
        if weight.grad is not None:
            local = weight.grad.values().shape[0]
            rows_n[:local], grads_nD[:local] = weight.grad.indices()[0], weight.grad.values()
        all_rows = [torch.empty_like(rows_n) for _ in counts]
        all_grads = [torch.empty_like(grads_nD) for _ in counts]
        dist.all_gather(all_rows, rows_n, group=self.group)
        dist.all_gather(all_grads, grads_nD, group=self.group)
        lots = zip(all_rows, all_grads, counts, strict=True)
        rows_U, sums_UD = sum_duplicates(*((r[:count], g[:count]) for r, g, count in lots))
        return _sparse(rows_U, sums_UD / len(counts), weight.shape)

    def _average_dense(self, weight: Tensor) -> Tensor:
        dense_ED = torch.zeros_like(weight)
        if weight.grad is not None:
            dense_ED += weight.grad
        dist.all_reduce(dense_ED, group=self.group)
        return dense_ED / dist.get_world_size(self.group)


def _check_replicable(config: EmbeddingsConfig) -> None:
    """Refuse what only the sharded form has."""
    asked = {
        f"embeddings.weights={config.weights}": config.weights != "fp32",
        f"embeddings.momentum={config.momentum}": config.momentum != "hbm",
        f"embeddings.all_to_all={config.all_to_all}": config.all_to_all != "fp32",
        f"embeddings.index_dedup={config.index_dedup}": config.index_dedup == "on",
        **{
            f"embeddings.tables.{n}.hbm_gb={t.hbm_gb}": True
            for n, t in config.tables.items()
            if t.hbm_gb
        },
    }
    refused = [setting for setting, is_set in asked.items() if is_set]
    if refused:
        raise ValueError(
            "replicated tables have fp32 weights and moments, whole on every rank, got "
            f"{', '.join(refused)}: leave it out, or set embeddings.form=sharded"
        )


DENSE = -1
"""Stands for a count of rows where the gradient is dense (full_weight)."""


class _RowLookup(torch.autograd.Function):
    """weight[rows] for several lots of rows; one gradient: sparse and coalesced, or dense."""

    @staticmethod
    def forward(ctx: Any, weight_ED: Tensor, dense: bool, *lots: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*lots)
        ctx.shape, ctx.dense = weight_ED.shape, dense
        return tuple(weight_ED.index_select(0, rows_n) for rows_n in lots)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.dense:
            # Distinct rows would have to be counted, for which the host waits for a GPU.
            gradient = grads[0].new_zeros(ctx.shape)
            for rows_n, grad_nD in zip(ctx.saved_tensors, grads, strict=True):
                gradient.index_add_(0, rows_n, grad_nD)
        else:
            summed = sum_duplicates(*zip(ctx.saved_tensors, grads, strict=True))
            gradient = _sparse(*summed, ctx.shape)
        return gradient, None, *(None for _ in grads)


def _look_up(weight_ED: Tensor, lots: list[Tensor], *, dense: bool) -> tuple[Tensor, ...]:
    vectors: tuple[Tensor, ...] = _RowLookup.apply(  # type: ignore[no-untyped-call]
        weight_ED, dense, *lots
    )
    return vectors


def _coalesce(gradient: Tensor) -> Tensor:
    return _sparse(*row_gradient(gradient), gradient.shape)


def _sparse(rows_U: Tensor, grads_UD: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(
        rows_U[None], grads_UD, shape, is_coalesced=True, check_invariants=False
    )
