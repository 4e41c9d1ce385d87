"""The HSTU encoder: pointwise gated attention over jagged sequences.

The arithmetic of a layer is kernels/hstu_layer: its reference.py in plain torch around an
attention, or its kernels. Here are the parameters, and what a batch says about masks and times.

Letters: B sequences, L tokens, R rows of the result (tokens that a loss reads), D model dim,
H heads, K dim of queries and keys, V dim of values.
"""

import torch
from torch import Tensor, nn

from gr.config import HSTUConfig, ModelConfig, SemiLocalConfig
from gr.layer_graphs import LayerGraphs
from gr.rotary import rotations
from gr.sequence import SequenceInfo, tail_if_shorter, truncate
from kernels.dispatch import Impl, resolve
from kernels.hstu_attention import AttentionMask, RelativeBias
from kernels.hstu_layer import (
    Attend,
    Fp8Weights,
    LayerWeights,
    hstu_layer,
    hstu_layer_around,
    quantize_weights,
)
from kernels.layer_norm import layer_norm
from kernels.rotary import Rotation

NORM_EPS = 1e-6
EVERYTHING = SemiLocalConfig()
LEAST_OUTPUT_FP8 = 2048
"""Model dim from which the output projection gains in fp8 (docs/benchmarks/kernels.md)."""


class HSTUEncoder(nn.Module):
    """A stack of HSTU layers. Every layer but the last computes all rows, the last the tails only.

    With attention truncation the last N2 layers compute what `gr.sequence.truncate` keeps.

    There is no norm after the stack by default, as in the research code, whose retrieval normalises
    vectors on its own; `final_norm` is for heads that read the rows as they are.

    Args:
        config: `dim`, `num_layers` and `hstu` are read.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.hstu
        self.impl = config.hstu.impl
        self.first_truncated = config.num_layers - config.hstu.truncation.layers
        layers = [HSTULayer(config.hstu, config.dim) for _ in range(config.num_layers)]
        self.layers = nn.ModuleList(layers)
        self.final_norm = nn.LayerNorm(config.dim) if config.hstu.final_norm else None
        round_to = config.hstu.graph_tokens
        self.graphs = LayerGraphs(layers, round_to) if round_to else None

    def forward(self, x_LD: Tensor, info: SequenceInfo) -> Tensor:
        """Return (R, D): the last layer's rows of the tails, in the order of the tokens.

        The kernels compute, and hand on from layer to layer, in the dtype of autocast where it is
        on; the reference leaves the choice to autocast, which keeps the residual in float32.

        Args:
            x_LD: floating, the tokens of all sequences.
            info: structure of the batch; its tails say which rows are returned.
        """
        device = x_LD.device.type
        if torch.is_autocast_enabled(device) and not self.is_reference(x_LD):
            x_LD = x_LD.to(torch.get_autocast_dtype(device))
        turned = None
        if self.config.rotary.angles != "none":
            turned = rotations(
                self.config.rotary,
                info,
                num_heads=self.config.num_heads,
                head_dim=self.config.qk_dim,
                dtype=x_LD.dtype,
            )
        first, last = self._num_captured(x_LD), len(self.layers) - 1
        if first:
            assert self.graphs is not None
            of_tails = first > last and info.num_rows != x_LD.shape[0]
            y_LD = self.graphs(x_LD, info, first, turned, of_tails=of_tails)
            x_LD, first = (x_LD, 0) if y_LD is None else (y_LD, first)
        for number in range(first, len(self.layers)):
            if number == self.first_truncated:
                x_LD, info, turned = truncated(x_LD, info, turned)
            tail_R = tail_if_shorter(info, x_LD) if number == last else None
            x_LD = self.layers[number](x_LD, info, tail_R=tail_R, rotations=turned)
        return self.normed(x_LD)

    def _num_captured(self, x_LD: Tensor) -> int:
        """Return how many layers are replayed: of the first ones, those before truncation."""
        if self.graphs is None or not self.graphs.serves(x_LD):
            return 0
        return self.first_truncated

    def normed(self, y_RD: Tensor) -> Tensor:
        """Return rows of the last layer after the final norm, if there is one."""
        if self.final_norm is None:
            return y_RD
        weight, bias = self.final_norm.weight, self.final_norm.bias
        impl = Impl.REFERENCE if self.is_reference(y_RD) else Impl.AUTO
        return layer_norm(y_RD, weight, bias, eps=NORM_EPS, impl=impl)

    def is_reference(self, x_LD: Tensor) -> bool:
        """Return whether the layers run in plain torch where these rows are."""
        if self.impl == "composed":
            return True
        return resolve(self.impl, x_LD, not_hopper="") is Impl.REFERENCE


class HSTULayer(nn.Module):
    """One HSTU layer: projection, pointwise attention, gate, projection, residual.

        X' = norm(X)
        U, V, Q, K = split(act(X' W_uvqk + b))                    Q, K turned by rotary angles
        A = silu(alpha Q K^T + bias) / scaling_length * mask      or softmax over the visible keys
        Y = X + W_o dropout(norm(A V) * U) + b_o                  concat_ua: [U, AV, norm(AV) * U]

    Every row is a function of its own sequence alone: scaling_length is fixed, and no statistic is
    taken over tokens.

    Args:
        config: the options.
        dim: D.

    Source: HSTU (arXiv 2402.17152) equations 1 to 3; weights start as in the research code of
        meta-recsys/generative-recommenders. alpha, b, activation on U only and concat_ua are those
        of its DLRM-v3 layer, which divides by the longest sequence of the batch instead.
    """

    def __init__(self, config: HSTUConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.fp8_products = fp8_products(config, dim)
        self.alpha = config.alpha or config.qk_dim**-0.5
        H, K, V = config.num_heads, config.qk_dim, config.v_dim
        # The modules below hold parameters under the names of checkpoints; `forward` applies them.
        self.input_norm = nn.LayerNorm(dim, elementwise_affine=config.norm_affine)
        columns = 2 * H * (V + K)
        self.uvqk_weight = nn.Parameter(torch.randn(dim, columns) * 0.02)
        self.uvqk_bias = nn.Parameter(torch.zeros(columns)) if config.uvqk_bias else None
        self.position_bias = self.time_bias = None
        if config.bias != "none":
            self.position_bias = nn.Parameter(torch.randn(2 * config.bias_max_len - 1) * 0.02)
        if config.bias == "position_time":
            self.time_bias = nn.Parameter(torch.randn(config.bias_time_buckets + 1) * 0.02)
        self.attention_norm = nn.LayerNorm(H * V, elementwise_affine=config.norm_affine)
        self.output = nn.Linear(H * V * (3 if config.concat_ua else 1), dim)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(
        self,
        x_LD: Tensor,
        info: SequenceInfo,
        tail_R: Tensor | None = None,
        rotations: tuple[Rotation, Rotation] | None = None,
    ) -> Tensor:
        """Return Y: (L, D), or (R, D) for the rows `tail_R`.

        Args:
            x_LD: floating.
            info: structure of the batch.
            tail_R: `tail_index(info)`: U, Q and all that follows are computed for these tokens
                only, V and K for all. None means every token.
            rotations: what the queries and the keys of all tokens are turned by (gr/rotary.py).
        """
        if tail_R is None:
            query_time_R, tail_offsets, max_tail_len = info.query_time, None, None
        else:
            query_time_R = info.query_time[tail_R]
            tail_offsets, max_tail_len = info.tail_offsets, info.max_tail_len
        if rotations is not None and tail_R is not None:
            rotations = rotations[0].rows(tail_R), rotations[1]
        config, weights = self.config, self.weights()
        is_composed = config.impl == "composed"
        impl = Impl.REFERENCE if is_composed else config.impl
        dropout = config.dropout if self.training else 0.0
        return hstu_layer(
            x_LD,
            weights,
            info.offsets,
            num_heads=config.num_heads,
            qk_dim=config.qk_dim,
            v_dim=config.v_dim,
            max_len=info.max_len,
            alpha=self.alpha,
            scaling_length=config.scaling_length if config.attention == "silu" else None,
            attention=config.attention,
            activate=config.uvqk_activation,
            norm=config.norm,
            concat_ua=config.concat_ua,
            mask=attention_mask(info, config.semi_local),
            num_candidates=info.num_candidates,
            bias=self.relative_bias(query_time_R, info.timestamp),
            rotations=rotations,
            tail_R=tail_R,
            tail_offsets=tail_offsets,
            max_tail_len=max_tail_len,
            dropout=dropout,
            seed=draw_seed(x_LD.device) if dropout > 0 else None,
            eps=NORM_EPS,
            recompute=config.recompute,
            fp8=self.fp8_weights(weights, impl),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            impl=impl,
            attention_impl=Impl.AUTO if is_composed else Impl.REFERENCE,
        )

    def around(
        self,
        x_LD: Tensor,
        attend: Attend,
        *,
        tail_R: Tensor | None,
        rotations: tuple[Rotation, Rotation] | None,
        weights: LayerWeights,
        fp8: Fp8Weights | None,
    ) -> Tensor:
        """Return Y with the caller's attention, without gradient and dropout: for inference.

        Args:
            x_LD: floating.
            attend: (q (R, H, K), k (L, H, K), v (L, H, V)) -> (R, H, V).
            tail_R: as of `forward`.
            rotations: of the queries (R rows) and of the keys.
            weights: `weights()`, or inference_weights of them.
            fp8: `fp8_weights` of them.
        """
        config = self.config
        is_composed = config.impl == "composed"
        return hstu_layer_around(
            x_LD,
            weights,
            attend,
            num_heads=config.num_heads,
            qk_dim=config.qk_dim,
            v_dim=config.v_dim,
            activate=config.uvqk_activation,
            norm=config.norm,
            concat_ua=config.concat_ua,
            rotations=rotations,
            tail_R=tail_R,
            eps=NORM_EPS,
            fp8=fp8,
            impl=Impl.REFERENCE if is_composed else config.impl,
            attention_impl=Impl.AUTO if is_composed else Impl.REFERENCE,
        )

    def weights(self) -> LayerWeights:
        """Return the parameters as the operator takes them."""
        return LayerWeights(
            uvqk=self.uvqk_weight,
            output=self.output.weight,
            input_norm=self.input_norm.weight,
            input_norm_bias=self.input_norm.bias,
            uvqk_bias=self.uvqk_bias,
            attention_norm=self.attention_norm.weight,
            attention_norm_bias=self.attention_norm.bias,
            output_bias=self.output.bias,
        )

    def fp8_weights(self, weights: LayerWeights, impl: Impl | str) -> Fp8Weights | None:
        """Return the weights of the products in fp8: made in a forward pass, used by both."""
        if not self.fp8_products:
            return None
        # Rounding by rows has no kernel for Hopper of its own.
        rowwise = "triton" if impl == "hopper" else impl
        return quantize_weights(weights, self.fp8_products, impl=rowwise)

    def relative_bias(self, query_time_R: Tensor, key_time_L: Tensor) -> RelativeBias | None:
        """Return what is added to alpha Q K^T; the times are used with bias=position_time only."""
        if self.position_bias is None:
            return None
        if self.time_bias is None:
            return RelativeBias(self.position_bias)
        return RelativeBias(self.position_bias, self.time_bias, query_time_R, key_time_L)


def fp8_products(config: HSTUConfig, dim: int) -> tuple[str, ...]:
    """Return the products of a layer of this dim that run in fp8."""
    if config.precision != "fp8":
        return ()
    default = ("uvqk", "output") if dim >= LEAST_OUTPUT_FP8 else ("uvqk",)
    return config.fp8_products or default


def attention_mask(info: SequenceInfo, semi_local: SemiLocalConfig = EVERYTHING) -> AttentionMask:
    """Return what is visible: history is causal, the contextual prefix sees itself only."""
    return AttentionMask(
        num_context=info.num_context,
        context="prefix" if info.num_context else "causal",
        local_window=semi_local.window or None,
        global_rows=semi_local.global_rows,
        global_columns=semi_local.global_columns,
    )


def kept_history(model: ModelConfig) -> int:
    """Return L', the tokens of history that truncated layers keep; 0 without truncation."""
    return model.hstu.truncation.history if model.encoder == "hstu" else 0


def truncated(
    x_LD: Tensor, info: SequenceInfo, rotations: tuple[Rotation, Rotation] | None
) -> tuple[Tensor, SequenceInfo, tuple[Rotation, Rotation] | None]:
    """Return rows, structure and rotations of what attention truncation keeps."""
    index_T, info = truncate(info)
    if rotations is not None:
        rotations = rotations[0].rows(index_T), rotations[1].rows(index_T)
    return x_LD.index_select(0, index_T), info, rotations


def draw_seed(device: torch.device) -> Tensor:
    """Return (1,) int64 of the default generator of `device`: what dropout is a function of."""
    return torch.randint(2**63 - 1, (1,), device=device)
