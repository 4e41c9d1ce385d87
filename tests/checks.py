import torch
from torch import Tensor


def assert_within_reference_error(
    actual: Tensor, same_dtype: Tensor, fp64: Tensor, *, times: float = 2.0
) -> None:
    """Bound the kernel's error by `times` the error the reference makes in the same dtype."""
    assert torch.isfinite(actual).all()
    eps = torch.finfo(actual.dtype).eps * fp64.abs().max().item()
    got = (actual.double() - fp64).abs().max().item()
    allowed = times * ((same_dtype.double() - fp64).abs().max().item() + eps)
    assert got <= allowed, f"max error {got:.3e} > {allowed:.3e}"
