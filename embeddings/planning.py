"""Which rank holds which rows: TorchRec's planner, with the memory that there really is."""

from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import (
    EmbeddingPerfEstimator,
    EmbeddingStorageEstimator,
)
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    PlannerError,
    ShardingOption,
    Storage,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import CacheParams, ShardingPlan

from embeddings.config import EmbeddingsConfig, TableConfig
from embeddings.memory import cache_fraction, describe_bytes, map_bytes, table_bytes, weight_bytes
from embeddings.sharding import Collections, data_type, sharder


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
    on_gpu = device.type == "cuda"
    hbm_bytes = torch.cuda.mem_get_info(device)[1] if on_gpu else None
    host_bytes = psutil.virtual_memory().total // local_world_size
    maps = sum(map_bytes(table) for table in config.tables.values())
    if hbm_bytes is not None:
        hbm_bytes = max(0, hbm_bytes - maps)
    else:
        host_bytes = max(0, host_bytes - maps)
    topology = TopologyFactory.create_topology(
        TrainerConfig(world_size=world_size, local_world_size=local_world_size),
        HardwareConfig(hbm_cap_bytes=hbm_bytes, ddr_cap_bytes=host_bytes),
        kernel_config=KernelConfig(compute_device=device.type),
    )
    constraints = {
        name: _constraints(config, table, mean_length, world_size, prefetch=on_gpu)
        for name, table in config.tables.items()
    }
    estimators = [
        EmbeddingPerfEstimator(topology=topology, constraints=constraints),
        _StorageEstimator(config, topology=topology, constraints=constraints),
    ]
    planner = EmbeddingShardingPlanner(
        topology=topology,
        enumerator=EmbeddingEnumerator(
            topology=topology,
            batch_size=num_sequences,
            constraints=constraints,
            estimator=estimators,
        ),
        batch_size=num_sequences,
        constraints=constraints,
        storage_reservation=_Reservation(config.reserved_hbm),
        debug=False,
    )
    # Rank 0 decides for all; a refusal is sent too, or the other ranks would wait for a plan.
    decision: list[ShardingPlan | str] = [""]
    if dist.get_rank(group) == 0:
        try:
            decision = [planner.plan(Collections(config), [sharder(config, device, world_size)])]
        except PlannerError:
            capacity = _Capacity(
                hbm=int((hbm_bytes or 0) * (1 - config.reserved_hbm)),
                host=int(host_bytes * (1 - config.reserved_hbm)),
            )
            decision = [_does_not_fit(config, world_size, capacity, on_gpu=on_gpu)]
    dist.broadcast_object_list(decision, src=dist.get_global_rank(group, 0), group=group)
    (plan,) = decision
    if isinstance(plan, str):
        raise ValueError(plan)
    return plan


def _constraints(
    config: EmbeddingsConfig,
    table: TableConfig,
    mean_length: float,
    world_size: int,
    *,
    prefetch: bool,
) -> ParameterConstraints:
    cached = cache_fraction(config, table)
    kernel = EmbeddingComputeKernel.FUSED
    cache = None
    if cached is not None:
        kernel = EmbeddingComputeKernel.FUSED_UVM_CACHING
        cache = CacheParams(
            algorithm=CacheAlgorithm.LRU,
            load_factor=cached,
            precision=data_type(config),
            prefetch_pipeline=prefetch,
        )
    rows_of_rank = -(-table.num_embeddings // world_size)
    # Row-wise, the last rank would get no row of it, which FBGEMM's lookup on the CPU dies of.
    is_tiny = rows_of_rank * (world_size - 1) >= table.num_embeddings
    return ParameterConstraints(
        sharding_types=["table_wise"] if is_tiny else list(config.sharding),
        compute_kernels=[kernel.value],
        pooling_factors=[mean_length] * len(table.features),
        cache_params=cache,
    )


class _StorageEstimator(EmbeddingStorageEstimator):
    """Counts the moments as they are.

    TorchRec's own gives row-wise Adam the bytes of the weights: half of the truth beside fp16
    weights, and in HBM whatever is kept on the host.
    """

    def __init__(self, config: EmbeddingsConfig, *, topology: Topology, **options: Any) -> None:
        super().__init__(topology=topology, **options)
        self.config = config
        self.on_gpu = topology.compute_device == "cuda"

    def estimate(
        self, sharding_options: list[ShardingOption], *others: Any, **options: Any
    ) -> None:
        """Set the storage of every shard: buffers as TorchRec reckons them, tables as we do."""
        super().estimate(sharding_options, *others, **options)
        for option in sharding_options:
            table = self.config.tables[option.name]
            for shard in option.shards:
                num_rows = shard.size[0]
                ours = table_bytes(self.config, table, num_rows, on_gpu=self.on_gpu)
                # What TorchRec counted beside the weights: ids and rows on their way.
                weights = num_rows * table.dim * weight_bytes(self.config)
                before = shard.storage.hbm if self.on_gpu else shard.storage.ddr
                is_cached = cache_fraction(self.config, table) is not None
                buffers = 0 if is_cached else max(0, before - weights)
                shard.storage = Storage(
                    hbm=ours.hbm + buffers if self.on_gpu else 0,
                    ddr=ours.host + (0 if self.on_gpu else buffers),
                )


class _Reservation(FixedPercentageStorageReservation):
    """Leaves a share of the host's memory as well as of the GPU's."""

    def reserve(self, *args: Any, **options: Any) -> Topology:
        """Return the topology with what the planner may use."""
        reserved = super().reserve(*args, **options)
        for device in reserved.devices:
            device.storage.ddr = int((1 - self._percentage) * device.storage.ddr)
        return reserved


@dataclass(frozen=True)
class _Capacity:
    """Bytes of a rank that tables may take."""

    hbm: int
    host: int


def _beside(config: EmbeddingsConfig) -> str:
    maps = {name: map_bytes(table) for name, table in config.tables.items()}
    described = ", ".join(f"{size} of {name!r}" for name, size in maps.items() if size)
    return f", and beside the maps of dynamic ids: {described} bytes" if described else ""


def _does_not_fit(
    config: EmbeddingsConfig, world_size: int, capacity: _Capacity, *, on_gpu: bool
) -> str:
    """Return the message for tables that the planner found no place for."""
    name, largest = max(
        config.tables.items(), key=lambda item: item[1].num_embeddings * item[1].dim
    )
    thousand = table_bytes(config, largest, 1000, on_gpu=on_gpu)
    free = world_size if "row_wise" in config.sharding else 1
    fits = [
        free * room * 1000 // need
        for room, need in ((capacity.hbm, thousand.hbm), (capacity.host, thousand.host))
        if need
    ]
    advice = [f"embeddings.tables.{name}.num_embeddings up to about {min(fits)} (if alone)"]
    if config.weights == "fp32":
        advice.append("embeddings.weights=fp16")
    if on_gpu:
        if config.momentum == "hbm" and config.update_rule == "row_wise_adamw":
            advice.append("embeddings.momentum=host")
        if not largest.hbm_gb:
            advice.append(f"embeddings.tables.{name}.hbm_gb, which keeps the rest on the host")
    if "row_wise" not in config.sharding:
        advice.append("row_wise in embeddings.sharding")
    advice.append("more ranks")
    room = f"{capacity.hbm} bytes of HBM and " if on_gpu else ""
    return (
        f"no way to spread the tables over {world_size} rank(s) by {list(config.sharding)}. They "
        f"need, with their moments, {describe_bytes(config, on_gpu=on_gpu)}. A rank has {room}"
        f"{capacity.host} bytes of host memory for tables (embeddings.reserved_hbm="
        f"{config.reserved_hbm}{_beside(config)}). The largest is {name!r}. What would fit: "
        f"{', or '.join(advice)}"
    )
