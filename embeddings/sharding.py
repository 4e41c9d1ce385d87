"""What TorchRec is to build of the tables: its modules, and its fused optimizer."""

from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import (
    CommType,
    QCommsConfig,
    get_qcomm_codecs_registry,
)
from torchrec.distributed.types import QuantizedCommCodecs
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection

from embeddings.config import EmbeddingsConfig, TableConfig
from embeddings.memory import cache_fraction


class Collections(nn.Module):
    """One EmbeddingCollection for each width, without memory until it is sharded.

    Attributes:
        collections: by width.
        features: of all collections, in their order.
        sizes: features of each collection.
    """

    def __init__(self, config: EmbeddingsConfig) -> None:
        super().__init__()
        self.collections = nn.ModuleDict()
        self.features: list[str] = []
        self.sizes: list[int] = []
        for dim in sorted({table.dim for table in config.tables.values()}):
            tables = [
                EmbeddingConfig(
                    name=name,
                    num_embeddings=table.num_embeddings,
                    embedding_dim=dim,
                    feature_names=list(table.features),
                    data_type=data_type(config),
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
    if device.type == "cpu":
        _check_cpu(config)
    if config.index_dedup == "on" and torch.are_deterministic_algorithms_enabled():
        raise ValueError(
            "embeddings.index_dedup=on sums the gradients of an id in no fixed order, which "
            "deterministic=true forbids: set embeddings.index_dedup=auto"
        )


def _check_cpu(config: EmbeddingsConfig) -> None:
    if config.update_rule == "row_wise_adamw":
        raise ValueError(
            "embeddings.form=sharded cannot train with row-wise AdamW on the CPU, where FBGEMM has "
            "none: set embeddings.update_rule=row_wise_adagrad, or embeddings.form=replicated"
        )
    cached = [name for name, table in config.tables.items() if table.hbm_gb]
    asked = {
        "embeddings.all_to_all=bf16": config.all_to_all == "bf16",
        **{f"embeddings.tables.{name}.hbm_gb": True for name in cached},
    }
    refused = [setting for setting, is_set in asked.items() if is_set]
    if refused:
        raise ValueError(f"{', '.join(refused)} needs a GPU: leave it out, or set device=cuda")


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
        if config.momentum == "host":
            fused["uvm_non_rowwise_momentum"] = True
    if any(cache_fraction(config, table) is not None for table in config.tables.values()):
        fused["gather_uvm_cache_stats"] = True
    # Mapped, not managed: managed memory can hang a GPU that is shared.
    fused["uvm_host_mapped"] = device.type == "cuda"
    return EmbeddingCollectionSharder(
        fused_params=fused,
        qcomm_codecs_registry=_codecs(config, device, world_size),
    )


def sends_once(config: EmbeddingsConfig, device: torch.device, world_size: int) -> bool:
    """Return whether a rank sends each id of its batch once: histories repeat items."""
    if config.index_dedup != "auto":
        return config.index_dedup == "on"
    # On a GPU the gradients of an id are summed in no fixed order.
    fixed_order = torch.are_deterministic_algorithms_enabled()
    return world_size > 1 and device.type == "cuda" and not fixed_order


def _codecs(
    config: EmbeddingsConfig, device: torch.device, world_size: int
) -> dict[str, QuantizedCommCodecs] | None:
    """Return what rounds rows and gradients for their way between ranks."""
    if config.all_to_all == "fp32" or world_size == 1:
        return None
    precision = CommType.FP16 if config.all_to_all == "fp16" else CommType.BF16
    codecs: dict[str, QuantizedCommCodecs] | None = get_qcomm_codecs_registry(
        QCommsConfig(forward_precision=precision, backward_precision=precision), device=device
    )
    return codecs


def data_type(config: EmbeddingsConfig) -> DataType:
    """Return the type of the weights."""
    return DataType.FP32 if config.weights == "fp32" else DataType.FP16
