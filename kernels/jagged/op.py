"""Jagged rows: the operators, their checks and their gradients.

Letters: B sequences, L tokens, N rows of a padded sequence, * any further dims of a row.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.jagged import reference


def concat(
    a: Tensor, a_offsets: Tensor, b: Tensor, b_offsets: Tensor, *, impl: Impl | str = Impl.AUTO
) -> Tensor:
    """Return sequence by sequence the rows of a, then those of b.

    Args:
        a: (La, *), any row stride.
        a_offsets: (B + 1,) int64: rows of sequence b are a_offsets[b]:a_offsets[b + 1].
        b: (Lb, *), dtype and row shape of a.
        b_offsets: (B + 1,) int64.
        impl: which implementation runs.

    Returns:
        (La + Lb, *); its offsets are a_offsets + b_offsets.

    Raises:
        ValueError: if rows, dtypes or offsets do not fit. Values of offsets are checked on the CPU
            only, where that waits for nothing.
    """
    _check_rows("a", a, a_offsets, a.shape[0])
    _check_rows("b", b, b_offsets, b.shape[0])
    _check_same_sequences(a_offsets, b_offsets)
    if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype or a.device != b.device:
        raise ValueError(f"b must have rows as a, {_describe(a)}; got {_describe(b)}")
    first, second = _flat(a), _flat(b)
    num_rows = a.shape[0] + b.shape[0]
    if resolve(impl, a) is Impl.REFERENCE:
        rows = reference.gather("concat", num_rows, a_offsets, b_offsets, first, second)
    else:
        rows = _concat(first, a_offsets, second, b_offsets)
    return rows.view(num_rows, *a.shape[1:])


def split(
    x: Tensor,
    a_offsets: Tensor,
    b_offsets: Tensor,
    *,
    num_a: int,
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor]:
    """Return the head and the tail of each sequence: what `concat` joined.

    Args:
        x: (L, *), any row stride; its offsets are a_offsets + b_offsets.
        a_offsets: (B + 1,) int64, of the heads.
        b_offsets: (B + 1,) int64, of the tails.
        num_a: a_offsets[-1], given so that no device has to be waited for.
        impl: which implementation runs.

    Returns:
        (num_a, *) and (L - num_a, *).

    Raises:
        ValueError: if offsets do not fit x (values on the CPU only).
    """
    num_b = x.shape[0] - num_a if x.dim() else 0
    if num_a < 0 or num_b < 0:
        raise ValueError(f"num_a must be in 0 .. {x.shape[0]}, the rows of x; got {num_a}")
    _check_rows("x", x, a_offsets, num_a, "a_offsets")
    _check_rows("x", x, b_offsets, num_b, "b_offsets")
    _check_same_sequences(a_offsets, b_offsets)
    flat = _flat(x)
    if resolve(impl, x) is Impl.REFERENCE:
        a = reference.gather("split_a", num_a, a_offsets, b_offsets, flat, None)
        b = reference.gather("split_b", num_b, a_offsets, b_offsets, flat, None)
    else:
        a, b = _split(flat, a_offsets, b_offsets, num_a)
    return a.view(num_a, *x.shape[1:]), b.view(num_b, *x.shape[1:])


def newest(
    x: Tensor,
    offsets: Tensor,
    tail_offsets: Tensor,
    *,
    num_rows: int,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Return the last tail_offsets[b + 1] - tail_offsets[b] rows of each sequence.

    Args:
        x: (L, *), any row stride.
        offsets: (B + 1,) int64.
        tail_offsets: (B + 1,) int64; no tail is longer than its sequence.
        num_rows: tail_offsets[-1], given so that no device has to be waited for.
        impl: which implementation runs.

    Returns:
        (num_rows, *).

    Raises:
        ValueError: if offsets do not fit (values on the CPU only).
    """
    _check_rows("x", x, offsets, x.shape[0])
    _check_rows("x", x, tail_offsets, num_rows, "tail_offsets")
    _check_same_sequences(offsets, tail_offsets)
    if _readable(offsets) and (tail_offsets.diff() > offsets.diff()).any():
        sequence = int((tail_offsets.diff() > offsets.diff()).nonzero()[0])
        raise ValueError(
            f"tail_offsets: sequence {sequence} has {int(offsets.diff()[sequence])} rows, its tail "
            f"{int(tail_offsets.diff()[sequence])}"
        )
    flat = _flat(x)
    if resolve(impl, x) is Impl.REFERENCE:
        rows = reference.gather("newest", num_rows, offsets, tail_offsets, flat, None)
    else:
        rows = _newest(flat, offsets, tail_offsets, num_rows)
    return rows.view(num_rows, *x.shape[1:])


def to_padded(
    x: Tensor,
    offsets: Tensor,
    *,
    max_len: int,
    fill: float = 0.0,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Return (B, max_len, *): the first max_len rows of each sequence, then `fill`.

    Args:
        x: (L, *), any row stride.
        offsets: (B + 1,) int64.
        max_len: N. Rows from there on are left out.
        fill: what stands after the end of a sequence.
        impl: which implementation runs.

    Raises:
        ValueError: if offsets do not fit x (values on the CPU only), or max_len is negative.
    """
    _check_rows("x", x, offsets, x.shape[0])
    if max_len < 0:
        raise ValueError(f"max_len must be at least 0, got {max_len}")
    flat, B = _flat(x), offsets.numel() - 1
    if resolve(impl, x) is Impl.REFERENCE:
        rows = reference.gather("to_padded", B * max_len, offsets, max_len, flat, None, fill)
    else:
        rows = _to_padded(flat, offsets, max_len, fill)
    return rows.view(B, max_len, *x.shape[1:])


def from_padded(
    x: Tensor, offsets: Tensor, *, num_rows: int, impl: Impl | str = Impl.AUTO
) -> Tensor:
    """Return the jagged rows of a padded tensor; a row from its N on is zero.

    Args:
        x: (B, N, *).
        offsets: (B + 1,) int64.
        num_rows: offsets[-1], given so that no device has to be waited for.
        impl: which implementation runs.

    Returns:
        (num_rows, *).

    Raises:
        ValueError: if offsets do not fit x (values on the CPU only).
    """
    if x.dim() < 2 or x.shape[0] != offsets.numel() - 1:
        raise ValueError(
            f"x must be (B, N, *) with B = {offsets.numel() - 1} as offsets say, got {_describe(x)}"
        )
    _check_rows("x", x, offsets, num_rows)
    N = x.shape[1]
    flat = x.reshape(x.shape[0] * N, math.prod(x.shape[2:]))
    if resolve(impl, x) is Impl.REFERENCE:
        rows = reference.gather("from_padded", num_rows, offsets, N, flat, None)
    else:
        rows = _from_padded(flat, offsets, N, num_rows)
    return rows.view(num_rows, *x.shape[2:])


def _flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def _readable(offsets: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device."""
    return not (offsets.is_cuda or torch.compiler.is_compiling())


def _check_rows(
    name: str, x: Tensor, offsets: Tensor, num_rows: int, offsets_name: str = "offsets"
) -> None:
    if x.dim() == 0 or x.dtype == torch.bool or x.is_complex():
        raise ValueError(
            f"{name} must have rows of floating-point or integer values, got {_describe(x)}"
        )
    if offsets.dim() != 1 or offsets.numel() == 0 or offsets.dtype != torch.int64:
        raise ValueError(
            f"{offsets_name} of {name} must be (B + 1,) int64, got {_describe(offsets)}"
        )
    if offsets.device != x.device:
        raise ValueError(
            f"{offsets_name} of {name} must be on {x.device}, got {_describe(offsets)}"
        )
    if not _readable(offsets):
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != num_rows or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"{offsets_name} of {name} must rise from 0 to {num_rows}, got {first} .. {last}"
            f"{'' if (offsets.diff() >= 0).all() else ', falling in between'}"
        )


def _check_same_sequences(a_offsets: Tensor, b_offsets: Tensor) -> None:
    if a_offsets.numel() != b_offsets.numel():
        raise ValueError(
            "both offsets must be of the same sequences, got "
            f"{a_offsets.numel() - 1} and {b_offsets.numel() - 1}"
        )


# Each operator is the gradient of its partner.


@torch.library.custom_op("gr::jagged_concat", mutates_args=())
def _concat(a: Tensor, a_offsets: Tensor, b: Tensor, b_offsets: Tensor) -> Tensor:
    from kernels.jagged._triton import gather

    return gather("concat", a.shape[0] + b.shape[0], a_offsets, b_offsets, a, b)


@_concat.register_fake
def _(a: Tensor, a_offsets: Tensor, b: Tensor, b_offsets: Tensor) -> Tensor:
    return a.new_empty(a.shape[0] + b.shape[0], a.shape[1])


@torch.library.custom_op("gr::jagged_split", mutates_args=())
def _split(x: Tensor, a_offsets: Tensor, b_offsets: Tensor, num_a: int) -> tuple[Tensor, Tensor]:
    from kernels.jagged._triton import gather

    a = gather("split_a", num_a, a_offsets, b_offsets, x, None)
    return a, gather("split_b", x.shape[0] - num_a, a_offsets, b_offsets, x, None)


@_split.register_fake
def _(x: Tensor, a_offsets: Tensor, b_offsets: Tensor, num_a: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(num_a, x.shape[1]), x.new_empty(x.shape[0] - num_a, x.shape[1])


@torch.library.custom_op("gr::jagged_newest", mutates_args=())
def _newest(x: Tensor, offsets: Tensor, tail_offsets: Tensor, num_rows: int) -> Tensor:
    from kernels.jagged._triton import gather

    return gather("newest", num_rows, offsets, tail_offsets, x, None)


@_newest.register_fake
def _(x: Tensor, offsets: Tensor, tail_offsets: Tensor, num_rows: int) -> Tensor:
    return x.new_empty(num_rows, x.shape[1])


@torch.library.custom_op("gr::jagged_oldest_zero", mutates_args=())
def _oldest_zero(tails: Tensor, offsets: Tensor, tail_offsets: Tensor, num_rows: int) -> Tensor:
    from kernels.jagged._triton import gather

    return gather("oldest_zero", num_rows, offsets, tail_offsets, None, tails)


@_oldest_zero.register_fake
def _(tails: Tensor, offsets: Tensor, tail_offsets: Tensor, num_rows: int) -> Tensor:
    return tails.new_empty(num_rows, tails.shape[1])


@torch.library.custom_op("gr::jagged_to_padded", mutates_args=())
def _to_padded(x: Tensor, offsets: Tensor, max_len: int, fill: float) -> Tensor:
    from kernels.jagged._triton import gather

    num_rows = (offsets.numel() - 1) * max_len
    return gather("to_padded", num_rows, offsets, max_len, x, None, fill)


@_to_padded.register_fake
def _(x: Tensor, offsets: Tensor, max_len: int, fill: float) -> Tensor:
    return x.new_empty((offsets.numel() - 1) * max_len, x.shape[1])


@torch.library.custom_op("gr::jagged_from_padded", mutates_args=())
def _from_padded(x: Tensor, offsets: Tensor, max_len: int, num_rows: int) -> Tensor:
    from kernels.jagged._triton import gather

    return gather("from_padded", num_rows, offsets, max_len, x, None)


@_from_padded.register_fake
def _(x: Tensor, offsets: Tensor, max_len: int, num_rows: int) -> Tensor:
    return x.new_empty(num_rows, x.shape[1])


def _concat_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, a_offsets, _, b_offsets = inputs
    ctx.save_for_backward(a_offsets, b_offsets)
    ctx.num_a = a.shape[0]


def _concat_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    da, db = _split(dout, *ctx.saved_tensors, ctx.num_a)
    return da, None, db, None


def _split_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _split_gradients(ctx: Any, da: Tensor, db: Tensor) -> tuple[Tensor | None, ...]:
    a_offsets, b_offsets = ctx.saved_tensors
    return _concat(da, a_offsets, db, b_offsets), None, None, None


def _newest_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, tail_offsets, _ = inputs
    ctx.save_for_backward(offsets, tail_offsets)
    ctx.num_rows = x.shape[0]


def _newest_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _oldest_zero(dout, *ctx.saved_tensors, ctx.num_rows), None, None, None


def _oldest_zero_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _newest(dout, *ctx.saved_tensors, ctx.num_rows), None, None, None


def _to_padded_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, max_len, _ = inputs
    ctx.save_for_backward(offsets)
    ctx.sizes = (max_len, x.shape[0])


def _to_padded_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _from_padded(dout, *ctx.saved_tensors, *ctx.sizes), None, None, None


def _from_padded_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, offsets, max_len, _ = inputs
    ctx.save_for_backward(offsets)
    ctx.max_len = max_len


def _from_padded_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _to_padded(dout, *ctx.saved_tensors, ctx.max_len, 0.0), None, None, None


_concat.register_autograd(_concat_gradients, setup_context=_concat_save)
_split.register_autograd(_split_gradients, setup_context=_split_save)
_newest.register_autograd(_newest_gradients, setup_context=_newest_save)
_oldest_zero.register_autograd(_oldest_zero_gradients, setup_context=_newest_save)
_to_padded.register_autograd(_to_padded_gradients, setup_context=_to_padded_save)
_from_padded.register_autograd(_from_padded_gradients, setup_context=_from_padded_save)
