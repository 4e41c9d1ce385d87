"""Each id once: what a rank asks other ranks for, and how its rows become those of all its ids.

Letters: F features, T tables, n ids of a batch, U distinct rows of a table, S sequences, D width of
a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import EmbeddingsConfig

SEQUENCES = 1024
"""Over which ids are spread: FBGEMM's kernels go through a sequence one id at a time, which for a
history of 2,000 takes 0.7 ms (one H200), however few there are. As many on every rank, or TorchRec
orders what comes from the others by a longer way."""


@dataclass(frozen=True)
class Repeats:
    """Where the ids of a batch are among its distinct ones."""

    inverse: dict[str, Tensor]
    """Feature -> (n,) int64: which of the distinct rows of its table each of its ids is."""
    first_of: dict[str, str]
    """Feature -> the first feature of its table, which carries the distinct rows of the table."""

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that the tensors are used on `stream`."""
        for inverse in self.inverse.values():
            inverse.record_stream(stream)


def take_out_repeats(
    rows: KeyedJaggedTensor, config: EmbeddingsConfig
) -> tuple[KeyedJaggedTensor, Repeats]:
    """Return the distinct rows of each table, and how to find those of every id among them.

    Waits for the device: their number is that of the rows to send.

    Args:
        rows: row numbers of all features, those of a table side by side.
        config: says which table a feature is of, and the tables' rows.
    """
    table_of = {f: name for name, table in config.tables.items() for f in table.features}
    names = list(dict.fromkeys(table_of[feature] for feature in rows.keys()))  # noqa: SIM118
    sizes = [config.tables[name].num_embeddings for name in names]
    starts = [sum(sizes[:t]) for t in range(len(names) + 1)]
    first_row = dict(zip(names, starts, strict=False))
    bounds, values = rows.offset_per_key(), rows.values().long()
    device = values.device
    if len(names) > 1:  # numbered through all tables
        values = values.clone()
        for i, feature in enumerate(rows.keys()):
            values[bounds[i] : bounds[i + 1]] += first_row[table_of[feature]]
    distinct, inverse = torch.unique(values, return_inverse=True)
    ends = [0, distinct.numel()]
    if len(names) > 1:
        steps = [torch.full((), start, dtype=torch.int64, device=device) for start in starts]
        ends = torch.searchsorted(distinct, torch.stack(steps)).tolist()
    place = {name: ends[t] for t, name in enumerate(names)}
    parts, counts = [], []
    inverse_of, first_of = {}, {}
    carried: dict[str, str] = {}
    for i, feature in enumerate(rows.keys()):
        name, count = table_of[feature], 0
        if name not in carried:
            carried[name] = feature
            t = names.index(name)
            part = distinct[ends[t] : ends[t + 1]]
            parts.append(part - first_row[name] if first_row[name] else part)
            count = part.numel()
        first_of[feature] = carried[name]
        own = inverse[bounds[i] : bounds[i + 1]]
        inverse_of[feature] = own - place[name] if place[name] else own
        counts.append(count)
    distinct_rows = _spread(rows, torch.cat(parts), counts)
    return distinct_rows, Repeats(inverse_of, first_of)


def spread_evenly(rows: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Return the same ids of each feature in sequences of equal lengths.

    Rows are looked up one by one, so that sequences mean nothing to a lookup but work in parallel.
    """
    bounds = rows.offset_per_key()
    counts = [end - start for start, end in pairwise(bounds)]
    return _spread(rows, rows.values(), counts)


def _spread(rows: KeyedJaggedTensor, values: Tensor, counts: list[int]) -> KeyedJaggedTensor:
    """Return values with the keys of `rows`, so many of each, in sequences of equal lengths."""
    number_S = torch.arange(SEQUENCES, device=values.device)
    lengths = [(number_S < count % SEQUENCES) + count // SEQUENCES for count in counts]
    return KeyedJaggedTensor(
        keys=rows.keys(),
        values=values,
        lengths=torch.cat(lengths).to(rows.lengths().dtype),
        stride=SEQUENCES,
        offset_per_key=[0, *accumulate(counts)],
    )


def put_back_repeats(
    found: dict[str, Tensor], repeats: Repeats, count_nonfinite: Callable[[Tensor], None]
) -> dict[str, Tensor]:
    """Return the rows of every id, by feature, from the distinct ones of each table.

    Gradients of an id are added up; one that is not finite is left out, and counted.

    Args:
        found: feature -> (U, D), of the features that carry the distinct rows of their table.
        repeats: of `take_out_repeats`.
        count_nonfinite: is told of (n,) bool gradient rows.
    """
    features = list(repeats.inverse)
    firsts = list(dict.fromkeys(repeats.first_of.values()))
    of = tuple(firsts.index(repeats.first_of[feature]) for feature in features)
    tensors = [*(found[first] for first in firsts), *repeats.inverse.values()]
    rows = _PutBack.apply(count_nonfinite, of, *tensors)  # type: ignore[no-untyped-call]
    return dict(zip(features, rows, strict=True))


class _PutBack(torch.autograd.Function):
    """Rows by place, behind one node, so that every rank's backward pass has the same exchanges."""

    @staticmethod
    def forward(ctx: Any, count_nonfinite: Any, of: tuple[int, ...], *tensors: Tensor) -> Any:
        distinct, inverse = tensors[: -len(of)], tensors[-len(of) :]
        ctx.count_nonfinite, ctx.of = count_nonfinite, of
        ctx.shapes = [x.shape for x in distinct]
        ctx.save_for_backward(*inverse)
        return tuple(distinct[t].index_select(0, x) for t, x in zip(of, inverse, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # One row more than there are, for gradients that are not finite.
        sums = [grads[0].new_zeros(U + 1, D) for U, D in ctx.shapes]
        for t, inverse_n, grad_nD in zip(ctx.of, ctx.saved_tensors, grads, strict=True):
            bad_n = ~row_is_finite(grad_nD)
            ctx.count_nonfinite(bad_n)
            sums[t].index_add_(0, inverse_n.masked_fill(bad_n, ctx.shapes[t][0]), grad_nD)
        return None, None, *(x[:-1] for x in sums), *(None for _ in ctx.of)


def row_is_finite(x_nD: Tensor) -> Tensor:
    """Return (n,) bool: which rows are finite throughout; reads them once and stores nothing."""
    finite: Tensor = torch.linalg.vector_norm(x_nD, ord=torch.inf, dim=1).isfinite()
    return finite
