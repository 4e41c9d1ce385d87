"""The dense optimizer, and the schedule that both optimizers follow."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

from gr.config import OptimConfig
from gr.parallel import World


class DenseUpdates:
    """AdamW on the dense part: gradients averaged over ranks and over accumulated batches, clipped.

    Parameters and their gradients are fp32, whatever autocast computes in: so are all sums of them.

    Args:
        model: the dense part, the same on all ranks.
        world: the ranks.
        config: optimizer, clipping and accumulation.
        deterministic: whether a resumed run must repeat the sums over ranks to the bit.

    Attributes:
        module: what computes the predictions that train.
        optimizer: of the model.
        num_accumulated: batches since the last update.
    """

    def __init__(
        self, model: nn.Module, world: World, config: OptimConfig, *, deterministic: bool = False
    ) -> None:
        self.model = model
        self.world = world
        self.config = config
        self.module = model
        if world.size > 1:
            # After its first step, DDP lays gradients out anew in the order in which they came, so
            # with more than two ranks a resumed run would add them up in another order than one
            # that went on. It does not where it looks for unused parameters.
            # Buffers are alike on all ranks, and frozen vectors are large.
            self.module = DistributedDataParallel(
                model,
                find_unused_parameters=deterministic,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,  # gradients are not copied for their sums
            )
        on_gpu = next(model.parameters()).is_cuda
        self.optimizer = dense_optimizer(model, config, fused=on_gpu)
        self._norm = torch.full((), float("nan"))
        self.num_accumulated = 0

    @property
    def grad_norm(self) -> float:
        """Of the last update, before clipping; NaN before the first. Waits for the device."""
        return float(self._norm)

    def set_lr(self, lr: float) -> None:
        """Set the step size of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def is_due(self, step: int) -> bool:
        """Return whether an update follows the batch before which `step` batches were taken."""
        return (step + 1) % self.config.accumulate == 0

    def gradients_of(self, step: int) -> AbstractContextManager[Any]:
        """Return the context for the forward and backward pass of the batch at `step`.

        Ranks exchange gradients in the backward pass of the batch that an update follows.
        """
        if isinstance(self.module, DistributedDataParallel) and not self.is_due(step):
            context: AbstractContextManager[Any] = self.module.no_sync()
            return context
        return nullcontext()

    def add(self) -> None:
        """Count a batch whose backward pass has run."""
        self.num_accumulated += 1

    def forget(self) -> None:
        """Forget the gradients that no update has used."""
        self.optimizer.zero_grad(set_to_none=True)
        self.num_accumulated = 0

    def sum_over_ranks(self) -> None:
        """Average what each rank has summed, where no backward pass did it. On all ranks alike."""
        if self.world.size == 1 or not self.num_accumulated:
            return
        for parameter in self.model.parameters():
            grad = parameter.grad
            parameter.grad = self.world.sum(torch.zeros_like(parameter) if grad is None else grad)
            parameter.grad /= self.world.size

    def update(self) -> Tensor:
        """Take a step with the mean of the accumulated gradients; return whether it was finite.

        One that is not changes nothing. Without any there is no step. On a GPU nothing is waited
        for: whether to step is decided there.

        Returns:
            () bool, on the device of the model.
        """
        parameters = list(self.model.parameters())
        if not self.num_accumulated:
            return torch.ones((), dtype=torch.bool, device=parameters[0].device)
        if self.num_accumulated > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= self.num_accumulated
        self._norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, self._norm)
        is_finite = self._norm.isfinite()
        if self.optimizer.defaults["fused"]:
            # What a GradScaler would say: torch's fused step then leaves everything as it is.
            self.optimizer.found_inf = is_finite.logical_not().float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bool(is_finite):
            self.optimizer.step()
        self.forget()
        return is_finite

    def load(self, state: dict[str, Any]) -> None:
        """Take over the optimizer's state, which another kind of device may have saved."""
        fused = [group["fused"] for group in self.optimizer.param_groups]
        set_optimizer_state_dict(self.model, self.optimizer, state)
        for group, is_fused in zip(self.optimizer.param_groups, fused, strict=True):
            group["fused"] = is_fused


def dense_optimizer(
    module: nn.Module, config: OptimConfig, *, fused: bool = False
) -> torch.optim.AdamW:
    """Return AdamW over the parameters of `module`, fused into one kernel or not.

    Only matrices decay.
    """
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
        fused=fused,
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
