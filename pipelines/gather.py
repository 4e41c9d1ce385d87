"""Collects the sequences of one global step from the partitions of a rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.history import (
    CLIPPED,
    EVENTS,
    FIRST_CONTEXT,
    SEQUENCES,
    SUPERVISED,
    EventRows,
    HistoryStore,
    Ints,
    Rules,
    SequenceRows,
    empty_progress,
)
from pipelines.reader import Block


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive sessions of one partition, and the histories that they read and extend."""

    partition: int
    store: HistoryStore
    block: Block
    first: int
    last: int
    """Session to stop before."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """Sequences of one rank in one global step, before layout."""

    sequences: Ints
    """(B, FIRST_CONTEXT + X) int64, columns as in pipelines.history."""
    ints: Ints
    """(E, I) int64, as EventEncoder makes them; history, then session, of each sequence."""
    codes: NDArray[np.uint8]
    """(E, S + 1): action codes, then 1 where the event is positive."""
    floats: NDArray[np.float32]
    """(supervised events, G): labels, then dense features."""
    num_clipped: int
    """Sequences whose history was cut short by what a store had already dropped."""


class SequenceBuffer:
    """Memory that the sequences of a step are written to, used again for each step."""

    def __init__(self, rules: Rules, num_context: int) -> None:
        """Start without memory; num_context: columns of a session's context."""
        self._rules = rules
        self._width = FIRST_CONTEXT + num_context
        self._out = _allocate(rules, self._width, 0, 0)

    def gather(self, spans: Sequence[Span], *, extend: bool = True) -> Gathered:
        """Take the sessions of `spans` in order; the result is valid until the next call.

        Args:
            spans: sessions.
            extend: whether they join the histories.
        """
        self._reserve(spans)
        out, rules = self._out, self._rules
        progress = empty_progress()
        for span in spans:
            read = span.store.advance if extend else span.store.look_up
            read(
                span.block.sessions,
                span.block.events,
                span.first,
                span.last,
                partition=span.partition,
                out=out,
                progress=progress,
            )
        num_events, num_supervised = int(progress[EVENTS]), int(progress[SUPERVISED])
        return Gathered(
            sequences=out.rows[: progress[SEQUENCES]],
            ints=_rows(out.events.ints, num_events, rules.num_ints),
            codes=_rows(out.events.codes, num_events, rules.num_codes),
            floats=_rows(out.events.floats, num_supervised, rules.num_floats),
            num_clipped=int(progress[CLIPPED]),
        )

    def _reserve(self, spans: Sequence[Span]) -> None:
        """Make room for the most that `spans` can give."""
        rules = self._rules
        num_sequences = num_events = 0
        for span in spans:
            offsets = span.block.sessions.offsets
            total = int(offsets[span.last] - offsets[span.first])
            num_sequences += span.last - span.first + total // rules.max_session_events
            num_events += total
        num_events += num_sequences * rules.max_events
        have = self._out
        if num_sequences > len(have.rows) or num_events * rules.num_codes > len(have.events.codes):
            self._out = _allocate(
                rules,
                self._width,
                max(num_sequences * 5 // 4, len(have.rows)),
                max(num_events * 5 // 4, len(have.events.codes) // rules.num_codes),
            )


def _allocate(rules: Rules, width: int, num_sequences: int, num_events: int) -> SequenceRows:
    return SequenceRows(
        rows=np.empty((num_sequences, width), np.int64),
        events=EventRows(
            ints=np.empty(num_events * rules.num_ints, np.int64),
            floats=np.empty(num_events * rules.num_floats, np.float32),
            codes=np.empty(num_events * rules.num_codes, np.uint8),
        ),
    )


def _rows(flat: Any, num_rows: int, width: int) -> Any:
    return flat[: num_rows * width].reshape(num_rows, width)
