"""How far a run is, and what it left out so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from pipelines.batch import StreamPosition
from pipelines.rejects import REASONS

SKIPPED = (
    *(f"data/rejected/{reason}" for reason in REASONS),
    "data/clipped_histories",
    "data/cut_bags",
    "train/nonfinite_rows",
    "train/nonfinite_steps",
)
NUM_COUNTS = 4
"""Of StagedBatch.counts, those before what was skipped."""
NONFINITE_ROWS, NONFINITE_STEPS = len(SKIPPED) - 2, len(SKIPPED) - 1


@dataclass
class Progress:
    """How far a run is, over all ranks."""

    step: int = 0
    """Updates made."""
    examples: int = 0
    """Sequences trained on."""
    tokens: int = 0
    """Tokens of those sequences."""
    flops: int = 0
    """Of the encoder's forward and backward passes over them (gr/flops.py)."""
    position: StreamPosition | None = None
    """Position of the stream after the last trained batch."""
    skipped: list[int] = field(default_factory=lambda: [0] * len(SKIPPED))
    """What was left out, of the data and of the gradients, in the order of SKIPPED, and ids without
    a pretrained vector."""

    @property
    def nonfinite_steps(self) -> int:
        """Steps whose loss or gradients were not all finite."""
        return self.skipped[NONFINITE_STEPS]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        position = self.position
        return {
            "step": self.step,
            "examples": self.examples,
            "tokens": self.tokens,
            "flops": self.flops,
            "rows": list(position.rows) if position else [],
            "segments": list(position.segments) if position else [],
            "skipped": self.skipped,
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """Return what `state` had returned."""
        return cls(
            step=state["step"],
            examples=state["examples"],
            tokens=state["tokens"],
            flops=state["flops"],
            position=StreamPosition(
                rows=tuple(state["rows"]),
                step=state["step"],
                segments=tuple(state["segments"]),
            ),
            skipped=list(state["skipped"]),
        )
