"""Mixture of transducers: one stack for each group of actions, fused where the heads read.

Letters: L tokens, T tokens of a group, R rows of the result, D model dim, G groups.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gr.config import ModelConfig
from gr.sequence import Group, SequenceInfo
from pipelines.config import DataConfig


class MixtureEncoder(nn.Module):
    """Stacks of one kind, each with its own part of the history; tables and tokens are shared.

        Y = [stack_1(X[tokens of group 1]), ..., stack_G(X[tokens of group G])]

    Every stack reads context, session and all tokens at which a head is read, so that each makes
    the same rows; the heads read them side by side.

    Args:
        stacks: name of the group -> its encoder.

    Source: ULTRA-HSTU (arXiv 2602.16986), mixture of transducers; the rows are joined as in
        TorchEasyRec's version of it.
    """

    def __init__(self, stacks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.stacks = nn.ModuleDict(stacks)

    def forward(self, x_LD: Tensor, info: SequenceInfo) -> Tensor:
        """Return (R, G D): the rows of every stack, in the order of the groups.

        Args:
            x_LD: floating, the tokens of all sequences.
            info: with `groups`, in the order of the stacks.
        """
        parts = [
            stack(x_LD.index_select(0, group.tokens), group.info)
            for stack, group in zip(self.stacks.values(), info.groups, strict=True)
        ]
        return torch.cat(parts, 1)


def mixture_groups(model: ModelConfig, data: DataConfig) -> tuple[Group, ...]:
    """Return the groups of a mixture as batches are split by them; empty without a mixture.

    Args:
        model: names the groups.
        data: gives each action its column and its codes.
    """
    columns = list(data.actions)
    return tuple(
        Group(
            least_codes=tuple(
                # A value that reaches the first threshold has code 2.
                (columns.index(name), 2 + data.actions[name].thresholds.index(least))
                for name, least in group.actions.items()
            ),
            history=group.history,
        )
        for group in model.mixture.values()
    )
