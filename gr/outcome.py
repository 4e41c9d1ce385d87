"""What the device found in a step, read by the host while the device goes on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class OnTheWay:
    """Values on their way to the host, which reads them while the device goes on.

    Args:
        values_n: float64.
    """

    def __init__(self, values_n: Tensor) -> None:
        self._values_n, self._event = values_n, None
        if values_n.is_cuda:
            self._values_n = torch.empty_like(values_n, device="cpu", pin_memory=True)
            self._values_n.copy_(values_n, non_blocking=True)
            self._event = torch.Event("cuda")
            self._event.record()

    def values(self) -> list[float]:
        """Return them; waits for what the device was given before them."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._values_n.tolist()
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
