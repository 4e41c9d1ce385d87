"""Encoders on jagged sequences of given lengths: how long they take, how much memory.

Used by gr/bench_ultra.py. Inputs are random; the loss reads the candidates at the end of each
sequence, as with data.anchor=session.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from gr.baselines.attention import softmax_attention
from gr.baselines.transformer import TransformerEncoder
from gr.config import (
    GroupConfig,
    HSTUConfig,
    ModelConfig,
    SemiLocalConfig,
    TransformerConfig,
    TruncationConfig,
)
from gr.flops import inference_flops
from gr.hstu import HSTUEncoder, kept_history
from gr.mixture import MixtureEncoder
from gr.sequence import GroupInfo, SequenceInfo, what_is_kept

GIB = 2**30
Figures = dict[str, float]
ALPHA = 1.6
"""Of stochastic length, as published at 8192."""


@dataclass(frozen=True)
class Shape:
    """What all encoders of a comparison share."""

    dim: int = 512
    num_heads: int = 4
    num_layers: int = 18
    candidates: int = 64
    device: str = "cuda"

    def hstu(self, longest: int, **changes: object) -> ModelConfig:
        """Return plain HSTU with changes of its layers."""
        width = self.dim // self.num_heads
        layer = HSTUConfig(
            num_heads=self.num_heads, qk_dim=width, v_dim=width, scaling_length=longest
        )
        return ModelConfig(
            dim=self.dim,
            num_layers=self.num_layers,
            hstu=replace(layer, **changes),  # type: ignore[arg-type]
        )

    def transformer(self) -> ModelConfig:
        """Return Transformer++."""
        return ModelConfig(
            encoder="transformer",
            dim=self.dim,
            num_layers=self.num_layers,
            transformer=TransformerConfig(num_heads=self.num_heads),
        )


def semi_local(window: int, global_rows: int) -> dict[str, object]:
    """Return the change that is semi-local attention, K1 and K2 by rows."""
    return {"semi_local": SemiLocalConfig(window=window, global_rows=global_rows)}


def truncation(layers: int, history: int) -> dict[str, object]:
    """Return the change that is attention truncation, N2 and L'."""
    return {"truncation": TruncationConfig(layers=layers, history=history)}


def mixture(model: ModelConfig, *histories: int) -> ModelConfig:
    """Return a mixture of such stacks, which read so many tokens of history each."""
    groups = {f"group_{i}": GroupConfig(history=n) for i, n in enumerate(histories)}
    return replace(model, mixture=groups)


def structure(
    lengths: Sequence[int], candidates: int, model: ModelConfig, device: str
) -> SequenceInfo:
    """Return sequences of these lengths, the candidates at their ends among them.

    Args:
        lengths: tokens of each sequence.
        candidates: of each sequence; fewer where it is shorter.
        model: says whether history is truncated.
        device: of the tensors.
    """
    length_B = torch.tensor(lengths, dtype=torch.int64)
    tail_B = length_B.clamp(max=candidates)
    kept = what_is_kept(length_B, length_B - tail_B, 0, kept_history(model))

    def offsets(x: Tensor) -> Tensor:
        return nn.functional.pad(x.cumsum(0), (1, 0)).to(device)

    total = int(length_B.sum())
    timestamp = torch.arange(total, device=device)
    groups = tuple(
        _spread(length_B, tail_B, group.history, model, device) for group in model.mixture.values()
    )
    return SequenceInfo(
        groups=groups,
        offsets=offsets(length_B),
        tail_offsets=offsets(tail_B),
        max_len=int(length_B.max()),
        max_tail_len=int(tail_B.max()),
        timestamp=timestamp,
        query_time=timestamp,
        session_start=(length_B - tail_B).to(device),
        num_context=0,
        num_candidates=tail_B.to(device),
        num_rows=int(tail_B.sum()),
        kept=kept,
    )


def _spread(
    length_B: Tensor, tail_B: Tensor, history: int, model: ModelConfig, device: str
) -> GroupInfo:
    """Return a group whose tokens lie evenly among those of the history."""
    start, chosen, lengths = 0, [], []
    for length, tail in zip(length_B.tolist(), tail_B.tolist(), strict=True):
        count = min(history, length - tail)
        of_history = torch.arange(count) * (length - tail) // max(1, count)
        chosen.append(start + torch.cat([of_history, torch.arange(length - tail, length)]))
        lengths.append(count + tail)
        start += length
    own = structure(lengths, int(tail_B.max()), replace(model, mixture={}), device)
    return GroupInfo(torch.cat(chosen).to(device), own)


def jagged_lengths(count: int, longest: int) -> list[int]:
    """Return lengths uniform in [1, longest], of a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, longest + 1, (count,), generator=generator).tolist()  # type: ignore[no-any-return]


def shortened(lengths: list[int], longest: int) -> list[int]:
    """Return what stochastic length makes of them: see data.stochastic_length."""
    generator = torch.Generator().manual_seed(1)
    cut = round(longest ** (ALPHA / 2))
    draws = torch.rand(len(lengths), generator=generator).tolist()
    return [
        n if n <= cut or draw < longest**ALPHA / n**2 else cut
        for n, draw in zip(lengths, draws, strict=True)
    ]


class Stack:
    """An encoder with its optimizer and a batch: what a step of it is.

    Args:
        model: the configuration.
        sequences: their lengths, the loss reading the last of each; or the structure of a batch.
        shape: shared.
        flash: Transformer++ with FlashAttention-2 of torch in the place of our attention.
    """

    def __init__(
        self,
        model: ModelConfig,
        sequences: Sequence[int] | SequenceInfo,
        shape: Shape,
        *,
        flash: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.device = torch.device(shape.device)
        self.info = (
            sequences
            if isinstance(sequences, SequenceInfo)
            else structure(sequences, shape.candidates, model, shape.device)
        )
        self.encoder: nn.Module
        if model.encoder == "transformer":
            attend = flash_attention if flash else softmax_attention
            self.encoder = TransformerEncoder(model, attend).to(self.device)
        elif model.mixture:
            stacks = {name: HSTUEncoder(model) for name in model.mixture}
            self.encoder = MixtureEncoder(stacks).to(self.device)
        else:
            self.encoder = HSTUEncoder(model).to(self.device)
        is_gpu = self.device.type == "cuda"
        parameters = self.encoder.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=is_gpu, capturable=is_gpu)
        dtype = torch.bfloat16 if is_gpu else torch.float32
        tokens = self.info.timestamp.numel()
        self.x_LD = torch.randn(tokens, model.dim, device=self.device, dtype=dtype)
        width = model.dim * max(1, len(model.mixture))
        self.dy_RD = torch.randn(self.info.num_rows, width, device=self.device)
        self.flops = inference_flops(model, self.info)

    def without_candidates(self) -> "Stack":
        """Return this, its last tokens being part of the history."""
        none = torch.zeros_like(self.info.num_candidates)
        self.info = replace(self.info, num_candidates=none)
        return self

    def forward(self) -> Tensor:
        """Return the rows of the candidates."""
        is_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_gpu):
            y: Tensor = self.encoder(self.x_LD, self.info)
        return y

    def infer(self) -> None:
        """Make a forward pass that keeps nothing."""
        with torch.no_grad():
            self.forward()

    def replay(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return `infer` or `train` as a CUDA graph: what the GPU takes, whatever the host does.

        On a CPU: the call itself.
        """
        if self.device.type == "cpu":
            return step
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()  # compiles
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def train(self) -> None:
        """Make a step: forward, backward down to the tokens, AdamW on the encoder."""
        self.x_LD.requires_grad_()
        y = self.forward()
        y.backward(self.dy_RD.to(y.dtype))  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.x_LD.grad = None


def flash_attention(
    q_RHK: Tensor, k_LHK: Tensor, v_LHK: Tensor, info: SequenceInfo, *, of_tails: bool
) -> Tensor:
    """Return causal softmax attention by FlashAttention-2 of torch, jagged.

    It knows no candidates: they see each other, in causal order. The pairs are as many.
    """
    dtype = torch.get_autocast_dtype("cuda")
    query = info.tail_offsets if of_tails else info.offsets
    out: Tensor = torch.ops.aten._flash_attention_forward(
        *(x.to(dtype) for x in (q_RHK, k_LHK, v_LHK)),
        query.int(),
        info.offsets.int(),
        info.max_tail_len if of_tails else info.max_len,
        info.max_len,
        0.0,
        True,
        False,
    )[0]
    return out


def replayed_ms(
    stacks: Mapping[str, "Stack"], kind: Literal["train", "infer"], *, rounds: int = 5
) -> dict[str, float]:
    """Return `median_ms` of steps as CUDA graphs.

    One after the other: the memory of a graph, a whole step's, goes back before the next.

    Args:
        stacks: name -> stack.
        kind: of step.
        rounds: times each is timed.
    """
    found: Figures = {}
    for name, stack in stacks.items():
        graph = stack.replay(getattr(stack, kind))
        found |= median_ms({name: graph}, rounds=rounds, warm_up=1)
        del graph
        free()
    return found


def median_ms(
    variants: Mapping[str, Callable[[], object]], *, rounds: int = 5, warm_up: int = 2
) -> dict[str, float]:
    """Return the median time of each variant in ms; they take turns, each waited for.

    Args:
        variants: name -> what is timed.
        rounds: times each is timed.
        warm_up: calls before, which compile.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        for _ in range(warm_up):
            call()
    for _ in range(rounds):
        for name, call in variants.items():
            _synchronize()
            start = time.perf_counter()
            call()
            _synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def kept_bytes(stack: Stack) -> int:
    """Return what the allocator has more after a forward pass than before, the input included."""
    stack.x_LD.requires_grad_()
    stack.forward()  # compiles
    _synchronize()
    before = torch.cuda.memory_allocated()
    y = stack.forward()
    _synchronize()
    found = torch.cuda.memory_allocated() - before
    del y
    return found + stack.x_LD.numel() * stack.x_LD.element_size()


def free() -> None:
    """Give back what the last measurement held on the GPU."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
