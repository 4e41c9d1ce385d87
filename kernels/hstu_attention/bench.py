"""HSTU attention against torch's softmax attention (same FLOPs), its options against plain causal.

FLOPs count visible pairs: two products forward, five backward.
"""

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.bench import Case, timed
from kernels.dispatch import Impl
from kernels.hstu_attention import AttentionMask, RelativeBias, hstu_attention
from kernels.hstu_attention.mask import num_visible

HEADS = 4
CASES = [
    Case(f"causal D={D} N={N}", torch.bfloat16, {"B": B, "N": N, "D": D})
    for D, N, B in (
        (64, 4096, 32),
        (64, 8192, 16),
        (128, 1024, 32),
        (128, 4096, 32),
        (128, 8192, 16),
        (256, 1024, 32),
        (256, 4096, 16),
    )
] + [
    Case("options D=128 N=4096", torch.bfloat16, {"B": 16, "N": 4096, "D": 128}),
    Case("jagged D=128 N=8192", torch.bfloat16, {"B": 32, "N": 8192, "D": 128}),
    *(
        Case(f"semi-local D=128 N={N}", torch.bfloat16, {"B": 8, "N": N, "D": 128})
        for N in (8192, 16384, 32768, 65536)
    ),
]
SEMI_LOCAL = AttentionMask(local_window=256, global_rows=256)
RIVALS = {
    "cuDNN softmax": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention-2 softmax": SDPBackend.FLASH_ATTENTION,
}


def variants(case, mode, device):
    N, D = case.shape["N"], case.shape["D"]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths(case).cumsum(0)]).to(device)
    L = int(offsets[-1])
    uvqk = torch.randn(L, 4 * HEADS * D, device=device, dtype=case.dtype)
    strided = tuple(x.unflatten(1, (HEADS, D)) for x in uvqk.split(HEADS * D, 1))[1:]
    v, q, k = (x.contiguous() for x in strided)
    impl = Impl.AUTO if device == "cuda" else Impl.REFERENCE

    def ours(inputs=(q, k, v), tables=(), times=(), **options):
        def call(q, k, v, *tables):
            bias = RelativeBias(*tables, *times) if tables else None
            return hstu_attention(
                *(q, k, v, offsets),
                max_len=N,
                alpha=D**-0.5,
                scaling_length=N,
                bias=bias,
                impl=impl,
                **options,
            )

        return timed(call, (*inputs, *tables), mode)

    if case.name.startswith("causal"):
        found = {"ours": ours(), **softmax_rivals(case, (q, k, v), mode, device)}
        if mode == "backward":
            found["ours, deterministic"] = ours(deterministic=True)
        return found
    if case.name.startswith("jagged"):
        return {"ours": ours()}
    if case.name.startswith("semi-local"):
        return {"ours": ours(mask=SEMI_LOCAL)} | ({"ours, causal": ours()} if N <= 16384 else {})
    sequences = offsets.numel() - 1
    # An event every two hours, and the prediction at the next one.
    time = torch.randint(0, 14400, (L,), device=device).cumsum(0)
    tables = tuple(0.02 * torch.randn(n, device=device) for n in (2 * N - 1, 129))
    return {
        "ours": ours(),
        "ours, candidates": ours(
            num_candidates=torch.full((sequences,), 20, device=device, dtype=torch.int64)
        ),
        "ours, prefix": ours(mask=AttentionMask(num_context=16, context="prefix")),
        "ours, strided": ours(inputs=(strided[1], strided[2], strided[0])),
        "ours, position bias": ours(tables=tables[:1]),
        "ours, position and time bias": ours(tables=tables, times=(time + 7200, time)),
    }


def softmax_rivals(case, inputs, mode, device):
    """torch's attention on the same q, k, v as (B, H, N, D); what refuses the shape is left out."""
    B, N = case.shape["B"], case.shape["N"]
    dense = tuple(x.unflatten(0, (B, N)).transpose(1, 2) for x in inputs)
    if device == "cpu":
        return {"torch softmax": timed(causal_softmax, dense, mode)}
    found = {}
    for name, backend in RIVALS.items():

        def call(q, k, v, backend=backend):
            with sdpa_kernel(backend):
                return causal_softmax(q, k, v)

        try:
            found[name] = timed(call, dense, mode)
            found[name]()
        except RuntimeError as refused:  # "No available kernel": head dim or hardware
            if "No available kernel" not in str(refused):
                raise
            found.pop(name, None)
    return found


def causal_softmax(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def lengths(case):
    B, N = case.shape["B"], case.shape["N"]
    if case.name.startswith("jagged"):
        return torch.randint(1, N + 1, (B,), generator=torch.Generator().manual_seed(0))
    return torch.full((B,), N)


def bytes_moved(case, mode):
    tokens = int(lengths(case).sum())
    tensors = 4 if mode == "forward" else 7  # q, k, v, out; q, k, v, dout, dq, dk, dv
    return tensors * tokens * HEADS * case.shape["D"] * case.dtype.itemsize


def flops(case, mode):
    mask = SEMI_LOCAL if case.name.startswith("semi-local") else AttentionMask()
    none = torch.zeros((), dtype=torch.int64)
    pairs = sum(int(num_visible(torch.arange(n), n, none, mask).sum()) for n in lengths(case))
    return (2 if mode == "forward" else 5) * 2 * HEADS * case.shape["D"] * pairs
