"""Tables spread over the ranks by TorchRec, with the optimizer fused into the backward pass.

Letters: E rows of a table, D width of a row, n rows with repeats.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    UVMCacheStatsIndex,
)
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import (
    ShardedTensorMetadata,
    TensorProperties,
)
from torch.distributed._shard.sharded_tensor.shard import Shard
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import EmbeddingsConfig
from embeddings.distinct import put_back_repeats
from embeddings.initial import BLOCK_ROWS, initial_rows
from embeddings.memory import cache_fraction, table_bytes
from embeddings.planning import plan_tables
from embeddings.sent_lookup import SentLookup
from embeddings.sharding import (
    Collections,
    check_trainable,
    collection_path,
    sends_once,
    sharder,
)
from embeddings.tables import PendingLookup, Tables, stream_of_its_own


class ShardedTables(Tables):
    """A rank holds some rows of each table, or some tables whole.

    Rows are updated inside backward: `optimizer_step` only counts. What `lookup` returns must enter
    the loss of every rank, also where it is empty, or the ranks wait for each other.

    Args:
        config: tables, optimizer, and what the planner may choose from.
        device: of this rank.
        seed: of the initial rows.
        num_sequences_hint: sequences of a rank's batch, for the planner.
        mean_length_hint: ids of a sequence in one feature, for the planner.
        process_group: ranks that train together; None means the default group.

    Raises:
        ValueError: if there is no process group, or FBGEMM lacks the optimizer on this device.
    """

    def __init__(
        self,
        config: EmbeddingsConfig,
        *,
        device: torch.device,
        seed: int,
        num_sequences_hint: int,
        mean_length_hint: float,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(config, device)
        check_trainable(config, device)
        self.steps = 0
        self._awaits_backward = False
        self._live: dict[str, dict[str, ShardedTensor]] | None = None
        self.group = process_group or dist.distributed_c10d._get_default_group()
        model = Collections(config)
        self.features, self.feature_counts = model.features, model.sizes
        self.sends_once = sends_once(config, device, dist.get_world_size(self.group))
        self.plan = plan_tables(config, device, self.group, num_sequences_hint, mean_length_hint)
        self.sharded = DistributedModelParallel(
            model,
            env=ShardingEnv.from_process_group(self.group),
            device=device,
            plan=self.plan,
            sharders=[sharder(config, device, dist.get_world_size(self.group))],
            init_data_parallel=False,
        )
        self.kernels = [
            module
            for collection in self.sharded.module.collections.values()
            for lookup in collection._lookups
            for module in lookup.modules()
            if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen)
        ]
        self.cached_kernels = [
            kernel for kernel in self.kernels if kernel.lxu_cache_weights.numel() > 0
        ]
        for kernel in self.cached_kernels:
            # Counted in `prefetch` only. A forward pass that is given the counts takes zero misses
            # as leave to read the cache alone, but by then they are those of the next batch.
            kernel.gather_uvm_cache_stats = False
        if device.type == "cuda":
            self.exchange = stream_of_its_own(device)
        for name, weight in self._weights().items():
            for first, local_ED in _local_rows(weight):
                _fill(local_ED, config, name, seed, first)

    def send(self, rows: KeyedJaggedTensor) -> PendingLookup:
        """Start the exchange of row numbers (see Tables), on a GPU beside its other work."""
        self.check_served(rows.keys())
        return SentLookup(rows, self)

    def lookup(self, rows: KeyedJaggedTensor | PendingLookup) -> dict[str, Tensor]:
        """Return the rows of each feature (see Tables)."""
        sent = self.send(rows) if isinstance(rows, KeyedJaggedTensor) else rows
        assert isinstance(sent, SentLookup)
        if self.config.update_rule == "row_wise_adamw":
            # FBGEMM counts forwards, evaluation included; the bias correction must count steps.
            for kernel in self.kernels:
                kernel.iter.fill_(self.steps)
                kernel.iter_cpu.fill_(self.steps)
        found = sent.finish()
        self._awaits_backward = torch.is_grad_enabled()
        if not self._awaits_backward:
            self._unlock_caches()
        if sent.repeats is not None:
            found = put_back_repeats(found, sent.repeats, self.count_nonfinite)
        else:
            vectors = self.guard(*(found[feature] for feature in self.features))
            found = dict(zip(self.features, vectors, strict=True))
        return {feature: found[feature] for feature in sent.rows.keys()}  # noqa: SIM118

    def take_cache_hits(self) -> tuple[int, int]:
        """Return how many rows were found in the caches (see Tables). Waits for the GPU."""
        asked = missed = 0
        if self.cached_kernels and self.exchange is not None:
            torch.cuda.current_stream().wait_stream(self.exchange)
        for kernel in self.cached_kernels:
            counts = kernel.uvm_cache_stats.tolist()
            asked += counts[UVMCacheStatsIndex.num_unique_indices]
            missed += counts[UVMCacheStatsIndex.num_unique_misses]
            kernel.uvm_cache_stats.zero_()
        if self.cached_kernels and self.exchange is not None:
            self.exchange.wait_stream(torch.cuda.current_stream())
        return asked - missed, asked

    def all_rows(self, table: str, chunk_rows: int = 65536) -> Iterator[tuple[int, Tensor]]:
        """Yield consecutive rows, gathered from the ranks (see Tables)."""
        config = self.table_config(table)
        weight = self._weights()[table]
        for first in range(0, config.num_embeddings, chunk_rows):
            last = min(first + chunk_rows, config.num_embeddings)
            chunk_ED = torch.zeros(last - first, config.dim, device=self.device)
            for start, local_ED in _local_rows(weight):
                lo, hi = max(start, first), min(start + local_ED.shape[0], last)
                if lo < hi:
                    chunk_ED[lo - first : hi - first] = local_ED[lo - start : hi - start]
            # Each row is on one rank and zero on the others, so the sum is exact.
            dist.all_reduce(chunk_ED, group=self.group)
            yield first, chunk_ED

    def full_weight(self, table: str) -> Tensor:
        """Refuse: no rank holds the whole table.

        Raises:
            ValueError: always, naming what to use instead.
        """
        self.table_config(table)
        raise ValueError(
            f"table {table!r} is spread over the ranks: its whole weight cannot be trained. Use a "
            "sampled loss (loss.retrieval=sampled_softmax) or embeddings.form=replicated; to score "
            "only, use all_rows"
        )

    def local_weight(self, table: str) -> Tensor | None:
        """Return the rows of a table that is whole on the only rank (see Tables)."""
        config = self.table_config(table)
        if self.cached_kernels or dist.get_world_size(self.group) > 1:
            return None
        shards = _local_rows(self._weights()[table])
        is_whole = len(shards) == 1 and len(shards[0][1]) == config.num_embeddings
        return shards[0][1] if is_whole else None

    @torch.no_grad()
    def set_rows(self, table: str, rows_U: Tensor, values_UD: Tensor) -> None:
        """Give those of the rows that this rank holds new values, and moments of zero."""
        if self._live is None:
            # TorchRec's and FBGEMM's own tensors; to look them up takes milliseconds.
            self._live = self.checkpoint_state()["tables"]
        weight, *moments = (_local_rows(x) for x in self._live[table].values())
        for i, (first, local_ED) in enumerate(weight):
            is_here_U = (rows_U >= first) & (rows_U < first + local_ED.shape[0])
            own_U = rows_U[is_here_U] - first
            local_ED.index_copy_(0, own_U, values_UD[is_here_U].to(local_ED.dtype))
            for moment in moments:
                moment[i][1].index_fill_(0, own_U, 0.0)

    def optimizer_zero_grad(self) -> None:
        """Let go of the rows of a lookup that no backward followed."""
        if self._awaits_backward:
            self._unlock_caches()
            self._awaits_backward = False

    def optimizer_step(self) -> None:
        """Count the step that backward has taken."""
        self._awaits_backward = False
        self.steps += 1

    def set_lr(self, lr: float) -> None:
        """Set the step size of the next backward."""
        for kernel in self.kernels:
            kernel.set_learning_rate(lr)

    def checkpoint_state(self) -> dict[str, Any]:
        """Return the live shards (see Tables): loading in place is enough, save for the steps."""
        fused = self.sharded.fused_optimizer.state_dict()["state"]
        tables = {}
        for name, weight in self._weights().items():
            moments = fused.get(_key(self.config, name), {})
            tables[name] = {"weight": weight}
            for part, fused_name in _MOMENTS[self.config.update_rule].items():
                sharded = moments.get(f"{name}.{fused_name}")
                local = sharded.local_shards() if sharded is not None else []
                by_row = part == "second_moment"
                tables[name][part] = _like(weight, [x.tensor for x in local], by_row, self.group)
        return {"tables": tables, "steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Take over a state that `checkpoint_state` returned and a loader filled."""
        for kernel in self.cached_kernels:
            # Before anything flushes: what the caches hold is older than what was loaded.
            kernel.reset_cache_states()
        for name, live in self.checkpoint_state()["tables"].items():
            for part, tensor in live.items():
                loaded = state["tables"][name][part].local_shards()
                for to, source in zip(tensor.local_shards(), loaded, strict=True):
                    to.tensor.copy_(source.tensor)
        self.steps = int(state["steps"])

    def plan_summary(self) -> str:
        """Return one line a table (see Tables)."""
        config, on_gpu = self.config, self.device.type == "cuda"
        lines = []
        for name, table in config.tables.items():
            sharding = self.plan.plan[collection_path(table)][name]
            whole = table_bytes(config, table, table.num_embeddings, on_gpu=on_gpu)
            by_rank = []
            for rank, num_rows in _rows_by_rank(sharding).items():
                part = table_bytes(config, table, num_rows, on_gpu=on_gpu)
                hbm = f"{part.hbm:,} HBM + " if on_gpu else ""
                by_rank.append(f"{rank}: {num_rows:,} rows, {hbm}{part.host:,} host")
            cached = cache_fraction(config, table) if on_gpu else None
            where = f", {cached:.1%} of the rows cached in HBM" if cached is not None else ""
            lines.append(
                f"{name}: {table.num_embeddings} x {table.dim}, {config.weights}, sharded "
                f"{sharding.sharding_type}{where}, {whole.hbm + whole.host} bytes with moments; "
                f"by rank {'; '.join(by_rank)}"
            )
        return "\n".join(lines)

    def _unlock_caches(self) -> None:
        # A prefetch locks the rows in the cache for backward to unlock: here, none will come.
        for kernel in self.cached_kernels:
            if kernel.prefetch_pipeline:
                torch.ops.fbgemm.lxu_cache_locking_counter_decrement(
                    kernel.lxu_cache_locking_counter, kernel.lxu_cache_locations
                )

    def _weights(self) -> dict[str, ShardedTensor]:
        exchange = self.exchange if self.cached_kernels else None
        if exchange is not None:
            # state_dict writes the caches back, which a prefetch must not meet.
            torch.cuda.current_stream().wait_stream(exchange)
        state = self.sharded.state_dict()
        if exchange is not None:
            exchange.wait_stream(torch.cuda.current_stream())
        return {name: state[_key(self.config, name)] for name in self.config.tables}


def _rows_by_rank(sharding: ParameterSharding) -> dict[int, int]:
    """Return rank -> rows that it holds, of the ranks that hold any."""
    rows: dict[int, int] = {}
    for shard in sharding.sharding_spec.shards:  # type: ignore[union-attr]
        rank = shard.placement.rank()
        rows[rank] = rows.get(rank, 0) + shard.shard_sizes[0]
    return {rank: count for rank, count in sorted(rows.items()) if count}


_MOMENTS = {
    "row_wise_adamw": {"first_moment": "momentum1", "second_moment": "exp_avg_sq"},
    "row_wise_adagrad": {"second_moment": "momentum1"},
}
"""Our names of the moments -> FBGEMM's."""


def _fill(local_ED: Tensor, config: EmbeddingsConfig, table: str, seed: int, first: int) -> None:
    """Set rows first .. of `table` to their initial values, a bounded number of them at a time."""
    if config.tables[table].init_std == 0:
        local_ED.zero_()
        return
    chunk = 64 * BLOCK_ROWS
    for start in range(0, local_ED.shape[0], chunk):
        part_ED = local_ED[start : start + chunk]
        lo = first + start
        hi = lo + part_ED.shape[0]
        rows = initial_rows(config.tables[table], table=table, seed=seed, first=lo, last=hi)
        part_ED.copy_(rows)


def _local_rows(weight: ShardedTensor) -> list[tuple[int, Tensor]]:
    """Return the first row and the rows of each shard on this rank."""
    return [
        (shard.metadata.shard_offsets[0], shard.tensor.detach()) for shard in weight.local_shards()
    ]


def _like(
    weight: ShardedTensor, local: list[Tensor], by_row: bool, group: dist.ProcessGroup
) -> ShardedTensor:
    """Return a moment, sharded as its table is.

    FBGEMM's own state has no entry on ranks that hold no row, so that ranks differ in their keys.
    """
    dims = 1 if by_row else 2
    shards = [
        ShardMetadata(
            shard_offsets=shard.shard_offsets[:dims],
            shard_sizes=shard.shard_sizes[:dims],
            placement=shard.placement,
        )
        for shard in weight.metadata().shards_metadata
    ]
    metadata = ShardedTensorMetadata(
        shards_metadata=shards,
        size=weight.metadata().size[:dims],
        tensor_properties=TensorProperties(dtype=torch.float32),
    )
    own = [
        shard
        for shard in shards
        if shard.placement and shard.placement.rank() == dist.get_rank(group)
    ]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        [Shard(tensor=x, metadata=shard) for x, shard in zip(local, own, strict=True)],
        metadata,
        process_group=group,
    )


def _key(config: EmbeddingsConfig, table: str) -> str:
    return f"{collection_path(config.tables[table])}.embeddings.{table}.weight"
