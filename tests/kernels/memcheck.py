"""Run one small case of every operator, forward and backward, under NVIDIA's compute-sanitizer.

    python -m tests.kernels.memcheck            every operator, in processes of its own
    python -m tests.kernels.memcheck linear     these checks only

Needs a GPU and compute-sanitizer (in the CUDA toolkit) on the path. torch's caching allocator is
switched off, so that every tensor is an allocation of its own and a byte past its end is an error.
Sizes are odd on purpose: the last tile of every kernel is partly outside.
"""

import argparse
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
from torch import Tensor

from kernels import jagged
from kernels.hstu_attention import (
    AttentionMask,
    CachedKeys,
    RelativeBias,
    hstu_attention,
    hstu_attention_cached,
)
from kernels.hstu_attention.cached import PAGE
from kernels.hstu_layer import RECOMPUTABLE, LayerWeights, hstu_layer, quantize_weights
from kernels.int4_rows import dequantize_int4, row_bytes
from kernels.layer_norm import layer_norm, layer_norm_fp8
from kernels.linear import linear, linear_fp8
from kernels.norm_gate import norm_gate, norm_gate_fp8
from kernels.position_time import position_time
from kernels.quantize import quantize_rows, transpose_rows
from kernels.rotary import Rotation, rotary
from kernels.sampled_softmax import sampled_softmax
from kernels.top_k import top_k

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LENGTHS = (129, 0, 1, 62)
"""Of the sequences: past a block, none, one, short of a block; 192 in all."""
L = sum(LENGTHS)


def _draw(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


def _offsets(device: str, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], device=device)


def _backward(out: Tensor, *inputs: Tensor | None) -> None:
    """Run the backward pass of every input that learns."""
    wanted = [x for x in inputs if x is not None]
    torch.autograd.grad(out, wanted, torch.randn_like(out))


MASKS = (
    AttentionMask(),
    AttentionMask(num_context=3, context="prefix", local_window=16, global_rows=8),
)


def check_hstu_attention_64(device: str) -> None:
    """Every kind of mask, both biases, float32 too."""
    for mask, has_bias in itertools.product(MASKS, (False, True)):
        for dtype in (torch.bfloat16, torch.float32):
            _attend(device, 64, 64, mask, has_bias, dtype=dtype)


def check_hstu_attention_128(device: str) -> None:
    """Every kind of mask, both biases, and the deterministic backward pass."""
    for mask, has_bias in itertools.product(MASKS, (False, True)):
        _attend(device, 128, 128, mask, has_bias)
    _attend(device, 128, 128, MASKS[0], True, deterministic=True)


def check_hstu_attention_256(device: str) -> None:
    """Two passes backward; and dims that differ, which plain Triton takes."""
    _attend(device, 256, 256, MASKS[0], False)
    _attend(device, 32, 96, MASKS[1], True)


def check_hstu_attention_cached(device: str) -> None:
    """New tokens behind cached ones: windows, a bias, softmax, pages that are not full."""
    offsets, heads = _offsets(device), 2
    cached = torch.tensor([260, 0, 128, 5], device=device)
    pages = torch.tensor([[4, 0, 2], [0, 0, 0], [1, 0, 0], [3, 0, 0]], dtype=torch.int32)
    times = torch.arange(5 * PAGE, device=device) * 60, torch.arange(L, device=device) * 3600
    for D, dtype in itertools.product((64, 48), (torch.bfloat16, torch.float32)):
        q, k, v = (_draw(device, L, heads, D, dtype=dtype).detach() for _ in range(3))
        old_k, old_v = (_draw(device, 5 * PAGE, heads, D, dtype=dtype).detach() for _ in range(2))
        keys = CachedKeys(old_k, old_v, times[0], pages.to(device), cached, 260)
        tables = [_draw(device, n, dtype=torch.float32).detach() for n in (2 * 129 - 1, 33)]
        for mask, bias, activation in (
            (AttentionMask(), None, "silu"),
            (AttentionMask(local_window=16, windowed_candidates=True), None, "softmax"),
            (AttentionMask(local_window=40, global_columns=9), tables, "silu"),
        ):
            hstu_attention_cached(
                *(q, k, v, offsets, keys),
                max_len=129,
                alpha=D**-0.5,
                scaling_length=129 if activation == "silu" else None,
                activation=activation,
                mask=mask,
                num_candidates=torch.tensor([70, 0, 1, 62], device=device),
                bias=RelativeBias(*bias, times[1] + 1800, times[1]) if bias else None,
            )


def _attend(
    device: str,
    K: int,
    V: int,
    mask: AttentionMask,
    has_bias: bool,
    *,
    dtype: torch.dtype = torch.bfloat16,
    deterministic: bool = False,
) -> None:
    offsets, heads = _offsets(device), 2
    hours = torch.arange(L, device=device) * 3600
    q, k, v = (_draw(device, L, heads, D, dtype=dtype) for D in (K, K, V))
    tables = [_draw(device, n, dtype=torch.float32) for n in (2 * 129 - 1, 33)] * has_bias
    out = hstu_attention(
        *(q, k, v, offsets),
        max_len=129,
        alpha=K**-0.5,
        scaling_length=129,
        mask=mask,
        bias=RelativeBias(*tables, hours + 1800, hours) if has_bias else None,
        deterministic=deterministic,
    )
    _backward(out, q, k, v, *tables)


def check_hstu_layer(device: str) -> None:
    """What the layer recomputes, nothing recomputed, and fp8; queries and keys turned or not."""
    D, heads, dim = 128, 2, 64
    rotation = Rotation.of(torch.randn(L, 1, dim // 2, device=device))
    for recompute, in_fp8 in ((RECOMPUTABLE, False), ((), False), (RECOMPUTABLE, True)):
        x = _draw(device, L, D)
        uvqk = _draw(device, D, 4 * heads * dim, dtype=torch.float32)
        output = _draw(device, heads * dim, D, dtype=torch.float32)
        weights = LayerWeights(uvqk=uvqk, output=output)
        y = hstu_layer(
            *(x, weights, _offsets(device)),
            num_heads=heads,
            qk_dim=dim,
            v_dim=dim,
            max_len=129,
            alpha=dim**-0.5,
            scaling_length=129,
            recompute=recompute,
            rotations=(rotation, rotation) if recompute else None,
            fp8=quantize_weights(weights, ("uvqk", "output")) if in_fp8 else None,
        )
        _backward(y, x, uvqk, output)


def check_int4_rows(device: str) -> None:
    """All rows, and some of them in another order, of two widths."""
    for dim in (40, 256):
        rows = torch.zeros(L, row_bytes(dim), dtype=torch.uint8, device=device)
        dequantize_int4(rows)
        dequantize_int4(rows, torch.arange(L - 1, -1, -2, device=device), dtype=torch.bfloat16)


def check_jagged(device: str) -> None:
    """Every operator, rows of 24 bytes."""
    tails = (9, 0, 1, 4)
    x, b = _draw(device, L, 12), _draw(device, sum(tails), 12)
    offsets, tail_offsets = _offsets(device), _offsets(device, tails)
    joined = jagged.concat(x, offsets, b, tail_offsets)
    parts = jagged.split(joined, offsets, tail_offsets, num_a=L)
    _backward(torch.cat(parts), x, b)
    _backward(jagged.newest(x, offsets, tail_offsets, num_rows=sum(tails)), x)
    padded = jagged.to_padded(x, offsets, max_len=129)
    _backward(jagged.from_padded(padded, offsets, num_rows=L), x)


def check_layer_norm(device: str) -> None:
    """One row a program and several, in 16 bits and in fp8."""
    for D in (200, 1024, 5000):
        x, weight, bias = _draw(device, L, D), _draw(device, D), _draw(device, D)
        _backward(layer_norm(x, weight, bias), x, weight, bias)
        layer_norm_fp8(x, weight, bias, keep=True)


LINEAR_SIZES = ((144, 264), (512, 2048), (1040, 520))


def check_linear(device: str) -> None:
    """Both epilogues, both schedules of the Hopper kernel, plain Triton, float32."""
    on_gpu = device == "cuda"
    for D, F in LINEAR_SIZES:
        for dtype in (torch.bfloat16, torch.float32):
            for impl in {"auto", "triton" if on_gpu else "reference"}:
                x, weight = _draw(device, L, D, dtype=dtype), _draw(device, F, D, dtype=dtype)
                bias, residual = _draw(device, F), _draw(device, L, F, dtype=dtype)
                y = linear(x, weight, bias, activation="silu", silu_columns=F // 2, impl=impl)
                _backward(y, x, weight, bias)
                y = linear(x, weight, bias, residual_LF=residual, impl=impl)
                _backward(y, x, weight, bias, residual)


def check_linear_fp8(device: str) -> None:
    """The weight's gradient in fp8 and in 16 bits."""
    for D, F in LINEAR_SIZES:
        for wgrad in ("fold", "bf16"):
            x, weight, bias = _draw(device, L, D), _draw(device, F, D), _draw(device, F)
            y = linear_fp8(x, weight, bias, activation="silu", wgrad=wgrad)
            _backward(y, x, weight, bias)


def check_norm_gate(device: str) -> None:
    """Group norm, dropout and the three parts side by side, and fp8."""
    seed = torch.tensor(7, device=device)
    for C, groups, concat, dropout in ((200, 4, False, 0.0), (1024, 1, True, 0.1)):
        x, u, weight, bias = (_draw(device, *shape) for shape in ((L, C), (L, C), (C,), (C,)))
        out = norm_gate(
            *(x, u, weight, bias), num_groups=groups, concat=concat, dropout=dropout, seed=seed
        )
        _backward(out, x, u, weight, bias)
        norm_gate_fp8(x, u, weight, bias, keep=True)


def check_position_time(device: str) -> None:
    """Indices at both ends of both tables."""
    x = _draw(device, L, 200)
    tables = [_draw(device, rows, 200, dtype=torch.float32) for rows in (40, 9)]
    position, time = (torch.arange(L, device=device) % t.shape[0] for t in tables)
    y = position_time(x, tables[0], position, tables[1], time, scale=3.0)
    _backward(y, x, *tables)


def check_quantize(device: str) -> None:
    """Rows of one program and of a large one, and their bytes transposed."""
    for D in (200, 5000):
        rows = quantize_rows(_draw(device, L + 1, D))
        transpose_rows(rows.values)
        transpose_rows(rows.values, rows.scale)


def check_rotary(device: str) -> None:
    """One angle for all heads, and one for each."""
    for groups in (1, 3):
        x = _draw(device, L, 3, 20)
        angles = torch.randn(L, groups, 10, device=device)
        _backward(rotary(x, Rotation(angles.cos(), angles.sin())), x)


def check_sampled_softmax(device: str) -> None:
    """Groups with no rows, no negatives, and more than a block of both."""
    rows, negatives = (129, 0, 1, 62), (70, 5, 0, 200)
    for D in (40, 256):
        query, positive = _draw(device, L, D), _draw(device, L, D)
        negative = _draw(device, sum(negatives), D)
        loss = sampled_softmax(
            *(query, positive, negative, _offsets(device, rows), _offsets(device, negatives)),
            positive_id_R=torch.arange(L, device=device),
            negative_id_N=torch.arange(sum(negatives), device=device),
            temperature=0.5,
        )
        _backward(loss, query, positive, negative)


def check_top_k(device: str) -> None:
    """Items that fill neither the last group nor the last group of groups; one block and two."""
    for num_queries in (3, 70):
        queries, items = _draw(device, num_queries, 40), _draw(device, 64 * 64 * 2 + 70, 40)
        top_k(queries, items, 1)
        top_k(queries, items[:200], 300, is_item_E=torch.arange(200, device=device) % 3 == 0)


CHECKS: dict[str, Callable[[str], None]] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


def main() -> int:
    """Run the checks named on the command line; return 1 if one is not clean."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="*", help=f"of {', '.join(CHECKS)}; all, if none is named")
    parser.add_argument("--here", action="store_true", help="in this process, unchecked")
    parser.add_argument("--tool", default="memcheck", help="of compute-sanitizer")
    arguments = parser.parse_args()
    names = arguments.op or list(CHECKS)
    if unknown := sorted(set(names) - set(CHECKS)):
        parser.error(f"expected checks of {', '.join(CHECKS)}; got {', '.join(unknown)}")
    if arguments.here:
        for name in names:
            CHECKS[name]("cuda")
        torch.cuda.synchronize()
        return 0
    if not torch.cuda.is_available() or shutil.which("compute-sanitizer") is None:
        raise SystemExit("memcheck needs a GPU and compute-sanitizer (CUDA toolkit) on the path")
    failed = 0
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 2)) as pool:
        running = {pool.submit(_sanitize, arguments.tool, name): name for name in names}
        for future in as_completed(running):
            done = future.result()
            failed += done.returncode != 0
            sys.stdout.write(f"{running[future]:18s} {'FAILED' if done.returncode else 'clean'}\n")
            if done.returncode != 0:
                sys.stdout.write(f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}\n")
            sys.stdout.flush()
    return int(failed > 0)


def _sanitize(tool: str, name: str) -> subprocess.CompletedProcess[str]:
    # --target-processes all would also check the compiler that Triton starts.
    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    script = [sys.executable, "-m", "tests.kernels.memcheck", "--here", name]
    return subprocess.run(
        [*sanitizer, *script],
        cwd=ROOT,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )


if __name__ == "__main__":
    sys.exit(main())
