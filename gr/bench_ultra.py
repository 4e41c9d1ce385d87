"""What the components of ULTRA-HSTU save on one GPU.

    python -m gr.bench_ultra [MEASUREMENT ...] [--records FILE]

A step is forward, backward down to the tokens, and AdamW, of the encoder alone, under bf16
autocast; times are medians of calls in turn, within one process. The loss reads 64 candidates at
the end of each sequence. Plain HSTU and ULTRA-HSTU run on the same kernels.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from gr.bench_encoders import (
    GIB,
    Shape,
    Stack,
    free,
    jagged_lengths,
    kept_bytes,
    median_ms,
    mixture,
    semi_local,
    shortened,
    truncation,
)
from gr.config import ModelConfig
from gr.memory import activation_bytes
from kernels.hstu_layer import RECOMPUTABLE, RECOMPUTED

K1, K2 = 256, 256
KEPT = 2048
"""L' of truncation."""
LIMIT_GIB = 78
Figures = dict[str, float]


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
    train = median_ms({name: stack.train for name, stack in stacks.items()}, rounds=4)
    infer = median_ms({name: stack.infer for name, stack in stacks.items()}, rounds=7)
    alone = {name: Stack(models[name], [longest], shape) for name in ("plain", "ultra")}
    train_alone = median_ms({name: stack.train for name, stack in alone.items()}, rounds=5)
    infer_alone = median_ms({name: stack.infer for name, stack in alone.items()}, rounds=7)
    found = {"full_layers": float(few), "tflop_forward_plain": stacks["plain"].flops / 1e12}
    for name, stack in stacks.items():
        found[f"train_ms_{name}"] = train[name]
        found[f"infer_ms_{name}"] = infer[name]
        if name != "plain":
            found[f"train_speedup_{name}"] = train["plain"] / train[name]
            found[f"infer_speedup_{name}"] = infer["plain"] / infer[name]
            found[f"flop_ratio_{name}"] = stacks["plain"].flops / stack.flops
    found["train_speedup_one_sequence"] = train_alone["plain"] / train_alone["ultra"]
    found["infer_speedup_one_sequence"] = infer_alone["plain"] / infer_alone["ultra"]
    return found


def measure_replay(shape: Shape) -> Figures:
    """The forward passes of `step` as CUDA graphs, in which launches cost next to nothing."""
    longest, local, layers = 16_384, semi_local(K1, K2), shape.num_layers
    cut = truncation(layers - max(1, layers // 6), KEPT)
    found: Figures = {}
    for count in (1, 8):
        models = {
            "plain": shape.hstu(longest),
            "ultra": shape.hstu(longest, **local, **cut),
            "ultra_fp8": shape.hstu(longest, precision="fp8", **local, **cut),
        }
        graphs = {
            name: Stack(model, [longest] * count, shape).replay() for name, model in models.items()
        }
        times = median_ms(graphs, rounds=7)
        found |= {f"ms_{name}_{count}": value for name, value in times.items()}
        for name in ("ultra", "ultra_fp8"):
            found[f"speedup_{name}_{count}"] = times["plain"] / times[name]
    return found


def measure_longest(shape: Shape) -> Figures:
    """One sequence, as long as 78 GiB train: semi-local attention, no truncation."""
    is_gpu = shape.device == "cuda"
    if is_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT_GIB * GIB / total))
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    found: Figures = {}
    lengths = [(1 << 18) * n for n in (4, 5, 6, 7, 8, 9, 10)] if is_gpu else [256, 512]
    for name, recompute in (("default", RECOMPUTED), ("attended", RECOMPUTABLE)):
        for length in lengths:
            if length < found.get("longest", 0.0):
                continue
            free()
            model = shape.hstu(8192, recompute=recompute, **semi_local(K1, K2))
            try:
                stack = Stack(model, [length], shape)
                step = median_ms({"": stack.train}, rounds=1, warm_up=1)[""]
            except torch.OutOfMemoryError:
                break
            finally:
                stack = None  # type: ignore[assignment]
            found["longest"] = found[f"longest_{name}"] = float(length)
            found[f"step_ms_{name}_{length}"] = step
            if is_gpu:
                found[f"peak_gib_{name}"] = torch.cuda.max_memory_allocated() / GIB
    free()
    if is_gpu:
        found |= _check_long(shape, int(found.get("longest", 0)))
        torch.cuda.set_per_process_memory_fraction(1.0)
    return found


def _check_long(shape: Shape, length: int) -> Figures:
    """Return how far the last rows of a long sequence are from those of its end alone.

    With a window and no global rows, layers see so many tokens back, and no more.
    """
    if not length:
        return {}
    model = shape.hstu(8192, **semi_local(K1, 0))
    # Without candidates, which would see all of the history.
    whole = Stack(model, [length], shape).without_candidates()
    reach = shape.num_layers * K1 + shape.candidates
    end = Stack(model, [reach], shape).without_candidates()
    end.encoder.load_state_dict(whole.encoder.state_dict())
    with torch.no_grad():
        end.x_LD = whole.x_LD[-reach:]
        y = whole.forward()
        difference = (end.forward() - y).abs().max() / y.abs().max()
    return {"end_alone_relative_difference": float(difference)}


def measure_memory(shape: Shape) -> Figures:
    """What a layer keeps for its backward pass, with recomputation and without, and as counted."""
    lengths = [3072] * 64
    found: Figures = {}
    kinds: dict[str, dict[str, object]] = {
        "recompute": {},
        "input_only": {"recompute": RECOMPUTABLE},
        "gated_only": {"recompute": ("gated",)},
        "none": {"recompute": ()},
        "composed": {"impl": "composed"},
    }
    for name, changes in kinds.items():
        sizes, counted = [], []
        for layers in (2, 4):
            free()
            few = replace(shape, num_layers=layers)
            model = few.hstu(3072, **changes)
            stack = Stack(model, lengths, few)
            sizes.append(kept_bytes(stack))
            counted.append(activation_bytes(model, stack.info))
            del stack
        found[f"layer_gib_{name}"] = (sizes[1] - sizes[0]) / 2 / GIB
        if name != "composed":
            found[f"counted_gib_{name}"] = (counted[1] - counted[0]) / 2 / GIB
    saved = 1 - found["layer_gib_recompute"] / found["layer_gib_none"]
    eager = 1 - found["layer_gib_recompute"] / found["layer_gib_composed"]
    alone = 1 - found["layer_gib_input_only"] / found["layer_gib_none"]
    names = ("saved", "saved_against_eager", "saved_input_only")
    return {**dict(zip(names, (saved, eager, alone), strict=True)), **found}


def measure_system(shape: Shape) -> Figures:
    """System options together against eager bf16 with the same attention kernel."""
    longest, count = 16_384, 4
    found: Figures = {}
    for name, attention in (("semi_local", semi_local(K1, K2)), ("causal", {})):
        kinds: dict[str, dict[str, object]] = {
            "eager": {"impl": "composed"},
            "fused": {},
            "fused_fp8": {"precision": "fp8"},
            "fused_fp8_gated": {"precision": "fp8", "recompute": ("gated",)},
            "fused_fp8_both": {"precision": "fp8", "fp8_products": ("uvqk", "output")},
            "fused_none": {"recompute": ()},
        }
        free()
        stacks = {
            kind: Stack(shape.hstu(longest, **attention, **changes), [longest] * count, shape)
            for kind, changes in kinds.items()
        }
        train = median_ms({kind: stack.train for kind, stack in stacks.items()}, rounds=5)
        infer = median_ms({kind: stack.infer for kind, stack in stacks.items()}, rounds=5)
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
        "ultra_short": Stack(ultra, cut, shape),
    }
    infer = median_ms({name: stack.infer for name, stack in stacks.items()}, rounds=7)
    train = median_ms({n: s.train for n, s in {**stacks, **short}.items()}, rounds=5)
    found = {"tokens": float(sum(lengths)), "tokens_short": float(sum(cut))}
    found |= {f"infer_ms_{name}": value for name, value in infer.items()}
    found |= {f"train_ms_{name}": value for name, value in train.items()}
    return found | {
        "infer_hstu": infer["transformer"] / infer["hstu"],
        "infer_ultra": infer["transformer"] / infer["ultra"],
        "train_hstu": train["transformer"] / train["hstu"],
        "train_hstu_short": train["transformer"] / train["hstu_short"],
        "train_transformer_short": train["transformer"] / train["transformer_short"],
        "train_ultra_short": train["transformer"] / train["ultra_short"],
    }


def measure_components(shape: Shape) -> Figures:
    """Each component alone and all together: four users of 8,192 events, 18 layers.

    Without merged tokens an event is two. The mixture reads 10,240 and 3,072 tokens (merged half as
    many); stochastic length cuts in training only. How an action is encoded costs the encoder
    nothing.
    """
    longest, count = (16_384, 4) if shape.device == "cuda" else (128, 2)
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
        found[f"train_ms_{name}"] = median_ms({"": train.train}, rounds=4)[""]
        found[f"train_tflop_{name}"] = 3 * train.flops / 1e12
        if shape.device == "cuda":
            found[f"peak_gib_{name}"] = torch.cuda.max_memory_allocated() / GIB
        del train
        infer = Stack(model, served, shape)
        found[f"infer_ms_{name}"] = median_ms({"": infer.infer}, rounds=5)[""]
        found[f"infer_tflop_{name}"] = infer.flops / 1e12
        del infer
    return found


MEASUREMENTS: dict[str, Callable[[Shape], Figures]] = {
    "step": measure_step,
    "components": measure_components,
    "replay": measure_replay,
    "memory": measure_memory,
    "system": measure_system,
    "transformer": measure_transformer,
    "longest": measure_longest,
}


def table(found: dict[str, Figures]) -> list[str]:
    """Return the lines of the report, in Markdown: what, target, aim, measured."""
    rows = []

    def row(what: str, least: str, aim: str, name: str, value: Callable[[Figures], str]) -> None:
        if name in found:
            rows.append(f"| {what} | {least} | {aim} | {value(found[name])} |")

    def times(key: str) -> Callable[[Figures], str]:
        return lambda x: f"{x[key]:.2f}x"

    row("training step, 18 layers x 16,384", "3x", "5x", "step", times("train_speedup_ultra"))
    row("inference, the same", "5x", "12x", "step", times("infer_speedup_ultra"))
    row("inference, as CUDA graphs", "5x", "12x", "replay", times("speedup_ultra_8"))
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
            f"{x['train_hstu_short']:.2f}x ({x['train_hstu']:.2f}x without; the Transformer itself "
            f"gains {x['train_transformer_short']:.2f}x by it)"
        ),
    )
    return ["| what | at least | aim | measured |", "|---|---|---|---|", *rows]


def main() -> None:
    """Measure what is named, all of it by default."""
    parser = argparse.ArgumentParser(prog="python -m gr.bench_ultra")
    parser.add_argument("what", nargs="*", help=f"of {', '.join(MEASUREMENTS)}; all by default")
    parser.add_argument("--records", type=Path, help="JSON lines, appended")
    options = parser.parse_args()
    names = options.what or list(MEASUREMENTS)
    unknown = [name for name in names if name not in MEASUREMENTS]
    if unknown:
        parser.error(f"expected measurements of {list(MEASUREMENTS)}, got {unknown}")
    if not torch.cuda.is_available():
        parser.error("these are measurements of a GPU, and there is none")
    found, failed = {}, []
    for name in names:
        free()
        try:
            figures = MEASUREMENTS[name](Shape())
        except Exception:
            # What comes next can be measured.
            traceback.print_exc()
            failed.append(name)
            continue
        found[name] = figures
        print(
            f"{name}: {json.dumps({k: float(f'{v:.4g}') for k, v in figures.items()})}", flush=True
        )
        if options.records is not None:
            with options.records.open("a") as lines:
                lines.write(json.dumps(describe(name, figures)) + "\n")
    print("\n".join(table(found)), flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def describe(name: str, figures: Figures) -> dict[str, object]:
    """Return a line of the records."""
    return {
        "what": name,
        "figures": {key: float(f"{value:.6g}") for key, value in figures.items()},
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": os.environ.get("GR_COMMIT", ""),
    }


if __name__ == "__main__":
    main()
