"""The loss of a batch: gr/losses.py applied to what the batch supervises."""

import torch
from torch import Tensor, nn

from embeddings.tables import Tables
from gr.config import TrainConfig
from gr.heads import RetrievalHead
from gr.losses import (
    ItemFrequency,
    LossSum,
    full_softmax,
    in_batch_softmax,
    multitask_loss,
    position_softmax,
    sampled_softmax,
)
from gr.model import Predictions
from gr.retrieval_metrics import RETRIEVAL
from gr.sequence import sequence_index
from pipelines.batch import SequenceBatch
from pipelines.config import NEGATIVE_ITEM_ID, TARGET_ITEM_ID


class Objective(nn.Module):
    """Sums of losses and of weights, by name: the tasks of ranking, and `retrieval`.

    Args:
        config: of the run.
        item_table: name of the table that holds the items.
    """

    def __init__(self, config: TrainConfig, item_table: str) -> None:
        super().__init__()
        self.config = config
        self.item_table = item_table
        names = list(config.data.tasks)
        if config.model.head.retrieval:
            names.append(RETRIEVAL)
        self.names = tuple(names)
        task_weights = config.loss.task_weights
        self.factors = [task_weights.get(name, 1.0) for name in config.data.tasks]
        if config.model.head.retrieval:
            self.factors.append(config.loss.retrieval_weight)
        self.frequency = (
            ItemFrequency(config.embeddings.tables[item_table].num_embeddings)
            if config.loss.retrieval == "in_batch" and config.loss.logq_correction
            else None
        )

    def weights(self, batch: SequenceBatch) -> Tensor:
        """Return (number of losses,) float64: this rank's weight of each."""
        sums = [batch.weights[name].sum() for name in self.config.data.tasks]
        if self.config.model.head.retrieval:
            sums.append(batch.retrieval_weights.sum())
        return torch.stack(sums).double()

    def forward(
        self,
        batch: SequenceBatch,
        predictions: Predictions,
        head: RetrievalHead | None,
        tables: Tables,
    ) -> dict[str, LossSum]:
        """Return name -> sum of weighted losses and sum of weights.

        Args:
            batch: labels, weights, targets and negatives (rows of the tables).
            predictions: of the dense part.
            head: turns item rows into item vectors; None without retrieval.
            tables: for losses over the whole catalogue.
        """
        tasks = self.config.data.tasks
        sums = multitask_loss(predictions.ranking, batch.labels, batch.weights, tasks)
        if head is not None and predictions.user_vectors is not None:
            sums[RETRIEVAL] = self._retrieval(batch, predictions, head, tables)
        return sums

    def count_targets(self, batch: SequenceBatch) -> None:
        """Let later batches know how often each target of this one came; on all ranks alike."""
        if self.frequency is not None:
            self.frequency.update(batch.ids[TARGET_ITEM_ID].values())

    def forget(self, rows: Tensor) -> None:
        """Let rows of the item table, which are to stand for other items, have no past."""
        if self.frequency is not None:
            self.frequency.forget(rows)

    def _retrieval(
        self,
        batch: SequenceBatch,
        predictions: Predictions,
        head: RetrievalHead,
        tables: Tables,
    ) -> LossSum:
        loss, rows, user_QD = self.config.loss, predictions.rows, predictions.user_vectors
        assert user_QD is not None
        target_rows = batch.ids[TARGET_ITEM_ID].values()
        weights = batch.retrieval_weights
        if loss.retrieval == "full_softmax":
            item_ED = head.item_vectors(tables.full_weight(self.item_table))
            return full_softmax(
                user_QD, item_ED, target_rows, weights_R=weights, temperature=loss.temperature
            )
        if loss.position_negatives:
            return position_softmax(
                user_QD,
                head.item_vectors(tables.full_weight(self.item_table)),
                target_rows,
                num_negatives=loss.position_negatives,
                weights_R=weights,
                temperature=loss.temperature,
            )
        target_QD = head.item_vectors(rows[TARGET_ITEM_ID])
        sequence_L = sequence_index(batch.offsets, batch.num_tokens)
        group_B, num_groups = self._groups(batch)
        group_Q = group_B[sequence_L[batch.retrieval_positions]]
        if loss.retrieval == "in_batch":
            log_q = self.frequency.log_q(target_rows) if self.frequency else None
            return in_batch_softmax(
                user_QD,
                target_QD,
                target_rows,
                group_Q,
                num_groups=num_groups,
                weights_R=weights,
                temperature=loss.temperature,
                log_q_R=log_q,
            )
        negatives = batch.ids[NEGATIVE_ITEM_ID]
        group_M = torch.repeat_interleave(
            group_B, negatives.lengths(), output_size=negatives.values().numel()
        )
        return sampled_softmax(
            user_QD,
            target_QD,
            target_rows,
            head.item_vectors(rows[NEGATIVE_ITEM_ID]),
            negatives.values(),
            group_Q,
            group_M,
            num_groups=num_groups,
            weights_R=weights,
            temperature=loss.temperature,
        )

    def _groups(self, batch: SequenceBatch) -> tuple[Tensor, int]:
        """Return (B,) the group of each sequence, and how many groups there can be."""
        scope = self.config.loss.negatives_scope
        if scope == "batch":
            return torch.zeros_like(batch.partition), 1
        if scope == "sequence":
            return torch.arange(batch.num_sequences, device=batch.offsets.device), max(
                1, batch.num_sequences
            )
        return batch.partition, len(batch.position.rows)
