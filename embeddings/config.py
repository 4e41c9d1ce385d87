"""Configuration of tables and their optimizer. Free of torch, so that launchers can read it."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicIdsConfig:
    """Which ids have a row of their own, of a table with `ids: dynamic` (embeddings/id_map.py)."""

    admit_after: int = 1
    """Events with an id after which it gets a row; until then it is looked up as unknown. An event
    counts once, though histories bring it again."""
    max_waiting: int = 0
    """Ids whose events are counted before they get a row; of more, those seen longest ago are
    forgotten. 0: as many as the table has rows. Nothing waits with admit_after=1."""
    ttl_days: float = 0.0
    """Days, in the time of the log, after which an id that no batch looked up loses its row.
    0: never."""
    when_full: Literal["evict", "refuse"] = "evict"
    """What a table without a free row does for a new id. evict: the ids that batches looked up
    longest ago lose their rows, a 64th of the table at once; refuse: the id stays unknown."""

    def __post_init__(self) -> None:
        if self.admit_after < 1 or self.max_waiting < 0:
            raise ValueError(
                "dynamic.admit_after must be at least 1 and dynamic.max_waiting at least 0, got "
                f"{self.admit_after} and {self.max_waiting}"
            )
        if self.max_waiting and self.admit_after == 1:
            raise ValueError(
                f"dynamic.max_waiting={self.max_waiting} changes nothing with dynamic.admit_after=1"
                ", where no id waits: raise admit_after, or leave max_waiting out"
            )
        if not 0 <= self.ttl_days < float("inf"):
            raise ValueError(
                f"dynamic.ttl_days must be finite and at least 0 (0: never), got {self.ttl_days}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TableConfig:
    """One embedding table. Row 0 is reserved for the unknown id (-1, or null in the log)."""

    num_embeddings: int = MISSING
    """Rows, row 0 included. With `ids: static`, ids run from 0 to num_embeddings - 2."""
    dim: int = MISSING
    """Width of a row; a multiple of 4, but for form=replicated."""
    ids: Literal["static", "hashed", "dynamic"] = "static"
    """static: row = id + 1, and an id out of range is an error; hashed: any 64-bit id, ids that
    collide share a row; dynamic: any 64-bit id, with a row of its own while it is in use."""
    dynamic: DynamicIdsConfig = field(default_factory=DynamicIdsConfig)
    """Of `ids: dynamic`."""
    features: tuple[str, ...] = MISSING
    """Features that are looked up in this table."""
    init_std: float = 0.02
    """Standard deviation of the rows at the start, truncated at two of it; 0 starts at zero."""
    hbm_gb: float = 0.0
    """GiB of HBM for the rows of this table, over all ranks. If it has more, all of them and their
    first moment are in host memory, and HBM is a cache of the rows used last. 0: all rows are in
    HBM. Sharded form on GPUs only."""

    def __post_init__(self) -> None:
        if self.num_embeddings < 2:
            raise ValueError(f"num_embeddings must be at least 2, got {self.num_embeddings}")
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1, got {self.dim}")
        if not 0 <= self.hbm_gb < float("inf"):
            raise ValueError(
                f"hbm_gb must be finite and at least 0 (0: all rows in HBM), got {self.hbm_gb}"
            )
        if self.ids != "dynamic" and self.dynamic != DynamicIdsConfig():
            raise ValueError(f"dynamic.* would be ignored with ids={self.ids}: set ids=dynamic")
        if self.ids == "dynamic" and self.hbm_gb:
            raise ValueError(
                "ids=dynamic gives new ids rows that a cache may hold, so hbm_gb must be 0, got "
                f"{self.hbm_gb}: use ids=hashed or embeddings.momentum=host"
            )
        if self.ids == "dynamic" and self.num_embeddings >= 2**31:
            raise ValueError(
                f"ids=dynamic numbers rows with 31 bits, got num_embeddings={self.num_embeddings}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RowWiseAdamWConfig:
    """Row-wise AdamW: first moment full, second moment one value a row (embeddings/optim.py)."""

    lr: float = 1e-3
    """Step size, before the schedule."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added outside the root."""
    weight_decay: float = 0.0
    """Decoupled, scaled by lr, applied to touched rows only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingsConfig:
    """All tables."""

    tables: dict[str, TableConfig] = field(default_factory=dict)
    """Name -> table."""
    form: Literal["auto", "replicated", "sharded"] = "auto"
    """replicated: plain modules, the same rows on every rank; sharded: TorchRec; auto: sharded on
    CUDA."""
    optimizer: RowWiseAdamWConfig = field(default_factory=RowWiseAdamWConfig)
    """Of every table."""
    update_rule: Literal["row_wise_adamw", "row_wise_adagrad", "adamw"] = "row_wise_adamw"
    """Of every table, in both forms. row_wise_adagrad uses lr and eps of `optimizer` only. The
    sharded form needs it on the CPU, where FBGEMM has no row-wise AdamW. adamw, of form=replicated
    only: a second moment for each number, and every row moves in every step, looked up or not, as
    torch.optim.AdamW does it: for the small tables of published comparisons."""
    weights: Literal["fp32", "fp16"] = "fp32"
    """Of the sharded form; fp16 rounds stochastically."""
    momentum: Literal["hbm", "host"] = "hbm"
    """Where the first moment of row-wise AdamW is, in the sharded form on GPUs. host: in mapped
    host memory, so that HBM holds the weights and 4 bytes a row."""
    sharding: tuple[Literal["row_wise", "table_wise", "column_wise"], ...] = (
        "row_wise",
        "table_wise",
    )
    """What the planner may choose from. A table of too few rows for every rank to have one is
    table_wise in any case; column_wise is refused, with the reason."""
    reserved_hbm: float = 0.3
    """Share of a GPU's memory, and of the host's, that the planner leaves to the dense part,
    activations and buffers."""
    index_dedup: Literal["auto", "on", "off"] = "auto"
    """Sharded form: each rank sends an id of its batch once, and its row comes back once. auto: on
    several GPUs, unless `deterministic`, since there it sums gradients in no fixed order."""
    all_to_all: Literal["fp32", "fp16", "bf16"] = "fp32"
    """What rows and their gradients travel as between ranks. On CPUs bf16 is not to be had."""

    def __post_init__(self) -> None:
        if "column_wise" in self.sharding:
            raise ValueError(
                "embeddings.sharding=column_wise splits a row over ranks, and each part would have "
                "a second moment of its own: another optimizer, which depends on the plan. Use "
                "row_wise, table_wise or both"
            )
        if not 0 <= self.reserved_hbm < 1:
            raise ValueError(
                f"embeddings.reserved_hbm must be at least 0 and below 1, got {self.reserved_hbm}"
            )
        if self.form != "replicated":
            for name, table in self.tables.items():
                if table.dim % 4:
                    raise ValueError(
                        f"embeddings.tables.{name}.dim must be a multiple of 4, got {table.dim}: "
                        "choose another, or set embeddings.form=replicated"
                    )
            if self.update_rule == "adamw":
                raise ValueError(
                    "embeddings.update_rule=adamw moves every row in every step, which tables of "
                    f"form={self.form} do not: set embeddings.form=replicated, or use "
                    "row_wise_adamw"
                )
        if self.momentum == "host" and self.update_rule != "row_wise_adamw":
            raise ValueError(
                f"embeddings.update_rule={self.update_rule} has no first moment to keep in host "
                "memory: set embeddings.momentum=hbm"
            )
        if self.update_rule == "row_wise_adagrad" and self.optimizer.weight_decay:
            raise ValueError(
                "embeddings.update_rule=row_wise_adagrad has no weight decay, got "
                f"embeddings.optimizer.weight_decay={self.optimizer.weight_decay}: set it to 0"
            )
        if not self.sharding:
            raise ValueError(
                "embeddings.sharding must name row_wise, table_wise or both, got none of them"
            )
        owner: dict[str, str] = {}
        for name, table in self.tables.items():
            for feature in table.features:
                if feature in owner:
                    raise ValueError(
                        f"feature {feature!r} is in tables {owner[feature]!r} and {name!r}; "
                        "a feature is looked up in one table"
                    )
                owner[feature] = name
