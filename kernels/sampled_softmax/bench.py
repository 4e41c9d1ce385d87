"""Sampled softmax against torch: padded product of each group, then cross entropy."""

import torch
from torch.nn import functional

from kernels.bench import Case, timed
from kernels.sampled_softmax import sampled_softmax

# G groups of R rows and N negatives each: one large pool, a pool a partition, a pool a sequence.
CASES = [
    Case(f"G={G} R={R} N={N} D=256", torch.bfloat16, {"G": G, "R": R, "N": N, "D": 256})
    for G, R, N in ((1, 16384, 16384), (64, 512, 2048), (1024, 64, 128))
]
TEMPERATURE = 0.05


def variants(case, mode, device):
    G, R, N, D = (case.shape[key] for key in "GRND")

    def unit(n):
        return functional.normalize(torch.randn(n, D, device=device), dim=1).to(case.dtype)

    inputs = (unit(G * R), unit(G * R), unit(G * N))
    rows, negatives = (torch.arange(G + 1, device=device) * n for n in (R, N))
    ids = [torch.randint(1_000_000, (G * n,), device=device) for n in (R, N)]

    def ours(query, positive, negative):
        return sampled_softmax(
            query, positive, negative, rows, negatives,
            positive_id_R=ids[0], negative_id_N=ids[1], temperature=TEMPERATURE,
        )  # fmt: skip

    def rival(query, positive, negative):
        own = (query * positive).sum(1, dtype=torch.float32).view(G, R, 1)
        others = query.view(G, R, D) @ negative.view(G, N, D).mT
        same = ids[0].view(G, R, 1) == ids[1].view(G, 1, N)
        others = others.float().masked_fill(same, -torch.inf)
        logits = torch.cat([own, others], 2) / TEMPERATURE
        return (logits.logsumexp(2) - logits[:, :, 0]).view(-1)

    return {"ours": timed(ours, inputs, mode), "torch, padded": timed(rival, inputs, mode)}


def bytes_moved(case, mode):
    G, R, N, D = (case.shape[key] for key in "GRND")
    once = G * (2 * R + N) * D * case.dtype.itemsize
    return once if mode == "forward" else 2 * once


def flops(case, mode):
    G, R, N, D = (case.shape[key] for key in "GRND")
    # Backward: logits again, then the two products with their gradients.
    return 2 * G * R * N * D * (1 if mode == "forward" else 3)
