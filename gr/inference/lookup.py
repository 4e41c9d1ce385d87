"""From raw ids to rows: what a Scorer needs of embedding tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from embeddings.int4 import Int4Tables
from embeddings.tables import Tables
from embeddings.vocabulary import Vocabulary
from pipelines.batch import SequenceBatch
from pipelines.history import Ints

Lookup = Callable[[SequenceBatch], tuple[SequenceBatch, Mapping[str, Tensor]]]
"""A batch of raw ids in host memory -> the batch on the device, and its rows by feature."""


class LocalRows:
    """Rows of tables that lie whole in this process's memory: a CUDA graph can read them.

    Args:
        vocabulary: maps ids of static and hashed tables.
        weights: feature -> its table's name, and the table (rows, width) on the device.
        dtype: of what is looked up.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        weights: Mapping[str, tuple[str, Tensor]],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.vocabulary, self._weights, self.dtype = vocabulary, weights, dtype

    def rows_of(self, feature: str, ids: Ints) -> Ints:
        """Return (n,) int64: the rows of ids, on the host.

        Raises:
            ValueError: for an id outside a static table.
        """
        return self.vocabulary.rows_of_few(self._weights[feature][0], ids)

    def vectors(self, feature: str, rows_n: Tensor) -> Tensor:
        """Return (n, width) of rows, on the device."""
        return self._weights[feature][1].index_select(0, rows_n).to(self.dtype)


class TableLookup:
    """A Lookup in the tables of a run.

    Args:
        model: the dense part, which finds pretrained vectors.
        id_rows: gr.ids.IdRows of the tables.
        tables: of one process.
    """

    def __init__(self, model: Any, id_rows: Any, tables: Tables | Int4Tables) -> None:
        self.model, self.id_rows, self.tables = model, id_rows, tables

    def __call__(self, batch: SequenceBatch) -> tuple[SequenceBatch, Mapping[str, Tensor]]:
        """Return the batch on the device, and its rows by feature."""
        vector_rows, _ = self.model.find_vectors(batch)
        batch = replace(batch, vector_rows=vector_rows)
        batch, is_event = self.id_rows.rows_on_host(batch)
        device = self.tables.device
        batch = batch.to(device)
        is_event = {name: x.to(device) for name, x in is_event.items()}
        batch, _ = self.id_rows.rows_on_device(batch, is_event)
        return batch, self.tables.lookup(batch.ids)

    def local(self, features: Sequence[str]) -> LocalRows | None:
        """Return the rows of features where this process holds all of them; else None."""
        weights = {}
        for name, table in self.tables.config.tables.items():
            for feature in {*table.features} & {*features}:
                weight = None if table.ids == "dynamic" else self.tables.local_weight(name)
                if weight is None:
                    return None
                weights[feature] = name, weight
        return LocalRows(self.id_rows.vocabulary, weights)


def trainer_lookup(trainer: Any, *, form: str = "fp32") -> TableLookup:
    """Return the lookup of a gr.trainer.Trainer, whose tables must be of one process.

    Args:
        trainer: with the weights of a checkpoint.
        form: fp32, the trainer's own tables; or int4, a copy of them in 4 bits in host memory, in
            whose place the trainer's can go.

    Raises:
        ValueError: for another form, or if a table cannot be had in 4 bits.
    """
    if form == "fp32":
        return TableLookup(trainer.model, trainer.id_rows, trainer.tables)
    if form != "int4":
        raise ValueError(f"tables for serving must be fp32 or int4, got {form!r}")
    tables = Int4Tables(trainer.tables)
    # Nothing is left that would keep the rows that were trained.
    trainer.id_rows.tables = trainer.tables = tables
    return TableLookup(trainer.model, trainer.id_rows, tables)
