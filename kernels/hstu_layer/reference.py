"""An HSTU layer in eager PyTorch: what runs on a CPU, and the oracle of the kernels.

Letters: L tokens, R rows of the result (the tails, or R = L), D model dim, H heads, K dim of
queries and keys, V dim of values.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import Impl
from kernels.hstu_attention import AttentionMask, RelativeBias, hstu_attention
from kernels.hstu_layer.structure import Fp8Weights, LayerWeights
from kernels.linear import QuantizedWeight, linear_fp8
from kernels.norm_gate.reference import kept
from kernels.quantize import QuantizedRows
from kernels.rotary import Rotation, rotary


def hstu_layer(
    x_LD: Tensor,
    weights: LayerWeights,
    offsets: Tensor,
    *,
    num_heads: int,
    qk_dim: int,
    v_dim: int,
    max_len: int,
    alpha: float,
    scaling_length: float | None,
    attention: Literal["silu", "softmax"],
    activate: str,
    norm: str,
    concat_ua: bool,
    mask: AttentionMask,
    num_candidates: Tensor | None,
    bias: RelativeBias | None,
    rotations: tuple[Rotation, Rotation] | None,
    tail_R: Tensor | None,
    q_offsets: Tensor,
    max_q_len: int,
    dropout: float,
    seed: Tensor | None,
    eps: float,
    fp8: Fp8Weights,
    fp8_wgrad: Literal["auto", "fold", "bf16"],
    deterministic: bool,
    attention_impl: Impl | str,
) -> Tensor:
    """Return (R, D): the layer of `kernels.hstu_layer`, whose arguments these are."""

    def attend(q_RHK: Tensor, k_LHK: Tensor, v_LHV: Tensor) -> Tensor:
        return hstu_attention(
            q_RHK,
            k_LHK,
            v_LHV,
            offsets,
            max_len=max_len,
            alpha=alpha,
            scaling_length=scaling_length,
            activation=attention,
            mask=mask,
            num_candidates=num_candidates,
            q_offsets=q_offsets,
            max_q_len=max_q_len,
            bias=bias,
            deterministic=deterministic,
            impl=attention_impl,
        )

    return around_attention(
        x_LD,
        weights,
        attend,
        num_heads=num_heads,
        qk_dim=qk_dim,
        v_dim=v_dim,
        activate=activate,
        norm=norm,
        concat_ua=concat_ua,
        rotations=rotations,
        tail_R=tail_R,
        dropout=dropout,
        seed=seed,
        eps=eps,
        fp8=fp8,
        fp8_wgrad=fp8_wgrad,
        attention_impl=attention_impl,
    )


def around_attention(
    x_LD: Tensor,
    weights: LayerWeights,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    num_heads: int,
    qk_dim: int,
    v_dim: int,
    activate: str,
    norm: str,
    concat_ua: bool,
    rotations: tuple[Rotation, Rotation] | None,
    tail_R: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    eps: float,
    fp8: Fp8Weights,
    fp8_wgrad: Literal["auto", "fold", "bf16"],
    attention_impl: Impl | str,
) -> Tensor:
    """Return the layer around an attention, (q_RHK, k_LHK, v_LHV) -> (R, H, V)."""
    weights = _cast(weights, x_LD.dtype)
    in_fp8 = fp8.uvqk, fp8_wgrad
    HK, HV = num_heads * qk_dim, num_heads * v_dim
    widths = {"u": HV, "v": HV, "q": HK, "k": HK}
    normed_LD = functional.layer_norm(
        x_LD, x_LD.shape[1:], weights.input_norm, weights.input_norm_bias, eps
    )
    if tail_R is None:
        x_RD = x_LD
        u, v, q, k = _project(normed_LD, "uvqk", weights, widths, activate, in_fp8)
    else:
        x_RD = x_LD.index_select(0, tail_R)
        normed_RD = normed_LD.index_select(0, tail_R)
        u, q = _project(normed_RD, "uq", weights, widths, activate, in_fp8)
        v, k = _project(normed_LD, "vk", weights, widths, activate, in_fp8)
    # Not len(x): that is a number, which torch.export would take for all lengths.
    q_RHK, k_LHK = (x.view(x.shape[0], num_heads, qk_dim) for x in (q, k))
    if rotations is not None:
        of_queries, of_keys = rotations
        q_RHK = rotary(q_RHK, of_queries, impl=attention_impl)
        k_LHK = rotary(k_LHK, of_keys, impl=attention_impl)
    attended_RHV = attend(q_RHK, k_LHK, v.view(v.shape[0], num_heads, v_dim))
    normed_shape = attended_RHV.shape[2:] if norm == "group" else attended_RHV.shape[1:]
    normed_RC = functional.layer_norm(attended_RHV, normed_shape, eps=eps).flatten(1)
    if weights.attention_norm is not None:
        normed_RC = normed_RC * weights.attention_norm
    if weights.attention_norm_bias is not None:
        normed_RC = normed_RC + weights.attention_norm_bias
    gated_RC = normed_RC * u
    if concat_ua:
        gated_RC = torch.cat([u, attended_RHV.flatten(1), gated_RC], dim=1)
    if dropout > 0:
        assert seed is not None
        keep_RC = kept(seed, gated_RC.shape[0], gated_RC.shape[1], dropout)
        gated_RC = torch.where(keep_RC, gated_RC / (1 - dropout), 0)
    if fp8.output is None:
        return x_RD + functional.linear(gated_RC, weights.output, weights.output_bias)
    return linear_fp8(
        gated_RC,
        weights.output,
        weights.output_bias,
        residual_LF=x_RD,
        quantized=fp8.output,
        wgrad=fp8_wgrad,
        impl=Impl.REFERENCE,
    )


def _cast(weights: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    cast: dict[str, Any] = {}
    for field in fields(weights):
        weight: Tensor | None = getattr(weights, field.name)
        cast[field.name] = None if weight is None else weight.to(dtype)
    return LayerWeights(**cast)


def _project(
    normed_LD: Tensor,
    parts: str,
    weights: LayerWeights,
    widths: dict[str, int],
    activate: str,
    in_fp8: tuple[QuantizedWeight | None, Literal["auto", "fold", "bf16"]],
) -> list[Tensor]:
    """Return the named parts of act(X' W_uvqk + b), heads side by side.

    Args:
        normed_LD: X', any number of rows.
        parts: letters of "uvqk".
        weights: of the layer.
        widths: columns of each part.
        activate: "all" or "u_only".
        in_fp8: the weight in fp8, or None; and how its gradient is computed then.
    """
    weight = _columns(weights.uvqk, parts, widths)
    quantized, wgrad = in_fp8
    if quantized is not None:
        active = parts if activate == "all" else parts[: parts.startswith("u")]
        projected = linear_fp8(
            normed_LD,
            weight.T,
            None if weights.uvqk_bias is None else _columns(weights.uvqk_bias, parts, widths),
            activation="silu" if active else "none",
            silu_columns=sum(widths[part] for part in active) or None,
            quantized=_rows_of_parts(quantized, parts, widths),
            wgrad=wgrad,
            impl=Impl.REFERENCE,
        )
        return list(torch.split(projected, [widths[part] for part in parts], dim=1))
    if weights.uvqk_bias is None:
        projected = normed_LD @ weight
    else:
        projected = torch.addmm(_columns(weights.uvqk_bias, parts, widths), normed_LD, weight)
    if activate == "all":
        projected = functional.silu(projected)
    split = list(torch.split(projected, [widths[part] for part in parts], dim=1))
    if activate == "u_only" and parts[0] == "u":
        split[0] = functional.silu(split[0])
    return split


def _columns(x: Tensor, parts: str, widths: dict[str, int]) -> Tensor:
    if parts == "uvqk":
        return x
    columns = torch.split(x, list(widths.values()), dim=-1)
    by_part = dict(zip(widths, columns, strict=True))
    return torch.cat([by_part[part] for part in parts], dim=-1)


def _rows_of_parts(weight: QuantizedWeight, parts: str, widths: dict[str, int]) -> QuantizedWeight:
    if parts == "uvqk":
        return weight
    rows, columns = weight
    names = torch.arange(len(rows.scale), device=rows.scale.device)
    index = _columns(names, parts, widths)
    return QuantizedWeight(
        QuantizedRows(rows.values[index], rows.scale[index]),
        QuantizedRows(columns.values[:, index], columns.scale),
    )
