"""The operator: arguments, their checks and the choice of implementation.

Letters: B sequences, L tokens, R rows of the result, D model dim, H heads, K dim of queries and
keys, V dim of values, C columns that the output projection reads.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.hstu_attention.arguments import (
    check_bias,
    check_lengths,
    check_scaling,
    not_hopper,
)
from kernels.hstu_attention.bias import RelativeBias
from kernels.hstu_attention.mask import AttentionMask
from kernels.hstu_attention.structure import structure_of
from kernels.hstu_layer import reference
from kernels.hstu_layer.arguments import (
    check_dropout,
    check_fp8,
    check_kernels,
    check_options,
    check_tail,
    check_tensors,
    folds,
)
from kernels.hstu_layer.autograd import apply
from kernels.hstu_layer.structure import (
    PRODUCTS,
    RECOMPUTED,
    Fp8Weights,
    Inputs,
    LayerWeights,
    Options,
    Rotations,
    Weights,
)
from kernels.linear import quantize_weight
from kernels.rotary import Rotation
from kernels.rotary.op import check_rotation


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
    attention: Literal["silu", "softmax"] = "silu",
    activate: Literal["all", "u_only"] = "all",
    norm: Literal["layer", "group"] = "layer",
    concat_ua: bool = False,
    mask: AttentionMask = AttentionMask(),  # noqa: B008 (immutable)
    num_candidates: Tensor | None = None,
    bias: RelativeBias | None = None,
    rotations: tuple[Rotation, Rotation] | None = None,
    tail_R: Tensor | None = None,
    tail_offsets: Tensor | None = None,
    max_tail_len: int | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    eps: float = 1e-6,
    recompute: Sequence[str] = RECOMPUTED,
    fp8: Fp8Weights | None = None,
    fp8_wgrad: Literal["auto", "fold", "bf16"] = "auto",
    deterministic: bool = False,
    impl: Impl | str = Impl.AUTO,
    attention_impl: Impl | str = Impl.REFERENCE,
) -> Tensor:
    """Return the rows of an HSTU layer.

        X' = norm(X)
        U, V, Q, K = split(act(X' W_uvqk + b))
        A = silu(alpha Q K^T + bias) / scaling_length * mask      or softmax over the visible keys
        Y = X + W_o dropout(norm(A V) * U) + b_o                  concat_ua: [U, AV, norm(A V) * U]

    Triton: for the backward pass X, A V and a few float32 a token are kept, 4 D bytes a token in 16
    bits with H V = D, and what `recompute` does not name: 2 D for "normed", 4 H (K + V) for "uvqk"
    (Z, of which both U, V, Q, K and the slope of SiLU are made), as much again for "silu" (U, V, Q,
    K beside Z; nothing where "uvqk" is named or they are columns of Z), 2 C for "gated". If it has
    "attended", A V is not kept either (2 D bytes then) and the attention runs forward again. What
    is computed again has the same bits: gradients do not depend on `recompute`. Q and K are turned
    where the projection is stored (in plain Triton a pass later), their gradients where SiLU's is
    made.

    In fp8 a product rounds what it reads, the weight, and the gradient of its result by rows to
    e4m3 (kernels/linear/fp8.py); the norms round what they write in the same pass, SiLU's gradient
    likewise. Where the weight's gradient is in fp8 too, X' takes D bytes and a scale a token if it
    is kept, and the gated rows are not kept at all.

    Args:
        x_LD: (L, D) floating, any row stride. Its dtype is that of every product and of the result.
        weights: parameters of the layer.
        offsets: (B + 1,) int64, on the device of x: tokens of sequence b are
            offsets[b]:offsets[b + 1]. Contents are checked in host memory only.
        num_heads: H.
        qk_dim: K; Triton takes up to 256.
        v_dim: V; likewise.
        max_len: at least the longest sequence.
        alpha: factor of Q K^T.
        scaling_length: divisor of the SiLU weights, above 0. None with softmax.
        attention: what makes weights of scores.
        activate: SiLU on U, V, Q and K, or on U only.
        norm: of A V: over all heads, or each head on its own.
        concat_ua: the output projection reads [U, AV, norm(A V) * U].
        mask: which keys a query sees.
        num_candidates: (B,) int64, candidates at the end of each sequence. None means none.
        bias: added to alpha Q K^T.
        rotations: what Q (R rows) and K (L rows) are turned by; see kernels/rotary.
        tail_R: (R,) int64, ascending: the tokens whose rows are wanted, the last
            tail_offsets[b + 1] - tail_offsets[b] of each sequence; U, Q and all that follows are
            computed for them only. None means every token.
        tail_offsets: (B + 1,) int64, with tail_R.
        max_tail_len: at least the longest tail, with tail_R.
        dropout: probability in [0, 1) that a value is dropped before the output projection.
        seed: one int64 on the device of x, needed for dropout; see norm_gate.
        eps: added to the variance, in both norms.
        recompute: names of RECOMPUTABLE: what the backward pass computes again. The reference,
            which leaves this to autograd, does not read it.
        fp8: quantize_weights(weights), for the products that run in fp8; it must be made anew when
            the weights change. None: all in the dtype of x.
        fp8_wgrad: how gradients of these weights are computed: fold in fp8, bf16 in the dtype of x,
            auto as was faster (kernels.linear.faster_wgrad).
        deterministic: the same bits for the same input; see hstu_attention.
        impl: which implementation runs. TRITON takes float32, float16 and bfloat16; HOPPER what
            hstu_attention's takes.
        attention_impl: of the attention within the reference, whose other operators are torch's,
            products in fp8 emulated. The kernels do not read it.

    Returns:
        (L, D) or (R, D), dtype of x.

    Raises:
        ValueError: if an argument does not fit the others, or the implementation, naming it: so
            fp8 with float32 tokens, or on a GPU below compute capability 8.9.

    Source: HSTU (arXiv 2402.17152) equations 1 to 3; which tensors to recompute: arXiv 2602.16986
        and the flags of DLRM-v3 in meta-recsys/generative-recommenders.
    """
    check_options(activate, norm, recompute)
    check_tensors(x_LD, weights, offsets, num_candidates, num_heads, qk_dim, v_dim, concat_ua)
    check_fp8(fp8, fp8_wgrad, weights)
    check_scaling(attention, scaling_length)
    check_dropout(dropout, seed, x_LD)
    if tail_R is None:
        if tail_offsets is not None or max_tail_len is not None:
            raise ValueError("tail_offsets and max_tail_len would be ignored: tail_R is None")
        q_offsets, max_q_len = offsets, max_len
    else:
        q_offsets, max_q_len = check_tail(tail_R, tail_offsets, max_tail_len, offsets)
    num_rows = x_LD.shape[0] if tail_R is None else tail_R.shape[0]
    if bias is not None:
        check_bias(bias, x_LD if tail_R is None else tail_R, x_LD)
    if not (offsets.is_cuda or torch.compiler.is_compiling()):
        check_lengths(
            offsets,
            q_offsets,
            num_candidates,
            num_keys=x_LD.shape[0],
            num_queries=num_rows,
            max_len=max_len,
            max_q_len=max_q_len,
        )
    if dropout == 0:
        seed = None
    softmax = attention == "softmax"
    q, v = (x_LD.new_empty(0, num_heads, dim) for dim in (qk_dim, v_dim))
    implementation = resolve(impl, x_LD, not_hopper=not_hopper(q, v, softmax=softmax))
    if implementation is Impl.REFERENCE:
        return reference.hstu_layer(
            x_LD,
            weights,
            offsets,
            num_heads=num_heads,
            qk_dim=qk_dim,
            v_dim=v_dim,
            max_len=max_len,
            alpha=alpha,
            scaling_length=scaling_length,
            attention=attention,
            activate=activate,
            norm=norm,
            concat_ua=concat_ua,
            mask=mask,
            num_candidates=num_candidates,
            bias=bias,
            rotations=rotations,
            tail_R=tail_R,
            q_offsets=q_offsets,
            max_q_len=max_q_len,
            dropout=dropout,
            seed=seed,
            eps=eps,
            fp8=Fp8Weights() if fp8 is None else fp8,
            fp8_wgrad=fp8_wgrad,
            deterministic=deterministic,
            attention_impl=attention_impl,
        )
    turned = Rotations()
    if rotations is not None:
        for rotation, rows in zip(rotations, (num_rows, x_LD.shape[0]), strict=True):
            check_rotation(rotation, (rows, num_heads, qk_dim), torch.float32, x_LD.device)
        turned = Rotations(*(part.detach().contiguous() for r in rotations for part in r))
    check_kernels(x_LD, qk_dim, v_dim, num_heads, norm, fp8)
    structure = structure_of(
        offsets,
        q_offsets,
        num_candidates,
        bias,
        mask,
        max_len=max_len,
        max_q_len=max_q_len,
        alpha=alpha,
        scaling_length=scaling_length,
        softmax=softmax,
        hopper=implementation is Impl.HOPPER,
        deterministic=deterministic,
    )
    flat = Weights(*(getattr(weights, name) for name in Weights._fields))
    inputs = (x_LD, *flat, structure.position_table, structure.time_table)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    fp8 = Fp8Weights() if fp8 is None else fp8
    options = Options(
        num_heads=num_heads,
        qk_dim=qk_dim,
        v_dim=v_dim,
        activate_all=activate == "all",
        norm_groups=num_heads if norm == "group" else 1,
        concat_ua=concat_ua,
        dropout=float(dropout),
        eps=eps,
        keep_normed=learns and "normed" not in recompute,
        keep_uvqk=learns and "uvqk" not in recompute,
        keep_silu=learns and "silu" not in recompute,
        keep_gated=learns and "gated" not in recompute,
        keep_attended=learns and "attended" not in recompute,
        hopper_products=impl != Impl.TRITON,
        folds_uvqk=folds(fp8_wgrad, fp8.uvqk, has_silu=True),
        folds_output=folds(fp8_wgrad, fp8.output, has_silu=False),
    )
    return apply(Inputs(x_LD, tail_R, seed, turned, flat, fp8, options, structure))


def quantize_weights(
    weights: LayerWeights, products: Sequence[str] = PRODUCTS, *, impl: Impl | str = Impl.AUTO
) -> Fp8Weights:
    """Return the weights of these products in fp8: once a step will do. Not differentiable.

    Args:
        weights: of a layer, float32, float16 or bfloat16.
        products: names of PRODUCTS.
        impl: which implementation runs. All give the same bits.

    Raises:
        ValueError: if a name is unknown, or as quantize_weight.
    """
    unknown = [name for name in products if name not in PRODUCTS]
    if isinstance(products, str) or unknown:
        raise ValueError(f"products must hold names of {list(PRODUCTS)}, got {products!r}")
    by_output = {"uvqk": weights.uvqk.T, "output": weights.output}
    return Fp8Weights(**{name: quantize_weight(by_output[name], impl=impl) for name in products})
