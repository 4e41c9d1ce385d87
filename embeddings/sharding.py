"""How TorchRec is to spread the tables: its modules, its planner, its fused optimizer."""

from typing import Any

import psutil
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.optimizers import Adam, PartialRowWiseAdam
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import EmbeddingsConfig, TableConfig

RESERVED_FRACTION = 0.3
"""Of a device's memory, kept from the planner for the dense part, activations and buffers."""


class Collections(nn.Module):
    """One EmbeddingCollection for each width, without memory until it is sharded."""

    def __init__(self, config: EmbeddingsConfig) -> None:
        super().__init__()
        self.collections = nn.ModuleDict()
        self.features: list[str] = []
        self.sizes: list[int] = []
        data_type = DataType.FP32 if config.weights == "fp32" else DataType.FP16
        for dim in sorted({table.dim for table in config.tables.values()}):
            tables = [
                EmbeddingConfig(
                    name=name,
                    num_embeddings=table.num_embeddings,
                    embedding_dim=dim,
                    feature_names=list(table.features),
                    data_type=data_type,
                    init_fn=nn.init.zeros_,
                )
                for name, table in config.tables.items()
                if table.dim == dim
            ]
            features = [feature for table in tables for feature in table.feature_names]
            self.features += features
            self.sizes.append(len(features))
            self.collections[f"dim{dim}"] = EmbeddingCollection(
                tables=tables, device=torch.device("meta")
            )

    def forward(self, rows: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Return (number of values, dim) of each of self.features, which are the keys of `rows`."""
        parts = zip(self.collections.values(), rows.split(self.sizes), strict=True)
        # All collections send before the first is waited for.
        pending = [collection(part) for collection, part in parts]
        return {name: found.values() for one in pending for name, found in one.items()}


def collection_path(table: TableConfig) -> str:
    """Return the name, within Collections, of the module that holds a table."""
    return f"collections.dim{table.dim}"


def check_trainable(config: EmbeddingsConfig, device: torch.device) -> None:
    """Refuse what FBGEMM or torch.distributed would fail on later, less readably.

    Raises:
        ValueError: if there is no process group, or no fused optimizer for this device.
    """
    if not dist.is_initialized():
        raise ValueError(
            "embeddings.form=sharded needs a process group, also of a single rank: call "
            "torch.distributed.init_process_group first, or set embeddings.form=replicated"
        )
    if device.type == "cpu" and config.update_rule == "row_wise_adamw":
        raise ValueError(
            "embeddings.form=sharded cannot train with row-wise AdamW on the CPU, where FBGEMM has "
            "none: set embeddings.update_rule=row_wise_adagrad, or embeddings.form=replicated"
        )


def plan_tables(
    config: EmbeddingsConfig,
    device: torch.device,
    group: dist.ProcessGroup,
    num_sequences: int,
    mean_length: float,
) -> ShardingPlan:
    """Let the planner place the tables, with the memory that the devices really have.

    Raises:
        ValueError: if they do not fit.
    """
    world_size = dist.get_world_size(group)
    local_world_size = get_local_size(world_size)
    hbm_bytes = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
    topology = TopologyFactory.create_topology(
        TrainerConfig(world_size=world_size, local_world_size=local_world_size),
        HardwareConfig(
            hbm_cap_bytes=hbm_bytes,
            ddr_cap_bytes=psutil.virtual_memory().total // local_world_size,
        ),
        kernel_config=KernelConfig(compute_device=device.type),
    )
    constraints = {
        name: ParameterConstraints(
            sharding_types=list(config.sharding),
            compute_kernels=["fused"],
            pooling_factors=[mean_length] * len(table.features),
        )
        for name, table in config.tables.items()
    }
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=num_sequences,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(RESERVED_FRACTION),
        debug=False,
    )
    model = Collections(config)
    # By this mark the planner sizes the moments, as a multiple of the weights' bytes: none, one, or
    # two where fp32 moments stand beside fp16 weights. What trains is set by the sharder.
    moments = RowWiseAdagrad
    if config.update_rule == "row_wise_adamw":
        moments = PartialRowWiseAdam if config.weights == "fp32" else Adam
    for parameter in model.parameters():
        parameter._optimizer_classes = [moments]  # type: ignore[attr-defined]
    # Rank 0 decides for all; a refusal is sent too, or the other ranks would wait for a plan.
    decision: list[ShardingPlan | str] = [""]
    if dist.get_rank(group) == 0:
        try:
            decision = [planner.plan(model, [sharder(config, device, world_size)])]
        except PlannerError as error:
            decision = [str(error)]
    dist.broadcast_object_list(decision, src=dist.get_global_rank(group, 0), group=group)
    (plan,) = decision
    if isinstance(plan, str):
        rows = ", ".join(f"{n}: {t.num_embeddings} x {t.dim}" for n, t in config.tables.items())
        raise ValueError(
            f"no way to spread the tables ({rows}) over {world_size} rank(s) by {config.sharding}: "
            "use more ranks, fewer rows, embeddings.weights=fp16, or allow row_wise in "
            f"embeddings.sharding. TorchRec's planner: {plan}"
        )
    return plan


def sharder(
    config: EmbeddingsConfig, device: torch.device, world_size: int
) -> EmbeddingCollectionSharder:
    """Return what shards an EmbeddingCollection, with the fused optimizer of `config`."""
    rule = config.optimizer
    fused: dict[str, Any] = {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "learning_rate": rule.lr,
        "eps": rule.eps,
        "bounds_check_mode": BoundsCheckMode.FATAL,
    }
    if config.update_rule == "row_wise_adamw":
        fused |= {
            "optimizer": EmbOptimType.PARTIAL_ROWWISE_ADAM,
            "beta1": rule.betas[0],
            "beta2": rule.betas[1],
            "weight_decay": rule.weight_decay,
        }
    # Histories repeat items: send each id once. FBGEMM has the kernel on CUDA only, and it sums the
    # gradients of an id in no fixed order.
    dedup = world_size > 1 and device.type == "cuda"
    dedup = dedup and not torch.are_deterministic_algorithms_enabled()
    return EmbeddingCollectionSharder(fused_params=fused, use_index_dedup=dedup)
