"""Keys and values into the rows of a cache, and a cached sequence out of them to one place.

Attention kernels that read a sequence in one place then take it whole.

Letters: R new tokens, C rows of the cache, G pages, H heads, K dim of keys, V dim of values.
"""

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.hstu_attention.cached import PAGE, CachedKeys


def laid_out(
    k: Tensor, v: Tensor, cached: CachedKeys, *, impl: Impl | str = Impl.AUTO
) -> tuple[Tensor, Tensor]:
    """Return keys and values of the first cached sequence, and the new ones behind them.

    There is room for full pages: G * PAGE + R rows, the rest of which are zeros, so that nothing
    need be known on the host of how long the sequence is. No gradient.

    Args:
        k: (R, H, K) of the new tokens.
        v: (R, H, V).
        cached: of the sequence; others are not read.
        impl: which implementation runs.

    Returns:
        (G * PAGE + R, H, K) and (G * PAGE + R, H, V).

    Raises:
        ValueError: if shapes, dtypes or devices of new and cached rows differ.
    """
    for name, new, old in (("k", k, cached.k), ("v", v, cached.v)):
        if new.shape[1:] != old.shape[1:] or new.dtype != old.dtype or new.device != old.device:
            raise ValueError(
                f"{name} must be (R, {old.shape[1]}, {old.shape[2]}) {old.dtype} on {old.device}, "
                f"as cached.{name} is, got {tuple(new.shape)} {new.dtype} on {new.device}"
            )
    pages_G, length = cached.pages[0], cached.lengths[:1]
    num_rows = len(pages_G) * PAGE + len(k)
    if resolve(impl, k) is not Impl.REFERENCE:
        from kernels.hstu_attention._triton.laid_out import laid_out as run

        return run(pages_G, length, cached.k, cached.v, k, v, num_rows, PAGE)
    row_n = torch.arange(num_rows, device=k.device)
    token_n = row_n.clamp(max=len(pages_G) * PAGE - 1)
    from_cache = pages_G[token_n // PAGE].long() * PAGE + token_n % PAGE
    from_new = row_n - length

    def whole(old: Tensor, new: Tensor) -> Tensor:
        is_new = (from_new >= 0) & (from_new < len(new))
        behind = old.new_zeros(num_rows, *old.shape[1:])
        if len(new):
            own = new[from_new.clamp(0, len(new) - 1)]
            behind = torch.where(is_new[:, None, None], own, behind)
        return torch.where((row_n < length)[:, None, None], old[from_cache], behind)

    return whole(cached.k, k), whole(cached.v, v)


def keep_rows(
    k: Tensor,
    v: Tensor,
    rows_R: Tensor,
    kept_k: Tensor,
    kept_v: Tensor,
    *,
    impl: Impl | str = Impl.AUTO,
) -> None:
    """Write keys and values to these rows of a cache. Of a row that stands twice either may stay.

    Args:
        k: (R, H, K).
        v: (R, H, V).
        rows_R: int64, below C. A row outside of the cache is the caller's error, which the kernel
            does not look for.
        kept_k: (C, H, K), dtype of k, contiguous.
        kept_v: (C, H, V), likewise.
        impl: which implementation runs.
    """
    if resolve(impl, k) is not Impl.REFERENCE:
        from kernels.hstu_attention._triton.laid_out import keep_rows as run

        run(k, v, rows_R, kept_k, kept_v)
        return
    for new, kept in ((k, kept_k), (v, kept_v)):
        kept.index_copy_(0, rows_R, new)
