"""A whole HSTU layer, forward and backward, against the same layer of torch's operators.

FLOPs count the products of the linear maps three times (forward, and two backward), those of the
visible pairs of attention 3.5 times; what is computed again does not count. Times in
fp8 hold the rounding of the weights.
"""

import torch
from torch.nn import functional

from kernels.bench import Case, timed
from kernels.dispatch import Impl
from kernels.hstu_attention import hstu_attention
from kernels.hstu_layer import RECOMPUTED, LayerWeights, hstu_layer, quantize_weights
from kernels.rotary import Rotation

CASES = [
    Case(
        f"d={D} {H}x{D // H} N={N}",
        torch.bfloat16,
        {"B": B, "N": N, "D": D, "H": H},
        ("forward", "both"),
    )
    for D, H, N, B in ((1024, 4, 4096, 32), (512, 4, 8192, 16), (2048, 8, 4096, 16))
]
KEPT = {
    "ours, 14d kept": ("silu", "gated"),
    "ours, 16d kept": ("silu",),
    "ours, 24d kept": (),
}
LEAST_OUTPUT_FP8 = 2048
"""D from which the output projection gains in fp8."""


def variants(case, mode, device):
    B, N, D, H = (case.shape[letter] for letter in "BNDH")
    offsets = torch.arange(B + 1, device=device) * N
    impl = Impl.AUTO if device == "cuda" else Impl.REFERENCE

    def draw(*shape):
        return torch.randn(*shape, device=device, dtype=case.dtype)

    # Parameters are float32, as in training.
    inputs = (draw(B * N, D), 0.02 * draw(D, 4 * D).float(), draw(D, D).float() / D**0.5)
    structure = {"max_len": N, "alpha": (D // H) ** -0.5, "scaling_length": N}

    def run(layer):
        if mode == "forward":
            return timed(layer, inputs, mode)
        leaves = [x.detach().requires_grad_() for x in inputs]
        dy = draw(B * N, D)
        return lambda: torch.autograd.grad(layer(*leaves), leaves, dy)

    # Of position and time: other angles for queries than for keys.
    angles = torch.randn(2, B * N, 1, D // H // 2, device=device) * 100
    turned = tuple(Rotation.of(angle) for angle in angles)

    def ours(recompute, in_fp8=False, rotations=None):
        products = ("uvqk", "output") if D >= LEAST_OUTPUT_FP8 else ("uvqk",)

        def layer(x, uvqk, output):
            weights = LayerWeights(uvqk=uvqk, output=output)
            return hstu_layer(
                *(x, weights, offsets),
                **structure,
                num_heads=H,
                qk_dim=D // H,
                v_dim=D // H,
                recompute=recompute,
                rotations=rotations,
                fp8=quantize_weights(weights, products) if in_fp8 else None,
                impl=impl,
            )

        return run(layer)

    def separate(x, uvqk, output):
        normed = functional.layer_norm(x, (D,), eps=1e-6)
        u, v, q, k = functional.silu(normed @ uvqk.to(x.dtype)).split(D, 1)
        q, k, v = (part.unflatten(1, (H, D // H)) for part in (q, k, v))
        attended = hstu_attention(q, k, v, offsets, **structure, impl=impl).flatten(1)
        gated = functional.layer_norm(attended, (D,), eps=1e-6) * u
        return x + functional.linear(gated, output.to(x.dtype))

    found = {
        "ours": ours(RECOMPUTED),
        "ours, fp8": ours(RECOMPUTED, in_fp8=True),
    }
    if D // H % 2 == 0:  # pairs
        found["ours, rotary"] = ours(RECOMPUTED, rotations=turned)
        found["ours, fp8, rotary"] = ours(RECOMPUTED, in_fp8=True, rotations=turned)
    if mode == "both":
        found["ours, fp8, 14d kept"] = ours(("silu", "gated"), in_fp8=True)
        found |= {name: ours(recompute) for name, recompute in KEPT.items()}
    return {**found, "torch operators, our attention": run(separate)}


def bytes_moved(case, mode):
    B, N, D = (case.shape[letter] for letter in "BND")
    # X and Y; X, dY and dX.
    return B * N * D * case.dtype.itemsize * (2 if mode == "forward" else 5)


def flops(case, mode):
    B, N, D = (case.shape[letter] for letter in "BND")
    linears, pairs = 2 * 5 * D * D * B * N, 2 * 2 * D * B * N * (N + 1) // 2
    return linears + pairs if mode == "forward" else 3 * linears + 7 * pairs // 2
