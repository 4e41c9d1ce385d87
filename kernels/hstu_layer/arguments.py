"""Checks of the arguments of hstu_layer: each names the argument and what was found."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.hstu_layer.structure import RECOMPUTABLE, Fp8Weights, LayerWeights
from kernels.linear import QuantizedWeight, faster_wgrad
from kernels.quantize.op import check_triton_rows


def check_options(activate: str, norm: str, recompute: Sequence[str]) -> None:
    """Refuse names that are not known.

    Raises:
        ValueError: naming them.
    """
    for name, value, known in (
        ("activate", activate, ("all", "u_only")),
        ("norm", norm, ("layer", "group")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")
    unknown = [name for name in recompute if name not in RECOMPUTABLE]
    if isinstance(recompute, str) or unknown:
        raise ValueError(f"recompute must hold names of {list(RECOMPUTABLE)}, got {recompute!r}")


def check_tensors(
    x_LD: Tensor,
    weights: LayerWeights,
    offsets: Tensor,
    num_candidates: Tensor | None,
    num_heads: int,
    qk_dim: int,
    v_dim: int,
    concat_ua: bool,
) -> None:
    """Refuse tensors of the wrong shape, dtype or device.

    Raises:
        ValueError: naming one.
    """
    if x_LD.dim() != 2 or x_LD.shape[1] == 0 or not x_LD.is_floating_point():
        raise ValueError(f"x must be (L, D) floating with D > 0, got {_describe(x_LD)}")
    for name, count in (("num_heads", num_heads), ("qk_dim", qk_dim), ("v_dim", v_dim)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    D, HK, HV = x_LD.shape[1], num_heads * qk_dim, num_heads * v_dim
    shapes = {
        "uvqk": (D, 2 * HV + 2 * HK),
        "output": (D, HV * (3 if concat_ua else 1)),
        "input_norm": (D,),
        "input_norm_bias": (D,),
        "uvqk_bias": (2 * HV + 2 * HK,),
        "attention_norm": (HV,),
        "attention_norm_bias": (HV,),
        "output_bias": (D,),
    }
    for name, shape in shapes.items():
        weight = getattr(weights, name)
        if weight is None:
            continue
        if weight.shape != shape or not weight.is_floating_point() or weight.device != x_LD.device:
            raise ValueError(
                f"weights.{name} must be {shape}, floating, on {x_LD.device} as x is, "
                f"got {_describe(weight)}"
            )
    for name, counts in (("offsets", offsets), ("num_candidates", num_candidates)):
        if counts is not None:
            _check_integers(name, counts, offsets.numel() - (name != "offsets"), x_LD.device)
    if offsets.numel() < 1:
        raise ValueError("offsets must hold B + 1 values, got none")


def check_tail(
    tail_R: Tensor, tail_offsets: Tensor | None, max_tail_len: int | None, offsets: Tensor
) -> tuple[Tensor, int]:
    """Return the offsets of the tails and the longest, checked.

    Raises:
        ValueError: if one is missing or does not fit.
    """
    if tail_offsets is None or max_tail_len is None:
        missing = "tail_offsets" if tail_offsets is None else "max_tail_len"
        raise ValueError(f"tail_R needs tail_offsets and max_tail_len, got no {missing}")
    _check_integers("tail_R", tail_R, tail_R.numel(), offsets.device)
    _check_integers("tail_offsets", tail_offsets, offsets.numel(), offsets.device)
    return tail_offsets, max_tail_len


def _check_integers(name: str, x: Tensor, size: int, device: torch.device) -> None:
    if x.dim() != 1 or x.numel() != size or x.dtype != torch.int64 or x.device != device:
        raise ValueError(f"{name} must be ({size},) int64 on {device}, got {_describe(x)}")


def check_dropout(dropout: float, seed: Tensor | None, x_LD: Tensor) -> None:
    """Refuse a probability outside of [0, 1), or one without a seed.

    Raises:
        ValueError: naming what does not fit.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if dropout > 0 and (
        seed is None or seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != x_LD.device
    ):
        found = "None" if seed is None else _describe(seed)
        raise ValueError(f"dropout needs a seed: one int64 on {x_LD.device}, got {found}")


def folds(wgrad: str, weight: QuantizedWeight | None, *, has_silu: bool) -> bool:
    """Return whether the gradient of this weight, if there is one, is computed in fp8."""
    if wgrad == "auto" and weight is not None:
        F, D = weight.rows.values.shape
        wgrad = faster_wgrad(F, D, weight.rows.values.device, has_silu=has_silu)
    return wgrad == "fold"


def check_fp8(fp8: Fp8Weights | None, wgrad: str, weights: LayerWeights) -> None:
    """Refuse weights in fp8 that are not of these weights.

    Raises:
        ValueError: naming what does not fit.
    """
    if wgrad not in ("auto", "fold", "bf16"):
        raise ValueError(f"fp8_wgrad must be auto, fold or bf16, got {wgrad!r}")
    if fp8 is None:
        return
    shapes = {"uvqk": weights.uvqk.shape[::-1], "output": weights.output.shape}
    for name, (F, D) in shapes.items():
        weight: QuantizedWeight | None = getattr(fp8, name)
        if weight is None:
            continue
        found = weight.rows.values.shape, weight.columns.values.shape
        if found != ((F, D), (D, F)):
            raise ValueError(
                f"fp8.{name} must be of a weight of {F} outputs and {D} inputs, got "
                f"{tuple(found[0])} and transposed {tuple(found[1])}: pass "
                "quantize_weights(weights)"
            )


def _check_fp8_triton(
    fp8: Fp8Weights, x_LD: Tensor, qk_dim: int, v_dim: int, num_heads: int
) -> None:
    if x_LD.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"fp8 needs float16 or bfloat16 tokens on impl='triton', got {x_LD.dtype}: cast x, "
            "leave fp8 out, or pass impl='reference'"
        )
    check_triton_rows("x", x_LD, x_LD.shape[1])
    if fp8.uvqk is not None:
        HV, HK = num_heads * v_dim, num_heads * qk_dim
        columns = 2 * sum(2 ** (width - 1).bit_length() for width in (HV, HK))
        check_triton_rows("the UVQK projection in fp8", x_LD, columns)


def check_kernels(
    x_LD: Tensor, qk_dim: int, v_dim: int, num_heads: int, norm: str, fp8: Fp8Weights | None
) -> None:
    """Refuse what the kernels do not take.

    Raises:
        ValueError: naming it.
    """
    from kernels._triton.rows import check_rows

    for name, dim in (("qk_dim", qk_dim), ("v_dim", v_dim)):
        if dim > 256:
            raise ValueError(
                f"the Triton kernels take {name} up to 256, got {dim}: use more heads, or pass "
                "impl='reference'"
            )
    check_rows("x", x_LD.dtype, x_LD.shape[1])
    check_rows("the attention output", x_LD.dtype, v_dim * (1 if norm == "group" else num_heads))
    if fp8 is not None:
        _check_fp8_triton(fp8, x_LD, qk_dim, v_dim, num_heads)


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"
