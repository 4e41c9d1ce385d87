"""What the components of ULTRA-HSTU save on one GPU.

    python -m gr.bench_ultra [MEASUREMENT ...] [--records FILE]

A step is forward, backward down to the tokens, and AdamW, of the encoder alone, under bf16
autocast. Times are medians of calls in turn, within one process, as CUDA graphs: what the GPU
takes. `eager` are the same steps launched by the host. The loss reads 64 candidates at
the end of each sequence. Plain HSTU and ULTRA-HSTU run on the same kernels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from embeddings.int4 import Int4Table, quantize_int4
from gr.bench_encoders import (
    GIB,
    Figures,
    Shape,
    Stack,
    free,
    jagged_lengths,
    median_ms,
    mixture,
    replayed_ms,
    semi_local,
    shortened,
    truncation,
)
from gr.bench_main import measure
from gr.bench_memory import measure_longest, measure_memory
from gr.config import ModelConfig

K1, K2 = 256, 256
KEPT = 2048
"""L' of truncation."""
KINDS: tuple[Literal["train", "infer"], ...] = ("train", "infer")


def measure_step(shape: Shape) -> Figures:
    """Eight sequences of 16,384: a training step and a forward pass, ULTRA against plain HSTU."""
    longest, count = (16_384, 8) if shape.device == "cuda" else (128, 2)
    local, layers = semi_local(K1, K2), shape.num_layers
    few, more = max(1, layers // 6), max(1, layers // 3)
    models = {
        "plain": shape.hstu(longest),
        "semi_local": shape.hstu(longest, **local),
        f"ultra_{more}_full": shape.hstu(longest, **local, **truncation(layers - more, KEPT)),
        "ultra": shape.hstu(longest, **local, **truncation(layers - few, KEPT)),
        "ultra_fp8": shape.hstu(
            longest, precision="fp8", **local, **truncation(layers - few, KEPT)
        ),
    }
    if shape.device != "cuda":
        models.pop("ultra_fp8")
    stacks = {name: Stack(model, [longest] * count, shape) for name, model in models.items()}
    calls = {name: (stack.train, stack.infer) for name, stack in stacks.items()}
    eager = {
        "eager_train": median_ms({name: train for name, (train, _) in calls.items()}, rounds=3),
        "eager_infer": median_ms({name: infer for name, (_, infer) in calls.items()}, rounds=5),
    }
    kinds = {kind: replayed_ms(stacks, kind) for kind in KINDS} | eager
    found = {"full_layers": float(few), "tflop_forward_plain": stacks["plain"].flops / 1e12}
    for name, stack in stacks.items():
        for kind, times in kinds.items():
            found[f"{kind}_ms_{name}"] = times[name]
            if name != "plain":
                found[f"{kind}_speedup_{name}"] = times["plain"] / times[name]
        found[f"flop_ratio_{name}"] = stacks["plain"].flops / stack.flops
    return found


def measure_system(shape: Shape) -> Figures:
    """System options together against eager bf16 with the same attention kernel."""
    longest, count = 16_384, 8
    found: Figures = {}
    for name, attention in (("semi_local", semi_local(K1, K2)), ("causal", {})):
        kinds: dict[str, dict[str, object]] = {
            "eager": {"impl": "composed"},
            "fused": {},
            "fused_fp8": {"precision": "fp8"},
            "fused_fp8_silu": {"precision": "fp8", "recompute": ("silu",)},
            "fused_fp8_both": {"precision": "fp8", "fp8_products": ("uvqk", "output")},
            "fused_silu": {"recompute": ("silu",)},
            "fused_none": {"recompute": ()},
            "fused_fp8_none": {"precision": "fp8", "recompute": ()},
        }
        free()
        stacks = {
            kind: Stack(shape.hstu(longest, **attention, **changes), [longest] * count, shape)
            for kind, changes in kinds.items()
        }
        train, infer = (replayed_ms(stacks, kind) for kind in KINDS)
        for kind in kinds:
            found[f"train_ms_{name}_{kind}"] = train[kind]
            found[f"infer_ms_{name}_{kind}"] = infer[kind]
        best = min(train[kind] for kind in kinds if kind != "eager")
        found[f"train_speedup_{name}"] = train["eager"] / best
        best = min(infer[kind] for kind in kinds if kind != "eager")
        found[f"infer_speedup_{name}"] = infer["eager"] / best
    return found


def measure_transformer(shape: Shape) -> Figures:
    """Lengths of 1 to 8192, against Transformer++ with FlashAttention-2 of torch."""
    longest, count = 8192, 32
    lengths = jagged_lengths(count, longest)
    local, layers = semi_local(K1, K2), shape.num_layers
    few = max(1, layers // 6)
    ultra = shape.hstu(longest, **local, **truncation(layers - few, KEPT))
    free()
    stacks = {
        "transformer": Stack(shape.transformer(), lengths, shape, flash=True),
        "transformer_ours": Stack(shape.transformer(), lengths, shape),
        "hstu": Stack(shape.hstu(longest), lengths, shape),
        "ultra": Stack(ultra, lengths, shape),
    }
    cut = shortened(lengths, longest)
    short = {
        "transformer_short": Stack(shape.transformer(), cut, shape, flash=True),
        "hstu_short": Stack(shape.hstu(longest), cut, shape),
        # A third of the tokens needs a third of the memory: nothing has to be computed again.
        "hstu_short_none": Stack(shape.hstu(longest, recompute=()), cut, shape),
        "hstu_short_fp8_none": Stack(
            shape.hstu(longest, recompute=(), precision="fp8"), cut, shape
        ),
        "ultra_short": Stack(ultra, cut, shape),
    }
    infer, train = replayed_ms(stacks, "infer"), replayed_ms({**stacks, **short}, "train")
    found = {"tokens": float(sum(lengths)), "tokens_short": float(sum(cut))}
    found |= {f"infer_ms_{name}": value for name, value in infer.items()}
    found |= {f"train_ms_{name}": value for name, value in train.items()}
    return found | {
        "infer_hstu": infer["transformer"] / infer["hstu"],
        "infer_ultra": infer["transformer"] / infer["ultra"],
        "train_hstu": train["transformer"] / train["hstu"],
        "train_hstu_short": train["transformer"] / train["hstu_short"],
        "train_hstu_short_none": train["transformer"] / train["hstu_short_none"],
        "train_hstu_short_fp8_none": train["transformer"] / train["hstu_short_fp8_none"],
        "train_transformer_short": train["transformer"] / train["transformer_short"],
        "train_ultra_short": train["transformer"] / train["ultra_short"],
    }


def measure_int4(
    shape: Shape, num_rows: int = 1_000_000, counts: Sequence[int] = (8192, 131_072)
) -> Figures:
    """Rows of 128 from host memory to the GPU, waited for: 4-bit against float16, wall clock.

    Row numbers are in host memory. `by_gpu`: they are copied, and the GPU reads the rows itself.
    """
    dim, found = 128, Figures()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, dim, generator=generator)
    table, halves = Int4Table(quantize_int4(rows)), rows.half()
    halves = halves.pin_memory() if shape.device == "cuda" else halves
    for count in counts:
        index = torch.randint(num_rows, (count,), generator=generator)

        def copy_halves(index: Tensor = index) -> None:
            pinned = torch.empty(len(index), dim, dtype=halves.dtype, pin_memory=halves.is_pinned())
            torch.index_select(halves, 0, index, out=pinned)
            pinned.to(shape.device, non_blocking=True)

        def copy_int4(index: Tensor = index) -> None:
            table.lookup(index, device=shape.device, dtype=halves.dtype)

        def read_int4(index: Tensor = index) -> None:
            table.lookup(index.to(shape.device), dtype=halves.dtype)

        calls = {"float16": copy_halves, "int4": copy_int4, "int4_by_gpu": read_int4}
        times = median_ms(calls, rounds=30, warm_up=5)
        found |= {f"ms_{name}_{count}": value for name, value in times.items()}
        found[f"latency_{count}"] = times["int4"] / times["float16"]
    found["bytes_ratio"] = halves.numel() * halves.element_size() / table.num_bytes
    return found


def measure_components(shape: Shape) -> Figures:
    """Each component alone and all together: eight users of 8,192 events, 18 layers.

    Without merged tokens an event is two. The mixture reads 10,240 and 3,072 tokens (merged half as
    many); stochastic length cuts in training only. How an action is encoded costs the encoder
    nothing.
    """
    longest, count = (16_384, 8) if shape.device == "cuda" else (128, 2)
    local, layers = semi_local(K1, K2), shape.num_layers
    cut = truncation(layers - max(1, layers // 6), KEPT)
    plain, half = shape.hstu(longest), shape.hstu(longest, **local, **cut)
    parts = longest * 5 // 8, longest * 3 // 16
    both = [longest] * count
    merged = [longest // 2] * count
    variants: dict[str, tuple[ModelConfig, list[int], list[int]]] = {
        "hstu": (plain, both, both),
        "semi_local": (shape.hstu(longest, **local), both, both),
        "truncation": (shape.hstu(longest, **cut), both, both),
        "mixture": (mixture(plain, *parts), both, both),
        "merged": (plain, merged, merged),
        "stochastic_length": (plain, both, shortened(both, longest)),
        "all": (mixture(half, *(n // 2 for n in parts)), merged, shortened(merged, longest // 2)),
        "all_but_stochastic_length": (mixture(half, *(n // 2 for n in parts)), merged, merged),
        "all_but_mixture": (half, merged, merged),
    }
    found: Figures = {}
    for name, (model, served, trained) in variants.items():
        free()
        train = Stack(model, trained, shape)
        train.train()
        if shape.device == "cuda":
            # Before `replayed_ms`, which lets the allocator forget its peak.
            found[f"peak_gib_{name}"] = torch.cuda.max_memory_allocated() / GIB
        found[f"train_ms_{name}"] = replayed_ms({"": train}, "train")[""]
        found[f"train_tflop_{name}"] = 3 * train.flops / 1e12
        del train
        infer = Stack(model, served, shape)
        found[f"infer_ms_{name}"] = replayed_ms({"": infer}, "infer")[""]
        found[f"infer_tflop_{name}"] = infer.flops / 1e12
        del infer
    return found


MEASUREMENTS: dict[str, Callable[[Shape], Figures]] = {
    "step": measure_step,
    "components": measure_components,
    "memory": measure_memory,
    "system": measure_system,
    "transformer": measure_transformer,
    "longest": measure_longest,
    "int4": measure_int4,
}


def table(found: Mapping[str, Figures]) -> list[str]:
    """Return the lines of the report, in Markdown: what, target, aim, measured."""
    rows = []

    def row(what: str, least: str, aim: str, name: str, value: Callable[[Figures], str]) -> None:
        if name in found:
            rows.append(f"| {what} | {least} | {aim} | {value(found[name])} |")

    def times(key: str) -> Callable[[Figures], str]:
        return lambda x: f"{x[key]:.2f}x"

    row("training step, 18 layers x 16,384", "3x", "5x", "step", times("train_speedup_ultra"))
    row("inference, the same", "5x", "12x", "step", times("infer_speedup_ultra"))
    row(
        "longest sequence trained",
        "1,048,576",
        "1,600,000",
        "longest",
        lambda x: f"{x.get('longest', 0):,.0f}",
    )
    row(
        "memory of a layer with recomputation",
        "-65 %",
        "-70 %",
        "memory",
        lambda x: (
            f"{-x['saved']:.1%} ({-x['saved_against_eager']:.1%} against eager; with attended "
            f"{-x['saved_input_only']:.1%})"
        ),
    )
    row(
        "system options against eager bf16",
        "1.5x",
        "1.7x",
        "system",
        lambda x: (
            f"{x['train_speedup_semi_local']:.2f}x semi-local, "
            f"{x['train_speedup_causal']:.2f}x causal"
        ),
    )
    row("Transformer++: HSTU forward", "1.6x", "2x", "transformer", times("infer_hstu"))
    row("Transformer++: ULTRA forward", "5.6x", "8x", "transformer", times("infer_ultra"))
    row(
        "Transformer++: HSTU training with stochastic length",
        "10x",
        "15.2x",
        "transformer",
        lambda x: (
            f"{x['train_hstu_short_none']:.2f}x without recomputation, "
            f"{x['train_hstu_short_fp8_none']:.2f}x in fp8, {x['train_hstu_short']:.2f}x by "
            f"default ({x['train_hstu']:.2f}x with whole sequences; the Transformer itself gains "
            f"{x['train_transformer_short']:.2f}x by it)"
        ),
    )
    row(
        "4-bit rows of 128: bytes fewer; latency of 131,072",
        "3x; 0.6x",
        "",
        "int4",
        lambda x: f"{x['bytes_ratio']:.2f}x; {x['latency_131072']:.2f}x",
    )
    return ["| what | at least | aim | measured |", "|---|---|---|---|", *rows]


if __name__ == "__main__":
    measure("gr.bench_ultra", MEASUREMENTS, Shape(), table)
