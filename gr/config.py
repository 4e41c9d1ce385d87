"""Configuration of a run: dataclass defaults < `base:` chain < file < dotlist overrides.

Free of torch, so that launchers can read it.
"""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from embeddings.config import EmbeddingsConfig
from gr.model_config import (
    ColdStartConfig,
    DLRMConfig,
    EncodingConfig,
    GroupConfig,
    HeadConfig,
    HSTUConfig,
    ModelConfig,
    PretrainedConfig,
    RotaryConfig,
    SemiLocalConfig,
    TransformerConfig,
    TruncationConfig,
    VectorFileConfig,
)
from pipelines.config import (
    ITEM_ID,
    NEGATIVE_ITEM_ID,
    TARGET_ITEM_ID,
    DataConfig,
    bag_features,
    id_features,
)

__all__ = [
    "CheckpointConfig",
    "ColdStartConfig",
    "DLRMConfig",
    "EncodingConfig",
    "EvalConfig",
    "GroupConfig",
    "HSTUConfig",
    "HeadConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "PretrainedConfig",
    "RotaryConfig",
    "SemiLocalConfig",
    "TrainConfig",
    "TransformerConfig",
    "TruncationConfig",
    "VectorFileConfig",
    "check_consistency",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What is minimised: sum over tasks of weight * mean loss, plus the retrieval loss."""

    task_weights: dict[str, float] = field(default_factory=dict)
    """Task -> weight; a task that is not named has weight 1."""
    retrieval_weight: float = 1.0
    """Of the retrieval loss."""
    retrieval: Literal["sampled_softmax", "in_batch", "full_softmax"] = "sampled_softmax"
    """sampled_softmax: uniform negatives; in_batch: other positives; full_softmax: every item
    (replicated tables only)."""
    position_negatives: int = 0
    """Of sampled_softmax: so many uniform negatives for each position of its own, drawn on the
    device from the whole catalogue, in the place of those that sequences share
    (data.num_negatives); replicated tables only."""
    negatives_scope: Literal["sequence", "partition", "batch"] = "partition"
    """Who shares negatives: a sequence, the sequences of one partition (does not depend on the
    number of ranks), or all of the rank's batch."""
    temperature: float = 0.05
    """Divides the logits of retrieval."""
    logq_correction: bool = False
    """in_batch: subtract the log of each item's frequency among the targets so far. Uniform
    negatives need no correction: it would be the same for every item."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"loss.temperature must be positive, got {self.temperature}")
        if self.position_negatives < 0 or (
            self.position_negatives and self.retrieval != "sampled_softmax"
        ):
            raise ValueError(
                "loss.position_negatives must be 0 or more, and belongs to loss.retrieval="
                f"sampled_softmax, got {self.position_negatives} with {self.retrieval}"
            )
        if self.logq_correction and self.retrieval != "in_batch":
            raise ValueError(
                f"loss.logq_correction changes nothing with loss.retrieval={self.retrieval}, whose "
                "items are all equally likely: use in_batch, or leave it out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Dense optimizer and the schedule of both."""

    lr: float = 1e-3
    """Step size of the dense AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of the dense AdamW."""
    eps: float = 1e-8
    """Of the dense AdamW."""
    weight_decay: float = 0.0
    """Of the dense AdamW; matrices only."""
    clip_norm: float = 1.0
    """Largest global norm of the dense gradient; 0 means no clipping."""
    accumulate: int = 1
    """Batches whose dense gradients are averaged into one update. Tables are updated with every
    batch, since TorchRec does it inside backward: in both forms, so that they learn the same. A
    step stays a batch, in schedules too."""
    max_nonfinite_steps: int = 0
    """Steps of a run, at most, whose loss or gradients are not all finite. A loss that is not
    finite skips the batch on all ranks, a dense gradient that is not skips the dense update, a row
    of a table's gradient is taken as zeros. The next such step stops the run."""
    warmup_steps: int = 0
    """Both learning rates rise linearly over so many steps."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up."""
    decay_steps: int = 0
    """Steps after which a decaying schedule has reached `final_lr_fraction`."""
    final_lr_fraction: float = 0.1
    """Of a decaying schedule."""

    def __post_init__(self) -> None:
        if self.accumulate < 1 or self.max_nonfinite_steps < 0:
            raise ValueError(
                "optim.accumulate must be at least 1 and optim.max_nonfinite_steps at least 0, got "
                f"{self.accumulate} and {self.max_nonfinite_steps}"
            )
        if self.schedule != "constant" and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"optim.schedule={self.schedule} needs optim.decay_steps > optim.warmup_steps, got "
                f"{self.decay_steps} and {self.warmup_steps}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Evaluation within the pass: what is scored has not been learnt from."""

    mode: Literal["progressive", "frozen"] = "progressive"
    """progressive: each batch is scored before its own update, by the forward pass that trains;
    frozen: each window (data.window) is scored as a whole, with the weights and histories of the
    windows before it, and then learnt from. Costs a second read and forward pass (perf/scoring)."""

    ks: tuple[int, ...] = (10, 50)
    """Cut-offs of HR and NDCG."""
    retrieval: bool = True
    """Rank each retrieval target against the full catalogue."""
    filter_seen: bool = False
    """Leave items of the user's history in the sequence out of the ranking, the target excepted."""
    filter_newest: int = 0
    """Of `filter_seen`: so many events of the history, the newest, are left out, so that models of
    longer histories rank the same items; 0 means all that the sequence holds."""
    new_item_events: int = 0
    """Score predictions about items with fewer events than this in the log before them apart, as
    NAME/new_items; events of starting histories count. The item ids and times of the whole log are
    read before the run. 0: not."""
    new_user_events: int = 0
    """Score predictions of users with fewer events than this before them apart, as NAME/new_users;
    more than data.max_history_tokens holds would be all. 0: not."""
    lifetime_auc: bool = True
    """Keep every prediction (20 bytes each and binary task, on rank 0 and in checkpoints) for the
    AUC and GAUC of the run; false: these two are null, those of the windows are not."""

    def __post_init__(self) -> None:
        if any(k < 1 for k in self.ks):
            raise ValueError(f"eval.ks must be at least 1, got {list(self.ks)}")
        for name in ("new_item_events", "new_user_events"):
            if getattr(self, name) < 0:
                raise ValueError(f"eval.{name} must be at least 0, got {getattr(self, name)}")
        if self.filter_newest < 0 or (self.filter_newest and not self.filter_seen):
            raise ValueError(
                "eval.filter_newest must be 0, or more with eval.filter_seen=true, got "
                f"{self.filter_newest} with {self.filter_seen}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When state is saved."""

    every_steps: int = 0
    """0 means at the end only."""
    keep: int = 2
    """Newest checkpoints kept."""
    asynchronous: bool = False
    """Copy the state to host memory, as much again as a rank saves, and write it while training
    goes on."""
    on_error: Literal["stop", "continue"] = "stop"
    """What a checkpoint that cannot be written (disk full) does to the run. The one before stays in
    either case."""
    histories: Literal["snapshot", "replay"] = "snapshot"
    """snapshot: a checkpoint holds the users' histories; replay: it holds the position only, and
    resuming reads the log anew up to there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A run."""

    run_dir: str = MISSING
    """Where everything is written; refused if not empty, unless `resume`."""
    resume: bool = False
    """Go on from the newest complete checkpoint of `run_dir`."""
    seed: int = 0
    """Of weights, negatives and dropout."""
    deterministic: bool = False
    """Bit-reproducible arithmetic: torch.use_deterministic_algorithms and one order of every
    sum."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    timeout_minutes: float = 10.0
    """How long a rank waits for the others before the run fails. Host code between two collectives
    (a slow file, a first compilation) counts."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the dense part's matrix products (bf16: autocast)."""
    max_steps: int = 0
    """Stop after so many steps; 0 means one pass over the log."""
    max_flops: float = 0.0
    """Stop when the encoder's training FLOPs (gr/flops.py) reach this; 0 means no such limit."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    overlap: bool = True
    """Bring the next batch to the device, and its ids to the ranks that hold their rows, while one
    trains. Changes no bit."""
    data: DataConfig = field(default_factory=DataConfig)
    """Log to batches."""
    embeddings: EmbeddingsConfig = field(default_factory=EmbeddingsConfig)
    """Ids to rows."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The dense part."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What is minimised."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Dense optimizer and schedule."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is measured."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is saved."""

    def __post_init__(self) -> None:
        if self.timeout_minutes <= 0:
            raise ValueError(f"timeout_minutes must be positive, got {self.timeout_minutes}")
        if self.max_flops < 0:
            raise ValueError(f"max_flops must be at least 0 (0: no limit), got {self.max_flops}")
        if self.max_flops and self.model.encoder == "dlrm":
            raise ValueError("max_flops counts the encoder's FLOPs, which model.encoder=dlrm lacks")
        check_consistency(self)


def check_consistency(config: TrainConfig) -> None:
    """Refuse settings that contradict each other across folders.

    Raises:
        ValueError: naming both settings and what to change.
    """
    data, model = config.data, config.model
    served = {f for table in config.embeddings.tables.values() for f in table.features}
    missing = [f for f in (*id_features(data), *bag_features(data)) if f not in served]
    if missing:
        raise ValueError(
            f"no embedding table serves feature(s) {missing}: "
            "add them to embeddings.tables.NAME.features"
        )
    unpooled = sorted(set(model.pooling) - set(bag_features(data)))
    if unpooled:
        raise ValueError(
            f"model.pooling names {unpooled}, which do not have several values a token; those that "
            f"have max_values are {list(bag_features(data))}: name one of them, or set max_values"
        )
    with_ids = {ITEM_ID, *id_features(data)} - {TARGET_ITEM_ID, NEGATIVE_ITEM_ID}
    if data.context == "none":
        with_ids -= set(data.context_features)
    for name, pretrained in model.pretrained.items():
        if pretrained.feature not in with_ids:
            raise ValueError(
                f"model.pretrained.{name}.feature={pretrained.feature} has no token with one id; "
                f"expected one of {sorted(with_ids)}"
            )
    if model.pretrained and model.encoder == "dlrm":
        raise ValueError(
            "model.pretrained is read by the tokens of a sequence, which model.encoder=dlrm does "
            "not have: leave it out"
        )
    _check_cold_start(config)
    if model.encoder == "dlrm" and data.context == "merged":
        raise ValueError(
            "model.encoder=dlrm reads one value of each context feature, but data.context=merged "
            "gives those at which a run begins: use data.context=none or prefix"
        )
    if model.encoding.position == "from_end" and data.anchor != "session":
        raise ValueError(
            "model.encoding.position=from_end tells an early position what follows it, so it needs "
            f"data.anchor=session, got {data.anchor}. Use from_session or from_start."
        )
    if model.encoder == "hstu" and model.hstu.semi_local.global_rows and data.anchor != "session":
        raise ValueError(
            "model.hstu.semi_local.global_rows counts from the end of the history, which tells an "
            f"early position what follows it, so it needs data.anchor=session, got {data.anchor}. "
            "Use global_columns, or none."
        )
    needs_session = [
        name
        for name, used in (
            ("model.encoding.position=from_session", model.encoding.position == "from_session"),
            (f"model.encoding.time={model.encoding.time}", model.encoding.time != "none"),
            (
                "model.hstu.truncation",
                model.encoder == "hstu" and model.hstu.truncation.layers > 0,
            ),
            ("model.mixture", bool(model.mixture)),
        )
        if used
    ]
    if needs_session and data.supervise != "session":
        raise ValueError(
            f"{' and '.join(needs_session)} place(s) the history relative to the session's start, "
            "which the history's own predictions must not know: data.supervise must be session, "
            f"got {data.supervise}"
        )
    _check_mixture(config)
    _check_item_table(config)
    _check_cohorts(config)
    accumulate = config.optim.accumulate
    for name, steps in (
        ("checkpoint.every_steps", config.checkpoint.every_steps),
        ("max_steps", config.max_steps),
    ):
        if steps % accumulate:
            raise ValueError(
                f"{name}={steps} would save between two dense updates: with optim.accumulate="
                f"{accumulate} it must be a multiple of {accumulate}"
            )
    if data.window == "epoch" and config.eval.mode != "frozen":
        raise ValueError(
            "data.window=epoch scores held-out events between epochs, so eval.mode must be frozen, "
            f"got {config.eval.mode}"
        )
    if config.eval.mode == "frozen" and data.window == "none":
        raise ValueError(
            "eval.mode=frozen scores window after window, but data.window=none: use data.window="
            "hour or day, or eval.mode=progressive"
        )
    if model.encoder == "hstu" and model.hstu.precision == "fp8" and config.precision != "bf16":
        raise ValueError(
            "model.hstu.precision=fp8 rounds what is bf16 elsewhere: set precision=bf16, got "
            f"precision={config.precision}"
        )
    if model.encoder == "dlrm" and (data.fill == "flops" or data.stochastic_length.balance):
        raise ValueError(
            "model.encoder=dlrm reads no sequence, so it has no cost that data.fill=flops or "
            "data.stochastic_length.balance could even out: use data.fill=tokens or sessions"
        )
    if not data.tasks and not model.head.retrieval:
        raise ValueError("nothing to learn: data.tasks is empty and model.head.retrieval is false")
    if (
        model.head.retrieval
        and config.loss.retrieval == "sampled_softmax"
        and (data.num_negatives > 0) == (config.loss.position_negatives > 0)
    ):
        raise ValueError(
            "loss.retrieval=sampled_softmax needs data.num_negatives > 0, which positions share, "
            "or loss.position_negatives > 0, of each position's own, not both; got "
            f"{data.num_negatives} and {config.loss.position_negatives}"
        )
    unknown = sorted(set(config.loss.task_weights) - set(data.tasks))
    if unknown:
        raise ValueError(
            f"loss.task_weights names unknown task(s) {unknown}; "
            f"data.tasks has {sorted(data.tasks)}"
        )


def _check_mixture(config: TrainConfig) -> None:
    """Refuse groups that the actions of the data cannot tell apart."""
    data, mixture = config.data, config.model.mixture
    for name, group in mixture.items():
        for action, least in group.actions.items():
            if action not in data.actions:
                raise ValueError(
                    f"model.mixture.{name}.actions names {action!r}, which data.actions lacks: it "
                    f"has {list(data.actions)}"
                )
            thresholds = data.actions[action].thresholds
            if least not in thresholds:
                raise ValueError(
                    f"model.mixture.{name}.actions.{action}={least} is not one of "
                    f"data.actions.{action}.thresholds, {list(thresholds)}: tokens tell no more"
                )


def _check_item_table(config: TrainConfig) -> None:
    """Refuse what a table of items, or the range of their ids, cannot go with."""
    data, tables = config.data, config.embeddings.tables
    name = next(name for name, table in tables.items() if ITEM_ID in table.features)
    is_dynamic = tables[name].ids == "dynamic"
    dynamic = [name for name, table in tables.items() if table.ids == "dynamic"]
    if dynamic and data.window == "epoch":
        raise ValueError(
            f"data.window=epoch numbers the ids of its log from 0, so that tables {dynamic} with "
            "ids=dynamic have no use: set ids=static"
        )
    draws = data.num_negatives > 0
    if draws and is_dynamic != (data.num_items == 0):
        raise ValueError(
            f"data.num_items={data.num_items} and embeddings.tables.{name}.ids={tables[name].ids}: "
            "negatives of a table with dynamic ids are drawn from the ids in use, for which "
            "data.num_items must be 0; for other tables it must be the number of items"
        )
    if is_dynamic and (reader := _reader_of_whole_table(config)):
        raise ValueError(
            f"{reader} needs every row of the table, but those of {name!r} come and go "
            "(ids=dynamic): use data.num_negatives or loss.retrieval=in_batch"
        )
    if draws and is_dynamic and NEGATIVE_ITEM_ID not in tables[name].features:
        raise ValueError(
            f"{NEGATIVE_ITEM_ID} must be a feature of table {name!r}, as item_id is, since its "
            "ids are dynamic"
        )


def _check_cohorts(config: TrainConfig) -> None:
    """Refuse to look for new items where the log, or a row, does not tell them."""
    if not config.eval.new_item_events:
        return
    data, tables = config.data, config.embeddings.tables
    name = next(name for name, table in tables.items() if ITEM_ID in table.features)
    if tables[name].ids != "static":
        raise ValueError(
            f"eval.new_item_events finds an item by its row, but embeddings.tables.{name}.ids="
            f"{tables[name].ids}: use static, or set it to 0"
        )
    if data.follow or data.window == "epoch":
        raise ValueError(
            "eval.new_item_events reads a session-end log as a whole before the run, which "
            "data.follow=true and data.window=epoch do not have: set it to 0"
        )


def _check_cold_start(config: TrainConfig) -> None:
    """Refuse content of items where embeddings of items cannot have it."""
    model, tables = config.model, config.embeddings.tables
    if not model.cold_start.path:
        if model.cold_start != ColdStartConfig():
            raise ValueError("model.cold_start has no path, so that it would be ignored: set it")
        return
    if "cold_start" in model.pretrained:
        raise ValueError("model.pretrained.cold_start has the name of model.cold_start: rename it")
    if model.encoder == "dlrm":
        raise ValueError("model.encoder=dlrm does not read model.cold_start: leave it out")
    name = next(name for name, table in tables.items() if ITEM_ID in table.features)
    apart = {TARGET_ITEM_ID, NEGATIVE_ITEM_ID} & {
        f for other, table in tables.items() for f in table.features if other != name
    }
    if apart:
        raise ValueError(
            f"model.cold_start is of items, but {sorted(apart)} are in another table than item_id: "
            f"put them into embeddings.tables.{name}.features"
        )
    if tables[name].ids == "hashed":
        raise ValueError(
            f"model.cold_start needs the id of each row, which embeddings.tables.{name}.ids=hashed "
            "does not tell: use static or dynamic"
        )
    if reader := _reader_of_whole_table(config):
        raise ValueError(
            f"{reader} trains rows only, not model.cold_start: use data.num_negatives or "
            "loss.retrieval=in_batch"
        )


def _reader_of_whole_table(config: TrainConfig) -> str:
    """Return the setting by which a loss reads every row of the item table; or ""."""
    if config.model.head.retrieval and config.loss.retrieval == "full_softmax":
        return "loss.retrieval=full_softmax"
    if config.model.head.retrieval and config.loss.position_negatives:
        return f"loss.position_negatives={config.loss.position_negatives}"
    return ""
