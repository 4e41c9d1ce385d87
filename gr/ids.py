"""Ids of a batch to rows of the tables, and what a batch does to tables whose ids come and go."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from embeddings.dynamic import DynamicVocabulary, Sightings
from embeddings.tables import Tables
from embeddings.vocabulary import Vocabulary
from gr.cold_start import vectors_key
from gr.config import TrainConfig
from gr.objective import Objective
from gr.tokens import is_new
from pipelines.batch import SequenceBatch
from pipelines.config import ITEM_ID, NEGATIVE_ITEM_ID, TARGET_ITEM_ID


@dataclass(frozen=True)
class Catalogue:
    """The items that have a row."""

    is_item: Tensor | None
    """(E,) bool: which rows of the item table are items; None: all but row 0."""
    id: Tensor | None
    """(E,) int64: their ids, where their content counts; None: row - 1."""

    def ids(self, rows: Tensor) -> Tensor:
        """Return the raw ids of rows, which are those of a static or dynamic table."""
        return rows - 1 if self.id is None else self.id[rows]


class IdRows:
    """Maps batches, on all ranks alike; `observe` and `apply` are of training only.

    On a GPU the maps are read and changed in the stream that brings batches (`tables.exchange`).

    Args:
        config: of the run.
        tables: that the rows are of.
        item_table: name of the table that holds the items.
    """

    def __init__(self, config: TrainConfig, tables: Tables, item_table: str) -> None:
        self.vocabulary = Vocabulary(config.embeddings)
        self.dynamic = DynamicVocabulary(
            config.embeddings, device=tables.device, seed=config.seed, drawn=(NEGATIVE_ITEM_ID,)
        )
        self.tables = tables
        self.item_table = item_table
        self.item_is_dynamic = item_table in self.dynamic.maps
        self.has_content = bool(config.model.cold_start.path)
        self.of_items = {ITEM_ID, *config.data.item_features}
        self._let_maps_wait()

    def rows_on_host(self, batch: SequenceBatch) -> tuple[SequenceBatch, dict[str, Tensor]]:
        """Return a batch with all its ids in `ids`, mapped where they can be on the CPU.

        Returns:
            The batch; feature of a dynamic table -> (n,) bool: which of its values are events of
            the session, for `rows_on_device`. Targets are events that item_id has too.

        Raises:
            ValueError: for an id outside a static table.
        """
        is_event = {}
        for name in self.dynamic.table_of:
            if name in (TARGET_ITEM_ID, NEGATIVE_ITEM_ID):
                continue
            if batch.bags is not None and name in batch.bags.keys():  # noqa: SIM118
                place = batch.bags.keys().index(name)
                lengths_L = batch.bags.lengths().view(-1, batch.num_tokens)[place]
                is_event[name] = torch.repeat_interleave(is_new(batch), lengths_L)
            elif name in batch.ids.keys():  # noqa: SIM118
                is_event[name] = is_new(batch, name, of_items=name in self.of_items)
        ids = self.vocabulary.rows(batch.lookup_ids(), batch.partition)
        return replace(batch, ids=ids), is_event

    def rows_on_device(
        self, batch: SequenceBatch, is_event: dict[str, Tensor]
    ) -> tuple[SequenceBatch, Sightings]:
        """Return a batch of `rows_on_host`, now on the device, with rows only; and its ids."""
        ids, seen = self.dynamic.map(batch.ids, is_event)
        return replace(batch, ids=ids), seen

    def catalogue(self) -> Catalogue:
        """Return the items as they are now; later batches leave it as it is."""
        if not self.item_is_dynamic:
            return Catalogue(None, None)
        with self._beside():
            ids = self.dynamic.ids(self.item_table) if self.has_content else None
            is_item = self.dynamic.is_used(self.item_table)
        if self.tables.exchange is not None:
            for tensor in (is_item,) if ids is None else (is_item, ids):
                tensor.record_stream(torch.cuda.current_stream())
        return Catalogue(is_item, ids)

    def learnable(self, batch: SequenceBatch) -> SequenceBatch:
        """Return the batch without weight on targets that have neither a row nor content."""
        if not self.item_is_dynamic:
            return batch
        is_something_R = batch.ids[TARGET_ITEM_ID].values() > 0
        content_R = batch.vector_rows.get(vectors_key(TARGET_ITEM_ID))
        if content_R is not None:
            is_something_R = is_something_R | (content_R >= 0)
        return replace(batch, retrieval_weights=batch.retrieval_weights * is_something_R)

    def observe(self, seen: Sightings, *, step: int, time: int | None) -> None:
        """Take note of the batch in training, before the next one is mapped."""
        if not self.dynamic.maps:
            return
        with self._beside():
            self.dynamic.observe(seen, step=step, time=time)

    def apply(self, objective: Objective) -> None:
        """Set the rows of ids that came or went, once the batch has updated the tables."""
        if not self.dynamic.maps:
            return
        if self.item_is_dynamic:
            objective.forget(self.dynamic.changed_rows(self.item_table))
        self.dynamic.apply(self.tables)
        # What comes next in that stream may take over memory that was read here.
        self._let_maps_wait()

    def checkpoint_state(self) -> dict[str, dict[str, Tensor]]:
        """Return the maps, to be saved or loaded in place."""
        if self.tables.exchange is not None:
            torch.cuda.current_stream().wait_stream(self.tables.exchange)
        state = self.dynamic.checkpoint_state()
        self._let_maps_wait()
        return state

    def load_checkpoint_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take over a state that `checkpoint_state` returned and a loader filled."""
        self.dynamic.load_checkpoint_state(state)
        self._let_maps_wait()

    def _let_maps_wait(self) -> None:
        """Let the stream of the maps go on only after what the current one has to do now."""
        if self.tables.exchange is not None:
            self.tables.exchange.wait_stream(torch.cuda.current_stream())

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Work in the stream of the maps; the current stream goes on after it."""
        exchange = self.tables.exchange
        with torch.cuda.stream(exchange):
            yield
        if exchange is not None:
            torch.cuda.current_stream().wait_stream(exchange)
