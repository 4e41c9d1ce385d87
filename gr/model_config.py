"""Configuration of the dense part of a run. Free of torch."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING


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
    recompute: tuple[Literal["normed", "uvqk", "silu", "gated", "attended"], ...] = (
        "normed",
        "uvqk",
        "silu",
        "gated",
    )
    """What the kernels' backward pass computes again instead of keeping it (kernels/hstu_layer):
    norm(X), the UVQK projection, U V Q and K of it, what the output projection reads; attended:
    A V, which halves what is kept by default and costs the attention's forward pass. (): nothing,
    the fastest where memory is left. The reference keeps all."""
    graph_tokens: int = 0
    """Train the layers as CUDA graphs, which a host launches in a tenth of the time
    (gr/layer_graphs.py), with tokens rounded up to a multiple of this; 512 will do. 0, and on a
    CPU, in evaluation, and for layers behind truncation: launched one by one."""

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
        self._check_graphs()
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

    def _check_graphs(self) -> None:
        if self.graph_tokens < 0:
            raise ValueError(f"model.hstu.graph_tokens must be at least 0, got {self.graph_tokens}")
        if self.graph_tokens and self.impl in ("composed", "reference"):
            raise ValueError(
                f"model.hstu.graph_tokens: what model.hstu.impl={self.impl} runs is not captured: "
                "set model.hstu.impl=auto, or model.hstu.graph_tokens=0"
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


def check_dropout(name: str, dropout: float) -> None:
    """Refuse a probability of dropout outside of [0, 1).

    Raises:
        ValueError: naming the setting.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {dropout}")
