"""How long a sequence trains within a GPU's memory, and what a layer keeps of it.

Measurements of gr/bench_ultra.py.
"""

from dataclasses import replace

import torch

from gr.bench_encoders import GIB, Figures, Shape, Stack, free, kept_bytes, median_ms, semi_local
from gr.memory import activation_bytes
from kernels.hstu_layer import RECOMPUTABLE, RECOMPUTED

WINDOW = 256
"""K1, and K2 by rows."""
LIMIT_GIB = 78


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
            model = shape.hstu(8192, recompute=recompute, **semi_local(WINDOW, WINDOW))
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
    model = shape.hstu(8192, **semi_local(WINDOW, 0))
    # Without candidates, which would see all of the history.
    whole = Stack(model, [length], shape).without_candidates()
    reach = shape.num_layers * WINDOW + shape.candidates
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
        "silu_gated": {"recompute": ("silu", "gated")},
        "silu": {"recompute": ("silu",)},
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
    saved = 1 - found["layer_gib_recompute"] / found["layer_gib_silu"]
    eager = 1 - found["layer_gib_recompute"] / found["layer_gib_composed"]
    alone = 1 - found["layer_gib_input_only"] / found["layer_gib_silu"]
    names = ("saved", "saved_against_eager", "saved_input_only")
    return {**dict(zip(names, (saved, eager, alone), strict=True)), **found}
