"""From looked-up rows and action codes to one vector a token.

Letters: B sequences, L tokens, I tokens with an item, A tokens with an action, S actions, D dim.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gr.config import ModelConfig
from pipelines.batch import SequenceBatch, TokenKind
from pipelines.config import ITEM_ID, DataConfig


class TokenEmbedding(nn.Module):
    """x_l = sum of the token's parts: item (id and features), action (all signals), context.

    An action is the sum over signals of a learned vector of its code (unknown, or the interval that
    its value falls into), and over data.action_context of a projection of the feature's row. Rows
    narrower or wider than D are projected.

    Args:
        data: names the features and the actions.
        model: gives D and what a candidate has in place of an action.
        feature_dims: feature -> width of its rows.
    """

    def __init__(
        self, data: DataConfig, model: ModelConfig, feature_dims: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.dim = model.dim
        self.item_features = (ITEM_ID, *data.item_features)
        self.context_features = tuple(data.context_features) if data.context == "prefix" else ()
        self.project = nn.ModuleDict()
        for name in (*self.item_features, *self.context_features):
            if feature_dims[name] != model.dim:
                self.project[name] = nn.Linear(feature_dims[name], model.dim, bias=False)
        sizes = [len(action.thresholds) + 2 for action in data.actions.values()]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.code_start_S: Tensor
        self.register_buffer(
            "code_start_S", torch.tensor(starts, dtype=torch.int64), persistent=False
        )
        self.action = nn.Embedding(sum(sizes), model.dim) if sizes else None
        if self.action is not None:
            nn.init.normal_(self.action.weight, std=0.02 / math.sqrt(len(sizes)))
        self.action_context = nn.ModuleDict(
            {
                name: nn.Linear(feature_dims[name], model.dim, bias=False)
                for name in data.action_context
            }
        )
        merged = data.layout == "merged" and data.anchor == "session"
        self.candidate_action = (
            nn.Parameter(torch.randn(model.dim) * 0.02)
            if merged and model.encoding.candidate_action == "learned"
            else None
        )

    def forward(self, batch: SequenceBatch, rows: Mapping[str, Tensor]) -> Tensor:
        """Return x_LD.

        Args:
            batch: token kinds and action codes.
            rows: feature -> looked-up rows, in the order of the batch's ids.
        """
        kind = batch.token_kind
        item_ID = self._sum(self.item_features, rows)
        x_LD = item_ID.new_zeros(batch.num_tokens, self.dim)
        x_LD = x_LD.index_add(0, carries_item(kind).nonzero()[:, 0], item_ID)
        token_A = ((kind == TokenKind.ACTION) | (kind == TokenKind.EVENT)).nonzero()[:, 0]
        if self.action is not None:
            action_AD = self.action(batch.action_codes + self.code_start_S).sum(1)
            x_LD = x_LD.index_add(0, token_A, action_AD)
        if self.action_context:
            # Of the items, all but candidates have an action, in the same order.
            is_known_I = kind[carries_item(kind)] != TokenKind.CANDIDATE
            for name, project in self.action_context.items():
                x_LD = x_LD.index_add(0, token_A, project(rows[name][is_known_I]))
        if self.candidate_action is not None:
            x_LD = x_LD + (kind == TokenKind.CANDIDATE)[:, None] * self.candidate_action
        for index, name in enumerate(self.context_features):
            x_LD = x_LD.index_add(0, batch.offsets[:-1] + index, self._sum((name,), rows))
        return x_LD

    def _sum(self, names: tuple[str, ...], rows: Mapping[str, Tensor]) -> Tensor:
        parts = [self.project[n](rows[n]) if n in self.project else rows[n] for n in names]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def carries_item(kind_L: Tensor) -> Tensor:
    """Return (L,) bool: which tokens bring an id of the item and its features."""
    item, event, candidate = TokenKind.ITEM, TokenKind.EVENT, TokenKind.CANDIDATE
    return (kind_L == item) | (kind_L == event) | (kind_L == candidate)
