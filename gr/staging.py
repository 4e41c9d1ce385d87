"""Batches on their way: to the device, and their ids to the ranks that hold the rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from embeddings.dynamic import Sightings
from embeddings.tables import PendingLookup, Tables
from gr.config import ModelConfig
from gr.flops import training_flops
from gr.hstu import kept_history
from gr.ids import IdRows
from gr.sequence import Group, SequenceInfo, info_of_copy, sequence_info
from pipelines.batch import SequenceBatch


@dataclass(frozen=True)
class StagedBatch:
    """A batch that is being brought; `arrive` before its tensors are read."""

    batch: SequenceBatch
    """On the device, with rows of the tables in the place of raw ids."""
    info: SequenceInfo
    """Its structure, on the device."""
    lookup: PendingLookup
    """Of all its ids."""
    event: torch.Event | None
    """On a GPU: all copies are made."""
    counts: Tensor
    """Float64, on the device: expected load, sequences, tokens, FLOPs, and what was skipped."""
    seen: Sightings = field(default_factory=Sightings)
    """Its ids in dynamic tables."""
    time: int | None = None
    """Of the batch, s: its latest token; None of an empty one."""

    def arrive(self) -> SequenceBatch:
        """Return the batch, which the device's current work may use from here on."""
        if self.event is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.event)
            self.batch.record_stream(stream)
            self.info.record_stream(stream)
            self.counts.record_stream(stream)
        return self.batch


def stage(
    batch: SequenceBatch,
    id_rows: IdRows,
    tables: Tables,
    *,
    model: ModelConfig,
    groups: Sequence[Group] = (),
    skipped: Sequence[int] = (),
) -> StagedBatch:
    """Start to bring a batch, on a GPU beside its other work. On every rank alike.

    Args:
        batch: raw ids, on the CPU.
        id_rows: maps raw ids to rows.
        tables: what the rows are looked up in.
        model: says what training on a batch costs.
        groups: of a mixture.
        skipped: what the batch leaves out, by reason, to be counted with it.

    Raises:
        ValueError: for an id outside a static table.
    """
    time = int(batch.timestamp.max()) if batch.num_tokens else None
    batch, is_event = id_rows.rows_on_host(batch)
    # In host memory: on a GPU it would have to be waited for.
    info = sequence_info(batch, keep_history=kept_history(model), groups=groups)
    counts = torch.tensor(
        [
            *(batch.expected_load, batch.num_sequences, batch.num_tokens),
            *(training_flops(model, info), *skipped),
        ],
        dtype=torch.float64,
    )
    event = None

    def copy(x: Tensor) -> Tensor:
        pinned = x if tables.exchange is None else x.pin_memory()
        return pinned.to(tables.device, non_blocking=True)

    with torch.cuda.stream(tables.exchange):
        if tables.exchange is not None:
            batch = batch.pin_memory()
        batch = batch.to(tables.device, non_blocking=True)
        counts = copy(counts)
        info = info_of_copy(info, batch, copy)
        is_event = {name: x.to(tables.device) for name, x in is_event.items()}
        batch, seen = id_rows.rows_on_device(batch, is_event)
        if tables.exchange is not None:
            event = torch.Event("cuda")
            event.record()
        sent = tables.send(batch.ids)
        return StagedBatch(batch, info, sent, event, counts, seen, time)


class Ahead:
    """Yields staged batches; `fetch`, called while one trains, brings the next.

    What the stream or the staging raises is raised when its batch is asked for, so that whatever
    comes before it is trained on and saved as without looking ahead.

    Args:
        batches: of the stream.
        stage: starts to bring one.
    """

    def __init__(
        self, batches: Iterable[SequenceBatch], stage: Callable[[SequenceBatch], StagedBatch]
    ) -> None:
        self._batches = iter(batches)
        self._stage = stage
        self._next: StagedBatch | BaseException | None = None

    def __iter__(self) -> Iterator[StagedBatch]:
        while True:
            if self._next is None:
                self.fetch()
            found, self._next = self._next, None
            if isinstance(found, StopIteration):
                return
            if isinstance(found, BaseException):
                raise found
            assert found is not None
            yield found

    def fetch(self) -> None:
        """Start to bring the batch after the one that was yielded last."""
        try:
            self._next = self._stage(next(self._batches))
        except Exception as error:
            self._next = error

    def advance(self) -> None:
        """Let the ids of the fetched batch, if there is one, go as far as they can."""
        if isinstance(self._next, StagedBatch):
            self._next.lookup.advance()
