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
    copied: torch.cuda.Event | None
    """After which it may be written to again; None: not on a GPU."""


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

    def copied_to(self, size: NextSize, target: Tensor, numbers: Tensor) -> None:
        """Copy what was written for a size to the device, and go on."""
        target.copy_(numbers, non_blocking=True)
        copied = self._staged[size].copied
        if copied is not None:
            copied.record()

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
            **dict.fromkeys(("candidates", "cached", "first_time", "session", "last_row"), (B,)),
            **dict.fromkeys(("before", "whole_first_time", "last_time"), (B,)),
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
            on_gpu = self.on_gpu
            length = self._places(size)[1]
            numbers = torch.zeros(length, dtype=torch.int64, pin_memory=on_gpu)
            view = self.views(size, numbers.numpy()) | {"all": numbers.numpy()}
            staged = Staged(numbers, view, torch.cuda.Event() if on_gpu else None)  # type: ignore[no-untyped-call]
            self._staged[size] = staged
            if len(self._staged) > MAX_GRAPHS:
                self._staged.popitem(last=False)
        self._staged.move_to_end(size)
        if staged.copied is not None:
            staged.copied.synchronize()
        return staged

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
        staged = self._staging(size)
        view, per_event = staged.view, self.per_event
        view["all"][:] = 0
        B, E, M, R = state.shape[1], len(requests.ints), len(items.ints), len(view["kind"])
        events_B, items_B = requests.counts, items.counts
        ends_B = np.cumsum(events_B * per_event + items_B)
        starts_B = ends_B - events_B * per_event - items_B
        rows = int(ends_B[-1])
        view["offsets"][1 : B + 1], view["offsets"][B + 1 :] = ends_B, rows
        view["offsets"][-1] = R
        view["candidates"][:B], view["candidates"][-1] = items_B, R - rows
        view["last_row"][:B] = ends_B - items_B - 1
        names = ("cached", "before", "first_time", "whole_first_time", "last_time")
        for name, values in zip(names, state, strict=True):
            view[name][:B] = values

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
        kind, time = view["kind"], view["time"]
        kind[:] = TokenKind.CANDIDATE
        kind[action_token] = TokenKind.ITEM if per_event > 1 else TokenKind.EVENT
        if per_event > 1:
            action_token += 1
            kind[action_token] = TokenKind.ACTION
        candidate_token = token_I[item_M]
        view["candidate_rows"][:M] = candidate_token
        token_H = np.flatnonzero(kind[:rows] != TokenKind.CANDIDATE)
        time[token_H] = np.repeat(requests.ints[:, TIMESTAMP], per_event)
        time[candidate_token] = np.repeat(requests.time, items_B)

        # New tokens may go to pages behind those that are read.
        table = np.zeros((B, max(len(mine) for mine in pages)), np.int64)
        for b, mine in enumerate(pages):
            table[b, : len(mine)] = mine
        used = min(size.pages, table.shape[1])
        of_graph = view["pages"].view(np.int32)[: B * size.pages].reshape(B, size.pages)
        of_graph[:, :used] = table[:, :used]
        owner_H = np.repeat(np.arange(B), events_B * per_event)
        page_H, row_H = np.divmod((state[0] - starts_B)[owner_H] + token_H, PAGE)
        view["kept"][token_H] = table[owner_H, page_H] * PAGE + row_H
        view["places"][token_H] = (state[1] - starts_B)[owner_H] + token_H
        view["places"][candidate_token] = np.repeat(state[1] + events_B * per_event, items_B)
        view["query_time"][: rows - 1] = time[1:rows]
        view["query_time"][ends_B - 1] = time[ends_B - 1]

        ids_I = np.empty(E + M, np.int64)
        for number, (feature, column) in enumerate(self.columns.items()):
            ids_I[event_E], ids_I[item_M] = requests.ints[:, column], items.ints[:, column]
            view["rows"][number, : E + M] = self.rows.rows_of(feature, ids_I)
        view["codes"][:E] = requests.codes[:, : self.num_signals]
        return staged.numbers
