"""Random layers for tests of kernels/hstu_layer, and every pair of their options in a few cases."""

from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, product

import torch

from kernels.hstu_attention import AttentionMask, RelativeBias
from kernels.hstu_layer import RECOMPUTABLE, RECOMPUTED, LayerWeights, hstu_layer, quantize_weights
from kernels.rotary import Rotation

OPTIONS = {
    "activate": ("all", "u_only"),
    "attention": ("silu", "softmax"),
    "norm": ("layer", "group"),
    "concat_ua": (False, True),
    "dropout": (0.0, 0.3),
    "bias": ("none", "position", "position_time"),
    "angles": ("none", "shared", "by_head"),
    "structure": ("plain", "context", "candidates", "context and candidates"),
    "has_tail": (False, True),
    "uvqk_bias": (True, False),
    "norm_affine": (True, False),
    "recompute": ((), RECOMPUTED, RECOMPUTABLE, ("normed", "gated"), ("silu",), ("uvqk",)),
}


def pairwise(options):
    """Return few dicts of options, among which every two values of two options meet."""
    names = list(options)
    missing = {
        ((a, x), (b, y))
        for a, b in combinations(names, 2)
        for x, y in product(options[a], options[b])
    }
    cases = []
    while missing:
        case = dict(min(missing, key=str))
        for name in names:
            if name in case:
                continue

            def gain(value, name=name, case=case, missing=missing):
                met = [((k, v), (name, value)) for k, v in case.items()]
                met += [(b, a) for a, b in met]
                return sum(pair in missing for pair in met)

            case[name] = max(options[name], key=gain)
        case = {name: case[name] for name in names}
        missing -= set(combinations(case.items(), 2))
        cases.append(case)
    return cases


@dataclass
class Layer:
    """Inputs in float64, to be rounded to the dtype under test."""

    lengths: list[int]
    tails: list[int]
    candidates: list[int]
    num_context: int = 0
    dim: int = 24
    num_heads: int = 2
    qk_dim: int = 16
    v_dim: int = 16
    seed: int = 0
    activate: str = "all"
    attention: str = "silu"
    norm: str = "layer"
    concat_ua: bool = False
    dropout: float = 0.0
    bias: str = "none"
    angles: str = "none"
    has_tail: bool = False
    uvqk_bias: bool = True
    norm_affine: bool = True
    recompute: tuple = RECOMPUTED
    fp8: tuple = ()
    fp8_wgrad: str = "auto"
    tensors: dict = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        L, D, HK, HV = (
            sum(self.lengths),
            self.dim,
            self.num_heads * self.qk_dim,
            self.num_heads * self.v_dim,
        )
        C = HV * (3 if self.concat_ua else 1)
        self.num_rows = sum(self.tails) if self.has_tail else L
        self.tensors = {
            "x": draw(L, D),
            "uvqk": draw(D, 2 * HV + 2 * HK) / D**0.5,
            "output": draw(D, C) / C**0.5,
            "output_bias": draw(D),
        }
        if self.uvqk_bias:
            self.tensors["uvqk_bias"] = draw(2 * HV + 2 * HK) / 2
        if self.norm_affine:
            self.tensors |= {
                "input_norm": draw(D) / 4 + 1,
                "input_norm_bias": draw(D) / 4,
                "attention_norm": draw(HV) / 4 + 1,
                "attention_norm_bias": draw(HV) / 4,
            }
        if self.bias != "none":
            self.tensors["position_table"] = draw(2 * 20 - 1) / 2
        if self.bias == "position_time":
            self.tensors["time_table"] = draw(31) / 2
        self.key_time = torch.randint(0, 40_000, (L,), generator=generator).cumsum(0)
        self.query_time = self.key_time + torch.randint(0, 90_000, (L,), generator=generator)
        self.dy = draw(self.num_rows, D)
        sets = self.num_heads if self.angles == "by_head" else 1
        self.angle = 9 * draw(2, L, sets, self.qk_dim // 2)

    def check_that_a_nan_stays_in_its_sequence(self, dtype, device):
        """Put a NaN into the second sequence: the others keep their bits, and it is lost."""
        first, last = self.lengths[0], self.lengths[0] + self.lengths[1]
        inputs = {name: x.to(device, dtype) for name, x in self.tensors.items()}
        clean = self.call(inputs, device, impl="triton")
        inputs["x"][first + 2] = float("nan")
        spoilt = self.call(inputs, device, impl="triton")
        assert torch.equal(spoilt[:first], clean[:first])
        assert torch.equal(spoilt[last:], clean[last:])
        # Rows from the NaN on see it.
        assert spoilt[first + 2 : last].isnan().all()

    def run(self, dtype, device, *, impl, rounded_to=None, gradients=True, nudge=0, **options):
        """Return the result, and the gradient of sum(y * dy) for every tensor, by name.

        With `nudge`, a seed, each number is off by half the distance of two neighbours in
        `rounded_to`, up or down: what a result may be off by however well it is computed.
        """
        generator = torch.Generator().manual_seed(nudge)
        inputs = {}
        for name, x in self.tensors.items():
            given = x.to(rounded_to or dtype).to(dtype)
            if nudge:
                sign = torch.randint(2, x.shape, generator=generator) * 2 - 1
                given = given * (1 + sign * torch.finfo(rounded_to).eps / 2)
            inputs[name] = given.to(device).requires_grad_(gradients)
        y = self.call(inputs, device, impl=impl, **options)
        found = {"y": y.detach()}
        if gradients:
            dy = self.dy.to(rounded_to or dtype).to(device, dtype)
            # In this thread: one of autograd's own, whose first call is a product of torch's, would
            # warn of a missing context of CUDA.
            with torch.autograd.set_multithreading_enabled(False):
                grads = torch.autograd.grad(y, list(inputs.values()), dy)
            found |= dict(zip(inputs, grads, strict=True))
        return found

    def call(self, inputs, device, **options):
        """Return the result for tensors by name."""
        offsets, tail_offsets = offsets_of(self.lengths, device), offsets_of(self.tails, device)
        tail_R = torch.cat(
            [
                torch.arange(end - tail, end)
                for end, tail in zip(offsets[1:].tolist(), self.tails, strict=True)
            ]
            or [torch.zeros(0, dtype=torch.int64)]
        ).to(device)
        query_time, key_time = self.query_time.to(device), self.key_time.to(device)
        bias = None
        if self.bias != "none":
            times = (query_time[tail_R] if self.has_tail else query_time, key_time)
            bias = RelativeBias(
                inputs["position_table"],
                inputs.get("time_table"),
                *(times if self.bias == "position_time" else ()),
            )
        names = [n for n in inputs if n not in ("x", "position_table", "time_table")]
        tails = {
            "tail_R": tail_R,
            "tail_offsets": tail_offsets,
            "max_tail_len": max(self.tails, default=0),
        }
        arguments = {
            "num_heads": self.num_heads,
            "qk_dim": self.qk_dim,
            "v_dim": self.v_dim,
            "max_len": max(self.lengths, default=0),
            "alpha": self.qk_dim**-0.5,
            "scaling_length": 5 if self.attention == "silu" else None,
            "attention": self.attention,
            "activate": self.activate,
            "norm": self.norm,
            "concat_ua": self.concat_ua,
            "mask": AttentionMask(
                num_context=self.num_context, context="prefix" if self.num_context else "causal"
            ),
            "num_candidates": torch.tensor(self.candidates, device=device, dtype=torch.int64),
            "bias": bias,
            "dropout": self.dropout,
            "seed": torch.tensor([2**61 + 77], device=device),
            "recompute": self.recompute,
            **(tails if self.has_tail else {}),
        }
        if self.angles != "none":
            dtype = torch.promote_types(inputs["x"].dtype, torch.float32)
            query, key = (Rotation.of(angle.to(device, dtype)) for angle in self.angle)
            arguments["rotations"] = (query.rows(tail_R) if self.has_tail else query, key)
        weights = LayerWeights(**{name: inputs[name] for name in names})
        if self.fp8 and inputs["x"].dtype != torch.float64:
            rowwise = "reference" if options.get("impl") == "reference" else "triton"
            arguments["fp8"] = quantize_weights(weights, self.fp8, impl=rowwise)
            arguments["fp8_wgrad"] = self.fp8_wgrad
        return hstu_layer(inputs["x"], weights, offsets, **(arguments | options))


STRUCTURES = {
    "plain": ([0, 19, 1], [0, 7, 0], [0, 0, 0], 0),
    "context": ([20, 3], [20, 1], [0, 0], 3),
    "candidates": ([18, 5], [4, 5], [4, 5], 0),
    "context and candidates": ([2, 18], [0, 18], [0, 6], 2),
}


def make_layer(*, structure="plain", **options):
    lengths, tails, candidates, num_context = STRUCTURES[structure]
    return Layer(lengths, tails, candidates, num_context, **options)


def offsets_of(lengths, device):
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(device)
