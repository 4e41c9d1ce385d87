"""What cached users ask next, from ids to scores: one copy to the device, one CUDA graph.

A few new events and candidates take a GPU less time than Python takes to launch what their tokens
and heads are made of. So all of it is one graph, captured for a number of events, candidates,
sequences and pages when requests of that size come for the second time. What is left over is one
more sequence of unknown events and candidates, none of which sees another.

Letters: B sequences with the one that is left over, E events, I = E + M items of events and
candidates, R rows (tokens), F features, S action signals, G pages of a sequence.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gr.config import TrainConfig
from gr.inference.cache import KeyValueStore, rows_in_pages
from gr.inference.encoded import Part, StackCache
from gr.inference.graphs import (
    MAX_GRAPHS,
    MOST_ROWS,
    MOST_SEQUENCES,
    captured_graph,
    padded,
    round_up,
)
from gr.inference.lookup import LocalRows, Lookup, TableLookup
from gr.inference.requests import Candidates, RequestEncoder, Requests
from gr.inference.stack import Layout, Pass, Stack
from gr.inference.users import CachedUser
from gr.model import SequenceModel
from gr.sequence import Before, SequenceInfo
from kernels.hstu_attention.cached import PAGE, is_aligned
from pipelines.batch import SequenceBatch, StreamPosition, TokenKind
from pipelines.history import TIMESTAMP, Ints
from pipelines.unify import token_counts

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
class Captured:
    """A graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    numbers: Tensor
    found: tuple[Tensor | None, Tensor | None]


class NextRequests:
    """Graphs of next requests. Layouts that `local_rows` gives rows for.

    Args:
        model: the dense part.
        encoder: of the requests.
        stack: the layers of the model.
        store: holds what is cached.
        rows: of the features of items.
        windowed: whether a window applies to candidates.
    """

    def __init__(
        self,
        model: SequenceModel,
        encoder: RequestEncoder,
        stack: Stack,
        store: KeyValueStore,
        rows: LocalRows,
        *,
        windowed: bool,
    ) -> None:
        self.model, self.encoder, self.stack, self.store = model, encoder, stack, store
        self.rows, self.windowed = rows, windowed
        self.per_event = token_counts(encoder.data).per_history_event
        columns = {slot.name: slot.first for slot in encoder.encoder.item_slots}
        self.columns = {f: columns.get(f, 0) for f in model.tokens.item_features}
        self.num_signals = encoder.encoder.num_codes - 1
        self._graphs: OrderedDict[NextSize, Captured] = OrderedDict()
        self._seen: set[NextSize] = set()
        self._known_places: dict[NextSize, Places] = {}
        self._pool: Any = None

    def takes(
        self, users: Sequence[CachedUser], requests: Requests, items: Candidates
    ) -> NextSize | None:
        """Return the size to `run` requests at: they fit a graph, and such ones came before.

        None: they are not for a graph.
        """
        size = self._size(users, requests, items)
        rows = size.events * self.per_event + size.items
        if rows > MOST_ROWS or len(users) > MOST_SEQUENCES:
            return None
        if size in self._seen:
            return size
        if len(self._seen) >= 8 * MAX_GRAPHS:
            self._seen.clear()
            self._known_places.clear()
        self._seen.add(size)
        return None

    def run(
        self,
        size: NextSize,
        chosen: Ints,
        users: Sequence[CachedUser],
        pages: list[list[int]],
        requests: Requests,
        items: Candidates,
    ) -> tuple[Part, Tensor | None, dict[str, Tensor]] | None:
        """Return the requests, (n, item dim) user vectors, and task -> (M,) what ranking says.

        None: an id has no row, which the lookup of a batch reports.

        Args:
            size: what `takes` has returned of them.
            chosen: (n,) int64: which requests of a plan they are.
            users: what is cached of each.
            pages: of each, with room for the new events.
            requests: RequestEncoder.after of what is cached.
            items: likewise.
        """
        count = len(users)
        try:
            numbers = self._numbers(size, users, pages, requests, items)
        except ValueError:
            return None
        vectors, ranking = self._found(size, numbers)
        ends = np.cumsum(requests.counts) - 1
        whole_B, lengths_B, first_time, whole_first_time, last_time = torch.tensor(
            [
                (
                    x.num_tokens + self.per_event * new,
                    x.lengths[0] + self.per_event * new,
                    x.first_time[0],
                    x.whole_first_time,
                    last,
                )
                for x, new, last in zip(
                    users,
                    requests.counts.tolist(),
                    requests.ints[ends, TIMESTAMP].tolist(),
                    strict=True,
                )
            ]
        ).unbind(1)
        before = Before(whole_B - self.encoder.num_context, whole_first_time, last_time)
        cache = StackCache(self.store, pages, lengths_B[None], first_time)
        part = Part(chosen, [cache], before, whole_B)
        # The memory of graphs is shared: the next one may write over it.
        outputs: dict[str, Tensor] = {}
        if ranking is not None and self.model.ranking is not None:
            mine = ranking[:, : len(items.ints)].clone()
            outputs = dict(zip(self.model.ranking.tasks, mine, strict=True))
        return part, None if vectors is None else vectors[:count].clone(), outputs

    def clear(self) -> None:
        """Forget all graphs: the weights have changed."""
        self._graphs.clear()

    def _size(self, users: Sequence[CachedUser], requests: Requests, items: Candidates) -> NextSize:
        cached = max(user.lengths[0] for user in users)
        return NextSize(
            events=round_up(len(requests.ints), 8),
            items=padded(len(items.ints)),
            sequences=1 << (len(users) - 1).bit_length(),
            pages=round_up(-(-cached // PAGE), 16),
        )

    def _views(self, size: NextSize, numbers: Any) -> dict[str, Any]:
        """Return the parts of the one array that a graph reads, of numpy or of torch."""
        parts, _ = self._places(size)
        return {name: numbers[at].reshape(shape) for name, (at, shape) in parts.items()}

    def _places(self, size: NextSize) -> Places:
        """Return where the parts are and how they are shaped, and the length of the array."""
        if size in self._known_places:
            return self._known_places[size]
        B, items = size.sequences + 1, size.events + size.items
        R = size.events * self.per_event + size.items
        shapes: dict[str, tuple[int, ...]] = {
            "offsets": (B + 1,),
            **dict.fromkeys(("candidates", "cached", "first_time", "session", "last_row"), (B,)),
            **dict.fromkeys(("before", "whole_first_time", "last_time"), (B,)),
            **dict.fromkeys(("kind", "time", "query_time", "kept"), (R,)),
            "rows": (len(self.columns), items),
            "codes": (size.events, self.num_signals),
            "candidate_rows": (size.items,),
            "pages": (B * size.pages // 2 + 1,),
        }
        parts, at = {}, 0
        for name, shape in shapes.items():
            count = math.prod(shape)
            parts[name] = slice(at, at + count), shape
            at = round_up(at + count, 16)  # kernels are compiled anew for other alignments
        self._known_places[size] = parts, at
        return parts, at

    def _numbers(
        self,
        size: NextSize,
        users: Sequence[CachedUser],
        pages: list[list[int]],
        requests: Requests,
        items: Candidates,
    ) -> Tensor:
        """Return what a graph reads, in host memory."""
        on_gpu = self.store.k[0].is_cuda
        numbers = torch.zeros(self._places(size)[1], dtype=torch.int64, pin_memory=on_gpu)
        view = self._views(size, numbers.numpy())
        count, E, M, per_event = len(users), len(requests.ints), len(items.ints), self.per_event
        new_B = requests.counts * per_event
        ends_B = np.cumsum(new_B + items.counts)
        rows = int(ends_B[-1])
        view["offsets"][1 : count + 1], view["offsets"][count + 1 :] = ends_B, rows
        view["offsets"][-1] = len(view["kind"])
        view["candidates"][:count] = items.counts
        view["candidates"][-1] = len(view["kind"]) - rows
        for name, values in (
            ("cached", [x.lengths[0] for x in users]),
            ("first_time", [x.first_time[0] for x in users]),
            ("before", [x.num_tokens for x in users]),
            ("whole_first_time", [x.whole_first_time for x in users]),
            ("last_time", [x.last_time for x in users]),
            ("last_row", ends_B - items.counts - 1),
        ):
            view[name][:count] = values
        kind, time, kept = view["kind"], view["time"], view["kept"]
        kinds = [TokenKind.ITEM, TokenKind.ACTION] if per_event == 2 else [TokenKind.EVENT]
        kind[:] = TokenKind.CANDIDATE
        # Sequence after sequence by slices: of one request that is less than index arithmetic.
        item_rows = np.empty((E + M, items.ints.shape[1]), np.int64)
        table = view["pages"].view(np.int32)
        row = event = item = 0
        for b, user in enumerate(users):
            e, m = int(requests.counts[b]), int(items.counts[b])
            own, head = requests.ints[event : event + e], row + e * per_event
            for part, kind_of in enumerate(kinds):
                kind[row + part : head : per_event] = kind_of
                time[row + part : head : per_event] = own[:, TIMESTAMP]
            time[head : head + m] = requests.time[b]
            kept[row:head] = rows_in_pages([pages[b]], [user.lengths[0]], [head - row])
            item_rows[event + item : event + item + e] = own
            item_rows[event + item + e : event + item + e + m] = items.ints[item : item + m]
            view["candidate_rows"][item : item + m] = np.arange(head, head + m)
            used = pages[b][: size.pages]
            table[b * size.pages : b * size.pages + len(used)] = used
            row, event, item = head + m, event + e, item + m
        for part, kind_of in enumerate(kinds):  # events that are left over
            kind[rows + part : rows + (size.events - E) * per_event : per_event] = kind_of
        view["query_time"][: rows - 1] = time[1:rows]
        view["query_time"][ends_B - 1] = time[ends_B - 1]
        for number, (feature, column) in enumerate(self.columns.items()):
            found = self.rows.rows_of(feature, item_rows[:, column].copy())
            view["rows"][number, : E + M] = found
        view["codes"][:E] = requests.codes[:, : self.num_signals]
        return numbers

    def _found(self, size: NextSize, numbers: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return what `_compute` does of numbers in host memory."""
        captured = self._graphs.get(size)
        if captured is None:
            on_device = numbers.to(self.store.k[0].device)
            graph, found = captured_graph(lambda: self._compute(size, on_device), self._pool)
            self._pool = graph.pool()
            captured = self._graphs[size] = Captured(graph, on_device, found)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(size)
        captured.numbers.copy_(numbers, non_blocking=True)
        captured.graph.replay()
        return captured.found

    def _compute(self, size: NextSize, numbers: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return user vectors, and (tasks, candidates) what ranking says."""
        model, view = self.model, self._views(size, numbers)
        R, B = len(view["kind"]), size.sequences + 1
        batch = _batch(view)
        info = SequenceInfo(
            offsets=view["offsets"],
            tail_offsets=view["offsets"],
            max_len=R,
            max_tail_len=R,
            timestamp=view["time"],
            query_time=view["query_time"],
            session_start=view["session"],
            # Context tokens are cached: they count as any others do.
            num_context=0,
            num_candidates=view["candidates"],
            num_rows=R,
            before=Before(view["before"], view["whole_first_time"], view["last_time"]),
        )
        rows = {f: self.rows.vectors(f, view["rows"][i]) for i, f in enumerate(self.columns)}
        x_RD = model.encoding(model.tokens(batch, rows), info)
        own = Before(view["cached"], view["first_time"], view["first_time"])
        layout = Layout(0, view["cached"], size.pages * PAGE, rows=view["kept"])
        given = Pass(
            replace(info, num_context=self.encoder.num_context, before=own),
            view["pages"].view(torch.int32)[: B * size.pages].view(B, size.pages),
            (layout,),
            windowed_candidates=self.windowed,
        )
        y_RD = self.stack.run(x_RD, given, self.store)
        vectors = ranking = None
        if model.retrieval is not None:
            vectors = model.retrieval(y_RD.index_select(0, view["last_row"][:-1]))
        if model.ranking is not None:
            outputs = model.ranking(y_RD.index_select(0, view["candidate_rows"]))
            ranking = torch.stack(list(outputs.values()))
        return vectors, ranking


def local_rows(
    config: TrainConfig,
    model: SequenceModel,
    encoder: RequestEncoder,
    lookup: Lookup,
    stacks: Sequence[Stack],
) -> LocalRows | None:
    """Return the rows of the features of items; None where next requests are not one graph.

    That is with tables that this process does not hold whole, and with what a batch has beside ids
    and action codes: bags, numbers, pretrained vectors, content, a context that is merged or that
    actions carry.
    """
    tokens, data = model.tokens, config.data
    has_more = (
        bool(config.model.mixture or tokens.bags.names or tokens.item_numbers)
        or bool(len(tokens.pretrained) or len(tokens.action_context))
        or model.content is not None
        or data.context == "merged"
    )
    (stack, *others) = stacks
    shapes = stack.shapes
    plain = all(is_aligned(stack.dtype, x.qk_dim, x.v_dim) for x in shapes) and stack.layouts == 1
    if has_more or others or not plain or not isinstance(lookup, TableLookup):
        return None
    return lookup.local(tokens.item_features)


def _batch(view: dict[str, Any]) -> SequenceBatch:
    """Return a batch of which the token embedding reads its part."""
    nothing = view["kind"][:0]
    return SequenceBatch(
        ids=KeyedJaggedTensor.empty(),
        offsets=view["offsets"],
        max_len=len(view["kind"]),
        token_kind=view["kind"],
        timestamp=view["time"],
        query_time=view["query_time"],
        num_context=0,
        num_candidates=view["candidates"],
        session_start=view["session"],
        action_codes=view["codes"],
        user_id=nothing,
        session_id=nothing,
        partition=nothing,
        ranking_positions=nothing,
        labels={},
        weights={},
        dense_features=nothing,
        retrieval_positions=nothing,
        retrieval_weights=nothing,
        window=0,
        position=StreamPosition((), 0),
        num_events=0,
        num_rejected={},
    )
