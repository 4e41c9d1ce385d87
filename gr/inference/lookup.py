"""From raw ids to rows: what a Scorer needs of embedding tables."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from pipelines.batch import SequenceBatch

Lookup = Callable[[SequenceBatch], tuple[SequenceBatch, Mapping[str, Tensor]]]
"""A batch of raw ids in host memory -> the batch on the device, and its rows by feature."""


def trainer_lookup(trainer: Any) -> Lookup:
    """Return the lookup of a gr.trainer.Trainer, whose tables must be of one process."""

    def lookup(batch: SequenceBatch) -> tuple[SequenceBatch, Mapping[str, Tensor]]:
        vector_rows, _ = trainer.model.find_vectors(batch)
        batch = replace(batch, vector_rows=vector_rows)
        batch, is_event = trainer.id_rows.rows_on_host(batch)
        device = trainer.tables.device
        batch = batch.to(device)
        is_event = {name: x.to(device) for name, x in is_event.items()}
        batch, _ = trainer.id_rows.rows_on_device(batch, is_event)
        return batch, trainer.tables.lookup(batch.ids)

    return lookup
