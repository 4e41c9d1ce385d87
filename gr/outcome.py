"""What the device found, read by the host while the device goes on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class TensorsOnTheWay:
    """Tensors on their way to the host, which reads them while the device goes on.

    Args:
        tensors: on one device; on the host they are taken as they are.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._event = None
        for name, x in tensors.items():
            self._tensors[name] = x
            if x.is_cuda:
                self._tensors[name] = torch.empty_like(x, device="cpu", pin_memory=True)
                self._tensors[name].copy_(x, non_blocking=True)
        if any(x.is_cuda for x in tensors.values()):
            self._event = torch.Event("cuda")
            self._event.record()

    def tensors(self) -> dict[str, Tensor]:
        """Return them; waits for what the device was given before them."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


class OnTheWay:
    """Values on their way to the host likewise.

    Args:
        values_n: float64.
    """

    def __init__(self, values_n: Tensor) -> None:
        self._sent = TensorsOnTheWay({"": values_n})

    def values(self) -> list[float]:
        """Return them; waits for what the device was given before them."""
        values: list[float] = self._sent.tensors()[""].tolist()
        return values


@dataclass
class Outcome:
    """What a step counted over all ranks."""

    counts: OnTheWay
    """Those of StagedBatch.counts, exact below 2^53, and whether all gradients were finite."""
    num_sessions: int
    """SequenceBatch.num_sessions."""
    to_blame: Callable[[], bool] | None = None
    """Finds a layer in fp8 by which the gradients are not finite, if they are not."""
