"""The numbers that a graph of next requests reads: one array, laid out and written on the host.

Letters: B sequences with the one that is left over, E events, I = E + M items of events and
candidates, H new tokens of histories, R rows (tokens), G pages of a sequence.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gr.inference.graphs import MAX_GRAPHS, round_up
from gr.inference.lookup import LocalRows
from gr.inference.requests import Candidates, Requests
from kernels.hstu_attention.cached import PAGE
from pipelines.batch import TokenKind
from pipelines.history import TIMESTAMP, Ints

Places = tuple[dict[str, tuple[slice, tuple[int, ...]]], int]
"""Name of a part -> where it is in an array and its shape; length of the array."""

MOST_LAYOUTS = 256
"""Kept: of requests that come one at a time there is one for each number of events and items."""


class NextSize(NamedTuple):
    """What a graph is captured for."""

    events: int
    items: int
    """Candidates."""
    sequences: int
    """Without the one that is left over."""
    pages: int


@dataclass
class Staged:
    """Host memory that the numbers of requests are written to, and copied to the device from."""

    numbers: Tensor
    view: dict[str, Any]
    """Parts of it, of numpy."""
    stream: torch.cuda.Stream | None = None
    """That copies it, of the last requests."""


@dataclass
class Layout:
    """Where the tokens of requests with so many events and candidates stand: the same for all."""

    numbers: Ints
    """The whole array, zero where requests differ."""
    events: Ints
    """Which of the items are events."""
    candidates: Ints
    """Which are candidates."""
    tokens: Ints
    owners: Ints
    """Of each new token of a history: its place in the batch, its request."""
    candidate_token: Ints
    """(M,)"""
    starts: Ints
    """First token of each request."""
    ends: Ints


class NextNumbers:
    """Writes the numbers of requests into host memory, one array a size.

    Args:
        rows: of the features of items.
        columns: feature of items -> column of an encoded event.
        per_event: tokens of an event.
        num_signals: action codes of an event.
        on_gpu: whether the memory is pinned.
    """

    def __init__(
        self,
        rows: LocalRows,
        columns: Mapping[str, int],
        *,
        per_event: int,
        num_signals: int,
        on_gpu: bool,
    ) -> None:
        self.rows, self.columns = rows, columns
        self.per_event, self.num_signals, self.on_gpu = per_event, num_signals, on_gpu
        self._staged: OrderedDict[NextSize, Staged] = OrderedDict()
        self._layouts: OrderedDict[tuple[NextSize, bytes], Layout] = OrderedDict()

    def is_read(self, size: NextSize) -> None:
        """Note that the current stream reads what was written last for a size."""
        if self.on_gpu:
            self._staged[size].stream = torch.cuda.current_stream()

    def views(self, size: NextSize, numbers: Any) -> dict[str, Any]:
        """Return the parts of the one array that a graph reads, of numpy or of torch."""
        parts, _ = self._places(size)
        return {name: numbers[at].reshape(shape) for name, (at, shape) in parts.items()}

    def _places(self, size: NextSize) -> Places:
        """Return where the parts are and how they are shaped, and the length of the array."""
        B, items = size.sequences + 1, size.events + size.items
        R = size.events * self.per_event + size.items
        shapes: dict[str, tuple[int, ...]] = {
            "offsets": (B + 1,),
            **dict.fromkeys(("candidates", "session", "last_row"), (B,)),
            # cached, before, first_time, whole_first_time, last_time
            "state": (5, round_up(B, 16)),
            **dict.fromkeys(("kind", "time", "query_time", "kept", "places"), (R,)),
            "rows": (len(self.columns), items),
            "item_token": (items,),
            "codes": (size.events, self.num_signals),
            "action_token": (size.events,),
            "candidate_rows": (size.items,),
            "pages": (B * size.pages // 2 + 1,),
        }
        parts, at = {}, 0
        for name, shape in shapes.items():
            count = math.prod(shape)
            parts[name] = slice(at, at + count), shape
            at = round_up(at + count, 16)  # kernels are compiled anew for other alignments
        return parts, at

    def _staging(self, size: NextSize) -> Staged:
        """Return host memory for requests of a size, which may be written to."""
        staged = self._staged.get(size)
        if staged is None:
            length = self._places(size)[1]
            numbers = torch.zeros(length, dtype=torch.int64, pin_memory=self.on_gpu)
            view = self.views(size, numbers.numpy()) | {"all": numbers.numpy()}
            staged = self._staged[size] = Staged(numbers, view)
            if len(self._staged) > MAX_GRAPHS:
                self._staged.popitem(last=False)
        self._staged.move_to_end(size)
        if staged.stream is not None:
            staged.stream.synchronize()
        return staged

    def _layout(self, size: NextSize, events_B: Ints, items_B: Ints) -> Layout:
        """Return where the tokens of requests stand, of so many events and candidates each."""
        key = size, events_B.tobytes() + items_B.tobytes()
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = self._new_layout(size, events_B, items_B)
            if len(self._layouts) > MOST_LAYOUTS:
                self._layouts.popitem(last=False)
        self._layouts.move_to_end(key)
        return layout

    def _new_layout(self, size: NextSize, events_B: Ints, items_B: Ints) -> Layout:
        numbers = np.zeros(self._places(size)[1], np.int64)
        view, per_event = self.views(size, numbers), self.per_event
        B, E, M, R = len(events_B), int(events_B.sum()), int(items_B.sum()), len(view["kind"])
        ends_B = np.cumsum(events_B * per_event + items_B)
        starts_B = ends_B - events_B * per_event - items_B
        rows = int(ends_B[-1])
        view["offsets"][1 : B + 1], view["offsets"][B + 1 :] = ends_B, rows
        view["offsets"][-1] = R
        view["candidates"][:B], view["candidates"][-1] = items_B, R - rows
        view["last_row"][:B] = ends_B - items_B - 1

        # Events and candidates of one request after the other, then what is left over.
        counts_B = events_B + items_B
        owner_I = np.repeat(np.arange(B), counts_B)
        place_I = np.arange(E + M) - np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
        is_event_I = place_I < events_B[owner_I]
        token_I = starts_B[owner_I] + place_I
        if per_event > 1:
            token_I += np.minimum(place_I, events_B[owner_I])
        event_E, item_M = np.flatnonzero(is_event_I), np.flatnonzero(~is_event_I)
        left = size.events - E
        item_token, action_token = view["item_token"], view["action_token"]
        item_token[: E + M] = token_I
        item_token[E + M : E + M + left] = np.arange(rows, rows + left * per_event, per_event)
        item_token[E + M + left :] = np.arange(rows + left * per_event, R)
        action_token[:E] = token_I[event_E]
        action_token[E:] = item_token[E + M : E + M + left]
        kind = view["kind"]
        kind[:] = TokenKind.CANDIDATE
        kind[action_token] = TokenKind.ITEM if per_event > 1 else TokenKind.EVENT
        if per_event > 1:
            action_token += 1
            kind[action_token] = TokenKind.ACTION
        view["candidate_rows"][:M] = token_I[item_M]
        return Layout(
            numbers=numbers,
            events=event_E,
            candidates=item_M,
            tokens=np.flatnonzero(kind[:rows] != TokenKind.CANDIDATE),
            owners=np.repeat(np.arange(B), events_B * per_event),
            candidate_token=token_I[item_M],
            starts=starts_B,
            ends=ends_B,
        )

    def written(
        self,
        size: NextSize,
        state: Ints,
        pages: list[list[int]],
        requests: Requests,
        items: Candidates,
    ) -> Tensor:
        """Return what a graph reads, in host memory.

        Args:
            size: of the graph.
            state: (5, B) int64: of each user what is cached in the stack and in all, the times of
                the first token of either and of the last.
            pages: as of `run`, like those that follow.
            requests: likewise.
            items: likewise.
        """
        layout = self._layout(size, requests.counts, items.counts)
        staged = self._staging(size)
        view, per_event, B = staged.view, self.per_event, state.shape[1]
        view["all"][:] = layout.numbers
        view["state"][:, :B] = state
        token_H, owner_H, time = layout.tokens, layout.owners, view["time"]
        time[token_H] = np.repeat(requests.ints[:, TIMESTAMP], per_event)
        time[layout.candidate_token] = np.repeat(requests.time, items.counts)
        rows, last_B = int(layout.ends[-1]), layout.ends - 1
        view["query_time"][: rows - 1] = time[1:rows]
        view["query_time"][last_B] = time[last_B]

        # New tokens may go to pages behind those that are read.
        table = np.zeros((B, max(len(mine) for mine in pages)), np.int64)
        for b, mine in enumerate(pages):
            table[b, : len(mine)] = mine
        used = min(size.pages, table.shape[1])
        of_graph = view["pages"].view(np.int32)[: B * size.pages].reshape(B, size.pages)
        of_graph[:, :used] = table[:, :used]
        page_H, row_H = np.divmod((state[0] - layout.starts)[owner_H] + token_H, PAGE)
        view["kept"][token_H] = table[owner_H, page_H] * PAGE + row_H
        view["places"][token_H] = (state[1] - layout.starts)[owner_H] + token_H
        ends_B = state[1] + requests.counts * per_event
        view["places"][layout.candidate_token] = np.repeat(ends_B, items.counts)

        ids_I = np.empty(len(requests.ints) + len(items.ints), np.int64)
        for number, (feature, column) in enumerate(self.columns.items()):
            ids_I[layout.events] = requests.ints[:, column]
            ids_I[layout.candidates] = items.ints[:, column]
            view["rows"][number, : len(ids_I)] = self.rows.rows_of(feature, ids_I)
        view["codes"][: len(requests.ints)] = requests.codes[:, : self.num_signals]
        return staged.numbers
