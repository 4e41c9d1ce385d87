"""Transformer++: the pre-norm Transformer with RMSNorm, rotary positions and SwiGLU.

Letters: L tokens, R rows of the result, D model dim, H heads, K = D / H.
"""

from functools import partial
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional

from gr.baselines.attention import softmax_attention
from gr.config import ModelConfig, RotaryConfig
from gr.flops import transformer_ffn_dim
from gr.rotary import rotations
from gr.sequence import SequenceInfo, tail_if_shorter
from kernels.hstu_layer import Attend as AttendRows
from kernels.rotary import Rotation, rotary

NORM_EPS = 1e-6


class Attend(Protocol):
    """Attention over jagged sequences, as `softmax_attention`."""

    def __call__(
        self, q_RHK: Tensor, k_LHK: Tensor, v_LHK: Tensor, info: SequenceInfo, *, of_tails: bool
    ) -> Tensor:
        """Return (R, H, K)."""
        ...


class TransformerEncoder(nn.Module):
    """A stack of layers and a norm; the last layer computes the rows of the tails only.

    Args:
        config: `dim`, `num_layers` and `transformer` are read; ffn_dim 0 means 8/3 D, rounded up to
            a multiple of 8.
        attend: the attention; another one is for comparisons of speed (gr/bench_ultra.py).

    Raises:
        ValueError: if the dim of a head is odd.

    Source: the Transformer++ of arXiv 2402.17152, table 5: layers of Touvron et al., "LLaMA", 2023.
    """

    def __init__(self, config: ModelConfig, attend: Attend = softmax_attention) -> None:
        super().__init__()
        self.head_dim = config.dim // config.transformer.num_heads
        if self.head_dim % 2:
            raise ValueError(
                "rotary positions turn pairs of numbers: model.dim / model.transformer.num_heads "
                f"must be even, got {config.dim} / {config.transformer.num_heads}"
            )
        self.layers = nn.ModuleList(
            TransformerLayer(config, attend) for _ in range(config.num_layers)
        )
        self.final_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)

    def forward(self, x_LD: Tensor, info: SequenceInfo) -> Tensor:
        """Return (R, D): the rows of the tails, in the order of the tokens.

        Args:
            x_LD: floating, the tokens of all sequences.
            info: structure of the batch.
        """
        rotation, _ = self.rotations(x_LD, info)
        for layer in self.layers[:-1]:
            x_LD = layer(x_LD, info, rotation)
        y_RD: Tensor = self.layers[-1](x_LD, info, rotation, tail_R=tail_if_shorter(info, x_LD))
        return self.normed(y_RD)

    def normed(self, y_RD: Tensor) -> Tensor:
        """Return rows of the last layer after the final norm."""
        return rms_norm(y_RD, self.final_norm)

    def rotations(self, x_LD: Tensor, info: SequenceInfo) -> tuple[Rotation, Rotation]:
        """Return what the queries and the keys of all tokens are turned by."""
        return rotations(
            RotaryConfig(angles="position"),
            info,
            num_heads=1,
            head_dim=self.head_dim,
            dtype=x_LD.dtype,
        )


def rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Return norm(x), in one pass."""
    # Torch's fused kernel wants the weight in the dtype of x; without it, a norm is five passes.
    weight = norm.weight.to(x.dtype)
    return functional.rms_norm(x, tuple(norm.normalized_shape), weight, norm.eps)


class LayerModules(nn.Module):
    """What a layer learns: norms, products of the attention and the gated feed-forward part.

    Args:
        config: as of the encoder.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        ffn_dim = config.transformer.ffn_dim or transformer_ffn_dim(dim)
        self.num_heads = config.transformer.num_heads
        self.dropout = nn.Dropout(config.transformer.dropout)
        self.attention_norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.ffn_norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.ffn_in = nn.Linear(dim, 2 * ffn_dim, bias=False)
        self.ffn_out = nn.Linear(ffn_dim, dim, bias=False)
        for linear in (self.query, self.key_value, self.ffn_in):
            nn.init.normal_(linear.weight, std=0.02)
        # Two residual branches a layer: their sum starts no larger in deep stacks (GPT-2).
        for linear in (self.output, self.ffn_out):
            nn.init.normal_(linear.weight, std=0.02 / (2 * config.num_layers) ** 0.5)

    def feed_forward(self, z_RD: Tensor) -> Tensor:
        """Return Z + dropout(W_2 (silu(W_g M) * W_1 M)), M = rms_norm(Z)."""
        gate_RF, value_RF = self.ffn_in(rms_norm(z_RD, self.ffn_norm)).chunk(2, dim=1)
        hidden_RF = functional.silu(gate_RF) * value_RF
        return z_RD + self.dropout(self.ffn_out(hidden_RF))  # type: ignore[no-any-return]


class TransformerLayer(LayerModules):
    """One layer.

        N = rms_norm(X);   Z = X + dropout(W_o softmax(rope(W_q N) rope(W_k N)^T / sqrt(K)) W_v N)
        M = rms_norm(Z);   Y = Z + dropout(W_2 (silu(W_g M) * W_1 M))               (no biases)

    Args:
        config: as of the encoder.
        attend: likewise.
    """

    def __init__(self, config: ModelConfig, attend: Attend = softmax_attention) -> None:
        super().__init__(config)
        self.attend = attend

    def forward(
        self,
        x_LD: Tensor,
        info: SequenceInfo,
        rotation: Rotation,
        tail_R: Tensor | None = None,
    ) -> Tensor:
        """Return Y: (L, D), or (R, D) for the tokens `tail_R` (gr.sequence.tail_index).

        Args:
            x_LD: floating.
            info: structure of the batch.
            rotation: angles of the tokens (gr/rotary.py).
            tail_R: tokens whose rows are wanted; None means all.
        """
        attend = partial(self.attend, info=info, of_tails=tail_R is not None)
        of_queries = rotation if tail_R is None else rotation.rows(tail_R)
        return self.around(x_LD, attend, (of_queries, rotation), tail_R)

    def around(
        self,
        x_LD: Tensor,
        attend: AttendRows,
        rotations: tuple[Rotation, Rotation],
        tail_R: Tensor | None,
    ) -> Tensor:
        """Return Y with the caller's attention, (q_RHK, k_LHK, v_LHK) -> (R, H, K).

        Args:
            x_LD: floating.
            attend: the attention.
            rotations: angles of the queries (R rows) and of the keys.
            tail_R: tokens whose rows are wanted; None means all.
        """
        of_queries, of_keys = rotations
        normed_LD = rms_norm(x_LD, self.attention_norm)
        k_LD, v_LD = self.key_value(normed_LD).chunk(2, dim=1)
        k_LHK, v_LHK = (x.unflatten(1, (self.num_heads, -1)) for x in (k_LD, v_LD))
        k_LHK = rotary(k_LHK, of_keys)
        x_RD = x_LD
        if tail_R is not None:
            x_RD, normed_LD = x_LD.index_select(0, tail_R), normed_LD.index_select(0, tail_R)
        q_RHK = rotary(self.query(normed_LD).unflatten(1, (self.num_heads, -1)), of_queries)
        attended_RHK = attend(q_RHK, k_LHK, v_LHK)
        z_RD = x_RD + self.dropout(self.output(attended_RHK.flatten(1)))
        return self.feed_forward(z_RD)
