"""Tables spread over the ranks by TorchRec, with the optimizer fused into the backward pass.

Letters: E rows of a table, D width of a row, n rows with repeats.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
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
from torchrec.distributed.types import ShardingEnv
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import EmbeddingsConfig
from embeddings.sharding import (
    Collections,
    check_trainable,
    collection_path,
    plan_tables,
    sharder,
)
from embeddings.tables import BLOCK_ROWS, Tables, initial_rows


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
        super().__init__()
        check_trainable(config, device)
        self.config = config
        self.steps = 0
        self.device = device
        self.group = process_group or dist.distributed_c10d._get_default_group()
        model = Collections(config)
        self.features = model.features
        self.plan = plan_tables(config, device, self.group, num_sequences_hint, mean_length_hint)
        self.sharded = DistributedModelParallel(
            model,
            env=ShardingEnv.from_process_group(self.group),
            device=device,
            plan=self.plan,
            sharders=[sharder(config, device, dist.get_world_size(self.group))],
            init_data_parallel=False,
        )
        self._kernels = [
            module
            for collection in self.sharded.module.collections.values()
            for lookup in collection._lookups
            for module in lookup.modules()
            if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen)
        ]
        for name, weight in self._weights().items():
            for first, local_ED in _local_rows(weight):
                _fill(local_ED, config, name, seed, first)

    def lookup(self, rows: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Return the rows of each feature (see Tables)."""
        features = rows.keys()
        self.check_served(features)
        if self.config.update_rule == "row_wise_adamw":
            # FBGEMM counts forwards, evaluation included; the bias correction must count steps.
            for kernel in self._kernels:
                kernel.iter.fill_(self.steps)
                kernel.iter_cpu.fill_(self.steps)
        found = self.sharded(_with_features(rows, self.features))
        vectors = _together([found[feature] for feature in self.features])
        by_feature = dict(zip(self.features, vectors, strict=True))
        return {feature: by_feature[feature] for feature in features}

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

    def optimizer_zero_grad(self) -> None:
        """Do nothing: backward has used its gradients already."""

    def optimizer_step(self) -> None:
        """Count the step that backward has taken."""
        self.steps += 1

    def set_lr(self, lr: float) -> None:
        """Set the step size of the next backward."""
        for kernel in self._kernels:
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
        for name, live in self.checkpoint_state()["tables"].items():
            for part, tensor in live.items():
                loaded = state["tables"][name][part].local_shards()
                for to, source in zip(tensor.local_shards(), loaded, strict=True):
                    to.tensor.copy_(source.tensor)
        self.steps = int(state["steps"])

    def plan_summary(self) -> str:
        """Return one line a table (see Tables)."""
        lines = []
        for name, table in self.config.tables.items():
            sharding = self.plan.plan[collection_path(table)][name]
            weight_bytes = 4 if self.config.weights == "fp32" else 2
            # Moments are fp32 whatever the weights are.
            moment_bytes = 4 * table.dim if self.config.update_rule == "row_wise_adamw" else 0
            num_bytes = table.num_embeddings * (weight_bytes * table.dim + moment_bytes + 4)
            ranks = " ".join(str(rank) for rank in sharding.ranks)
            lines.append(
                f"{name}: {table.num_embeddings} x {table.dim}, sharded {sharding.sharding_type}, "
                f"rank(s) {ranks}, {num_bytes} bytes in all"
            )
        return "\n".join(lines)

    def _weights(self) -> dict[str, ShardedTensor]:
        state = self.sharded.state_dict()
        return {name: state[_key(self.config, name)] for name in self.config.tables}


_MOMENTS = {
    "row_wise_adamw": {"first_moment": "momentum1", "second_moment": "exp_avg_sq"},
    "row_wise_adagrad": {"second_moment": "momentum1"},
}
"""Our names of the moments -> FBGEMM's."""


def _together(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the tensors behind one autograd node.

    Whichever of them a loss uses, each rank then runs the same collectives in backward.
    """
    joined: tuple[Tensor, ...] = _Together.apply(*tensors)  # type: ignore[no-untyped-call]
    return joined


class _Together(torch.autograd.Function):
    """The identity; a tensor that the loss did not use gets a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


def _with_features(rows: KeyedJaggedTensor, features: list[str]) -> KeyedJaggedTensor:
    """Return `rows` with exactly these keys; a missing feature has no values.

    TorchRec fixes the keys and their order at the first batch, and refuses a stride of 0.
    """
    if rows.keys() == features and rows.stride() > 0:
        return rows
    bounds = rows.offset_per_key()
    stride = max(rows.stride(), 1)
    position = {feature: i for i, feature in enumerate(rows.keys())}
    lengths = rows.lengths().new_zeros(len(features), stride)
    values, ends = [rows.values()[:0]], [0]
    for i, feature in enumerate(features):
        if feature in position and rows.stride() > 0:
            j = position[feature]
            lengths[i] = rows.lengths()[j * stride : (j + 1) * stride]
            values.append(rows.values()[bounds[j] : bounds[j + 1]])
        ends.append(ends[-1] + (values[-1].numel() if feature in position else 0))
    return KeyedJaggedTensor(
        keys=features,
        values=torch.cat(values),
        lengths=lengths.flatten(),
        stride=stride,
        offset_per_key=ends,
    )


def _fill(local_ED: Tensor, config: EmbeddingsConfig, table: str, seed: int, first: int) -> None:
    """Set rows first .. of `table` to their initial values, a bounded number of them at a time."""
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
