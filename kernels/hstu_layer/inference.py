"""A layer without its attention, for inference: nothing is kept for a backward pass.

Letters: L tokens, R rows of the result (the tails, or R = L), D model dim, H heads, K dim of
queries and keys, V dim of values.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Literal, cast

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.hstu_attention.arguments import not_hopper
from kernels.hstu_attention.structure import Structure
from kernels.hstu_layer import reference
from kernels.hstu_layer.arguments import check_kernels, check_options, check_tensors
from kernels.hstu_layer.structure import (
    Fp8Weights,
    Inputs,
    LayerWeights,
    Options,
    Rotations,
    Weights,
)
from kernels.rotary import Rotation

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q (R, H, K), k (L, H, K), v (L, H, V)) -> (R, H, V)."""


def hstu_layer_around(
    x_LD: Tensor,
    weights: LayerWeights,
    attend: Attend,
    *,
    num_heads: int,
    qk_dim: int,
    v_dim: int,
    activate: Literal["all", "u_only"] = "all",
    norm: Literal["layer", "group"] = "layer",
    concat_ua: bool = False,
    rotations: tuple[Rotation, Rotation] | None = None,
    tail_R: Tensor | None = None,
    eps: float = 1e-6,
    fp8: Fp8Weights | None = None,
    impl: Impl | str = Impl.AUTO,
    attention_impl: Impl | str = Impl.REFERENCE,
) -> Tensor:
    """Return the rows of an HSTU layer whose attention is `attend`. No gradient, no dropout.

    Args:
        x_LD: as of hstu_layer, like those that follow.
        weights: of the layer; `inference_weights` of them are read without a copy.
        attend: the attention. It gets queries and keys turned, and may keep keys and values.
        num_heads: H.
        qk_dim: K.
        v_dim: V.
        activate: SiLU on U, V, Q and K, or on U only.
        norm: of A V: over all heads, or each head on its own.
        concat_ua: the output projection reads [U, AV, norm(A V) * U].
        rotations: what Q (R rows) and K (L rows) are turned by.
        tail_R: (R,) int64: tokens whose rows are wanted; None means every token.
        eps: added to the variance, in both norms.
        fp8: of `weights`, for the products that run in fp8.
        impl: which implementation runs.
        attention_impl: of the rotation within the reference.

    Returns:
        (L, D) or (R, D), dtype of x.

    Raises:
        ValueError: if an argument does not fit the others, or the implementation, naming it.
    """
    check_options(activate, norm, ())
    # Its shape is read; zeros would be a kernel a layer.
    empty = torch.empty(1, dtype=torch.int64, device=x_LD.device)
    check_tensors(x_LD, weights, empty, None, num_heads, qk_dim, v_dim, concat_ua)
    q, v = (x_LD.new_empty(0, num_heads, dim) for dim in (qk_dim, v_dim))
    with torch.no_grad():
        if resolve(impl, x_LD, not_hopper=not_hopper(q, v, softmax=False)) is Impl.REFERENCE:
            return reference.around_attention(
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
                dropout=0.0,
                seed=None,
                eps=eps,
                fp8=Fp8Weights() if fp8 is None else fp8,
                fp8_wgrad="bf16",
                attention_impl=attention_impl,
            )
        from kernels.hstu_layer.fused import hstu_layer_infer  # the reference needs no Triton

        check_kernels(x_LD, qk_dim, v_dim, num_heads, norm, fp8)
        turned = Rotations()
        if rotations is not None:
            turned = Rotations(*(part.contiguous() for r in rotations for part in r))
        options = Options(
            num_heads=num_heads,
            qk_dim=qk_dim,
            v_dim=v_dim,
            activate_all=activate == "all",
            norm_groups=num_heads if norm == "group" else 1,
            concat_ua=concat_ua,
            dropout=0.0,
            eps=eps,
            keep_normed=False,
            keep_uvqk=False,
            keep_silu=False,
            keep_gated=False,
            keep_attended=False,
            hopper_products=impl != Impl.TRITON,
            folds_uvqk=False,
            folds_output=False,
        )
        inputs = Inputs(
            x_LD,
            tail_R,
            None,
            turned,
            Weights(*(getattr(weights, name) for name in Weights._fields)),
            Fp8Weights() if fp8 is None else fp8,
            options,
            cast(Structure, None),  # the attention is not its own
        )
        with torch.autocast(x_LD.device.type, enabled=False):
            return hstu_layer_infer(inputs, attend)


def inference_weights(weights: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    """Return weights that the kernels read as they are: the matrices in `dtype`, outputs first."""
    found = {
        field.name: None if (x := getattr(weights, field.name)) is None else x.detach()
        for field in fields(weights)
    }
    uvqk, output = weights.uvqk.detach(), weights.output.detach()
    return replace(
        LayerWeights(**found),  # type: ignore[arg-type]
        uvqk=uvqk.to(dtype).T.contiguous().T,
        output=output.to(dtype).contiguous(),
    )
