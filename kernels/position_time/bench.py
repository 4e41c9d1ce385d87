"""Input encoding against torch: product, two look-ups and two sums."""

import torch
from torch.nn import functional

from kernels.bench import Case, timed
from kernels.position_time import position_time

TOKENS, POSITIONS, TIMES = 131072, 1024, 2049
CASES = [
    Case(f"L={TOKENS} D={dim}", torch.bfloat16, {"L": TOKENS, "D": dim}) for dim in (512, 1024)
]


def variants(case, mode, device):
    L, D = case.shape["L"], case.shape["D"]
    x = torch.randn(L, D, device=device, dtype=case.dtype)
    tables = (torch.randn(POSITIONS, D, device=device), torch.randn(TIMES, D, device=device))
    # Most tokens are recent: low indices are common, as in histories.
    position, time = ((torch.rand(L, device=device) ** 3 * t.shape[0]).long() for t in tables)
    scale = D**0.5

    def ours(x, position_table, time_table):
        return position_time(x, position_table, position, time_table, time, scale=scale)

    def rival(x, position_table, time_table):
        looked_up = functional.embedding(position, position_table.to(x.dtype))
        return x * scale + looked_up + functional.embedding(time, time_table.to(x.dtype))

    inputs = (x, *tables)
    return {"ours": timed(ours, inputs, mode), "torch": timed(rival, inputs, mode)}


def bytes_moved(case, mode):
    L, D = case.shape["L"], case.shape["D"]
    return L * (2 * D * case.dtype.itemsize + 16) + (POSITIONS + TIMES) * D * 4


def flops(case, mode):
    return 0
