"""The layer with products in fp8: what the rounding costs, and that nothing else changes.

The budget, in norm. (e4m3 has 4 digits: rounding one factor of a product is off by 2.6 %.)
- What rounding to fp8 costs, by the reference against float64: 7 % of the layer's own part of Y and
  13 % of a gradient, which is rounded on its way three times; 30 % of a gradient of the small
  layer, whose sums are over 22 tokens (8 to 25 % over 12 seeds on a CPU).
- What the kernels add to that: half as much again, since a value near the middle of two steps may
  fall either way.
"""

from functools import partial

import pytest
import torch

from kernels.hstu_layer import (
    PRODUCTS,
    RECOMPUTABLE,
    RECOMPUTED,
    Fp8Weights,
    LayerWeights,
    hstu_layer,
    quantize_weights,
)
from tests.kernels.evaluate import poisoned_memory
from tests.kernels.fp8 import FP8_CHECKS
from tests.kernels.hstu_layer_cases import Layer

PLAIN = {"fp8": ("uvqk",), "fp8_wgrad": "fold"}
CASES = [
    PLAIN,
    {"fp8": PRODUCTS, "fp8_wgrad": "bf16", "has_tail": True, "dropout": 0.3, "recompute": ()},
    {
        "fp8": PRODUCTS,
        "fp8_wgrad": "fold",
        "has_tail": True,
        "activate": "u_only",
        "angles": "by_head",
    },
    {"fp8": PRODUCTS, "fp8_wgrad": "fold", "dropout": 0.3, "uvqk_bias": False, "angles": "shared"},
    {"fp8": PRODUCTS, "fp8_wgrad": "fold", "concat_ua": True, "norm": "group", "recompute": ()},
    {"fp8": ("output",), "fp8_wgrad": "bf16", "norm_affine": False},
    {
        "fp8": ("uvqk",),
        "fp8_wgrad": "bf16",
        "activate": "u_only",
        "recompute": ("uvqk",),
        "angles": "by_head",
    },
]
cases = pytest.mark.parametrize(
    "options", CASES, ids=lambda options: "-".join(map(str, options.values()))
)


def check(layer, dtype, device, impl, gradient):
    with poisoned_memory(torch.device(device)):
        got = layer.run(dtype, device, impl=impl)
    rounded = layer.run(dtype, device, impl="reference")
    exact = layer.run(torch.float64, device, impl="reference", rounded_to=dtype)
    x = layer.tensors["x"].to(dtype).to(device, torch.float64)
    if layer.has_tail:
        ends = [sum(layer.lengths[: i + 1]) for i in range(len(layer.lengths))]
        tails = zip(ends, layer.tails, strict=True)
        x = x[[i for end, tail in tails for i in range(end - tail, end)]]
    for name, expected in exact.items():
        assert got[name].dtype == dtype
        rounding = (rounded[name].double() - expected).norm()
        # A head's few channels vary little where a token sees little but itself, and its norm
        # magnifies any rounding: in 16 bits, too, these gradients are off ten times as much.
        if name == "y" or layer.norm == "layer":
            size = (expected - x if name == "y" else expected).norm()
            assert rounding <= (0.07 if name == "y" else gradient) * size, (name, rounding / size)
        added = (got[name].double() - rounded[name].double()).norm()
        allowed = 0.5 * rounding + 2 * torch.finfo(dtype).eps * expected.norm()
        assert added <= allowed, (name, added, allowed)


@pytest.mark.interpret
@cases
def test_error_of_fp8(options, device):
    layer = Layer([13, 0, 9], [5, 0, 9], [2, 0, 0], dim=48, **options)
    check(layer, torch.float16, device, "triton", gradient=0.3)


@pytest.mark.gpu
@cases
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_error_of_fp8_on_a_gpu(options, impl):
    shape = {"dim": 256, "num_heads": 4, "qk_dim": 64, "v_dim": 64}
    layer = Layer([300, 0, 517, 64, 1], [40, 0, 517, 5, 0], [20, 0, 100, 5, 0], **shape, **options)
    check(layer, torch.bfloat16, "cuda", impl, gradient=0.13)


@pytest.mark.interpret
def test_what_is_recomputed_has_the_same_bits(device):
    layer = Layer([9, 4], [3, 4], [2, 0], num_heads=1, **CASES[2])
    run = partial(layer.run, torch.float16, device, impl="triton", deterministic=True)
    kept = run(recompute=())
    for recompute in (("uvqk",), ("silu",), RECOMPUTABLE):
        again = run(recompute=recompute)
        for name, expected in kept.items():
            assert torch.equal(again[name], expected), (recompute, name)


@pytest.mark.gpu
@pytest.mark.parametrize("options", CASES[:5], ids=str)
def test_what_is_recomputed_has_the_same_bits_on_a_gpu(options):
    shape = {"dim": 256, "num_heads": 4, "qk_dim": 64, "v_dim": 64}
    layer = Layer([700, 131], [3, 131], [2, 0], **(options | shape))
    run = partial(layer.run, torch.bfloat16, "cuda", impl="auto", deterministic=True)
    kept, again = run(recompute=()), run(recompute=RECOMPUTABLE)
    for name, expected in kept.items():
        assert torch.equal(again[name], expected), name


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("wgrad", "recompute", "a_dim", "a_token"),
    [
        ("fold", (), 24 - 1 - 2, 4),
        ("fold", ("silu",), 16 - 1 - 2, 4),
        ("fold", RECOMPUTED, 4, 0),
        ("fold", RECOMPUTABLE, 2, 0),
        ("bf16", (), 24, 0),
        ("bf16", ("uvqk",), 16 - 8 + 1, 4),  # X' in fp8 for the projection that is made again.
    ],
    ids=str,
)
def test_bytes_that_are_kept(wgrad, recompute, a_dim, a_token, device):
    """fold: X' takes a byte a number and a scale a token, the gated rows are not kept."""
    L, d = 20, 32
    shape = {"dim": d, "num_heads": 2, "qk_dim": 16, "v_dim": 16}
    layer = Layer([13, 7], [0, 0], [0, 0], fp8=PRODUCTS, fp8_wgrad=wgrad, **shape)
    inputs = {n: x.to(device, torch.float16).requires_grad_() for n, x in layer.tensors.items()}
    storages = {}

    def pack(x):
        if x.numel() and x.shape[0] == L:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer.call(inputs, device, impl="triton", recompute=recompute)
    statistics = 2 * 2 * 4
    assert sum(storages.values()) == L * (a_dim * d + a_token + statistics)


@pytest.mark.interpret
def test_a_nan_stays_in_its_sequence(device):
    layer = Layer([18, 17, 3], [18, 17, 3], [0, 0, 0], num_heads=1, has_tail=True, fp8=PRODUCTS)
    layer.check_that_a_nan_stays_in_its_sequence(torch.float16, device)


@pytest.mark.interpret
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_an_empty_batch_has_gradients_of_zero(lengths, device):
    layer = Layer(lengths, lengths, lengths, fp8=PRODUCTS, fp8_wgrad="fold")
    found = layer.run(torch.float16, device, impl="triton")
    assert found.pop("y").shape == found.pop("x").shape == (0, layer.dim)
    assert all((gradient == 0).all() for gradient in found.values())


@pytest.mark.interpret
@pytest.mark.parametrize("options", [CASES[0], CASES[2]], ids=str)
def test_registration(options, device):
    """Fake tensors, autograd and compilation agree."""
    layer = Layer([4, 2], [2, 2], [1, 0], num_heads=1, **(options | {"recompute": ()}))
    inputs = {n: x.to(device, torch.float16).requires_grad_() for n, x in layer.tensors.items()}
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.hstu_layer.op.apply", calls.append)
        layer.call(inputs, device, impl="triton")
    operator = torch.ops.gr.hstu_layer.default
    torch.library.opcheck(operator, calls[0].flat, test_utils=FP8_CHECKS)


@pytest.mark.interpret
@pytest.mark.parametrize("products", [("uvqk",), PRODUCTS], ids=str)
def test_compiles_whole(products, device):
    layer = Layer([6, 3], [2, 3], [1, 0], num_heads=1, has_tail=True, fp8=products)
    inputs = {n: x.to(device, torch.float16).requires_grad_() for n, x in layer.tensors.items()}
    call = partial(layer.call, device=device, impl="triton")
    found = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        y = run(inputs)
        found.append([y, *torch.autograd.grad(y.sum(), [*inputs.values()])])
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)


def small(dtype=torch.float32, device="cpu", **changes):
    tensors = Layer([3, 2], [1, 2], [0, 0]).tensors
    weights = LayerWeights(**{n: x.to(device, dtype) for n, x in tensors.items() if n != "x"})
    arguments = {
        "x_LD": tensors["x"].to(device, dtype),
        "weights": weights,
        "offsets": torch.tensor([0, 3, 5], device=device),
        "num_heads": 2,
        "qk_dim": 16,
        "v_dim": 16,
        "max_len": 3,
        "alpha": 0.25,
        "scaling_length": 5,
        "fp8": quantize_weights(weights),
    }
    return arguments | changes


def test_wrong_input_is_refused():
    right = small()
    other = quantize_weights(LayerWeights(uvqk=torch.randn(24, 64), output=torch.randn(24, 32)))
    with pytest.raises(ValueError, match=r"fp8\.uvqk must be of a weight of 128 outputs and 24"):
        hstu_layer(**(right | {"fp8": other}))
    swapped = Fp8Weights(output=right["fp8"].uvqk)
    with pytest.raises(ValueError, match=r"fp8\.output must be of a weight of 24 outputs and 32"):
        hstu_layer(**(right | {"fp8": swapped}))
    with pytest.raises(ValueError, match="fp8_wgrad must be auto, fold or bf16"):
        hstu_layer(**(right | {"fp8_wgrad": "fp8"}))
    for products in ("uvqk", ("uvqk", "gate")):
        with pytest.raises(ValueError, match="products must hold names of"):
            quantize_weights(right["weights"], products)


@pytest.mark.interpret
def test_float32_tokens_are_refused(device):
    with pytest.raises(ValueError, match="fp8 needs float16 or bfloat16 tokens"):
        hstu_layer(**small(device=device), impl="triton")


@pytest.mark.gpu
def test_a_gpu_without_fp8_is_refused(monkeypatch):
    arguments = small(torch.bfloat16, "cuda")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(ValueError, match=r"compute capability 8\.9"):
        hstu_layer(**arguments, impl="triton")


@pytest.mark.interpret
def test_rows_that_no_program_holds_are_refused(device):
    layer = Layer([2], [1], [0], dim=16, num_heads=40, qk_dim=125, v_dim=75, fp8=("uvqk",))
    with pytest.raises(ValueError, match="the UVQK projection in fp8 has rows of 24576"):
        layer.run(torch.float16, device, impl="triton", gradients=False)
