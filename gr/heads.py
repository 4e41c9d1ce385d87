"""What reads the encoder's output: tasks of an event, and the vector that items are compared with.

Letters: P ranking positions, R retrieval positions, D model dim, T tasks.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.config import TaskConfig

NORM_EPS = 1e-6
"""Vectors shorter than this are divided by it instead of by their length."""


class RankingHead(nn.Module):
    """A shared MLP, then one linear read-out a task, whose bias starts at the task's prior.

        h = silu(W_n ... silu(W_1 y + b_1) ... + b_n);   output_t = w_t . h + c_t

    Args:
        dim: D.
        tasks: name -> task; the order is the order of the rows of `readout`.
        hidden: widths of the shared part; empty means that the read-outs see y itself.

    Raises:
        ValueError: if there is no task.
    """

    def __init__(self, dim: int, tasks: Mapping[str, TaskConfig], hidden: Sequence[int]) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("a ranking head needs at least one task, got none: see data.tasks")
        self.tasks = tuple(tasks)
        widths = (dim, *hidden)
        self.shared = nn.Sequential()
        for width_in, width_out in pairwise(widths):
            self.shared.extend([nn.Linear(width_in, width_out), nn.SiLU()])
        self.readout = nn.Linear(widths[-1], len(tasks))
        with torch.no_grad():
            self.readout.bias.copy_(torch.tensor([_start(task) for task in tasks.values()]))

    def forward(self, y_PD: Tensor) -> dict[str, Tensor]:
        """Return task -> (P,): the logit of a binary task, the transformed value of another."""
        hidden_PH = self.shared(y_PD)
        # Logits near 3 are 1/64 apart in bf16: examples would tie.
        with torch.autocast(y_PD.device.type, enabled=False):
            output_PT = self.readout(hidden_PH.to(self.readout.weight.dtype))
        return dict(zip(self.tasks, output_PT.unbind(1), strict=True))


def _start(task: TaskConfig) -> float:
    if task.prior is None:
        return 0.0
    return math.log(task.prior / (1 - task.prior)) if task.type == "binary" else task.prior


class RetrievalHead(nn.Module):
    """The user's vector, in the space of the item rows.

    With `l2_normalize`, x / max(|x|, 1e-6) on both sides, so that the dot product is a cosine. The
    user vector is not projected where the model is as wide as the item rows.

    Args:
        dim: D.
        item_dim: width of the item rows.
        l2_normalize: normalise user and item vectors.

    Source: generative-recommenders db1bf8f, L2NormEmbeddingPostprocessor.
    """

    def __init__(self, dim: int, item_dim: int, *, l2_normalize: bool = True) -> None:
        super().__init__()
        self.l2_normalize = l2_normalize
        self.project = nn.Identity() if dim == item_dim else nn.Linear(dim, item_dim, bias=False)

    def forward(self, y_RD: Tensor) -> Tensor:
        """Return (R, item_dim) user vectors, in fp32 or better."""
        return self.item_vectors(self.project(y_RD))

    def item_vectors(self, rows: Tensor) -> Tensor:
        """Return item rows (N, item_dim) as they are compared with user vectors."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return functional.normalize(rows, dim=-1, eps=NORM_EPS) if self.l2_normalize else rows
