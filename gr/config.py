"""Configuration of a run: dataclass defaults < `base:` chain < file < dotlist overrides.

Free of torch, so that launchers can read it.
"""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from embeddings.config import EmbeddingsConfig
from pipelines.config import (
    ITEM_ID,
    NEGATIVE_ITEM_ID,
    TARGET_ITEM_ID,
    DataConfig,
    bag_features,
    id_features,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryConfig:
    """Rotary encoding of order and time on queries and keys (gr/rotary.py)."""

    angles: Literal["none", "position", "time", "sum", "split_dims", "split_heads"] = "none"
    """What turns the pairs of numbers of a head: the position; the time; the sum of both angles;
    position and time in turn, by pairs of numbers or by heads."""
    periods: tuple[float, float] = (60.0, 31_536_000.0)
    """Seconds of the shortest and of the longest turn of time; between them a geometric series."""

    def __post_init__(self) -> None:
        shortest, longest = self.periods
        if not 0 < shortest <= longest < float("inf"):
            raise ValueError(
                "rotary.periods must be two finite times in s, the shorter first, got "
                f"{list(self.periods)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SemiLocalConfig:
    """Semi-local attention of ULTRA-HSTU (docs/ultra_hstu.md)."""

    window: int = 0
    """K1: a token sees so many tokens before it, and itself. 0 means all tokens before it."""
    global_rows: int = 0
    """K2: so many tokens of history, the newest, see everything before them despite the window (as
    candidates always do); needs data.anchor=session, since it counts from the end."""
    global_columns: int = 0
    """K2 by columns: so many tokens, the first of the history, stay visible despite the window (as
    context tokens always do)."""

    def __post_init__(self) -> None:
        for name in ("window", "global_rows", "global_columns"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"model.hstu.semi_local.{name} must be at least 0, got {getattr(self, name)}"
                )
        if not self.window and (self.global_rows or self.global_columns):
            raise ValueError(
                "model.hstu.semi_local.global_rows and global_columns except something from "
                "window, which is 0 (no window): set it, or leave them out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TruncationConfig:
    """Attention truncation of ULTRA-HSTU (docs/ultra_hstu.md)."""

    layers: int = 0
    """N2: so many layers, the last ones, compute context, session and the newest history only. 0
    means none."""
    history: int = 0
    """L': tokens of history that these layers keep."""

    def __post_init__(self) -> None:
        if self.layers < 0 or self.history < 0 or (self.layers > 0) != (self.history > 0):
            raise ValueError(
                "model.hstu.truncation.layers and history must both be positive, or both 0 (no "
                f"truncation), got {self.layers} and {self.history}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class HSTUConfig:
    """One HSTU layer (gr/hstu.py)."""

    num_heads: int = 2
    """H."""
    qk_dim: int = 32
    """K, of one head."""
    v_dim: int = 32
    """V, of one head."""
    uvqk_activation: Literal["all", "u_only"] = "all"
    """SiLU on U, V, Q and K as in the paper, or on U only as in DLRM-v3."""
    uvqk_bias: bool = True
    """Bias of the UVQK projection."""
    attention: Literal["silu", "softmax"] = "silu"
    """Pointwise SiLU, or softmax over the visible keys."""
    alpha: float = 0.0
    """Factor of QK^T; 0 means 1 / sqrt(qk_dim)."""
    scaling_length: int = 256
    """Divisor of the pointwise attention weights: fixed, never the batch's. Softmax divides by its
    own sum and does not read it."""
    bias: Literal["none", "position", "position_time"] = "none"
    """Relative attention bias, added before the activation, shared by the heads."""
    bias_max_len: int = 512
    """Distances from this on share one entry of the position table."""
    bias_time_buckets: int = 128
    """Time differences fall into floor(ln(max(1, s)) / 0.301), clipped to this."""
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    """Angles of Q and K."""
    semi_local: SemiLocalConfig = field(default_factory=SemiLocalConfig)
    """Which pairs attention sees; of every layer."""
    truncation: TruncationConfig = field(default_factory=TruncationConfig)
    """Layers that drop the older history."""
    norm: Literal["layer", "group"] = "layer"
    """Norm of the attention output: over all heads, or each head on its own."""
    norm_affine: bool = False
    """Weight and bias in the norms of the input and of the attention output."""
    concat_ua: bool = False
    """Output projection reads [U, AV, norm(AV) * U] instead of the product alone."""
    dropout: float = 0.0
    """Before the output projection."""
    final_norm: bool = False
    """Layer norm (with weight and bias) of the encoder's result, after the last layer."""
    impl: Literal["auto", "composed", "hopper", "triton", "reference"] = "auto"
    """auto: on a GPU the fused layer, with its kernels for Hopper where they apply. hopper, triton:
    these kernels of it, or an error. composed: torch's operators, and on a GPU the attention's
    kernels between them. reference: plain torch, which on a CPU auto and composed are too."""
    precision: Literal["bf16", "fp8"] = "bf16"
    """Of a layer's two products. bf16: that of the run, whose setting `precision` may also be fp32.
    fp8: e4m3 with a scale for each row, forward and backward, in the products that `fp8_products`
    names; it needs precision=bf16 of the run, and a GPU of compute capability 8.9 or more. A CPU,
    impl=composed and impl=reference emulate it, slowly."""
    fp8_products: tuple[Literal["uvqk", "output"], ...] = ()
    """Which products precision=fp8 means: the UVQK projection, the output projection. (): those
    that are faster so on one H100, uvqk, and from model.dim=2048 on output too."""
    recompute: tuple[Literal["normed", "uvqk", "gated", "attended"], ...] = (
        "normed",
        "uvqk",
        "gated",
    )
    """What the kernels' backward pass computes again instead of keeping it (kernels/hstu_layer):
    norm(X), the UVQK projection, what the output projection reads; attended: A V, which halves what
    is kept by default and costs the attention's forward pass. The reference keeps all."""

    def __post_init__(self) -> None:
        counts = ("num_heads", "qk_dim", "v_dim", "scaling_length", "bias_max_len")
        for name in (*counts, "bias_time_buckets"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.hstu.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(
                f"model.hstu.alpha must be finite and at least 0 (0: 1 / sqrt(qk_dim)), "
                f"got {self.alpha}"
            )
        check_dropout("model.hstu.dropout", self.dropout)
        if self.fp8_products and self.precision != "fp8":
            raise ValueError(
                f"model.hstu.fp8_products={list(self.fp8_products)} would be ignored: set "
                "model.hstu.precision=fp8, or leave it out"
            )
        if self.rotary.angles == "none":
            return
        if self.qk_dim % 2 or (self.rotary.angles == "split_dims" and self.qk_dim < 4):
            raise ValueError(
                "model.hstu.rotary turns pairs of numbers: model.hstu.qk_dim must be even (4 or "
                f"more with split_dims), got {self.qk_dim}"
            )
        if self.rotary.angles == "split_heads" and self.num_heads < 2:
            raise ValueError(
                "model.hstu.rotary.angles=split_heads needs model.hstu.num_heads of 2 or more, "
                f"got {self.num_heads}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """One layer of SASRec, of Transformer++ or of cross-attention (gr/baselines/)."""

    num_heads: int = 2
    """Heads; the model dim must be a multiple of it."""
    ffn_dim: int = 0
    """Hidden width of the feed-forward part; 0 means the model dim (SASRec), 8/3 of it rounded up
    to a multiple of 8 (Transformer++, cross-attention)."""
    dropout: float = 0.0
    """After attention and feed-forward; in SASRec also on the hidden part of the latter."""

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.ffn_dim < 0:
            raise ValueError(
                "model.transformer.num_heads must be at least 1 and ffn_dim at least 0, got "
                f"{self.num_heads} and {self.ffn_dim}"
            )
        check_dropout("model.transformer.dropout", self.dropout)


@dataclass(frozen=True, kw_only=True, slots=True)
class DLRMConfig:
    """DLRM (gr/baselines/dlrm.py)."""

    bottom: tuple[int, ...] = (128, 64)
    """Widths of the MLP over dense features; its output is projected to the model dim."""
    top: tuple[int, ...] = (256, 128)
    """Widths of the MLP over the interactions; the last is what the tasks read."""

    def __post_init__(self) -> None:
        if not self.top or any(width < 1 for width in (*self.bottom, *self.top)):
            raise ValueError(
                "model.dlrm.top must have a layer, and widths must be at least 1, got "
                f"bottom={list(self.bottom)}, top={list(self.top)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodingConfig:
    """What is added to the tokens before the first layer (gr/encodings.py)."""

    position: Literal["none", "from_start", "from_session", "from_end"] = "from_session"
    """Learned position: index from the start; distance to the first token of the session (the
    anchor of what is supervised); distance to the end (needs data.anchor=session)."""
    position_std: float = 0.0
    """Standard deviation of the position table at the start, normal; 0: uniform within
    +- 1 / sqrt(position_buckets)."""
    position_buckets: int = 1024
    """Rows of the position table; farther positions share the last. from_session: one half counts
    down through the history, the other up through the session."""
    time: Literal["none", "sqrt", "log"] = "none"
    """Learned bucket of the time from a token to the start of the session: floor(sqrt(minutes)), or
    floor(ln(seconds) / 0.301)."""
    time_buckets: int = 2048
    """Rows of the time table; longer times share the last."""
    periodic: tuple[Literal["hour", "weekday"], ...] = ()
    """sin and cos of the local time of the token, projected to the model dim."""
    hour_sinusoid: bool = False
    """The Transformer's sinusoids (base 10000) of the whole local hour 0 .. 23, as they are. Not
    periodic, 23 h is farther from 0 h than noon is; for comparison with what was written on it."""
    gap: Literal["none", "log"] = "none"
    """Learned bucket of the time since the token before: floor(ln(seconds) / 0.301). Of candidates,
    since the end of the history."""
    gap_buckets: int = 128
    """Rows of that table; longer times share the last."""
    scale_by_sqrt_dim: bool = True
    """Multiply the token embedding by sqrt(dim) before the encodings are added."""
    candidate_action: Literal["zero", "learned"] = "zero"
    """What stands for the action of a candidate in the merged layout."""
    dropout: float = 0.0
    """On the sum."""

    def __post_init__(self) -> None:
        for name in ("position_buckets", "time_buckets", "gap_buckets"):
            if getattr(self, name) < 2:
                raise ValueError(
                    f"model.encoding.{name} must be at least 2, got {getattr(self, name)}"
                )
        if len(set(self.periodic)) != len(self.periodic):
            raise ValueError(f"model.encoding.periodic names one twice: {list(self.periodic)}")
        check_dropout("model.encoding.dropout", self.dropout)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """What reads the encoder's output (gr/heads.py)."""

    ranking_hidden: tuple[int, ...] = (128,)
    """Widths of the shared part of the ranking MLP; empty means linear."""
    retrieval: bool = True
    """Whether there is a retrieval head."""
    l2_normalize: bool = True
    """Normalise user and item vectors before the dot product."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorFileConfig:
    """A file of frozen vectors of ids (gr/pretrained.py)."""

    path: str = MISSING
    """Parquet file with one row an id, or .npy file with a matrix whose row i belongs to id i."""
    id_column: str = "id"
    """Of a Parquet file: integers, or text, which is hashed as gr sessionize does."""
    vector_column: str = "vector"
    """Of a Parquet file: lists of floating numbers, all of one length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainedConfig(VectorFileConfig):
    """Frozen vectors of ids, a part of the tokens that carry the feature."""

    feature: str = MISSING
    """item_id, or a feature of data.item_features or data.context_features with one id a token,
    whose raw ids the file knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColdStartConfig(VectorFileConfig):
    """Content of items, a part of their embedding wherever it stands (gr/cold_start.py)."""

    path: str = ""
    """Vectors of items, as VectorFileConfig; empty: there is no such part."""
    hidden: tuple[int, ...] = (128,)
    """Widths of the hidden layers between a vector and the embedding; empty means linear."""
    with_rows: bool = True
    """false: content alone is an item's embedding, and its row counts nothing: for comparison."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupConfig:
    """The part of the history that one stack of a mixture of transducers reads."""

    actions: dict[str, float] = field(default_factory=dict)
    """Action of data.actions -> one of its thresholds: an event belongs to the group if any of the
    named values reaches its own. Empty: every event belongs. An event may belong to several groups,
    and one that belongs to none is read by none."""
    history: int = 0
    """Events, at most: the newest that belong to the group, of those that data.max_history_tokens
    and stochastic length leave. 0 means all of them."""

    def __post_init__(self) -> None:
        if self.history < 0:
            raise ValueError(f"model.mixture.*.history must be at least 0, got {self.history}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The dense part."""

    encoder: Literal["hstu", "sasrec", "transformer", "cross_attention", "dlrm"] = "hstu"
    """Which encoder; the rest is shared."""
    dim: int = 64
    """D."""
    num_layers: int = 2
    """Layers of the encoder."""
    hstu: HSTUConfig = field(default_factory=HSTUConfig)
    """Of encoder hstu."""
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    """Of encoders sasrec, transformer and cross_attention."""
    dlrm: DLRMConfig = field(default_factory=DLRMConfig)
    """Of encoder dlrm."""
    mixture: dict[str, GroupConfig] = field(default_factory=dict)
    """Mixture of transducers: name of a group of actions -> what its stack reads. Each group has a
    stack of `num_layers` of its own; the heads read all of them side by side. Empty: one stack
    reads everything (docs/ultra_hstu.md)."""
    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    """Position and time."""
    pooling: dict[str, str] = field(default_factory=dict)
    """Feature with several ids a token (max_values) -> how their rows become one vector, mean or
    attention; mean where it is not named (gr/bags.py)."""
    pretrained: dict[str, PretrainedConfig] = field(default_factory=dict)
    """Name -> frozen vectors. Ids without one are counted (data/without_vector/NAME)."""
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)
    """Embedding of an item = its row + a function of its content, so that a new item has a place
    before it was learnt; give its table `init_std: 0`. Items without a vector are counted
    (data/without_vector/cold_start)."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """Ranking and retrieval."""

    def __post_init__(self) -> None:
        if self.dim < 1 or self.num_layers < 1:
            raise ValueError(
                "model.dim and model.num_layers must be at least 1, "
                f"got {self.dim} and {self.num_layers}"
            )
        for name, kind in self.pooling.items():
            if kind not in ("mean", "attention"):
                raise ValueError(f"model.pooling.{name} must be mean or attention, got {kind!r}")
        if self.encoder == "hstu" and self.hstu.truncation.layers >= self.num_layers:
            raise ValueError(
                f"model.hstu.truncation.layers={self.hstu.truncation.layers} leaves none of "
                f"model.num_layers={self.num_layers} that reads the whole history: for that, "
                "shorten data.max_history_tokens"
            )
        is_softmax = self.encoder in ("sasrec", "transformer", "cross_attention")
        if is_softmax and self.dim % self.transformer.num_heads:
            raise ValueError(
                f"model.dim={self.dim} must be a multiple of model.transformer.num_heads="
                f"{self.transformer.num_heads}"
            )
        if len(self.mixture) == 1 or (self.mixture and self.encoder == "dlrm"):
            raise ValueError(
                "model.mixture needs two groups or more, and an encoder of sequences, got "
                f"{list(self.mixture)} with model.encoder={self.encoder}"
            )
        if self.encoder == "dlrm" and self.head.retrieval:
            raise ValueError(
                "model.encoder=dlrm has no retrieval head: set model.head.retrieval=false"
            )

    @property
    def has_dropout(self) -> bool:
        """Whether anything is dropped in training."""
        of_encoder = self.hstu if self.encoder == "hstu" else self.transformer
        return self.encoder != "dlrm" and max(self.encoding.dropout, of_encoder.dropout) > 0


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


def check_dropout(name: str, dropout: float) -> None:
    """Refuse a probability of dropout outside of [0, 1).

    Raises:
        ValueError: naming the setting.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {dropout}")


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
