"""From looked-up rows, numbers and action codes to one vector a token.

Letters: B sequences, L tokens, I tokens with an item, A tokens with an action, S actions, D dim.
"""

import math
from collections.abc import Collection, ItemsView, Mapping

import torch
from torch import Tensor, nn

from gr.bags import BagPooling
from gr.config import ModelConfig
from gr.numbers import NumberEncodings
from gr.pretrained import PretrainedVectors
from gr.sequence import sequence_index
from pipelines.batch import SequenceBatch, TokenKind
from pipelines.config import ITEM_ID, DataConfig, FeatureConfig, bag_features


class TokenEmbedding(nn.Module):
    """x_l = sum of the token's parts: item (id and features), action (all signals), context.

    An action is the sum over signals of a learned vector of its code (unknown, or the interval that
    its value falls into), and over data.action_context of a projection of the feature's row. A
    feature with several ids is pooled, a number encoded (gr/bags.py, gr/numbers.py). Rows narrower
    or wider than D are projected.

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
        context = data.context_features if data.context != "none" else {}
        self.item_features = (ITEM_ID, *_plain(data.item_features))
        self.item_numbers = tuple(n for n, x in data.item_features.items() if x.is_number)
        self.context_features = tuple(context)
        self.bags = BagVectors(data, model, feature_dims)
        numbers = {n: x for n, x in {**data.item_features, **context}.items() if x.is_number}
        self.numbers = NumberEncodings(numbers, model.dim)
        self.pretrained = PretrainedFeatures(model)
        self.project = nn.ModuleDict()
        for name in (*self.item_features, *_plain(context), *self.bags.names):
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

    def forward(
        self,
        batch: SequenceBatch,
        rows: Mapping[str, Tensor],
        *,
        known_places: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return x_LD: sums in float32 or better, whatever autocast makes of their parts.

        Args:
            batch: token kinds and action codes.
            rows: feature -> looked-up rows, in the order of the batch's ids.
            known_places: (I,) and (A,) int64: the tokens of items and of actions, where that is
                known; None: they are looked for.
        """
        kind = batch.token_kind
        item_ID = self._sum(self.item_features, rows)
        for name in self.item_numbers:
            item_ID = item_ID + self.numbers.encode(name, batch.numbers[name])
        item_ID = item_ID.to(torch.promote_types(item_ID.dtype, torch.float32))
        if len(item_ID) == batch.num_tokens:
            # Every token has one: looking for them would wait for the device. The sum itself is
            # copied once, since what is looked up must stay as it is.
            x_LD = item_ID.clone()
        else:
            x_LD = item_ID.new_zeros(batch.num_tokens, self.dim)
            if known_places is None:
                token_I = places(carries_item(kind), len(item_ID))
            else:
                token_I = known_places[0]
            x_LD.index_copy_(0, token_I, item_ID)
        if known_places is not None:
            token_A = known_places[1]
        elif self.action is not None or self.action_context:
            has_action_L = (kind == TokenKind.ACTION) | (kind == TokenKind.EVENT)
            token_A = places(has_action_L, len(batch.action_codes))
        if self.action is not None:
            action_ASD = self.action(batch.action_codes + self.code_start_S)
            action_AD = action_ASD.sum(1) if len(self.code_start_S) > 1 else action_ASD[:, 0]
            x_LD = _add(x_LD, token_A, action_AD)
        if self.action_context:
            # Of the items, all but candidates have an action, in the same order.
            is_known_I = kind[carries_item(kind)] != TokenKind.CANDIDATE
            for name, project in self.action_context.items():
                x_LD = _add(x_LD, token_A, project(rows[name][is_known_I]))
        if self.candidate_action is not None:
            x_LD = x_LD + (kind == TokenKind.CANDIDATE)[:, None] * self.candidate_action
        for name, frozen in self.pretrained.items():
            feature = frozen.config.feature
            if feature in self.item_features:
                token_n = carries_item(kind).nonzero()[:, 0]
            else:
                token_n = context_tokens(batch, self.context_features.index(feature), feature)
            x_LD = _add(x_LD, token_n, frozen(batch.vector_rows[name]))
        for name in self.bags.names:
            x_LD = x_LD + self._sum((name,), {name: self.bags(name, batch, rows)})
        for index, name in enumerate(self.context_features):
            is_left_out = batch.num_context == 0 and name not in batch.context_positions
            if name in self.bags.names or is_left_out:  # of a part of a sequence (gr/inference)
                continue
            is_number = name in batch.numbers
            vectors = (
                self.numbers.encode(name, batch.numbers[name])
                if is_number
                else self._sum((name,), rows)
            )
            x_LD = _add(x_LD, context_tokens(batch, index, name), vectors)
        return x_LD

    def find_vectors(self, batch: SequenceBatch) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return batch.vector_rows of a batch with raw ids, on the CPU, and ids without a vector.

        What stood in the history was counted before.
        """
        rows, lacking = {}, {}
        for name, vectors in self.pretrained.items():
            feature = vectors.config.feature
            rows[name] = vectors.find(batch.ids[feature].values())
            new_n = is_new(batch, feature, of_items=feature in self.item_features)
            lacking[name] = int((new_n & (rows[name] < 0)).sum())
        return rows, lacking

    def observe(self, batch: SequenceBatch) -> None:
        """Add the numbers of a batch's sessions to what numbers are encoded by, on all ranks."""
        self.numbers.observe(new_numbers(batch, self.item_numbers))

    def _sum(self, names: tuple[str, ...], rows: Mapping[str, Tensor]) -> Tensor:
        parts = [self.project[n](rows[n]) if n in self.project else rows[n] for n in names]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


class BagVectors(nn.Module):
    """One vector a token of each feature that has several ids.

    Args:
        data: names the features.
        model: how they are pooled.
        feature_dims: feature -> width of its rows.
    """

    def __init__(
        self, data: DataConfig, model: ModelConfig, feature_dims: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.names = bag_features(data)
        self.pooling = nn.ModuleDict(
            {
                name: BagPooling(feature_dims[name], model.pooling.get(name, "mean"))
                for name in self.names
            }
        )

    def forward(self, name: str, batch: SequenceBatch, rows: Mapping[str, Tensor]) -> Tensor:
        """Return (L, width of the rows): the pooled bag of each token, zero where there is none."""
        assert batch.bags is not None
        lengths_FL = batch.bags.lengths().view(len(self.names), batch.num_tokens)
        return self.pooling[name](  # type: ignore[no-any-return]
            rows[name], lengths_FL[self.names.index(name)]
        )


class PretrainedFeatures(nn.ModuleDict):
    """All frozen vectors of a model, by name."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(
            {name: PretrainedVectors(name, x, model.dim) for name, x in model.pretrained.items()}
        )

    def items(self) -> "ItemsView[str, PretrainedVectors]":
        """Return (name, vectors) of each."""
        return super().items()  # type: ignore[return-value]


def new_numbers(batch: SequenceBatch, of_items: Collection[str]) -> dict[str, Tensor]:
    """Return batch.numbers with NaN for what stood in the history: it was counted before.

    Args:
        batch: a batch.
        of_items: those of batch.numbers that are features of items.
    """
    return {
        name: values.where(is_new(batch, name, of_items=name in of_items), torch.nan)
        for name, values in batch.numbers.items()
    }


def is_new(batch: SequenceBatch, name: str = "", *, of_items: bool = False) -> Tensor:
    """Return (n,) bool: which values of a feature, as batch.ids holds them, are of the session.

    Without a name: which tokens are.

    The context of a sequence is, but a series that is merged also has tokens in the history.

    Args:
        batch: a batch.
        name: of the feature.
        of_items: whether it is a feature of items.
    """
    sequence_L = sequence_index(batch.offsets, batch.num_tokens)
    place_L = torch.arange(batch.num_tokens, device=sequence_L.device) - batch.offsets[sequence_L]
    is_new_L = place_L >= batch.session_start[sequence_L]
    if not name:
        return is_new_L
    if of_items:
        return is_new_L[carries_item(batch.token_kind)]
    if name in batch.context_positions:
        return is_new_L[batch.context_positions[name]]
    return torch.ones(batch.num_sequences, dtype=torch.bool, device=sequence_L.device)


def context_tokens(batch: SequenceBatch, index: int, name: str) -> Tensor:
    """Return (n,) int64: the tokens of a context feature, the `index`th."""
    if name in batch.context_positions:
        return batch.context_positions[name]
    return batch.offsets[:-1] + index


def _plain(features: Mapping[str, FeatureConfig]) -> list[str]:
    return [name for name, x in features.items() if not x.is_bag and not x.is_number]


def places(is_there_L: Tensor, count: int) -> Tensor:
    """Return (count,) int64: where `is_there_L` holds, in order.

    Args:
        is_there_L: bool.
        count: how often it holds, given so that no device has to be waited for.
    """
    if is_there_L.is_cuda:
        return is_there_L.logical_not().byte().argsort(stable=True)[:count]
    return is_there_L.nonzero()[:, 0]


def _add(x_LD: Tensor, token_n: Tensor, vectors_nD: Tensor) -> Tensor:
    """Return x_LD, changed in place: vectors, maybe narrower ones, are added to some tokens."""
    return x_LD.index_add_(0, token_n, vectors_nD.to(x_LD.dtype))


def carries_item(kind_L: Tensor) -> Tensor:
    """Return (L,) bool: which tokens bring an id of the item and its features."""
    item, event, candidate = TokenKind.ITEM, TokenKind.EVENT, TokenKind.CANDIDATE
    return (kind_L == item) | (kind_L == event) | (kind_L == candidate)
