"""Layers whose fp8 products overflow go on in bf16.

Scales are those of each row as it is, so that a product in fp8 is finite wherever the one in 16
bits is, up to rounding near the largest number, and a scale that is itself beyond float32. Where a
step is not finite all the same, the guard looks which layer made it so, at the price of computing
that batch again; steps that are finite cost nothing.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gr.hstu import HSTULayer
from gr.parallel import World


@dataclass
class Seen:
    """One call of a layer."""

    number: int
    arguments: tuple[object, ...]
    keywords: dict[str, object]
    x: Tensor
    y: Tensor


class Fp8Guard:
    """Finds and turns off layers in fp8 that overflow where bf16 does not.

    Args:
        model: the dense part.
        world: the ranks, which decide together.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model = model
        self.world = world
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, HSTULayer) and module.fp8_products
        }

    @property
    def is_needed(self) -> bool:
        """Whether any layer still computes in fp8."""
        return any(layer.fp8_products for layer in self.layers.values())

    def state(self) -> list[str]:
        """Return the layers that were turned to bf16, for a checkpoint."""
        return [name for name, layer in self.layers.items() if not layer.fp8_products]

    def load_state(self, names: Sequence[str]) -> None:
        """Turn these layers to bf16; those that the configuration has in bf16 stay so."""
        for name in self.layers.keys() & {*names}:
            self.layers[name].fp8_products = ()

    def after_forward(self, forward: Callable[[], object]) -> bool:
        """Look for layers to blame for a forward pass that was not finite; on all ranks alike.

        Args:
            forward: makes the pass again.

        Returns:
            Whether any was turned to bf16, so that the pass is worth another try.
        """

        def is_to_blame(call: Seen) -> bool:
            if not bool(call.x.isfinite().all()) or bool(call.y.isfinite().all()):
                return False
            return bool(self._in_bf16(call).isfinite().all())

        with torch.no_grad():
            calls = self._watch(forward)[0]
            blamed = [call.number for call in calls if is_to_blame(call)]
        return self._turn_off(blamed, "its result was not finite, in bf16 it is: the batch again")

    def after_backward(self, forward: Callable[[], Tensor]) -> bool:
        """Look for layers to blame for gradients that were not finite; on all ranks alike.

        Args:
            forward: makes the forward pass again and returns the loss.

        Returns:
            Whether any was turned to bf16, from the next step on.
        """
        calls, loss = self._watch(forward)
        blamed = []
        if bool(loss.isfinite()):
            for call in reversed(calls):
                of_y, *others = self._gradients(loss, call.y, call)
                if not bool(of_y.isfinite().all()) or _all_finite(others):
                    continue
                again = self._in_bf16(call)
                if _all_finite(self._gradients(again, None, call, of_y)):
                    blamed.append(call.number)
                break
        return self._turn_off(
            blamed, "a gradient was not finite, in bf16 it is: no dense update by this batch"
        )

    def _watch(self, forward: Callable[[], object]) -> tuple[list[Seen], Tensor]:
        calls: list[Seen] = []
        hooks = []
        for number, layer in enumerate(self.layers.values()):
            if not layer.fp8_products:
                continue

            def note(
                module: nn.Module,
                arguments: tuple[object, ...],
                keywords: dict[str, object],
                y: Tensor,
                number: int = number,
            ) -> None:
                x = arguments[0]
                assert isinstance(x, Tensor)
                calls.append(Seen(number, arguments, keywords, x, y))

            hooks.append(layer.register_forward_hook(note, with_kwargs=True))
        try:
            loss = forward()
        finally:
            for hook in hooks:
                hook.remove()
        return calls, loss if isinstance(loss, Tensor) else torch.zeros(())

    def _in_bf16(self, call: Seen) -> Tensor:
        layer = list(self.layers.values())[call.number]
        products, layer.fp8_products = layer.fp8_products, ()
        try:
            y: Tensor = layer.forward(*call.arguments, **call.keywords)  # type: ignore[arg-type]
        finally:
            layer.fp8_products = products
        return y

    def _gradients(
        self, loss: Tensor, y: Tensor | None, call: Seen, of_loss: Tensor | None = None
    ) -> list[Tensor]:
        """Return the gradients of y (if it is given), of the layer's input and parameters."""
        layer = list(self.layers.values())[call.number]
        inputs = [call.x] if call.x.requires_grad else []
        wanted = [*([] if y is None else [y]), *inputs, *layer.parameters()]
        found = torch.autograd.grad(loss, wanted, of_loss, retain_graph=True, allow_unused=True)
        return [x for x in found if x is not None]

    def _turn_off(self, blamed: list[int], what: str) -> bool:
        flags = torch.zeros(len(self.layers), device=self.world.device)
        flags[blamed] = 1.0
        chosen = [i for i, flag in enumerate(self.world.sum(flags).tolist()) if flag]
        names = [list(self.layers)[i] for i in chosen]
        self.load_state(names)
        if names and self.world.is_main:
            tqdm.write(
                f"fp8 overflowed in {', '.join(names)} ({what}); from here on in bf16",
                file=sys.stderr,
            )
        return bool(names)


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors)
