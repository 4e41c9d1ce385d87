"""What a model says about a batch: ranks in the catalogue, and what of it counts in the metrics."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embeddings.tables import Tables
from gr.cohorts import Cohorts
from gr.config import TrainConfig
from gr.ids import Catalogue
from gr.metrics import EvalAccumulator
from gr.model import Predictions, SequenceModel
from gr.retrieval_metrics import catalogue_ranks
from gr.sequence import sequence_index
from gr.tokens import carries_item
from pipelines.batch import SequenceBatch
from pipelines.config import ITEM_ID, TARGET_ITEM_ID


@dataclass(frozen=True)
class Scored:
    """A batch, and what the model says about it."""

    batch: SequenceBatch
    """On the device, with rows of the tables in the place of raw ids."""
    predictions: Predictions
    ranks: Tensor | None
    """(R,) int64 rank of each retrieval target in the catalogue; None without eval.retrieval.
    0: not ranked, an event of history (data.supervise=all or sampled), which counts nothing."""
    log_probs: Tensor | None
    """(R,) log probability of each target, likewise."""


class Scoring:
    """Predictions of a run against labels and catalogue, and the metrics they make.

    Args:
        config: of the run.
        model: on its device.
        tables: what the model reads.
        item_table: of them, the one that holds the catalogue.
    """

    def __init__(
        self, config: TrainConfig, model: nn.Module, tables: Tables, item_table: str
    ) -> None:
        self.config = config
        self.model = model
        self.tables = tables
        self.item_table = item_table
        self.cohorts = Cohorts(config).to(next(model.parameters()).device)
        self.evaluation = EvalAccumulator(
            config.data.tasks,
            retrieval=config.model.head.retrieval and config.eval.retrieval,
            ks=config.eval.ks,
            lifetime_auc=config.eval.lifetime_auc,
            cohorts=self.cohorts.names,
        )

    @torch.no_grad()
    def of(
        self,
        batch: SequenceBatch,
        predictions: Predictions,
        catalogue: Catalogue,
    ) -> Scored:
        """Return predictions with the ranks of their targets, where targets are ranked.

        Args:
            batch: on the device, with rows of the tables in the place of raw ids.
            predictions: of the model for it.
            catalogue: as it was when the model read the tables.
        """
        if predictions.user_vectors is None or not self.config.eval.retrieval:
            return Scored(batch, predictions, None, None)
        sequence_L = sequence_index(batch.offsets, batch.num_tokens)
        model = self.model
        assert isinstance(model, SequenceModel)
        head = model.retrieval
        assert head is not None
        chunks = (
            (first, model.item_vectors(chunk, catalogue.ids(_numbers(first, chunk))))
            for first, chunk in self.tables.all_rows(self.item_table)
        )
        rules, rows_R = self.config.eval, batch.ids[TARGET_ITEM_ID].values()
        chosen: Tensor | slice = slice(None)
        is_new_R = self._of_session(batch, batch.retrieval_positions, sequence_L, ahead=1)
        if is_new_R is not None:
            chosen = is_new_R.nonzero()[:, 0]
        seen = None
        if rules.filter_seen:
            seen = seen_items(batch, sequence_L, newest=rules.filter_newest, chosen=chosen)
        ranks, log_probs = catalogue_ranks(
            predictions.user_vectors[chosen],
            head.item_vectors(predictions.rows[TARGET_ITEM_ID][chosen]),
            rows_R[chosen],
            chunks,
            temperature=self.config.loss.temperature,
            seen=seen,
            is_item_E=catalogue.is_item,
        )
        if isinstance(chosen, Tensor):
            ranks = torch.zeros_like(rows_R).index_copy(0, chosen, ranks)
            log_probs = log_probs.new_zeros(len(rows_R)).index_copy(0, chosen, log_probs)
        return Scored(batch, predictions, ranks, log_probs)

    def add(self, scored: Scored) -> None:
        """Add a batch to the metrics."""
        batch, ranking = scored.batch, scored.predictions.ranking
        sequence_L = sequence_index(batch.offsets, batch.num_tokens)
        if ranking:
            positions, weights = batch.ranking_positions, batch.weights
            is_new_P = self._of_session(batch, positions, sequence_L, ahead=0)
            if is_new_P is not None:
                weights = {task: weight * is_new_P for task, weight in weights.items()}
            users_P = batch.user_id[sequence_L[positions]]
            cohorts = self.cohorts.of_ranking(batch, sequence_L)
            self.evaluation.update_ranking(ranking, batch.labels, weights, users_P, cohorts)
        if scored.ranks is not None and scored.log_probs is not None:
            is_new_R = self._of_session(batch, batch.retrieval_positions, sequence_L, ahead=1)
            weight_R = batch.retrieval_weights
            weight_R = weight_R if is_new_R is None else weight_R * is_new_R
            cohorts = self.cohorts.of_retrieval(batch, sequence_L)
            self.evaluation.update_retrieval(scored.ranks, scored.log_probs, weight_R, cohorts)

    def _of_session(
        self, batch: SequenceBatch, positions: Tensor, sequence_L: Tensor, *, ahead: int
    ) -> Tensor | None:
        """Return which positions predict events of the session; None where all do.

        With supervise=all or sampled, positions of history train again on what a pass has learnt
        and scored before: only the session's are scored.

        Args:
            batch: a batch.
            positions: (n,) int64 tokens.
            sequence_L: int64, the sequence of each token.
            ahead: tokens from a position to the event that is predicted there.
        """
        if self.config.data.supervise == "session":
            return None
        sequence_n = sequence_L[positions]
        return positions + ahead - batch.offsets[sequence_n] >= batch.session_start[sequence_n]


def _numbers(first: int, rows: Tensor) -> Tensor:
    return torch.arange(first, first + len(rows), device=rows.device)


def seen_items(
    batch: SequenceBatch,
    sequence_L: Tensor,
    *,
    newest: int = 0,
    chosen: Tensor | slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Return the items that stand before each retrieval position in its sequence.

    Args:
        batch: with rows of the item table as item ids.
        sequence_L: the sequence of each token.
        newest: only so many of them, the last; 0 means all.
        chosen: index into the retrieval positions: of these only, which count from 0.

    Returns:
        (S,) int64 index into the retrieval positions; (S,) int64 row: one pair a position and item.
    """
    items_L1 = nn.functional.pad(carries_item(batch.token_kind).cumsum(0), (1, 0))
    positions = batch.retrieval_positions[chosen]
    first_R = items_L1[batch.offsets[sequence_L[positions]]]
    count_R = items_L1[positions + 1] - first_R
    if newest:
        first_R = first_R + (count_R - newest).clamp_min(0)
        count_R = count_R.clamp_max(newest)
    index_S = torch.repeat_interleave(torch.arange(len(count_R), device=count_R.device), count_R)
    place_S = torch.arange(len(index_S), device=count_R.device)
    place_S = place_S - (count_R.cumsum(0) - count_R)[index_S]
    return index_S, batch.ids[ITEM_ID].values()[first_R[index_S] + place_S]
