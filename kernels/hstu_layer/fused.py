"""The layer from its kernels; the backward pass computes again what was not kept.

    X' = norm(X);  Z = X' W + b;  U, V, Q, K = silu(Z);  Y = X + W_o gate(norm(attention), U)

U, V, Q and K are views of one buffer, Z has one, and so has its gradient. SiLU has no inverse, so
it is Z that is kept, if anything, and SiLU is applied again, unless its result is kept beside Z;
both passes see the same bits. The
backward pass does not store U: the gated norm's kernel makes it from Z, and U's columns of Z's
gradient with it.

Letters: L tokens, R rows of the result (the tails, or R = L), D model dim, H heads, K dim of
queries and keys, V dim of values, C columns that the output projection reads.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.hstu_attention.op import _run_forward as attention_fwd
from kernels.hstu_attention.op import run_backward as attention_bwd
from kernels.hstu_layer.projection import Output, Rows, projections
from kernels.hstu_layer.structure import Inputs, Options, Saved, Weights
from kernels.layer_norm import layer_norm_fp8
from kernels.layer_norm._triton import layer_norm_bwd, layer_norm_fwd
from kernels.norm_gate import norm_gate_fp8
from kernels.norm_gate._triton import norm_gate_fwd, norm_gate_silu_bwd
from kernels.quantize import QuantizedRows, quantize_rows


def hstu_layer_fwd(inputs: Inputs) -> tuple[Tensor, Saved]:
    """Return Y (R, D), and what the options keep for the backward pass."""
    inputs = inputs._replace(x=_rows(inputs.x))
    x, tail, options = inputs.x, inputs.tail, inputs.options
    keep = options.keep_normed, options.keep_gated
    plain = inputs.reads_normed.plain and keep[0]
    normed, mean, rstd = _normed(inputs, plain=plain, fp8=inputs.fp8.uvqk is not None)
    parts: dict[str, Tensor] = {}
    kept, activated = [], []
    for projection in projections(inputs):
        y, z = projection.forward(normed, options.keep_uvqk)
        parts |= projection.split(y)
        kept.append(z)
        activated.append(y if inputs.keeps_activated else x.new_empty(0))
        del y, z
    attended, lse = attention_fwd(*_heads(parts, options), *inputs.structure)
    gated, gate_mean, gate_rstd = _gated(attended.flatten(1), parts["u"], inputs)
    y = Output(inputs).forward(gated, x if tail is None else x.index_select(0, tail))
    of_normed = _kept(normed, keep[0] and plain, keep[0] and inputs.reads_normed.fp8, x)
    keeps_gated = gated.plain is not None and keep[1] and not inputs.folds_output
    return y, Saved(
        *of_normed,
        kept[0] if options.keep_uvqk else x.new_empty(0),
        kept[1] if options.keep_uvqk and tail is not None else x.new_empty(0),
        activated[0],
        activated[1] if tail is not None else x.new_empty(0),
        attended if options.keep_attended else x.new_empty(0),
        gated.plain if gated.plain is not None and keeps_gated else x.new_empty(0),
        lse,
        mean,
        rstd,
        gate_mean,
        gate_rstd,
    )


def hstu_layer_infer(inputs: Inputs, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Return Y (R, D) with the caller's attention of (q, k, v); `inputs.structure` is not read."""
    inputs = inputs._replace(x=_rows(inputs.x))
    x, tail = inputs.x, inputs.tail
    in_fp8 = inputs.fp8.uvqk is not None
    normed, _, _ = _normed(inputs, plain=not in_fp8, fp8=in_fp8)
    parts: dict[str, Tensor] = {}
    for projection in projections(inputs):
        parts |= projection.split(projection.forward(normed, False)[0])
    attended = attend(*_heads(parts, inputs.options))
    gated, _, _ = _gated(attended.flatten(1), parts["u"], inputs)
    return Output(inputs).forward(gated, x if tail is None else x.index_select(0, tail))


def hstu_layer_bwd(
    dy: Tensor, needs_bias_grad: bool, saved: Saved, inputs: Inputs
) -> tuple[Tensor, ...]:
    """Return the gradients of X, of each of the weights and of both tables of the bias.

    Empty where there is no such input, or those of the tables are not needed.

    Args:
        dy: (R, D).
        needs_bias_grad: whether to compute those of the tables.
        saved: what the forward pass kept.
        inputs: of the forward pass.
    """
    inputs, dy = inputs._replace(x=_rows(inputs.x)), _rows(dy)
    x, tail, weights, options = inputs.x, inputs.tail, inputs.weights, inputs.options
    if options.keep_normed:
        normed = _rows_of(saved.normed, saved.normed_fp8, saved.normed_scale)
    else:
        normed = _normed(inputs, plain=inputs.reads_normed.plain, fp8=inputs.reads_normed.fp8)[0]
    parts: dict[str, Tensor] = {}
    used = projections(inputs)
    kept = [saved.uvqk, saved.vk][: len(used)]
    for i, (projection, y) in enumerate(zip(used, (saved.act_uvqk, saved.act_vk), strict=False)):
        if inputs.keeps_activated:
            parts |= projection.split(y)
        elif options.keep_uvqk:
            parts |= projection.activate(kept[i])
        else:
            y, kept[i] = projection.forward(normed, True)
            parts |= projection.split(y)
        del y
    parts.pop("u", None)
    attended = saved.attended
    if not options.keep_attended:
        attended = attention_fwd(*_heads(parts, options), *inputs.structure)[0]
    gradients = [projection.gradient_buffer(z) for projection, z in zip(used, kept, strict=True)]

    output = Output(inputs)
    of_y = output.gradient_rows(dy)
    dgated = output.dgrad(of_y)
    gated, written = _empty_gated(saved, dgated, inputs)
    dattended, dgate_weight, dgate_bias, du_sum = norm_gate_silu_bwd(
        dgated,
        attended.flatten(1),
        kept[0][:, : options.widths["u"]],
        _contiguous(weights.attention_norm),
        _contiguous(weights.attention_norm_bias),
        inputs.seed,
        saved.gate_mean,
        saved.gate_rstd,
        options.norm_groups,
        options.concat_ua,
        options.dropout,
        gradients[0][:, : options.widths["u"]],
        weights.uvqk_bias is not None,
        *written,
    )
    del dgated
    if inputs.folds_output and gated.plain is not None:
        gated = Rows(None, quantize_rows(gated.plain, impl="triton"))
    doutput = output.wgrad(of_y, gated)
    del gated, written, of_y
    (dq, dk, dv, dposition, dtime), dq_factor = attention_bwd(
        dattended.view(attended.shape),
        attended if inputs.structure.softmax else None,
        saved.lse,
        needs_bias_grad,
        *_heads(parts, options),
        inputs.structure,
        rounds=False,
    )
    del dattended, parts
    dparts = {"v": dv.flatten(1), "q": dq.flatten(1), "k": dk.flatten(1)}
    del dv, dq, dk

    # The last of the projections is of all tokens, the one before of the tails.
    dnormed, duvqk, dbias = used[-1].gradients(dparts, dq_factor, kept[-1], gradients[-1], normed)
    if tail is not None:
        dtail, duq, dq_bias = used[0].gradients(dparts, dq_factor, kept[0], gradients[0], normed)
        _add_rows(dnormed, tail, dtail)
        u, v = options.widths["u"], options.widths["v"]
        duvqk = torch.cat([duq[:, :u], duvqk[:, :v], duq[:, u:], duvqk[:, v:]], 1)
        dbias = torch.cat([dbias[:v], dq_bias, dbias[v:]])
    del normed, kept, dparts, gradients
    sums_dy = tail is None and weights.output_bias is not None
    dx, dnorm_weight, dnorm_bias, doutput_bias = layer_norm_bwd(
        dnormed,
        x,
        _contiguous(weights.input_norm),
        weights.input_norm_bias is not None,
        saved.mean,
        saved.rstd,
        dy if tail is None else None,
        sum_dskip=sums_dy,
    )
    if not sums_dy and weights.output_bias is not None:
        doutput_bias = dy.sum(0, dtype=torch.float32)
    if tail is not None:
        _add_rows(dx, tail, dy)
    of_weights = Weights(
        uvqk=duvqk,
        output=doutput,
        input_norm=dnorm_weight,
        input_norm_bias=dnorm_bias,
        uvqk_bias=None if weights.uvqk_bias is None else torch.cat([du_sum, dbias]),
        attention_norm=dgate_weight,
        attention_norm_bias=dgate_bias,
        output_bias=None if weights.output_bias is None else doutput_bias,
    )
    return dx, *_as_weights(of_weights, weights), dposition, dtime


def _heads(parts: dict[str, Tensor], options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v with a dim of heads."""
    H = options.num_heads
    q, k, v = (parts[part].view(len(parts[part]), H, options.widths[part] // H) for part in "qkv")
    return q, k, v


def _normed(inputs: Inputs, *, plain: bool, fp8: bool) -> tuple[Rows, Tensor, Tensor]:
    """Return norm(X) in these forms, plain at least, and mean and 1 / std of each row."""
    weights, eps = inputs.weights, inputs.options.eps
    weight, bias = _contiguous(weights.input_norm), _contiguous(weights.input_norm_bias)
    if fp8:
        found = layer_norm_fp8(inputs.x, weight, bias, eps=eps, keep=plain, impl="triton")
        return Rows(found.y, found.rows), found.mean, found.rstd
    y, mean, rstd = layer_norm_fwd(inputs.x, weight, bias, eps)
    return Rows(y), mean, rstd


def _gated(attended: Tensor, u: Tensor, inputs: Inputs) -> tuple[Rows, Tensor, Tensor]:
    """Return what the output projection reads, and mean and 1 / std of the gated norm."""
    weights, options = inputs.weights, inputs.options
    vectors = _contiguous(weights.attention_norm), _contiguous(weights.attention_norm_bias)
    if inputs.fp8.output is not None and options.gate_is_whole:
        found = norm_gate_fp8(
            attended,
            u,
            *vectors,
            eps=options.eps,
            dropout=options.dropout,
            seed=inputs.seed,
            keep=options.keep_gated and not inputs.folds_output,
            impl="triton",
        )
        return Rows(found.out, found.rows), found.mean, found.rstd
    gated, mean, rstd = norm_gate_fwd(
        attended,
        u,
        *vectors,
        inputs.seed,
        options.norm_groups,
        options.eps,
        options.concat_ua,
        options.dropout,
    )
    fp8 = None if inputs.fp8.output is None else quantize_rows(gated, impl="triton")
    return Rows(gated, fp8), mean, rstd


def _empty_gated(
    saved: Saved, dgated: Tensor, inputs: Inputs
) -> tuple[Rows, tuple[Tensor | None, QuantizedRows | None]]:
    """Return what the output projection read, and which of it the gated norm has yet to write."""
    if inputs.options.keep_gated and not inputs.folds_output:
        return Rows(saved.gated), (None, None)
    if inputs.folds_output and inputs.options.gate_is_whole:
        R, C = dgated.shape
        values = dgated.new_empty(R, C, dtype=torch.float8_e4m3fn)
        rows = QuantizedRows(values, dgated.new_empty(R, dtype=torch.float32))
        return Rows(None, rows), (None, rows)
    plain = torch.empty_like(dgated)
    return Rows(plain), (plain, None)


def _kept(rows: Rows, plain: bool, fp8: bool, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return these forms of the rows, and an empty tensor for another."""
    y = rows.plain if rows.plain is not None and plain else x.new_empty(0)
    if rows.fp8 is None or not fp8:
        return y, x.new_empty(0), x.new_empty(0)
    return y, *rows.fp8


def _rows_of(plain: Tensor, values: Tensor, scale: Tensor) -> Rows:
    """Return the forms that _kept did not leave out."""
    return Rows(
        plain if plain.dim() > 1 else None,
        QuantizedRows(values, scale) if values.dim() > 1 else None,
    )


def _rows(x: Tensor) -> Tensor:
    """Return x with contiguous columns; any row stride will do."""
    return x if x.stride(1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _add_rows(x: Tensor, rows: Tensor, more: Tensor) -> None:
    """Add `more` to the given rows of x, which differ: no two sums meet in one."""
    x.index_copy_(0, rows, x.index_select(0, rows) + more)


def _as_weights(gradients: Weights, weights: Weights) -> list[Tensor]:
    """Return each gradient in the dtype of its weight, empty where there is none."""
    return [
        weights.uvqk.new_empty(0)
        if weight is None or grad is None
        else grad.to(weight.dtype).contiguous()
        for grad, weight in zip(gradients, weights, strict=True)
    ]
