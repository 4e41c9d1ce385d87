"""What cached users ask next, from ids to scores: one copy to the device, one CUDA graph.

A few new events and candidates take a GPU less time than Python takes to launch what their tokens
and heads are made of. So all of it is one graph, captured for a number of events, candidates,
sequences and pages when requests of that size come for the second time. What is left over is one
more sequence of unknown events and candidates, none of which sees another.

Letters: B sequences with the one that is left over, E events, I = E + M items of events and
candidates, R rows (tokens), F features, S action signals, G pages of a sequence.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gr.config import TrainConfig
from gr.inference.cache import KeyValueStore
from gr.inference.encoded import Behind, Part, StackCache
from gr.inference.graphs import (
    MAX_GRAPHS,
    MOST_ROWS,
    MOST_SEQUENCES,
    captured_graph,
    padded,
    round_up,
)
from gr.inference.lookup import LocalRows, Lookup, TableLookup
from gr.inference.next_numbers import NextNumbers, NextSize
from gr.inference.requests import Candidates, RequestEncoder, Requests
from gr.inference.stack import Layout, Pass, Stack
from gr.inference.users import CachedUser
from gr.model import SequenceModel
from gr.sequence import Before, SequenceInfo
from kernels.hstu_attention.cached import PAGE, is_aligned
from pipelines.batch import SequenceBatch, StreamPosition
from pipelines.history import TIMESTAMP, Ints
from pipelines.unify import token_counts


@dataclass
class Captured:
    """A graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    host: Tensor
    """Where its first node copies the numbers from."""
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
        evaluating: context in which the model is evaluated.
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
        evaluating: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.evaluating = evaluating
        self.model, self.encoder, self.stack, self.store = model, encoder, stack, store
        self.rows, self.windowed = rows, windowed
        self.per_event = token_counts(encoder.data).per_history_event
        columns = {slot.name: slot.first for slot in encoder.encoder.item_slots}
        self.columns = {f: columns.get(f, 0) for f in model.tokens.item_features}
        self.numbers = NextNumbers(
            rows,
            self.columns,
            per_event=self.per_event,
            num_signals=encoder.encoder.num_codes - 1,
            on_gpu=store.k[0].is_cuda,
        )
        self._graphs: OrderedDict[NextSize, Captured] = OrderedDict()
        self._seen: set[NextSize] = set()
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
        state = np.array(
            [
                (x.lengths[0], x.num_tokens, x.first_time[0], x.whole_first_time, x.last_time)
                for x in users
            ]
        ).T
        try:
            numbers = self.numbers.written(size, state, pages, requests, items)
        except ValueError:
            return None
        vectors, ranking = self._found(size, numbers)

        def behind() -> Behind:
            added_B = self.per_event * requests.counts
            lengths_B, whole_B = (torch.from_numpy(x + added_B) for x in state[:2])
            first_time, whole_first_time = (torch.from_numpy(x.copy()) for x in state[2:4])
            last_time = torch.from_numpy(requests.ints[np.cumsum(requests.counts) - 1, TIMESTAMP])
            before = Before(whole_B - self.encoder.num_context, whole_first_time, last_time)
            cache = StackCache(self.store, pages, lengths_B[None], first_time)
            return Behind([cache], before, whole_B)

        part = Part(chosen, behind)
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

    def _found(self, size: NextSize, numbers: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return what `_compute` does of numbers in host memory."""
        captured = self._graphs.get(size)
        if captured is None or captured.host is not numbers:
            captured = self._graphs[size] = self._capture(size, numbers)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(size)
        captured.graph.replay()
        self.numbers.is_read(size)
        return captured.found

    def _capture(self, size: NextSize, numbers: Tensor) -> Captured:
        on_device = numbers.to(self.store.k[0].device)

        def compute() -> tuple[Tensor | None, Tensor | None]:
            on_device.copy_(numbers, non_blocking=True)
            return self._compute(size, on_device)

        with self.evaluating():
            graph, found = captured_graph(compute, self._pool)
        self._pool = graph.pool()
        return Captured(graph, numbers, on_device, found)

    def _compute(self, size: NextSize, numbers: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return user vectors, and (tasks, candidates) what ranking says."""
        model, view = self.model, self.numbers.views(size, numbers)
        R, B = len(view["kind"]), size.sequences + 1
        cached, before, first_time, whole_first_time, last_time = view["state"][:, :B]
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
            before=Before(before, whole_first_time, last_time),
            places=view["places"],
        )
        rows = {f: self.rows.vectors(f, view["rows"][i]) for i, f in enumerate(self.columns)}
        known_places = view["item_token"], view["action_token"]
        x_RD = model.encoding(model.tokens(batch, rows, known_places=known_places), info)
        own = Before(cached, first_time, first_time)
        layout = Layout(0, cached, size.pages * PAGE, rows=view["kept"])
        given = Pass(
            replace(info, num_context=self.encoder.num_context, before=own, places=None),
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
