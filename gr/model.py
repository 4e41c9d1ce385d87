"""The recommender: rows of the tables in, predictions and losses out.

Letters: B sequences, L tokens, R rows of the encoder, P ranking positions, Q retrieval positions,
M negatives, D model dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from gr.baselines.cross_attention import CrossAttentionEncoder
from gr.baselines.dlrm import DLRM
from gr.baselines.sasrec import SASRecEncoder
from gr.baselines.transformer import TransformerEncoder
from gr.cold_start import NAME, ContentTower, vectors_key
from gr.config import TrainConfig
from gr.encodings import TokenEncoding
from gr.heads import RankingHead, RetrievalHead
from gr.hstu import HSTUEncoder
from gr.mixture import MixtureEncoder
from gr.numbers import NumberEncodings
from gr.sequence import SequenceInfo, sequence_index, tail_rows
from gr.tokens import BagVectors, TokenEmbedding, carries_item, is_new, new_numbers
from pipelines.batch import SequenceBatch
from pipelines.config import (
    ITEM_ID,
    TARGET_ITEM_ID,
    bag_features,
    id_features,
    number_features,
)

ENCODERS = {
    "hstu": HSTUEncoder,
    "sasrec": SASRecEncoder,
    "transformer": TransformerEncoder,
    "cross_attention": CrossAttentionEncoder,
}


@dataclass
class Predictions:
    """What the dense part says about a batch."""

    ranking: dict[str, Tensor]
    """Task -> (P,) logits or values."""
    user_vectors: Tensor | None
    """(Q, item dim) user vector of each retrieval position."""
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    """Feature -> its rows, as they were looked up, or of items with their content."""


class SequenceModel(nn.Module):
    """Token embedding, encodings, encoder and heads: the dense part of every sequence model."""

    def __init__(self, config: TrainConfig, feature_dims: Mapping[str, int], utc_offset: int):
        super().__init__()
        model, data = config.model, config.data
        self.tokens = TokenEmbedding(data, model, feature_dims)
        self.encoding = TokenEncoding(model.encoding, model.dim, utc_offset_seconds=utc_offset)
        self.encoder: nn.Module
        if model.mixture:
            self.encoder = MixtureEncoder(
                {name: ENCODERS[model.encoder](model) for name in model.mixture}
            )
        else:
            self.encoder = ENCODERS[model.encoder](model)
        width = model.dim * max(1, len(model.mixture))
        self.ranking = (
            RankingHead(width, data.tasks, model.head.ranking_hidden) if data.tasks else None
        )
        self.retrieval = (
            RetrievalHead(width, feature_dims[ITEM_ID], l2_normalize=model.head.l2_normalize)
            if model.head.retrieval
            else None
        )
        self.content = (
            ContentTower(model.cold_start, feature_dims[ITEM_ID]) if model.cold_start.path else None
        )

    def find_vectors(self, batch: SequenceBatch) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return batch.vector_rows of a batch with raw ids, and how many ids have no vector.

        Not those of negatives, which are known when their rows are.
        """
        rows, lacking = self.tokens.find_vectors(batch)
        if self.content is not None:
            for name in (ITEM_ID, TARGET_ITEM_ID):
                rows[vectors_key(name)] = self.content.find(batch.ids[name].values())
            is_new_n = is_new(batch, ITEM_ID, of_items=True)
            lacking[NAME] = int((is_new_n & (rows[vectors_key(ITEM_ID)] < 0)).sum())
        return rows, lacking

    def observe(self, batch: SequenceBatch) -> None:
        """Add a batch to what numbers are encoded by, on all ranks together."""
        self.tokens.observe(batch)

    def forward(
        self, batch: SequenceBatch, info: SequenceInfo, rows: Mapping[str, Tensor]
    ) -> Predictions:
        """Return the predictions at every position that a loss reads."""
        if self.content is not None:
            rows = self.content.add(batch, rows)
        x_LD = self.encoding(self.tokens(batch, rows), info)
        y_RD: Tensor = self.encoder(x_LD, info)
        sequence_L = sequence_index(batch.offsets, batch.num_tokens)

        def read(positions: Tensor) -> Tensor:
            rows_of = tail_rows(info, positions, sequence_L[positions])
            return y_RD.index_select(0, rows_of)

        return Predictions(
            ranking=self.ranking(read(batch.ranking_positions)) if self.ranking else {},
            user_vectors=self.retrieval(read(batch.retrieval_positions))
            if self.retrieval
            else None,
            rows=rows,
        )

    def item_vectors(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return items as they are compared with user vectors, (n, item dim).

        Args:
            rows: (n, item dim) of the item table.
            ids: (n,) int64 raw ids, on the device.
        """
        assert self.retrieval is not None
        if self.content is not None:
            rows = self.content.join(rows, self.content(self.content.find_on_device(ids)))
        return self.retrieval.item_vectors(rows)


class PointwiseModel(nn.Module):
    """DLRM: each candidate on its own, with dense features instead of the history."""

    def __init__(self, config: TrainConfig, feature_dims: Mapping[str, int]):
        super().__init__()
        data, model = config.data, config.model
        self.item_features = (ITEM_ID, *data.item_features)
        self.context_features = tuple(data.context_features)
        names = (*self.item_features, *self.context_features)
        self.bags = BagVectors(data, model, feature_dims)
        features = {**data.item_features, **data.context_features}
        numbers = number_features(data)
        self.numbers = NumberEncodings({name: features[name] for name in numbers}, model.dim)
        self.dlrm = DLRM(
            model.dlrm,
            num_dense=len(data.dense_features),
            feature_dims={n: model.dim if n in numbers else feature_dims[n] for n in names},
            dim=model.dim,
        )
        self.ranking = RankingHead(model.dlrm.top[-1], data.tasks, ())

    def forward(
        self, batch: SequenceBatch, info: SequenceInfo, rows: Mapping[str, Tensor]
    ) -> Predictions:
        """Return the predictions at every ranking position."""
        item_P = (carries_item(batch.token_kind).cumsum(0) - 1)[batch.ranking_positions]
        sequence_P = sequence_index(batch.offsets, batch.num_tokens)[batch.ranking_positions]
        vectors = {**rows, **{n: self.numbers.encode(n, x) for n, x in batch.numbers.items()}}
        features = {}
        for name in self.item_features:
            features[name] = (
                self.bags(name, batch, rows)[batch.ranking_positions]
                if name in self.bags.names
                else vectors[name][item_P]
            )
        for index, name in enumerate(self.context_features):
            features[name] = (
                self.bags(name, batch, rows)[batch.offsets[sequence_P] + index]
                if name in self.bags.names
                else vectors[name][sequence_P]
            )
        return Predictions(self.ranking(self.dlrm(batch.dense_features, features)), None, rows)

    def find_vectors(self, batch: SequenceBatch) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return nothing: there are no pretrained vectors here."""
        return {}, {}

    def observe(self, batch: SequenceBatch) -> None:
        """Add a batch to what numbers are encoded by, on all ranks together."""
        self.dlrm.observe(batch.dense_features)
        self.numbers.observe(new_numbers(batch, self.item_features))


def dense_model(
    config: TrainConfig, feature_dims: Mapping[str, int], utc_offset: int
) -> SequenceModel | PointwiseModel:
    """Return the dense part that the configuration asks for.

    Args:
        config: of the run.
        feature_dims: feature -> width of its rows.
        utc_offset: seconds to add to a timestamp for local time.
    """
    if config.model.encoder == "dlrm":
        return PointwiseModel(config, feature_dims)
    return SequenceModel(config, feature_dims, utc_offset)


def feature_dims(config: TrainConfig) -> dict[str, int]:
    """Return the width of the rows of each looked-up feature."""
    dims = {f: t.dim for t in config.embeddings.tables.values() for f in t.features}
    return {name: dims[name] for name in (*id_features(config.data), *bag_features(config.data))}
