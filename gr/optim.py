"""The dense optimizer, and the schedule that both optimizers follow."""

import math

import torch
from torch import nn

from gr.config import OptimConfig


def dense_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the parameters of `module`; only matrices decay."""
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )


def lr_factor(step: int, config: OptimConfig) -> float:
    """Return what multiplies both learning rates at `step`, a pure function of it.

    Linear warm-up, then constant, or a cosine or line down to `final_lr_fraction` at `decay_steps`.

    Args:
        step: steps taken so far (0 for the first update).
        config: the schedule.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    span = config.decay_steps - config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / span)
    remaining = (
        0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    )
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * remaining
