"""HSTU layers in training as CUDA graphs, one a layer and pass, that the host launches whole.

A layer's passes are thirty launches, for which a host may need longer than the GPU. A graph repeats
them at the sizes that it was captured at, so tokens are rounded up: those that are added are one
more sequence, of zeros, whose result no loss reads. It sees no other sequence and no other sees it,
and its gradients are zeros, so that all others are what they would be without it.

Graphs read from and write to memory of their own, which those of all sizes share: they never run at
one time. What a size needs between its forward and its backward pass is in a pool that the next
size uses too.

Letters: L tokens, C tokens of a graph, B sequences, S sequences of a graph, D model dim.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from gr.graph_memory import Buffers, Size, Structure, round_up, size_of
from gr.sequence import SequenceInfo, tail_index
from kernels.rotary import Rotation

if TYPE_CHECKING:
    from gr.hstu import HSTULayer

MOST_SIZES = 64
"""So many sizes are kept. What comes then is launched, until one of them has not come for long."""
LONG = 1000
"""Calls."""


@dataclass
class Pass:
    """What a layer's forward pass leaves to its backward pass while both are captured."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    x: Tensor | None = None
    y: Tensor | None = None
    dx: Tensor | None = None


@dataclass
class Captured:
    """The graphs of one size."""

    size: Size
    buffers: Buffers
    """Which they read and write."""
    last_call: int = 0
    """When it came last."""
    forward: list[Callable[[], None]] = field(default_factory=list)
    """Of each layer, first to last."""
    backward: list[Callable[[], None]] = field(default_factory=list)
    """Likewise."""


class LayerGraphs:
    """Layers of one stack, called like them, in training on a GPU.

    A backward pass must follow before the layers are called again. The result and the gradients are
    overwritten by the next call, so they are to be read before; what `.grad` of a parameter still
    holds then is copied.

    Args:
        layers: of the stack; a call takes the first so many.
        round_to: tokens are rounded up to a multiple of this.
    """

    def __init__(self, layers: "Sequence[HSTULayer]", round_to: int) -> None:
        self.layers = layers
        self.round_to = round_to
        self.generation = 0
        """Calls so far: a backward pass is of the last one, or what it reads is gone."""
        self.calls = 0
        self.captured: dict[Size, Captured] = {}
        self.buffers: Buffers | None = None
        """Of the largest size so far."""
        self.structures: dict[int, Structure] = {}
        """By S."""
        self.learning: list[list[Tensor]] = []
        """Parameters of each layer that learn, as of the first call."""
        self.gradients: list[list[Tensor]] = []
        """Of these, in their order."""
        self.pool: Any = None
        self.stream: torch.cuda.Stream | None = None
        """In which passes are captured."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerGraphs":
        """Return graphs, yet to be captured, of copied layers."""
        return LayerGraphs(copy.deepcopy(self.layers, memo), self.round_to)

    def serves(self, x_LD: Tensor) -> bool:
        """Return whether a call with these tokens is one to be replayed: in training, unwatched."""
        watched = any(layer._forward_hooks or layer._forward_pre_hooks for layer in self.layers)
        is_training = torch.is_grad_enabled() and self.layers[0].training
        return is_training and not watched and x_LD.shape[0] > 0 and _is_capturable(x_LD)

    def __call__(
        self,
        x_LD: Tensor,
        info: SequenceInfo,
        num_layers: int,
        rotations: tuple[Rotation, Rotation] | None = None,
        *,
        of_tails: bool = False,
    ) -> Tensor | None:
        """Return what the first `num_layers` layers make of the tokens, differentiable.

        (L, D), or `of_tails`, with all layers, (R, D): those of the tails. None: call the layers,
        this is one size too many.
        """
        turned = [] if rotations is None else [part for one in rotations for part in one]
        fp8 = [layer.fp8_products for layer in self.layers[:num_layers]]
        size = size_of(x_LD, info, fp8, self.round_to, of_tails=of_tails)
        captured = self.captured.get(size)
        self.calls += 1
        if captured is None:
            if not self._has_place():
                return None
            captured = self._capture(size, x_LD, info, turned)
        captured.last_call = self.calls
        self._load(captured, x_LD, info, turned)
        self.generation += 1
        chain, R = x_LD, info.num_rows if of_tails else x_LD.shape[0]
        for number in range(num_layers):
            learning = self.learning[number]
            chain = _Replay.apply(self, captured, number, R, chain, *learning)  # type: ignore[no-untyped-call]
        return chain

    def _has_place(self) -> bool:
        """Return whether one more size may be kept; one that has not come for long goes for it."""
        if len(self.captured) < MOST_SIZES:
            return True
        oldest = min(self.captured.values(), key=lambda each: each.last_call)
        if self.calls - oldest.last_call <= LONG:
            return False
        del self.captured[oldest.size]
        return True

    def keep_gradients(self, number: int) -> None:
        """Copy what parameters of a layer hold of a batch before, since it is to be overwritten."""
        for parameter, gradient in zip(self.learning[number], self.gradients[number], strict=True):
            held = parameter.grad
            if held is not None and held.data_ptr() == gradient.data_ptr():
                parameter.grad = held.clone()

    @torch.no_grad()
    def _load(
        self, captured: Captured, x_LD: Tensor, info: SequenceInfo, turned: Sequence[Tensor]
    ) -> None:
        """Put a batch where the graphs read it, and zeros behind."""
        size, buffers = captured.size, captured.buffers
        structure = self.structures[size.sequences]
        L, B, C = x_LD.shape[0], info.offsets.numel() - 1, size.tokens
        structure.offsets[: B + 1].copy_(info.offsets)
        structure.offsets[B + 1 :].fill_(C)
        structure.tail_offsets[: B + 1].copy_(info.tail_offsets)
        structure.tail_offsets[B + 1 :].fill_(size.rows)
        structure.num_candidates[:B].copy_(info.num_candidates)
        structure.num_candidates[B:].zero_()
        by_token = [(buffers.x, x_LD), *zip(buffers.turned, turned, strict=True)]
        if self.layers[0].config.bias == "position_time":
            by_token.append((buffers.timestamp, info.timestamp))
            by_token.append((buffers.query_time, info.query_time))
        for to, source in by_token:
            to[:L].copy_(source)
            to[L:C].zero_()

    def _capture(
        self, size: Size, x_LD: Tensor, info: SequenceInfo, turned: Sequence[Tensor]
    ) -> Captured:
        made = Captured(size, self._room(size, x_LD, turned))
        for number in range(size.layers):
            self.keep_gradients(number)
        self._load(made, x_LD, info, turned)
        if x_LD.is_cuda:
            # What dropout draws must not depend on when a size is captured.
            state = torch.cuda.get_rng_state(x_LD.device)
            self._warm_up(made)
            torch.cuda.synchronize()
        passes = [Pass() for _ in range(size.layers)]
        numbers = range(size.layers)
        made.forward = [self._record(self._forward(made, passes, i)) for i in numbers]
        made.backward = [self._record(self._backward(made, passes, i)) for i in reversed(numbers)]
        made.backward.reverse()
        if x_LD.is_cuda:
            torch.cuda.set_rng_state(state, x_LD.device)
        self.captured[size] = made
        return made

    def _room(self, size: Size, x_LD: Tensor, turned: Sequence[Tensor]) -> Buffers:
        """Return buffers that this size fits in; those of smaller sizes stay with their graphs."""
        device = x_LD.device
        if size.sequences not in self.structures:
            offsets = torch.zeros(size.sequences + 1, dtype=torch.int64, device=device)
            self.structures[size.sequences] = Structure(
                offsets, torch.zeros_like(offsets), torch.zeros_like(offsets[1:])
            )
        if not self.gradients:
            self.learning = [
                [parameter for parameter in layer.parameters() if parameter.requires_grad]
                for layer in self.layers
            ]
            self.gradients = [[torch.zeros_like(p) for p in some] for some in self.learning]
            if x_LD.is_cuda:
                self.pool = torch.cuda.graph_pool_handle()
                self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        buffers = self.buffers
        if buffers is None or buffers.num_tokens < size.tokens or buffers.x.dtype != size.dtype:
            room = round_up(size.tokens * 9 // 8, self.round_to)
            buffers = Buffers(x_LD, room, turned)
            self.buffers = buffers
        return buffers

    def _info(self, captured: Captured) -> SequenceInfo:
        size, buffers = captured.size, captured.buffers
        structure = self.structures[size.sequences]
        return SequenceInfo(
            offsets=structure.offsets,
            tail_offsets=structure.tail_offsets,
            max_len=size.max_len,
            max_tail_len=size.max_tail_len,
            timestamp=buffers.timestamp[: size.tokens],
            query_time=buffers.query_time[: size.tokens],
            session_start=structure.num_candidates,  # which layers do not read
            num_context=size.num_context,
            num_candidates=structure.num_candidates,
            num_rows=size.rows,
        )

    def _forward(self, captured: Captured, passes: list[Pass], number: int) -> Callable[[], None]:
        size, buffers = captured.size, captured.buffers
        layer, info = self.layers[number], self._info(captured)
        own, C, device = passes[number], size.tokens, buffers.x.device.type
        turned = [part[:C] for part in buffers.turned]
        rotations = (Rotation(*turned[:2]), Rotation(*turned[2:])) if turned else None
        is_last = number == size.layers - 1

        def run() -> None:
            source = buffers.x[:C] if number == 0 else passes[number - 1].y
            assert source is not None
            own.x = source.detach().requires_grad_()
            # Leaves of this pass: those of the parameters may be held by DDP, which made them in
            # another stream, and autograd would let that wait for the one that is captured.
            own.weights = {
                name: parameter.detach().requires_grad_()
                for name, parameter in layer.named_parameters()
                if parameter.requires_grad
            }
            # Without a cache of casts: what is in it would be freed under the graph.
            is_cast = size.autocast is not None
            cast = torch.autocast(device, size.autocast, is_cast, cache_enabled=False)
            with torch.enable_grad(), cast:
                tail_R = tail_index(info) if is_last and size.max_tail_len else None
                options = {"tail_R": tail_R, "rotations": rotations}
                own.y = functional_call(layer, own.weights, (own.x, info), options)
            if is_last:
                buffers.y[: size.rows].copy_(own.y.detach())

        return run

    def _backward(self, captured: Captured, passes: list[Pass], number: int) -> Callable[[], None]:
        size, buffers = captured.size, captured.buffers
        own, gradients, C = passes[number], self.gradients[number], size.tokens

        def run() -> None:
            is_last = number == size.layers - 1
            dy = buffers.dy[: size.rows] if is_last else passes[number + 1].dx
            assert own.x is not None
            assert own.y is not None
            own.dx, *found = torch.autograd.grad(own.y, [own.x, *own.weights.values()], dy)
            # The memory goes back to the pool.
            own.x, own.y, own.weights = None, None, {}
            if not is_last:
                passes[number + 1].dx = None
            torch._foreach_copy_(gradients, found)
            if number == 0:
                assert own.dx is not None
                buffers.dx[:C].copy_(own.dx)
                own.dx = None

        return run

    def _warm_up(self, captured: Captured) -> None:
        """Run each layer, so that its kernels of this size are compiled and loaded.

        One layer at a time, so that it takes the memory of one; always in the same stream, since
        what is freed is kept for the stream that it was of.
        """
        numbers = range(captured.size.layers)
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            y: Tensor | None = None
            for number in numbers:
                passes = [Pass(y=y) for _ in numbers]
                self._forward(captured, passes, number)()
                made = passes[number].y
                assert made is not None
                y = made.detach()
                if number < captured.size.layers - 1:
                    passes[number + 1].dx = torch.zeros_like(y)
                self._backward(captured, passes, number)()
        torch.cuda.current_stream().wait_stream(self.stream)

    def _record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Return what repeats the work of `run`: a graph; on a CPU, in tests, `run` itself."""
        if self.stream is None:
            run()
            return run
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            # Other threads go on: they pin memory, and watch over communication.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        replay: Callable[[], None] = graph.replay
        return replay


class _Replay(torch.autograd.Function):
    """One layer. Between layers there is only an order to keep: their rows stay in the graphs."""

    @staticmethod
    def forward(
        ctx: Any,
        graphs: LayerGraphs,
        captured: Captured,
        number: int,
        num_rows: int,
        chain: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.graphs, ctx.captured, ctx.number, ctx.num_rows = graphs, captured, number, num_rows
        ctx.generation, ctx.num_tokens = graphs.generation, chain.shape[0]  # of the first layer
        captured.forward[number]()
        if number < captured.size.layers - 1:
            return chain.new_empty(0)
        return captured.buffers.y[:num_rows].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        graphs, captured, number = ctx.graphs, ctx.captured, ctx.number
        buffers, gradients = captured.buffers, graphs.gradients[number]
        if ctx.generation != graphs.generation:
            raise RuntimeError(
                "model.hstu.graph_tokens: the layers were called again before this backward pass, "
                "so that what it reads is gone. Go backward after each forward pass, or set 0"
            )
        if number == captured.size.layers - 1:
            buffers.dy[: ctx.num_rows].copy_(dy)
            buffers.dy[ctx.num_rows : captured.size.rows].zero_()
        graphs.keep_gradients(number)
        captured.backward[number]()
        dx = buffers.dx[: ctx.num_tokens].detach() if number == 0 else dy.new_empty(0)
        return None, None, None, None, dx, *(gradient.detach() for gradient in gradients)


def _is_capturable(x_LD: Tensor) -> bool:
    return x_LD.is_cuda
