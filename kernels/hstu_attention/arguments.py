"""Checks of the arguments of hstu_attention: each names the argument and what was found."""

import torch
from torch import Tensor

from kernels.hstu_attention.bias import RelativeBias


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    q_offsets: Tensor,
    num_candidates: Tensor | None,
) -> None:
    """Check shapes, dtypes and devices against each other.

    Raises:
        ValueError: if they do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or not x.is_floating_point():
            raise ValueError(
                f"{name} must be a floating tensor (tokens, heads, dim), got {_describe(x)}"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"q, k and v must share dtype and device; q is {_describe(q)}, "
                f"{name} {_describe(x)}"
            )
    if k.shape[1:] != q.shape[1:]:
        raise ValueError(
            f"k must have the heads and the dim of q, got k {tuple(k.shape)} and q {tuple(q.shape)}"
        )
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"v must have the tokens and the heads of k, got v {tuple(v.shape)} and "
            f"k {tuple(k.shape)}"
        )
    integers = {"offsets": offsets, "q_offsets": q_offsets}
    if num_candidates is not None:
        integers["num_candidates"] = num_candidates
    for name, x in integers.items():
        if x.dim() != 1 or x.dtype != torch.int64 or x.device != q.device:
            raise ValueError(
                f"{name} must be a 1-D int64 tensor on the device of q, {q.device}, "
                f"got {_describe(x)}"
            )
    if offsets.numel() < 1:
        raise ValueError("offsets must hold B + 1 values, got none")
    if q_offsets.numel() != offsets.numel():
        raise ValueError(
            f"q_offsets must hold as many values as offsets, got {q_offsets.numel()} and "
            f"{offsets.numel()}"
        )
    if num_candidates is not None and num_candidates.numel() != offsets.numel() - 1:
        raise ValueError(
            f"num_candidates must hold one value for each of the {offsets.numel() - 1} sequences, "
            f"got {num_candidates.numel()}"
        )


def check_scaling(activation: str, scaling_length: float | None) -> None:
    """Check that the activation is known and that its scaling is given where it has one.

    Raises:
        ValueError: if not.
    """
    if activation not in ("silu", "softmax"):
        raise ValueError(f"activation must be 'silu' or 'softmax', got {activation!r}")
    if activation == "silu" and (scaling_length is None or not scaling_length > 0):
        raise ValueError(
            f"scaling_length must be above 0 with activation='silu', got {scaling_length}"
        )
    if activation == "softmax" and scaling_length is not None:
        raise ValueError(
            f"softmax divides by its own sum: scaling_length must be None, got {scaling_length}"
        )


def check_bias(bias: RelativeBias, q: Tensor, k: Tensor) -> None:
    """Check tables and times.

    Raises:
        ValueError: if they do not fit q and k, or the times would be ignored.
    """
    table = bias.position_table
    if table.dim() != 1 or table.numel() % 2 == 0 or not table.is_floating_point():
        raise ValueError(
            f"bias.position_table must be floating, (2 * M - 1,), got {_describe(table)}"
        )
    times = {"bias.query_time": (bias.query_time, q), "bias.key_time": (bias.key_time, k)}
    if bias.time_table is None:
        given = [name for name, (time, _) in times.items() if time is not None]
        if given:
            raise ValueError(f"{' and '.join(given)} would be ignored: bias.time_table is None")
        return
    if (
        bias.time_table.dim() != 1
        or bias.time_table.numel() == 0
        or not bias.time_table.is_floating_point()
    ):
        raise ValueError(
            f"bias.time_table must be floating, (T + 1,), got {_describe(bias.time_table)}"
        )
    for name, (time, like) in times.items():
        if time is None:
            raise ValueError(f"bias.time_table needs {name}, got None")
        if time.shape != like.shape[:1] or time.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, ({like.shape[0]},), got {_describe(time)}")


def check_lengths(
    offsets: Tensor,
    q_offsets: Tensor,
    num_candidates: Tensor | None,
    *,
    num_keys: int,
    num_queries: int,
    max_len: int,
    max_q_len: int,
) -> None:
    """Check the values of tensors in host memory.

    Raises:
        ValueError: if lengths contradict each other, the number of rows or the given maxima.
    """
    for name, x, total, longest, limit in (
        ("offsets", offsets, num_keys, "max_len", max_len),
        ("q_offsets", q_offsets, num_queries, "max_q_len", max_q_len),
    ):
        if x[0] != 0 or x[-1] != total:
            raise ValueError(
                f"{name} must begin with 0 and end with the number of rows, {total}, "
                f"got {int(x[0])} and {int(x[-1])}"
            )
        lengths = x.diff()
        if lengths.numel() and lengths.min() < 0:
            raise ValueError(f"{name} must not fall, got a step of {int(lengths.min())}")
        if lengths.numel() and lengths.max() > limit:
            raise ValueError(
                f"{longest} must be at least the largest step of {name}, {int(lengths.max())}, "
                f"got {limit}"
            )
    counts = {"q_offsets": q_offsets.diff()}
    if num_candidates is not None:
        counts["num_candidates"] = num_candidates
    for name, x in counts.items():
        if bool((x > offsets.diff()).any()) or bool((x < 0).any()):
            b = int(((x > offsets.diff()) | (x < 0)).nonzero()[0])
            raise ValueError(
                f"{name} must give each sequence between 0 and its number of tokens, "
                f"got {int(x[b])} for sequence {b} of {int(offsets.diff()[b])} tokens"
            )


def check_supported(q: Tensor, v: Tensor) -> None:
    """Check what the Triton kernels take.

    Raises:
        ValueError: if they do not take the dtype or a dim.
    """
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"the Triton kernels take float32, float16 and bfloat16, got {q.dtype}: convert q, k "
            "and v, or pass impl='reference'"
        )
    for name, dim in (("q and k", q.shape[2]), ("v", v.shape[2])):
        if not 1 <= dim <= 256:
            raise ValueError(
                f"the Triton kernels take a dim of 1 to 256, got {dim} of {name}: use more heads, "
                "or pass impl='reference'"
            )


def not_hopper(q: Tensor, v: Tensor, *, softmax: bool) -> str:
    """Return why the kernels for Hopper do not take a call; empty if they do."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, got {q.dtype}"
    if softmax:
        return "it has SiLU weights only, got activation='softmax'"
    for name, dim in (("q and k", q.shape[2]), ("v", v.shape[2])):
        if dim not in (32, 64, 128, 256):
            return f"it takes dims of 32, 64, 128 and 256, got {dim} of {name}"
    return ""


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"
