"""The layer from its kernels; the backward pass computes again what was not kept.

    X' = norm(X);  Z = X' W + b;  U, V, Q, K = silu(Z);  Y = X + W_o gate(norm(attention), U)

U, V, Q and K are views of one buffer, Z has one, and so has its gradient. SiLU has no inverse, so
it is Z that is kept, if anything, and SiLU is applied again; both passes see the same bits.

Letters: L tokens, R rows of the result (the tails, or R = L), D model dim, H heads, K dim of
queries and keys, V dim of values, C columns that the output projection reads.
"""

import torch
from torch import Tensor

from kernels.dispatch import is_hopper
from kernels.hstu_attention.op import _run_backward as attention_bwd
from kernels.hstu_attention.op import _run_forward as attention_fwd
from kernels.hstu_layer._triton import silu_bwd, silu_fwd
from kernels.hstu_layer.structure import Inputs, Options, Saved, Weights
from kernels.layer_norm._triton import layer_norm_bwd, layer_norm_fwd
from kernels.linear.op import why_not_hopper
from kernels.norm_gate._triton import norm_gate_bwd, norm_gate_fwd


class Projection:
    """Columns of the UVQK projection for some of the tokens.

    Args:
        parts: letters of "uvqk", which stand in this order in `widths`.
        rows: index of the tokens; None means all.
        weights: of the layer.
        options: likewise.
        dtype: of the product.
    """

    def __init__(
        self,
        parts: str,
        rows: Tensor | None,
        weights: Weights,
        options: Options,
        dtype: torch.dtype,
    ) -> None:
        self.parts, self.rows, self.options = parts, rows, options
        self.widths = [options.widths[part] for part in parts]
        self.silu_columns = options.silu_columns(parts)
        self.weight_DF = self._columns(weights.uvqk.to(dtype))
        bias = weights.uvqk_bias
        self.bias = None if bias is None else self._columns(bias).contiguous()

    def _columns(self, x: Tensor) -> Tensor:
        if self.parts == "uvqk":
            return x
        by_part = dict(
            zip("uvqk", torch.split(x, [*self.options.widths.values()], -1), strict=True)
        )
        return torch.cat([by_part[part] for part in self.parts], -1)

    def select(self, normed_LD: Tensor) -> Tensor:
        """Return X' of the tokens."""
        return normed_LD if self.rows is None else normed_LD.index_select(0, self.rows)

    def forward(self, normed_LD: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """Return silu(Z), and Z if `keep`, else an empty tensor."""
        weight_FD = self.weight_DF.T.contiguous()
        columns = self.silu_columns
        normed = self.select(normed_LD)
        keep_z = keep and columns > 0
        y, z = _linear(normed, weight_FD, self.bias, None, columns, keep_z, self.options)
        return y, y if keep and columns == 0 else z

    def activate(self, z: Tensor) -> dict[str, Tensor]:
        """Return the parts of silu(Z)."""
        columns = self.silu_columns
        if columns == 0:
            return self.split(z)
        y = silu_fwd(z[:, :columns])
        return self.split(y) if columns == z.shape[1] else {**self.split(z), self.parts[0]: y}

    def split(self, y: Tensor) -> dict[str, Tensor]:
        """Return the parts, views of y."""
        return dict(zip(self.parts, torch.split(y, self.widths, 1), strict=True))

    def gradients(
        self, parts: dict[str, Tensor], z: Tensor, normed_LD: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return the gradients of X', and of the weight's and the bias's columns by part.

        Args:
            parts: gradient of each part of silu(Z), contiguous, (rows, width).
            z: Z.
            normed_LD: X', of all tokens.
        """
        dz, dbias = silu_bwd([parts[part] for part in self.parts], z, self.silu_columns)
        dnormed = dz @ self.weight_DF.T
        dweight = self.select(normed_LD).T @ dz
        return (
            dnormed,
            self.split(dweight),
            dict(zip(self.parts, torch.split(dbias, self.widths), strict=True)),
        )


def projections(
    tail: Tensor | None, weights: Weights, options: Options, dtype: torch.dtype
) -> list[Projection]:
    """Return the projection of all tokens; with tails that of theirs and that of all."""
    if tail is None:
        return [Projection("uvqk", None, weights, options, dtype)]
    return [
        Projection("uq", tail, weights, options, dtype),
        Projection("vk", None, weights, options, dtype),
    ]


def hstu_layer_fwd(inputs: Inputs) -> tuple[Tensor, Saved]:
    """Return Y (R, D), and what the options keep for the backward pass."""
    x, tail, seed, weights, options, structure = inputs
    x = _rows(x)
    normed, mean, rstd = _normed(x, weights, options)
    parts: dict[str, Tensor] = {}
    kept = []
    for projection in projections(tail, weights, options, x.dtype):
        y, z = projection.forward(normed, options.keep_uvqk)
        parts |= projection.split(y)
        kept.append(z)
        del y, z
    attended, lse = attention_fwd(*_heads(parts, options), *structure)
    gated, gate_mean, gate_rstd = norm_gate_fwd(
        attended.flatten(1),
        parts["u"],
        _contiguous(weights.attention_norm),
        _contiguous(weights.attention_norm_bias),
        seed,
        options.norm_groups,
        options.eps,
        options.concat_ua,
        options.dropout,
    )
    residual = x if tail is None else x.index_select(0, tail)
    y, _ = _linear(
        gated, weights.output.to(x.dtype), weights.output_bias, residual, 0, False, options
    )
    return y, Saved(
        normed=normed if options.keep_normed else x.new_empty(0),
        uvqk=kept[0] if options.keep_uvqk else x.new_empty(0),
        vk=kept[1] if options.keep_uvqk and tail is not None else x.new_empty(0),
        attended=attended,
        gated=gated if options.keep_gated else x.new_empty(0),
        lse=lse,
        mean=mean,
        rstd=rstd,
        gate_mean=gate_mean,
        gate_rstd=gate_rstd,
    )


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
    x, tail, seed, weights, options, structure = inputs
    x, dy = _rows(x), _rows(dy)
    normed = saved.normed if options.keep_normed else _normed(x, weights, options)[0]
    parts: dict[str, Tensor] = {}
    used = projections(tail, weights, options, x.dtype)
    kept = [saved.uvqk, saved.vk][: len(used)]
    for i, projection in enumerate(used):
        if options.keep_uvqk:
            parts |= projection.activate(kept[i])
        else:
            y, kept[i] = projection.forward(normed, True)
            parts |= projection.split(y)
            del y

    output_weight = weights.output.to(x.dtype)
    dgated = dy @ output_weight
    gated = saved.gated if options.keep_gated else torch.empty_like(dgated)
    dattended, du, dgate_weight, dgate_bias = norm_gate_bwd(
        dgated,
        saved.attended.flatten(1),
        parts["u"],
        _contiguous(weights.attention_norm),
        _contiguous(weights.attention_norm_bias),
        seed,
        saved.gate_mean,
        saved.gate_rstd,
        options.norm_groups,
        options.concat_ua,
        options.dropout,
        None if options.keep_gated else gated,
    )
    del dgated
    doutput = dy.T @ gated
    del gated
    dq, dk, dv, dposition, dtime = attention_bwd(
        dattended.view(saved.attended.shape),
        saved.attended if structure.softmax else None,
        saved.lse,
        needs_bias_grad,
        *_heads(parts, options),
        *structure,
    )
    del dattended, parts
    dparts = {"u": du, "v": dv.flatten(1), "q": dq.flatten(1), "k": dk.flatten(1)}
    del du, dv, dq, dk

    # The last of the projections is of all tokens, the one before of the tails.
    dnormed, dweights, dbiases = used[-1].gradients(dparts, kept[-1], normed)
    if tail is not None:
        dtail, *of_tail = used[0].gradients(dparts, kept[0], normed)
        _add_rows(dnormed, tail, dtail)
        dweights, dbiases = dweights | of_tail[0], dbiases | of_tail[1]
    del normed, kept, dparts
    dx, dnorm_weight, dnorm_bias = layer_norm_bwd(
        dnormed,
        x,
        _contiguous(weights.input_norm),
        weights.input_norm_bias is not None,
        saved.mean,
        saved.rstd,
        dy if tail is None else None,
    )
    if tail is not None:
        _add_rows(dx, tail, dy)
    gradients = Weights(
        uvqk=_joined(dweights),
        output=doutput,
        input_norm=dnorm_weight,
        input_norm_bias=dnorm_bias,
        uvqk_bias=_joined(dbiases),
        attention_norm=dgate_weight,
        attention_norm_bias=dgate_bias,
        output_bias=dy.sum(0, dtype=torch.float32),
    )
    return dx, *_as_weights(gradients, weights), dposition, dtime


def _heads(parts: dict[str, Tensor], options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v with a dim of heads."""
    H = options.num_heads
    q, k, v = (parts[part].view(len(parts[part]), H, options.widths[part] // H) for part in "qkv")
    return q, k, v


def _normed(x: Tensor, weights: Weights, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return norm(X), and mean and 1 / std of each row."""
    weight, bias = _contiguous(weights.input_norm), _contiguous(weights.input_norm_bias)
    return layer_norm_fwd(x, weight, bias, options.eps)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_columns: int,
    keep: bool,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Return y and z (empty unless `keep`) of kernels/linear, in its Hopper kernel if it can."""
    hopper = options.hopper_products and is_hopper(x.device)
    hopper = hopper and not why_not_hopper(x, weight, residual)
    if hopper:
        from kernels.linear._hopper.forward import linear_fwd
    else:
        from kernels.linear._triton.linear import linear_fwd
    found: tuple[Tensor, Tensor] = linear_fwd(
        x, weight.contiguous(), _contiguous(bias), residual, silu_columns, keep
    )
    return found


def _rows(x: Tensor) -> Tensor:
    """Return x with contiguous columns; any row stride will do."""
    return x if x.stride(1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _add_rows(x: Tensor, rows: Tensor, more: Tensor) -> None:
    """Add `more` to the given rows of x, which differ: no two sums meet in one."""
    x.index_copy_(0, rows, x.index_select(0, rows) + more)


def _joined(parts: dict[str, Tensor]) -> Tensor:
    """Return the columns of U, V, Q and K side by side."""
    return torch.cat([parts[part] for part in "uvqk"], -1)


def _as_weights(gradients: Weights, weights: Weights) -> list[Tensor]:
    """Return each gradient in the dtype of its weight, empty where there is none."""
    return [
        weights.uvqk.new_empty(0) if weight is None or grad is None else grad.to(weight.dtype)
        for grad, weight in zip(gradients, weights, strict=True)
    ]
