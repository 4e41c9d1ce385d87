"""Row numbers on their way to the ranks that hold the rows, beside the work of a GPU."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.distinct import Repeats, spread_evenly, take_out_repeats
from embeddings.tables import PendingLookup

if TYPE_CHECKING:
    from embeddings.sharded import ShardedTables


class SentLookup(PendingLookup):
    """Row numbers on their way through TorchRec's input_dist, each collection's on its own.

    On a GPU that runs in the stream `exchange`, so that it does not wait for the batch in training.
    """

    def __init__(self, rows: KeyedJaggedTensor, tables: "ShardedTables") -> None:
        super().__init__(rows)
        self.exchange = tables.exchange
        self.cached_kernels = tables.cached_kernels
        self.is_prefetched = False
        self.collections = list(tables.sharded.module.collections.values())
        self.contexts = [each.create_context() for each in self.collections]
        self.on_their_way: list[Any] = []
        self.values: list[Any] = []
        self.event = None if self.exchange is None else torch.Event("cuda")
        if self.exchange is not None and torch.cuda.current_stream() != self.exchange:
            self.exchange.wait_stream(torch.cuda.current_stream())
            for tensor in (rows.values(), rows.lengths()):
                tensor.record_stream(self.exchange)
        self.repeats: Repeats | None = None
        with torch.cuda.stream(self.exchange):
            asked = _with_features(rows, tables.features)
            if tables.sends_once:
                asked, self.repeats = take_out_repeats(asked, tables.config)
            else:
                asked = spread_evenly(asked)
            parts = asked.split(tables.feature_counts)
            each_with = zip(self.collections, self.contexts, parts, strict=True)
            # All collections send before the first is waited for.
            self.lengths = [each.input_dist(context, part) for each, context, part in each_with]

    def advance(self) -> None:
        """Exchange the row numbers, now that their counts are known, and load them into caches.

        The host waits for the counts alone, where there are no caches: for the row numbers it would
        wait until the slowest rank had come so far.
        """
        self._send_numbers()
        if self.event is None or not self.cached_kernels:
            return
        forward_stream = torch.cuda.current_stream()
        self._receive()
        with torch.cuda.stream(self.exchange):
            for values in self.values:
                values.record_stream(forward_stream)
            # A row that found no place in a cache is updated where it lies: it may be brought
            # only after that, and the host does not wait for a backward pass.
            torch.cuda.current_stream().wait_stream(forward_stream)
            self._prefetch(forward_stream)
            self.event.record()

    def finish(self) -> dict[str, Tensor]:
        """Look the rows up and return those of each feature."""
        if not self.on_their_way:
            self._send_numbers()
        if not self.values:
            self._receive()
        if self.event is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.event)
            for values, context in zip(self.values, self.contexts, strict=True):
                values.record_stream(stream)
                context.record_stream(stream)
            if self.repeats is not None:
                self.repeats.record_stream(stream)
        if not self.is_prefetched:
            self._prefetch(None)
        each_with = zip(self.collections, self.contexts, self.values, strict=True)
        pending = [
            each.compute_and_output_dist(context, values) for each, context, values in each_with
        ]
        return {name: found.values() for one in pending for name, found in one.items()}

    def _prefetch(self, forward_stream: torch.cuda.Stream | None) -> None:
        """Load rows into the caches, in the current stream, for a lookup in another if given."""
        self.is_prefetched = True
        if not self.cached_kernels:
            return
        # Not by TorchRec's `prefetch`, which reports an error for each table without a cache.
        for each, values in zip(self.collections, self.values, strict=True):
            for lookup, rows in zip(each._lookups, values, strict=True):
                parts = rows.split(lookup._feature_splits)
                for group, part in zip(lookup._emb_modules, parts, strict=True):
                    kernel = group.emb_module
                    if any(kernel is cached for cached in self.cached_kernels):
                        kernel.gather_uvm_cache_stats = True
                        kernel.prefetch(part.values(), part.offsets(), forward_stream)
                        kernel.gather_uvm_cache_stats = False

    def _send_numbers(self) -> None:
        with torch.cuda.stream(self.exchange):
            self.on_their_way = [each.wait() for each in self.lengths]

    def _receive(self) -> None:
        with torch.cuda.stream(self.exchange):
            self.values = [each.wait() for each in self.on_their_way]
            if self.event is not None:
                self.event.record()


def _with_features(rows: KeyedJaggedTensor, features: list[str]) -> KeyedJaggedTensor:
    """Return `rows` with exactly these keys; a missing feature has no values.

    TorchRec fixes the keys and their order at the first batch, and refuses a stride of 0.
    """
    if rows.keys() == features and rows.stride() > 0:
        return rows
    bounds = rows.offset_per_key()
    stride = max(rows.stride(), 1)
    position = {feature: i for i, feature in enumerate(rows.keys())}
    lengths = rows.lengths().new_zeros(len(features), stride)
    values, ends = [rows.values()[:0]], [0]
    for i, feature in enumerate(features):
        if feature in position and rows.stride() > 0:
            j = position[feature]
            lengths[i] = rows.lengths()[j * stride : (j + 1) * stride]
            values.append(rows.values()[bounds[j] : bounds[j + 1]])
        ends.append(ends[-1] + (values[-1].numel() if feature in position else 0))
    return KeyedJaggedTensor(
        keys=features,
        values=torch.cat(values),
        lengths=lengths.flatten(),
        stride=stride,
        offset_per_key=ends,
    )
