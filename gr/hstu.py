"""The HSTU encoder: pointwise gated attention over jagged sequences.

Letters: B sequences, L tokens, R rows of the result (tokens that a loss reads), D model dim,
H heads, K dim of queries and keys, V dim of values.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from gr.config import HSTUConfig, ModelConfig
from gr.sequence import SequenceInfo
from kernels.hstu_attention import AttentionMask, RelativeBias, hstu_attention

NORM_EPS = 1e-6


class HSTUEncoder(nn.Module):
    """A stack of HSTU layers. Every layer but the last computes all rows, the last the tails only.

    There is no norm after the stack by default, as in the research code, whose retrieval normalises
    vectors on its own; `final_norm` is for heads that read the rows as they are.

    Args:
        config: `dim`, `num_layers` and `hstu` are read.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            HSTULayer(config.hstu, config.dim) for _ in range(config.num_layers)
        )
        self.final_norm = (
            nn.LayerNorm(config.dim, eps=NORM_EPS) if config.hstu.final_norm else nn.Identity()
        )

    def forward(self, x_LD: Tensor, info: SequenceInfo) -> Tensor:
        """Return (R, D): the last layer's rows of the tails, in the order of the tokens.

        Args:
            x_LD: floating, the tokens of all sequences.
            info: structure of the batch; its tails say which rows are returned.
        """
        for layer in self.layers[:-1]:
            x_LD = layer(x_LD, info)
        y_RD: Tensor = self.layers[-1](x_LD, info, tail_R=tail_index(info))
        return self.final_norm(y_RD)  # type: ignore[no-any-return]


class HSTULayer(nn.Module):
    """One HSTU layer: projection, pointwise attention, gate, projection, residual.

        X' = norm(X)
        U, V, Q, K = split(act(X' W_uvqk + b))
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
        self.alpha = config.alpha or config.qk_dim**-0.5
        H, K, V = config.num_heads, config.qk_dim, config.v_dim
        self.widths = {"u": H * V, "v": H * V, "q": H * K, "k": H * K}
        self.input_norm = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=config.norm_affine)
        self.uvqk_weight = nn.Parameter(torch.randn(dim, sum(self.widths.values())) * 0.02)
        self.uvqk_bias = (
            nn.Parameter(torch.zeros(sum(self.widths.values()))) if config.uvqk_bias else None
        )
        self.position_bias = self.time_bias = None
        if config.bias != "none":
            self.position_bias = nn.Parameter(torch.randn(2 * config.bias_max_len - 1) * 0.02)
        if config.bias == "position_time":
            self.time_bias = nn.Parameter(torch.randn(config.bias_time_buckets + 1) * 0.02)
        self.attention_norm = AttentionNorm(
            H, V, by_head=config.norm == "group", affine=config.norm_affine
        )
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(H * V * (3 if config.concat_ua else 1), dim)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x_LD: Tensor, info: SequenceInfo, tail_R: Tensor | None = None) -> Tensor:
        """Return Y: (L, D), or (R, D) for the rows `tail_R`.

        Args:
            x_LD: floating.
            info: structure of the batch.
            tail_R: `tail_index(info)`: U, Q and all that follows are computed for these tokens
                only, V and K for all. None means every token.
        """
        normed_LD = self.input_norm(x_LD)
        if tail_R is None:
            x_RD, query_time_R = x_LD, info.query_time
            q_offsets, max_q_len = info.offsets, info.max_len
            u, v, q, k = self.project(normed_LD, "uvqk")
        else:
            x_RD, query_time_R = x_LD.index_select(0, tail_R), info.query_time[tail_R]
            q_offsets, max_q_len = info.tail_offsets, info.max_tail_len
            u, q = self.project(normed_LD.index_select(0, tail_R), "uq")
            v, k = self.project(normed_LD, "vk")
        attended_RHV = hstu_attention(
            q,
            k,
            v,
            info.offsets,
            max_len=info.max_len,
            alpha=self.alpha,
            scaling_length=(
                self.config.scaling_length if self.config.attention == "silu" else None
            ),
            activation=self.config.attention,
            mask=attention_mask(info),
            num_candidates=info.num_candidates,
            q_offsets=q_offsets,
            max_q_len=max_q_len,
            bias=self.relative_bias(query_time_R, info.timestamp),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        u_RV = u.flatten(1)
        gated_RV = self.attention_norm(attended_RHV) * u_RV
        if self.config.concat_ua:
            gated_RV = torch.cat([u_RV, attended_RHV.flatten(1), gated_RV], dim=1)
        return x_RD + self.output(self.dropout(gated_RV))  # type: ignore[no-any-return]

    def project(self, normed_LD: Tensor, parts: str) -> list[Tensor]:
        """Return the named parts of act(X' W_uvqk + b), each (L, H, K) or (L, H, V).

        Args:
            normed_LD: X', any number of rows.
            parts: letters of "uvqk".
        """
        weight = self._columns(self.uvqk_weight, parts)
        bias = None if self.uvqk_bias is None else self._columns(self.uvqk_bias, parts)
        projected = normed_LD @ weight if bias is None else torch.addmm(bias, normed_LD, weight)
        if self.config.uvqk_activation == "all":
            projected = functional.silu(projected)
        widths = [self.widths[p] for p in parts]
        by_part = dict(zip(parts, torch.split(projected, widths, dim=1), strict=True))
        if self.config.uvqk_activation == "u_only" and "u" in by_part:
            by_part["u"] = functional.silu(by_part["u"])
        H = self.config.num_heads
        return [x.view(x.shape[0], H, x.shape[1] // H) for x in by_part.values()]

    def relative_bias(self, query_time_R: Tensor, key_time_L: Tensor) -> RelativeBias | None:
        """Return what is added to alpha Q K^T; the times are used with bias=position_time only."""
        if self.position_bias is None:
            return None
        if self.time_bias is None:
            return RelativeBias(self.position_bias)
        return RelativeBias(self.position_bias, self.time_bias, query_time_R, key_time_L)

    def _columns(self, x: Tensor, parts: str) -> Tensor:
        if parts == "uvqk":
            return x
        columns = torch.split(x, list(self.widths.values()), dim=-1)
        by_part = dict(zip(self.widths, columns, strict=True))
        return torch.cat([by_part[p] for p in parts], dim=-1)


class AttentionNorm(nn.Module):
    """Layer norm of A V, over all heads together or over each on its own (group norm).

    Args:
        num_heads: H.
        v_dim: V.
        by_head: one mean and variance a head.
        affine: weight and bias of each of the H * V values.
    """

    def __init__(self, num_heads: int, v_dim: int, *, by_head: bool, affine: bool) -> None:
        super().__init__()
        self.normed_shape = (v_dim,) if by_head else (num_heads, v_dim)
        self.weight = nn.Parameter(torch.ones(num_heads * v_dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_heads * v_dim)) if affine else None

    def forward(self, attended_LHV: Tensor) -> Tensor:
        """Return (L, H * V)."""
        y = functional.layer_norm(attended_LHV, self.normed_shape, eps=NORM_EPS).flatten(1)
        if self.weight is not None and self.bias is not None:
            y = y * self.weight + self.bias
        return y


def attention_mask(info: SequenceInfo) -> AttentionMask:
    """Return what is visible: history is causal, the contextual prefix sees itself only."""
    return AttentionMask(
        num_context=info.num_context, context="prefix" if info.num_context else "causal"
    )


def tail_index(info: SequenceInfo) -> Tensor:
    """Return (R,) int64: the tokens of the tails, in the order of the encoder's result."""
    tail_lengths_B = info.tail_offsets.diff()
    token_of_row_B = info.offsets[1:] - info.tail_offsets[1:]
    shift_R = torch.repeat_interleave(token_of_row_B, tail_lengths_B)
    return shift_R + torch.arange(shift_R.numel(), device=shift_R.device)
