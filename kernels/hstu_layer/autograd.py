"""The layer as an operator of torch: its registration, and one autograd function around it.

Letters: L tokens, R rows of the result, D model dim, H heads.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.hstu_attention.structure import Structure
from kernels.hstu_layer.structure import (
    FIRST_OF_STRUCTURE,
    FIRST_OPTION,
    FIRST_VALUE,
    FIRST_WEIGHT,
    FP8,
    INPUTS_SCHEMA,
    PRODUCTS,
    Inputs,
    Options,
    Saved,
    Weights,
)


def apply(inputs: Inputs) -> Tensor:
    """Return the result of the layer, differentiable."""
    flat = inputs.flat
    if type(inputs.x) is Tensor and not torch.compiler.is_compiling():
        # The same, without the registered operator: it takes 0.2 ms of a processor a call.
        direct: Tensor = _Layer.apply(*flat)[0]  # type: ignore[no-untyped-call]
        return direct
    y: Tensor = _forward(*flat)[0]
    return y


def _run_forward(*inputs: Any) -> tuple[Tensor, ...]:
    from kernels.hstu_layer.fused import hstu_layer_fwd  # the reference needs no Triton

    given = Inputs.of(inputs)
    # Products have the dtype of x, whatever autocast would choose.
    with torch.autocast(given.x.device.type, enabled=False):
        y, saved = hstu_layer_fwd(given)
    return y, *saved


_forward = torch.library.custom_op(
    "gr::hstu_layer",
    _run_forward,
    mutates_args=(),
    schema=f"({INPUTS_SCHEMA}) -> ({', '.join(['Tensor'] * (1 + len(Saved._fields)))})",
)


@_forward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    given = Inputs.of(inputs)
    x, tail, weights = given.x, given.tail, given.weights
    options, structure = given.options, given.structure
    (L, D), H = x.shape, options.num_heads
    R = L if tail is None else tail.shape[0]
    uvqk, uq = weights.uvqk.shape[1], H * (options.qk_dim + options.v_dim)

    def kept(keep: bool, *shape: int) -> Tensor:
        return x.new_empty(shape if keep else (0,))

    def float32(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    def fp8(keep: bool, *shape: int) -> tuple[Tensor, Tensor]:
        if not keep:
            return x.new_empty(0), x.new_empty(0)
        return x.new_empty(shape, dtype=torch.float8_e4m3fn), float32(shape[0])

    normed = given.reads_normed
    normed_fp8, normed_scale = fp8(options.keep_normed and normed.fp8, L, D)
    keeps_gated = options.keep_gated and not given.folds_output

    return (
        x.new_empty(R, D),
        *Saved(
            normed=kept(options.keep_normed and normed.plain, L, D),
            normed_fp8=normed_fp8,
            normed_scale=normed_scale,
            uvqk=kept(options.keep_uvqk, R, uvqk if tail is None else uq),
            vk=kept(options.keep_uvqk and tail is not None, L, uq),
            act_uvqk=kept(given.keeps_activated, R, uvqk if tail is None else uq),
            act_vk=kept(given.keeps_activated and tail is not None, L, uq),
            attended=kept(options.keep_attended, R, H, options.v_dim),
            gated=kept(keeps_gated, R, weights.output.shape[1]),
            lse=float32(R, H) if structure.softmax else float32(0),
            mean=float32(L),
            rstd=float32(L),
            gate_mean=float32(R, options.norm_groups),
            gate_rstd=float32(R, options.norm_groups),
        ),
    )


def _run_backward(
    dy: Tensor, needs_bias_grad: bool, of_forward: Sequence[Tensor], *inputs: Any
) -> tuple[Tensor, ...]:
    from kernels.hstu_layer.fused import hstu_layer_bwd

    given = Inputs.of(inputs)
    with torch.autocast(dy.device.type, enabled=False):
        return hstu_layer_bwd(dy, needs_bias_grad, Saved(*of_forward), given)


_backward = torch.library.custom_op(
    "gr::hstu_layer_bwd",
    _run_backward,
    mutates_args=(),
    # What the forward pass saved is a list: an operator takes at most 64 arguments.
    schema=f"(Tensor dy, bool needs_bias_grad, Tensor[] of_forward, {INPUTS_SCHEMA}) -> "
    f"({', '.join(['Tensor'] * (1 + len(Weights._fields) + 2))})",
)


@_backward.register_fake
def _(
    dy: Tensor, needs_bias_grad: bool, of_forward: Sequence[Tensor], *inputs: Any
) -> tuple[Tensor, ...]:
    given = Inputs.of(inputs)
    x, weights, structure = given.x, given.weights, given.structure
    tables = structure.position_table, structure.time_table

    def like(x: Tensor | None, none: Tensor) -> Tensor:
        return none.new_empty(0) if x is None else x.new_empty(x.shape)

    return (
        x.new_empty(x.shape),
        *(like(weight, x) for weight in weights),
        *(like(table if needs_bias_grad else None, x) for table in tables),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.options, ctx.values = inputs[FIRST_OPTION:FIRST_OF_STRUCTURE], inputs[FIRST_VALUE:]
    # x, tail, seed, rotations, weights and those in fp8; offsets, tables and times.
    tensors = *inputs[:FP8], *inputs[FP8], *inputs[FIRST_OF_STRUCTURE:FIRST_VALUE]
    ctx.save_for_backward(*output[1:], *tensors)


def _differentiate(
    ctx: Any, dy: Tensor, *_: None, backward: Callable[..., Any] = _backward
) -> tuple[Any, ...]:
    weights = ctx.needs_input_grad[FIRST_WEIGHT:FP8]
    needs = Structure(*ctx.needs_input_grad[FIRST_OF_STRUCTURE:])
    needs_bias_grad = bool(needs.position_table or needs.time_table)
    first = len(Saved._fields)
    last = first + FP8
    after = last + 4 * len(PRODUCTS)
    saved, before = list(ctx.saved_tensors[:first]), ctx.saved_tensors[first:last]
    fp8, of_structure = list(ctx.saved_tensors[last:after]), ctx.saved_tensors[after:]
    dx, *dweights, dposition, dtime = backward(
        dy, needs_bias_grad, saved, *before, fp8, *ctx.options, *of_structure, *ctx.values
    )
    is_list = backward is _backward and all(x is not None for x in fp8)
    grads: dict[str, Tensor | None] = dict.fromkeys(Structure._fields)
    grads["position_table"] = dposition if needs.position_table else None
    grads["time_table"] = dtime if needs.time_table else None
    return (
        dx if ctx.needs_input_grad[0] else None,
        *[None] * (FIRST_WEIGHT - 1),
        *(d if needed else None for d, needed in zip(dweights, weights, strict=True)),
        # Of a list of tensors torch wants a list; one that holds None it takes for a value.
        [None] * len(fp8) if is_list else None,
        *[None] * len(Options._fields),
        *grads.values(),
    )


class _Layer(torch.autograd.Function):
    """The registered operator without its registration."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _run_forward(*inputs)
        ctx.mark_non_differentiable(*output[1:])
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *of_saved: None) -> tuple[Any, ...]:
        return _differentiate(ctx, dy, *of_saved, backward=_run_backward)


_forward.register_autograd(_differentiate, setup_context=_save)
