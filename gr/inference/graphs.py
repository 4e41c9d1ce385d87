"""Passes as CUDA graphs: what takes a GPU less time than Python takes to launch it.

A graph is captured for a number of rows, sequences and pages when a pass of that size comes for
the second time, and replayed for whatever fits: the rows that are left over are one more sequence,
of candidates without a history, so that nothing of the pass has to know of them. Numbers go to the
device in one copy, the first node of a graph.

Letters: R rows of a graph, B its sequences with the one that is left over, G pages of a sequence.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from gr.inference.cache import KeyValueStore
from gr.inference.stack import Layout, Pass, Stack
from gr.sequence import Before, SequenceInfo
from kernels.hstu_attention.cached import PAGE, is_aligned
from pipelines.history import Ints

MAX_GRAPHS = 64
"""Kept at a time, of one stack: the least recently used gives way."""
MOST_ROWS = 1 << 14
TAIL = 2
"""Rows that are read of a history: its last token, and the unknown item behind it."""
MOST_SEQUENCES = 64
MOST_RUNS = 16
"""Passes alike that one graph makes."""
NUM_STREAMS = 4
"""That they are spread over: where one pass leaves processors idle, another uses them."""

Found = TypeVar("Found")


class Size(NamedTuple):
    """What a graph is captured for."""

    rows: int
    sequences: int
    """Without the one that is left over."""
    pages: int
    """Of a sequence; 0: nothing is cached."""
    keeps: bool
    of_tails: bool
    windowed: bool
    num_context: int
    runs: int = 1
    """Passes that differ in the tokens only."""


@dataclass
class Captured:
    """A graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    host: Tensor
    """Where its first node copies the numbers from."""
    numbers: Tensor
    """Where to. Nobody else holds that memory, which would be given away."""
    y: Tensor
    given: Pass | None = None
    """The last pass: what comes with the same needs its rows only."""
    stream: torch.cuda.Stream | None = None
    """That the last pass runs on."""


class PassGraphs:
    """The graphs of one stack, whose keys and values lie in one store.

    Args:
        stack: the layers.
        store: whose memory the graphs read and write.
    """

    def __init__(self, stack: Stack, store: KeyValueStore) -> None:
        self.stack, self.store = stack, store
        self._graphs: OrderedDict[Size, Captured] = OrderedDict()
        self._seen: set[Size] = set()
        # What goes by way of whole sequences waits for the device.
        self._is_aligned = all(is_aligned(stack.dtype, x.qk_dim, x.v_dim) for x in stack.shapes)
        self._pool: Any = None
        self._streams: list[Any] = []
        if store.k[0].is_cuda:
            self._streams = [torch.cuda.Stream() for _ in range(NUM_STREAMS)]  # type: ignore[no-untyped-call]

    def takes(self, given: Pass, runs: int = 1) -> bool:
        """Return whether to `run` a pass: it can be one of a graph, and such a one came before."""
        info, layout = given.info, given.layouts[0]
        count = len(info.offsets) - 1
        fits = 0 < len(info.timestamp) <= MOST_ROWS and 0 < count <= MOST_SEQUENCES
        if len(given.layouts) > 1 or not fits or not self._is_aligned:
            return False
        if given.of_tails:  # as many rows are wanted of each graph's pass
            fits = count == 1 and int(info.tail_offsets[1]) == TAIL
        elif layout.max_len == 0:
            fits = False
        if runs > 1 and (layout.rows is not None or given.of_tails):
            return False
        size = _size(given, runs)
        if not fits or size in self._seen:
            return fits
        if len(self._seen) >= 8 * MAX_GRAPHS:
            self._seen.clear()
        self._seen.add(size)
        return False

    def run(self, x_RD: Tensor, given: Pass, runs: int = 1) -> Tensor:
        """Return as Stack.run does, for a pass in host memory.

        Args:
            x_RD: on the device; the tokens of all passes.
            given: a pass that `takes` takes.
            runs: passes that differ in their tokens only, and keep nothing.
        """
        size, rows = _size(given, runs), len(x_RD) // runs
        captured = self._graphs.get(size)
        if captured is None:
            captured = self._capture(size, x_RD)
        self._graphs.move_to_end(size)
        if captured.given is not given:
            if captured.stream is not None:  # which may still have to read the last
                captured.stream.synchronize()
            _fill(captured.host.numpy(), size, given, rows)
            captured.given = given
        captured.x[:, :rows].copy_(x_RD.view(runs, rows, -1))
        captured.graph.replay()
        captured.stream = torch.cuda.current_stream()
        # The memory of graphs is shared: the next one may write over it.
        y = captured.y[:, : TAIL if given.of_tails else rows]
        return y.clone(memory_format=torch.contiguous_format).flatten(0, 1)

    def clear(self) -> None:
        """Forget all graphs: the weights have changed."""
        self._graphs.clear()

    def _capture(self, size: Size, like: Tensor) -> Captured:
        device = like.device
        host = torch.zeros(_total(size), dtype=torch.int64, pin_memory=True)
        numbers = host.to(device)
        x = torch.zeros(size.runs, size.rows, like.shape[1], dtype=like.dtype, device=device)
        given = _static(size, numbers)
        # Something that can be computed: a history of TAIL tokens, and candidates without one.
        first = min(TAIL, size.rows)
        view = _Numbers(size, host.numpy())
        view.offsets[1:-1], view.offsets[-1] = first, size.rows
        view.tail_offsets[1:] = TAIL * size.of_tails
        view.num_candidates[0], view.num_candidates[-1] = 1, size.rows - first

        def compute() -> Tensor:
            numbers.copy_(host, non_blocking=True)
            return self._passes(x, given)

        graph, y = captured_graph(compute, self._pool)
        self._pool = graph.pool()
        captured = Captured(graph, x, host, numbers, y)
        self._graphs[size] = captured
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return captured

    def _passes(self, x: Tensor, given: Pass) -> Tensor:
        """Return (runs, rows, D): what Stack.run gives for each of the passes."""
        if len(x) == 1:
            return self.stack.run(x[0], given, self.store)[None]
        main = torch.cuda.current_stream()
        for stream in self._streams:
            stream.wait_stream(main)
        found = []
        for number, tokens in enumerate(x):
            with torch.cuda.stream(self._streams[number % len(self._streams)]):
                found.append(self.stack.run(tokens, given, self.store))
        for stream in self._streams:
            main.wait_stream(stream)
        return torch.stack(found)


def captured_graph(compute: Callable[[], Found], pool: Any) -> tuple[torch.cuda.CUDAGraph, Found]:
    """Return a graph of what a function does on the device, and the memory that it writes to.

    Args:
        compute: may be called several times.
        pool: of graphs that never run at one time; None: a new one.
    """
    enabled = torch.is_autocast_enabled("cuda")
    # Without its cache: what it casts would be freed under the graph.
    with torch.autocast("cuda", torch.bfloat16, enabled, cache_enabled=False):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            found = compute()
    return graph, found


def _size(given: Pass, runs: int = 1) -> Size:
    """Return the size of the graph that a pass is one of."""
    info, cached = given.info, given.layouts[0].max_len
    return Size(
        rows=padded(len(info.timestamp)),
        sequences=1 << (len(info.offsets) - 2).bit_length(),
        pages=round_up(-(-cached // PAGE), 16) if cached else 0,
        keeps=given.layouts[0].rows is not None,
        of_tails=given.of_tails,
        windowed=given.windowed_candidates,
        num_context=info.num_context,
        runs=runs,
    )


class _Numbers:
    """What a pass reads besides the rows themselves, in one array: of numpy or of torch."""

    def __init__(self, size: Size, numbers: Any) -> None:
        self.all = numbers
        B, R = size.sequences + 1, size.rows
        self._end = 0
        self.offsets = self._take(B + 1)
        self.tail_offsets = self._take(B + 1)
        self.num_candidates = self._take(B)
        self.lengths = self._take(B)
        self.first_time = self._take(B)
        self.session_start = self._take(B)
        self.timestamp = self._take(R)
        self.query_time = self._take(R)
        self.rows = self._take(R if size.keeps else 0)
        self.pages = self._take(B * size.pages // 2 + B)
        """Read as int32: more than B G of them."""

    def _take(self, count: int) -> Any:
        first = self._end
        # Kernels are compiled anew for other alignments than those of tensors by themselves.
        self._end = round_up(first + count, 16)
        return self.all[first : first + count]


def _total(size: Size) -> int:
    B, R = size.sequences + 1, size.rows
    kept = R if size.keeps else 0
    counts = (B + 1, B + 1, B, B, B, B, R, R, kept, B * size.pages // 2 + B)
    return sum(round_up(n, 16) for n in counts)


def _static(size: Size, numbers: Tensor) -> Pass:
    """Return a pass that reads everything from `numbers`."""
    R, B, view = size.rows, size.sequences + 1, _Numbers(size, numbers)
    # int32 pages begin at an even place, as int64 do.
    pages = view.pages.view(torch.int32)[: B * max(1, size.pages)].view(B, -1)
    before = None
    if size.pages:
        before = Before(view.lengths, view.first_time, view.first_time)
    info = SequenceInfo(
        offsets=view.offsets,
        tail_offsets=view.tail_offsets,
        max_len=R,
        max_tail_len=TAIL if size.of_tails else R,
        timestamp=view.timestamp,
        query_time=view.query_time,
        session_start=view.session_start,
        num_context=size.num_context,
        num_candidates=view.num_candidates,
        num_rows=TAIL if size.of_tails else R,
        before=before,
    )
    layout = Layout(
        number=0,
        lengths=view.lengths,
        max_len=size.pages * PAGE,
        rows=view.rows if size.keeps else None,
    )
    of_one = size.sequences == 1 and size.pages > 0 and not size.keeps
    beside = min(size.runs, NUM_STREAMS)
    return Pass(info, pages, (layout,), size.of_tails, size.windowed, of_one, beside)


def _fill(out: np.ndarray, size: Size, given: Pass, rows: int) -> None:
    """Write what `_static` reads."""
    info, layout, count = given.info, given.layouts[0], len(given.info.offsets) - 1
    view = _Numbers(size, out)
    # Rows that are not kept go to the page of nobody. What is long is written once.
    for part in (view.rows, view.offsets, view.lengths, view.first_time, view.session_start):
        part[:] = 0
    view.tail_offsets[:], view.num_candidates[:], view.pages[:] = 0, 0, 0
    view.timestamp[rows:], view.query_time[rows:] = 0, 0
    view.offsets[: count + 1] = info.offsets.numpy()
    view.offsets[count + 1 : -1], view.offsets[-1] = rows, size.rows
    view.tail_offsets[1:] = TAIL * size.of_tails
    view.num_candidates[:count] = info.num_candidates.numpy()
    view.num_candidates[-1] = size.rows - rows
    view.session_start[:count] = info.session_start.numpy()
    view.timestamp[:rows], view.query_time[:rows] = info.timestamp.numpy(), info.query_time.numpy()
    if layout.rows is not None:
        kept: Any = slice(0, rows)
        if layout.keep is not None and len(layout.keep):
            first, last = int(layout.keep[0]), int(layout.keep[-1])
            is_whole = last - first + 1 == len(layout.keep)  # they ascend
            kept = slice(first, last + 1) if is_whole else layout.keep.numpy()
        view.rows[kept] = layout.rows.numpy()
    if size.pages:
        assert info.before is not None
        view.lengths[:count] = layout.lengths.numpy()
        view.first_time[:count] = info.before.first_time.numpy()
        table = view.pages.view(np.int32)[: (size.sequences + 1) * size.pages]
        mine = given.pages.numpy()[:, : size.pages]
        table.reshape(-1, size.pages)[:count, : mine.shape[1]] = mine


def runs_alike(counts: Ints, begin: int, microbatch: int) -> int:
    """Return how many microbatches of one request from `begin` on a graph makes: a power of two.

    Args:
        counts: (B,) int64: candidates of each request. Of several, one at a time.
        begin: candidates before them.
        microbatch: candidates of each.
    """
    whole = min((int(counts[0]) - begin) // microbatch, MOST_RUNS) if len(counts) == 1 else 1
    return 1 << max(0, whole.bit_length() - 1)


def padded(rows: int) -> int:
    """Return for how many rows a graph is captured that takes so many."""
    if rows <= 512:
        return round_up(rows, 64)
    if rows <= 2048:
        return round_up(rows, 256)
    return round_up(rows, 512 if rows <= 4096 else 1024)


def round_up(n: int, step: int) -> int:
    """Return the least multiple of `step` that is not below n."""
    return -(-n // step) * step
