"""What inference costs on one GPU, against what it does without caches.

    python -m gr.inference.bench [MEASUREMENT ...] [--records FILE]

candidates: 16,384 candidates behind 8,192 tokens, 6 layers of d=512, microbatches of 1,024 (`wide`:
16,384), against a pass of its own for each candidate, and against encoding the history again for
each 1,024.
requests: a user's second request, 32 new events and 64 candidates, against the first; everything
from encoded events to scores. forward: 5 layers of d=512 over about 99k jagged tokens, also as a
graph, which no host slows.
attention: the kernel of cached keys by itself.

Times are medians of calls in turn, within one process; ratios are of the same process.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gr.bench_encoders import Shape, median_ms, structure
from gr.bench_main import measure
from gr.config import ModelConfig
from gr.flops import inference_flops, layer_flops
from gr.hstu import HSTUEncoder
from gr.inference.bench_requests import measure_requests
from gr.inference.cache import KeyValueStore, pages_for
from gr.inference.encoded import (
    NewTokens,
    StackCache,
    candidate_pass,
    history_pass,
    part_of,
)
from gr.inference.graphs import PassGraphs, captured_graph, runs_alike
from gr.inference.mfalcon import MICROBATCH, MICROBATCH_ON_GPU
from gr.inference.stack import Layout, Pass, Stack
from gr.sequence import Before, SequenceInfo
from kernels.hstu_attention import CachedKeys, hstu_attention, hstu_attention_cached
from kernels.hstu_attention.cached import PAGE

Figures = dict[str, float]
GPU_MICROBATCHES = MICROBATCH_ON_GPU // MICROBATCH
PUBLISHED_TOKENS_PER_S = 10.63e6
"""Meta's Triton inference on one H100 (generative-recommenders issue 530)."""


class Decoder:
    """A stack of layers with one history in its cache. To be run without gradient, in autocast.

    Args:
        model: of the stack.
        history: tokens.
        device: where.
        graphs: whether passes are CUDA graphs.
    """

    def __init__(self, model: ModelConfig, history: int, device: str, *, graphs: bool) -> None:
        torch.manual_seed(0)
        self.model, self.history, self.device = model, history, torch.device(device)
        self.encoder = HSTUEncoder(model).to(device).eval()
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.stack = Stack(self.encoder, self.dtype)
        pages = 2 + pages_for(history + 1024)
        self.store = KeyValueStore(self.stack.shapes, pages, dtype=self.dtype, device=self.device)
        self.pages = [self.store.allocate(pages - 1)]
        is_gpu = self.device.type == "cuda"
        self.graphs = PassGraphs(self.stack, self.store) if graphs and is_gpu else None
        self.x_LD = torch.randn(history + 1, model.dim, device=device, dtype=self.dtype)
        whole = structure([history + 1], 2, model, "cpu")
        self.info = replace(whole, num_candidates=torch.ones(1, dtype=torch.int64))
        self.cache: StackCache | None = None
        self.infos: dict[int, SequenceInfo] = {}
        """Of so many candidates: made before they are timed, as those of the rivals are."""

    def run(self, x_RD: Tensor, given: Pass, runs: int = 1) -> Tensor:
        if self.graphs is not None and self.graphs.takes(given, runs):
            return self.graphs.run(x_RD, given, runs)
        if runs > 1:
            return torch.cat([self.run(x, given) for x in x_RD.chunk(runs)])
        return self.stack.run(x_RD, given.to(self.device), self.store)

    def encode(self) -> Tensor:
        new = NewTokens(
            self.info, torch.arange(self.history + 1), torch.zeros(1, dtype=torch.int64),
            self.info.timestamp[:1],
        )  # fmt: skip
        given, self.cache, _ = history_pass(new, self.store, self.pages, 1)
        return self.run(self.x_LD, given)

    def score(self, x_MD: Tensor, microbatch: int) -> Tensor:
        assert self.cache is not None
        count = len(x_MD)
        if count not in self.infos:
            self.infos[count] = structure([count], count, self.model, "cpu")
        info = self.infos[count]
        found = []
        size, begin, given = 0, 0, None
        while begin < count:
            if given is None or size != min(microbatch, count - begin):
                size = min(microbatch, count - begin)
                _, part = part_of(info, torch.tensor([begin]), torch.tensor([size]))
                the_one = torch.zeros(1, dtype=torch.int64)
                given = candidate_pass(part, self.cache, the_one, windowed=False)
            runs = runs_alike(np.array([count]), begin, microbatch) if self.graphs else 1
            found.append(self.run(x_MD[begin : begin + runs * size], given, runs))
            begin += runs * size
        return torch.cat(found)

    def go_on(self, x_RD: Tensor, candidates: int) -> Tensor:
        """Compute new tokens, the last of them candidates, behind all but one of the history."""
        cached = torch.tensor([self.history - 1])
        whole = structure([len(x_RD)], candidates, self.model, "cpu")
        first = torch.zeros(1, dtype=torch.int64)
        info = replace(whole, before=Before(cached, first, first))
        new = NewTokens(info, torch.arange(len(x_RD)), cached, first)
        given, _, _ = history_pass(new, self.store, self.pages, 1)
        return self.run(x_RD, given)


def measure_candidates(shape: Shape) -> Figures:
    """Rows 1 to 3 of the targets."""
    on_gpu = shape.device == "cuda"
    with torch.no_grad(), torch.autocast(shape.device, torch.bfloat16, on_gpu):
        return _candidates(shape, on_gpu)


def _candidates(shape: Shape, on_gpu: bool) -> Figures:
    history, most, microbatch = (8192, 16_384, 1024) if on_gpu else (96, 64, 16)
    model = shape.hstu(history)
    decoder = Decoder(model, history, shape.device, graphs=True)
    eager = Decoder(model, history, shape.device, graphs=False)
    eager.encoder.load_state_dict(decoder.encoder.state_dict())
    eager.stack.refresh()
    eager.x_LD = decoder.x_LD
    x_MD = torch.randn(most, model.dim, device=shape.device, dtype=decoder.dtype)

    together = 8  # passes of the rivals that share a batch, so that the GPU is busy
    alone_info = structure([history + 1] * together, 1, model, shape.device)
    past = decoder.x_LD[:history]
    alone_x = torch.cat([x for i in range(together) for x in (past, x_MD[i : i + 1])])
    again_info = structure([history + microbatch] * together, microbatch, model, shape.device)
    again_x = torch.cat([past, x_MD[:microbatch]]).repeat(together, 1)

    def forward(x: Tensor, info: SequenceInfo) -> Tensor:
        y: Tensor = decoder.encoder(x, info)
        return y

    decoder.encode()
    expected = forward(alone_x, alone_info).float()
    wide = GPU_MICROBATCHES * microbatch
    errors, before = {}, None
    for name, size in (("microbatches", microbatch), ("wide", wide)):
        decoder.score(x_MD, size)
        y_MD = decoder.score(x_MD, size).float()  # of the graph that is timed
        pairs = {name: (y_MD[:together], expected)}
        if before is not None:
            pairs["between"] = (y_MD, before)
        for pair, (got, wanted) in pairs.items():
            errors[pair] = ((got - wanted).norm() / wanted.norm()).item()
            if not errors[pair] < 2e-2:
                raise ValueError(f"{pair}: rows are {errors[pair]:.1%} off: not timed")
        before = y_MD

    def whole(count: int, size: int) -> None:
        decoder.encode()
        decoder.score(x_MD[:count], size)

    sizes = [microbatch * 2**i for i in range(5) if microbatch * 2**i <= most]
    times = median_ms(
        {
            "history": decoder.encode,
            "history_eager": eager.encode,
            **{f"whole_{m}": partial(whole, m, microbatch) for m in sizes},
            "wide": partial(whole, most, wide),
            "alone": partial(forward, alone_x, alone_info),
            "again": partial(forward, again_x, again_info),
        },
        rounds=5,
    )
    eager.encode()
    times |= median_ms({"score_eager": partial(eager.score, x_MD, microbatch)}, rounds=3)
    # A second request: 32 events of two tokens and the newest one again, with 64 candidates.
    new, few = (66, 64) if on_gpu else (6, 4)

    def first_request() -> None:
        decoder.encode()
        decoder.score(x_MD[:few], few)

    times |= median_ms(
        {"first": first_request, "second": partial(decoder.go_on, x_MD[: new + few], few)},
        rounds=15,
    )
    per_key, per_query, per_pair = layer_flops(model)
    of_candidate = model.num_layers * (per_key + per_query + (history + 1) * per_pair)
    flops_history = inference_flops(model, decoder.info)
    flops_alone = inference_flops(model, structure([history + 1], 1, model, "cpu"))
    flops_again = inference_flops(
        model, structure([history + microbatch], microbatch, model, "cpu")
    )
    ours = flops_history + most * of_candidate
    total, total_wide = times[f"whole_{most}"], times["wide"]
    alone = times["alone"] / together * most
    again = times["again"] / together * (most / microbatch)
    figures = {
        "error": errors["microbatches"],
        "error_wide": errors["wide"],
        "error_between": errors["between"],
        "ms_total_wide": total_wide,
        "share_alone_wide": (alone / total_wide) / (most * flops_alone / ours),
        "speedup_again_wide": again / total_wide,
        "ms_first_request": times["first"],
        "ms_second_request": times["second"],
        "speedup_second_request": times["first"] / times["second"],
        "ms_history": times["history"],
        "ms_history_eager": times["history_eager"],
        "ms_total": total,
        "ms_total_eager": times["history_eager"] + times["score_eager"],
        "ms_alone_each": times["alone"] / together,
        "tflops_ours": ours / total / 1e9,
        "tflops_alone": flops_alone * together / times["alone"] / 1e9,
        "tflops_history": flops_history / times["history"] / 1e9,
        "flop_ratio_alone": most * flops_alone / ours,
        "speedup_alone": alone / total,
        "share_alone": (alone / total) / (most * flops_alone / ours),
        "flop_ratio_again": most / microbatch * flops_again / ours,
        "speedup_again": again / total,
    }
    for m in sizes:
        figures[f"us_each_{m}"] = 1e3 * times[f"whole_{m}"] / m
    return figures


def measure_forward(shape: Shape) -> Figures:
    """Row 5: forward passes over 32 sequences of 99k tokens, 5 layers."""
    on_gpu = shape.device == "cuda"
    longest = 4096 if on_gpu else 64
    lengths = np.random.default_rng(0).integers(longest // 2, longest, 32)
    lengths = (lengths * (99_000 / lengths.sum())).astype(int) if on_gpu else lengths
    shape = replace(shape, num_layers=5)
    figures: Figures = {}
    variants: dict[str, Callable[[], None]] = {}
    graphs = []
    flops = 0
    for name, changes in (("bf16", {}), ("fp8", {"precision": "fp8"})):
        if not on_gpu and name == "fp8":
            continue
        model = shape.hstu(longest, **changes)
        encoder = HSTUEncoder(model).to(shape.device).eval()
        dtype = torch.bfloat16 if on_gpu else torch.float32
        stack = Stack(encoder, dtype)
        # Every row is wanted, as published.
        host = structure(lengths.tolist(), longest, model, "cpu")
        info = replace(host, num_candidates=torch.zeros_like(host.num_candidates))
        flops = inference_flops(model, info)
        x_LD = torch.randn(int(lengths.sum()), model.dim, device=shape.device, dtype=dtype)
        given = _whole_pass(info).to(torch.device(shape.device))
        store = KeyValueStore(stack.shapes, 1, dtype=dtype, device=torch.device(shape.device))

        def call(stack=stack, x=x_LD, given=given, store=store):  # type: ignore[no-untyped-def]
            with torch.no_grad(), torch.autocast(shape.device, torch.bfloat16, on_gpu):
                stack.run(x, given, store)

        def module(encoder=encoder, x=x_LD, info=given.info):  # type: ignore[no-untyped-def]
            with torch.no_grad(), torch.autocast(shape.device, torch.bfloat16, on_gpu):
                encoder(x, info)

        variants |= {name: call, f"{name}_module": module}
        if on_gpu:
            run = variants[name]
            run()  # compiles
            graph, _ = captured_graph(run, None)
            graphs.append((graph, run))  # what a graph reads must outlive it
            variants[f"{name}_graph"] = graph.replay
    times = median_ms(variants, rounds=9, warm_up=3)
    total = int(lengths.sum())
    for name, ms in times.items():
        figures[f"ms_{name}"] = ms
        figures[f"mtokens_per_s_{name}"] = total / ms / 1e3
        figures[f"against_published_{name}"] = total / ms * 1e3 / PUBLISHED_TOKENS_PER_S
        figures[f"tflops_{name}"] = flops / ms / 1e9
    figures["tokens"] = total
    return figures


def measure_attention(shape: Shape) -> Figures:
    """The kernel of cached keys: 1,024 and 64 queries over 8,192 keys, against causal attention."""
    on_gpu = shape.device == "cuda"
    H, K = shape.num_heads, shape.dim // shape.num_heads
    cached = 8192 if on_gpu else 256
    dtype = torch.bfloat16 if on_gpu else torch.float32
    device = shape.device

    def rows(n: int) -> Tensor:
        return torch.randn(n, H, K, device=device, dtype=dtype)

    keys = CachedKeys(
        rows(cached), rows(cached), None,
        torch.arange(cached // PAGE, device=device, dtype=torch.int32)[None],
        torch.tensor([cached], device=device), cached,
    )  # fmt: skip
    variants: dict[str, Callable[[], object]] = {}
    flops: Figures = {}
    repeats = 20 if on_gpu else 1

    graphs = []

    def repeated(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            for _ in range(repeats):
                call()

        if not on_gpu:
            return run
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graphs.append((graph, call))  # what a graph reads must outlive it
        return graph.replay

    for queries in (1024, 128, 64) if on_gpu else (16,):
        q, k, v = rows(queries), rows(queries), rows(queries)
        offsets = torch.tensor([0, queries], device=device)
        counts = torch.tensor([queries], device=device)

        def call(q=q, k=k, v=v, offsets=offsets, counts=counts):  # type: ignore[no-untyped-def]
            return hstu_attention_cached(
                q, k, v, offsets, keys, max_len=len(q), alpha=0.1, scaling_length=8192.0,
                num_candidates=counts,
            )  # fmt: skip

        variants[f"cached_{queries}"] = repeated(call)
        flops[f"cached_{queries}"] = queries * (cached + 1) * 4.0 * H * K
    x = [rows(cached) for _ in range(3)]
    whole = torch.tensor([0, cached], device=device)
    variants["causal"] = repeated(
        lambda: hstu_attention(
            x[0], x[1], x[2], whole, max_len=cached, alpha=0.1, scaling_length=8192.0
        )
    )
    flops["causal"] = cached * (cached + 1) / 2 * 4.0 * H * K
    with torch.no_grad():
        times = median_ms(variants, rounds=9, warm_up=3)
    figures: Figures = {}
    for name, ms in times.items():
        figures[f"us_{name}"] = 1e3 * ms / repeats
        figures[f"tflops_{name}"] = flops[name] * repeats / ms / 1e9
    return figures


def _whole_pass(info: SequenceInfo) -> Pass:
    """Return a pass of sequences of which nothing is cached or kept."""
    none = torch.zeros_like(info.session_start)
    return Pass(info, torch.zeros(len(none), 1, dtype=torch.int32), (Layout(0, none, 0),))


MEASUREMENTS: dict[str, Callable[[Shape], Figures]] = {
    "attention": measure_attention,
    "candidates": measure_candidates,
    "requests": measure_requests,
    "forward": measure_forward,
}


if __name__ == "__main__":
    measure("gr.inference.bench", MEASUREMENTS, Shape(num_layers=6))
