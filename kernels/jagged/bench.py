"""Jagged rows against torch indexing with the index known beforehand: lengths uniform in [1, N]."""

import torch

from kernels import jagged
from kernels.bench import Case, timed

CASES = [
    Case(f"{op} B=128 N=2048 D={dim}", torch.bfloat16, {"B": 128, "N": 2048, "D": dim})
    for op in ("concat", "newest", "to_padded")
    for dim in (128, 512)
]


def _lengths(case):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, case.shape["N"] + 1, (case.shape["B"],), generator=generator)


def _tails(case):
    return (_lengths(case) // 4).clamp(min=1)


def _offsets(lengths, device):
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device)


def _positions(starts, counts):
    """Return the rows start .. start + count of each sequence, one after the other."""
    return torch.cat(
        [torch.arange(n) + s for s, n in zip(starts.tolist(), counts.tolist(), strict=True)]
    )


def variants(case, mode, device):
    N = case.shape["N"]
    lengths, tails = _lengths(case), _tails(case)
    offsets, tail_offsets = _offsets(lengths, device), _offsets(tails, device)
    starts = offsets[:-1].cpu()
    L, R = int(lengths.sum()), int(tails.sum())
    x = torch.randn(L, case.shape["D"], device=device, dtype=case.dtype)
    if case.name.startswith("concat"):
        b = torch.randn(R, case.shape["D"], device=device, dtype=case.dtype)
        order = torch.cat(
            [
                torch.cat(
                    [
                        _positions(starts[i : i + 1], lengths[i : i + 1]),
                        _positions(L + tail_offsets[i : i + 1].cpu(), tails[i : i + 1]),
                    ]
                )
                for i in range(len(lengths))
            ]
        ).to(device)
        return {
            "ours": timed(lambda x, b: jagged.concat(x, offsets, b, tail_offsets), (x, b), mode),
            "torch cat + index": timed(
                lambda x, b: torch.cat([x, b]).index_select(0, order), (x, b), mode
            ),
        }
    if case.name.startswith("newest"):
        order = _positions(starts + lengths - tails, tails).to(device)
        return {
            "ours": timed(
                lambda x: jagged.newest(x, offsets, tail_offsets, num_rows=R), (x,), mode
            ),
            "torch index_select": timed(lambda x: x.index_select(0, order), (x,), mode),
        }
    target = _positions(torch.arange(len(lengths)) * N, lengths).to(device)

    def rival(x):
        padded = x.new_zeros(len(lengths) * N, x.shape[1])
        return padded.index_copy_(0, target, x)

    return {
        "ours": timed(lambda x: jagged.to_padded(x, offsets, max_len=N), (x,), mode),
        "torch index_copy": timed(rival, (x,), mode),
    }


def bytes_moved(case, mode):
    row = case.shape["D"] * case.dtype.itemsize
    L, R = int(_lengths(case).sum()), int(_tails(case).sum())
    if case.name.startswith("concat"):
        return 2 * (L + R) * row
    if case.name.startswith("newest"):
        return (2 * R if mode == "forward" else R + L) * row
    return (L + case.shape["B"] * case.shape["N"] if mode == "forward" else 2 * L) * row


def flops(case, mode):
    return 0
