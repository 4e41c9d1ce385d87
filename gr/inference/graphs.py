"""Passes as CUDA graphs: what takes a GPU less time than Python takes to launch it.

A graph is captured for a number of rows and of pages, and replayed for whatever fits: the rows that
are left over are a second sequence of candidates without a history, so that nothing of the pass has
to know of them. Inputs go to the device in one copy.

Letters: R rows of a graph, G pages.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gr.inference.cache import KeyValueStore
from gr.inference.stack import Layout, Pass, Stack
from gr.sequence import Before, SequenceInfo
from kernels.hstu_attention.cached import PAGE

MAX_GRAPHS = 32
"""Kept at a time, of one stack: the least recently used gives way."""
MOST_ROWS = 1 << 14
TAIL = 2
"""Rows that are read of a history: its last token, and the unknown item behind it."""
SCALARS = 16
"""Numbers in front of those of rows and pages."""


class Size(NamedTuple):
    """What a graph is captured for."""

    rows: int
    pages: int
    """0: nothing is cached."""
    keeps: bool
    of_tails: bool
    windowed: bool
    num_context: int


@dataclass
class Captured:
    """A graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    numbers: Tensor
    y: Tensor


class PassGraphs:
    """The graphs of one stack, whose keys and values lie in one store.

    Args:
        stack: the layers.
        store: whose memory the graphs read and write.
    """

    def __init__(self, stack: Stack, store: KeyValueStore) -> None:
        self.stack, self.store = stack, store
        self._graphs: OrderedDict[Size, Captured] = OrderedDict()
        self._pool: Any = None

    def takes(self, given: Pass) -> bool:
        """Return whether a pass can be one of a graph."""
        info = given.info
        layout = given.layouts[0]
        return (
            len(info.offsets) == 2
            and len(given.layouts) == 1
            and 0 < len(info.timestamp) <= MOST_ROWS
            and (layout.max_len > 0 or (given.of_tails and int(info.tail_offsets[1]) == TAIL))
        )

    def run(self, x_RD: Tensor, given: Pass) -> Tensor:
        """Return as Stack.run does, for a pass in host memory of one sequence.

        Args:
            x_RD: on the device.
            given: a pass that `takes` takes.
        """
        info, layout = given.info, given.layouts[0]
        rows, cached = len(x_RD), layout.max_len
        pages = _round_up(-(-cached // PAGE), 16) if cached else 0
        size = Size(
            rows=_row_bucket(rows),
            pages=pages,
            keeps=layout.rows is not None,
            of_tails=given.of_tails,
            windowed=given.windowed_candidates,
            num_context=info.num_context,
        )
        captured = self._graphs.get(size)
        if captured is None:
            captured = self._capture(size, x_RD)
        self._graphs.move_to_end(size)
        # Pinned memory anew: it is handed out again once the copy is made.
        host = torch.empty(len(captured.numbers), dtype=torch.int64, pin_memory=True)
        _fill(host.numpy(), size, given, rows)
        captured.numbers.copy_(host, non_blocking=True)
        captured.x[:rows].copy_(x_RD)
        captured.graph.replay()
        # The memory of graphs is shared: the next one may write over it.
        return captured.y[: TAIL if given.of_tails else rows].clone()

    def clear(self) -> None:
        """Forget all graphs: the weights have changed."""
        self._graphs.clear()

    def _capture(self, size: Size, like: Tensor) -> Captured:
        device = like.device
        total = SCALARS + 3 * size.rows + size.pages
        numbers = torch.zeros(total, dtype=torch.int64, device=device)
        x = torch.zeros(size.rows, like.shape[1], dtype=like.dtype, device=device)
        given = _static(size, numbers)
        # Something that can be computed: a history of TAIL tokens, and candidates without one.
        first = min(TAIL, size.rows)
        tail = TAIL * size.of_tails
        scalars = [0, first, size.rows, 0, tail, tail, 1, size.rows - first]
        numbers[: len(scalars)].copy_(torch.tensor(scalars))
        enabled = torch.is_autocast_enabled(device.type)
        # Without its cache: what it casts would be freed under the graph.
        with torch.autocast(device.type, torch.bfloat16, enabled, cache_enabled=False):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self.stack.run(x, given, self.store)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                y = self.stack.run(x, given, self.store)
        self._pool = graph.pool()
        captured = Captured(graph, x, numbers, y)
        self._graphs[size] = captured
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return captured


def _static(size: Size, numbers: Tensor) -> Pass:
    """Return a pass of two sequences that reads everything from `numbers`."""
    R = size.rows
    timestamp, query_time, rows = numbers[SCALARS : SCALARS + 3 * R].view(3, R)
    pages = numbers[SCALARS + 3 * R :].view(torch.int32).view(2, -1)
    before = None
    if size.pages:
        before = Before(numbers[8:10], numbers[10:12], numbers[10:12])
    info = SequenceInfo(
        offsets=numbers[0:3],
        tail_offsets=numbers[3:6],
        max_len=R,
        max_tail_len=TAIL if size.of_tails else R,
        timestamp=timestamp,
        query_time=query_time,
        session_start=numbers[12:14],
        num_context=size.num_context,
        num_candidates=numbers[6:8],
        num_rows=TAIL if size.of_tails else R,
        before=before,
    )
    layout = Layout(
        number=0,
        lengths=numbers[8:10],
        max_len=size.pages * PAGE,
        rows=rows if size.keeps else None,
    )
    return Pass(info, pages, (layout,), size.of_tails, size.windowed)


def _fill(out: np.ndarray, size: Size, given: Pass, rows: int) -> None:
    """Write what `_static` reads."""
    info, layout, R = given.info, given.layouts[0], size.rows
    out[:SCALARS] = 0
    out[1], out[2] = rows, R
    out[4] = out[5] = TAIL * size.of_tails
    out[6], out[7] = int(info.num_candidates[0]), R - rows
    if size.pages:
        assert info.before is not None
        out[8], out[10] = int(layout.lengths[0]), int(info.before.first_time[0])
    out[12] = int(info.session_start[0])
    times = out[SCALARS : SCALARS + 3 * R].reshape(3, R)
    times[:, rows:] = 0
    times[0, :rows], times[1, :rows] = info.timestamp.numpy(), info.query_time.numpy()
    if layout.rows is not None:
        times[2] = 0  # a row of the page of nobody
        kept = slice(0, rows) if layout.keep is None else layout.keep.numpy()
        times[2, kept] = layout.rows.numpy()
    if size.pages:
        table = out[SCALARS + 3 * R :].view(np.int32).reshape(2, -1)
        table[:] = 0
        mine = given.pages[0].numpy()
        table[0, : len(mine)] = mine[: table.shape[1]]


def _row_bucket(rows: int) -> int:
    """Return for how many rows a graph is captured that takes so many."""
    if rows <= 512:
        return _round_up(rows, 64)
    return _round_up(rows, 256) if rows <= 2048 else _round_up(rows, 512)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
