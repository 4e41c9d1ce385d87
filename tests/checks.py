import torch
from torch import Tensor


def assert_within_reference_error(
    actual: Tensor,
    same_dtype: Tensor,
    fp64: Tensor,
    *,
    times: float = 2.0,
    scale: float | None = None,
) -> None:
    """Bound the kernel's error by `times` the error the reference makes in the same dtype.

    Args:
        actual: what the kernel gives.
        same_dtype: what the reference gives in the kernel's dtype.
        fp64: what the reference gives in float64.
        times: 2; more for a gradient with a written reason.
        scale: what one rounding is relative to: the largest result, or for sums whose terms cancel
            the largest sum of the terms' magnitudes.
    """
    assert torch.isfinite(actual).all()
    eps = torch.finfo(actual.dtype).eps * (fp64.abs().max().item() if scale is None else scale)
    got = (actual.double() - fp64).abs().max().item()
    allowed = times * ((same_dtype.double() - fp64).abs().max().item() + eps)
    assert got <= allowed, f"max error {got:.3e} > {allowed:.3e}"
