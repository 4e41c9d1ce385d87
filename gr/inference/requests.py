"""What is asked of a model, in columns of the log, laid out as training lays out sequences.

A request is a user's history and the time at which a prediction is made; its candidates are the
events of a session that begins then. Rows, tokens and batches are made by the code of the data
side: pipelines.features, pipelines.unify, pipelines.assemble.

Letters: B requests, E events of history of all, M candidates of all, I and S columns of an encoded
event, X columns of an encoded context.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gr.inference.columns import (
    TYPES,
    Columns,
    check_finite,
    column_array,
    integers,
    request_data,
)
from gr.inference.series import hide, hide_repeated, last_known, nothing_known
from pipelines.assemble import assemble
from pipelines.batch import SequenceBatch, StreamPosition
from pipelines.config import DataConfig
from pipelines.feature_columns import UNKNOWN_ID, read_numbers
from pipelines.features import EventEncoder
from pipelines.gather import Gathered
from pipelines.history import FIRST_CONTEXT, TIMESTAMP, Ints
from pipelines.schema import EVENT_ITEM_ID, EVENT_TIMESTAMP, USER_ID
from pipelines.unify import token_counts


@dataclass(frozen=True)
class Requests:
    """Users, the times of their predictions, and their encoded histories."""

    user_id: Ints
    """(B,) int64."""
    time: Ints
    """(B,) int64 s: when the prediction is made (the anchor)."""
    context: Ints
    """(B, X) int64, as EventEncoder.encode_context makes them."""
    counts: Ints
    """(B,) int64: events of history."""
    ints: Ints
    """(E, I) int64, as EventEncoder.encode makes them; in the order of time."""
    codes: NDArray[np.uint8]
    """(E, S + 1)."""
    num_left_out: int = 0
    """Events that are not before their request's time."""

    @property
    def num_requests(self) -> int:
        """B."""
        return len(self.user_id)

    def of(self, chosen: Ints) -> "Requests":
        """Return some of the requests, (n,) int64."""
        if _is_all(chosen, self.num_requests):
            return self
        rows = rows_of(self.counts, chosen)
        return Requests(
            user_id=self.user_id[chosen],
            time=self.time[chosen],
            context=self.context[chosen],
            counts=self.counts[chosen],
            ints=self.ints[rows],
            codes=self.codes[rows],
        )

    def without_events(self, chosen: Ints) -> "Requests":
        """Return some of the requests, (n,) int64, with nothing in their histories."""
        return Requests(
            user_id=self.user_id[chosen],
            time=self.time[chosen],
            context=self.context[chosen],
            counts=np.zeros(len(chosen), np.int64),
            ints=self.ints[:0],
            codes=self.codes[:0],
        )


@dataclass(frozen=True)
class Candidates:
    """Items to score for each request."""

    counts: Ints
    """(B,) int64."""
    ints: Ints
    """(M, I) int64."""
    floats: NDArray[np.float32]
    """(M, G): labels, unknown, then dense features."""

    def rows_of(self, chosen: Ints) -> Ints:
        """Return (m,) int64: which of the items are those of some requests, (n,) int64."""
        return rows_of(self.counts, chosen)

    def of(self, chosen: Ints) -> "Candidates":
        """Return those of some requests."""
        if _is_all(chosen, len(self.counts)):
            return self
        rows = self.rows_of(chosen)
        return Candidates(self.counts[chosen], self.ints[rows], self.floats[rows])


class RequestEncoder:
    """Encodes requests and lays them out.

    Args:
        data: of the run that trained the model.
    """

    def __init__(self, data: DataConfig) -> None:
        self.data = request_data(data)
        self.encoder = EventEncoder(self.data)
        self.max_events = data.max_history_tokens // token_counts(data).per_history_event
        """Newest events of a history that are read."""
        self.num_context = token_counts(self.data).context
        """Context tokens at the head of every sequence."""

    def requests(
        self,
        user_id: Any,
        time: Any,
        history: Columns,
        counts: Any,
        context: Columns | None = None,
    ) -> Requests:
        """Encode users and their histories.

        Of each history the newest events strictly before the request's time are taken, in the order
        of their time, as in training (docs/design.md); those at or after it are counted.

        Args:
            user_id: (B,) integers.
            time: (B,) integers, s.
            history: every column of an event that the run reads -> (E,) values, request after
                request; null is unknown. With data.context=merged the columns of the context too,
                as they were in the event's session. A counter (data.item_features.NAME.counter)
                under its own name, or it is missing.
            counts: (B,) integers: events of each history.
            context: column of the context -> (B,) values.

        Raises:
            ValueError: if a column is missing, or lengths or types do not agree.
        """
        users, times, counts = (
            integers(name, x)
            for name, x in (("user_id", user_id), ("time", time), ("counts", counts))
        )
        num_requests, num_events = len(users), int(counts.sum())
        for name, x in (("time", times), ("counts", counts)):
            if len(x) != num_requests:
                raise ValueError(
                    f"{name} must have one value a request, {num_requests}, got {len(x)}"
                )
        if (counts < 0).any():
            raise ValueError(f"counts must be at least 0, got {int(counts.min())}")
        columns = self._columns("events", "history", history, num_events)
        of_sessions = self._context(context or {}, users)
        of_events = of_sessions[:0]
        if self.encoder.merges_context:
            owner = np.repeat(np.arange(num_requests), counts)
            of_events = self._context(history, users[owner])
        ints, codes, _ = self._encode(columns, num_events, of_events, history)

        # Newest events strictly before the anchor; of equal times the order of arrival.
        owner = np.repeat(np.arange(num_requests), counts)
        order = np.lexsort((ints[:, TIMESTAMP], owner))
        is_before = ints[order, TIMESTAMP] < times[owner]
        order = order[is_before]
        before = np.bincount(owner[order], minlength=num_requests)
        ends = np.cumsum(before)
        place = np.arange(len(order))
        order = order[place >= np.repeat(ends - np.minimum(before, self.max_events), before)]
        return Requests(
            user_id=users,
            time=times,
            context=of_sessions,
            counts=np.minimum(before, self.max_events),
            ints=np.ascontiguousarray(ints[order]),
            codes=np.ascontiguousarray(codes[order]),
            num_left_out=int((~is_before).sum()),
        )

    def candidates(self, requests: Requests, items: Columns, counts: Any) -> Candidates:
        """Encode items to score.

        Args:
            requests: whom they are for.
            items: item_id and every item feature -> (M,) values, request after request. A counter
                under its own name, or it is missing.
            counts: (B,) integers: candidates of each request.

        Raises:
            ValueError: if a column is missing, or lengths or types do not agree.
        """
        counts = integers("counts", counts)
        if len(counts) != requests.num_requests or (counts < 0).any():
            raise ValueError(
                f"counts must have one value a request, {requests.num_requests}, each at least 0, "
                f"got {counts.tolist()[:10]}"
            )
        num_items = int(counts.sum())
        times = np.repeat(requests.time, counts)
        known = {EVENT_TIMESTAMP: times, **items}
        columns = self._columns("events", "candidates", known, num_items, optional=self._of_actions)
        owner = np.repeat(np.arange(requests.num_requests), counts)
        context = requests.context[owner] if self.encoder.merges_context else requests.context[:0]
        ints, _, floats = self._encode(columns, num_items, context, items)
        return Candidates(counts, ints, floats)

    def no_item(self, requests: Requests) -> Candidates:
        """Return one unknown item a request: something that stands behind the history."""
        encoder, num_requests = self.encoder, requests.num_requests
        ints = np.zeros((num_requests, encoder.num_ints), np.int64)
        ints[:, 0], ints[:, TIMESTAMP] = UNKNOWN_ID, requests.time
        for slot in encoder.item_slots:
            hide(ints, slot)
        if encoder.merges_context:
            ints[:, encoder.num_ints - encoder.num_context :] = requests.context
        floats = np.full((num_requests, encoder.num_floats), np.nan, np.float32)
        return Candidates(np.ones(num_requests, np.int64), ints, floats)

    def after(
        self, requests: Requests, first: Ints, known: Sequence[Ints], items: Candidates
    ) -> tuple[Requests, Candidates]:
        """Return what follows the first events of each history, and the items behind it.

        Args:
            requests: of them all.
            first: (B,) int64: so many events of each are left out.
            known: of each, a row of an event with the series' values known last in those.
            items: for each request one at least.
        """
        ends, item_ends = np.cumsum(requests.counts), np.cumsum(items.counts)
        starts = ends - requests.counts + first
        new = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
        ints = [requests.ints[x] for x in new]
        if self.encoder.merges_context:
            items = replace(items, ints=items.ints.copy())
            for b, own in enumerate(ints):
                mine = slice(item_ends[b] - items.counts[b], item_ends[b])
                both = np.concatenate([own, items.ints[mine]])
                hide_repeated(both, self.encoder.series_slots, known[b])
                ints[b], items.ints[mine] = both[: len(own)], both[len(own) :]
        codes = [requests.codes[x] for x in new]
        suffix = replace(
            requests,
            counts=requests.counts - first,
            ints=ints[0] if len(ints) == 1 else np.concatenate(ints),
            codes=codes[0] if len(codes) == 1 else np.concatenate(codes),
        )
        return suffix, items

    def known_before_last(self, requests: Requests, b: int) -> Ints:
        """Return a row of an event with what the series' values were before the newest event."""
        encoder = self.encoder
        slots = encoder.series_slots if encoder.merges_context else ()
        known = nothing_known(slots, encoder.num_ints)
        if not slots:
            return known
        end = int(requests.counts[: b + 1].sum())
        rows = requests.ints[end - int(requests.counts[b]) : end - 1]
        return last_known(rows, slots, known)

    def most_tokens(self, num_events: int) -> int:
        """Return the tokens, at most, of context, so many events and what stands behind them."""
        counts = token_counts(self.data)
        series = len(self.encoder.series_slots) * self.encoder.merges_context
        return counts.context + num_events * (counts.per_history_event + series) + series

    def batch(self, requests: Requests, candidates: Candidates) -> SequenceBatch:
        """Return the sequences, history, then candidates: raw ids, in host memory."""
        num_requests = requests.num_requests
        assert (candidates.counts > 0).all()  # an empty sequence has no layout
        sequences = np.zeros((num_requests, FIRST_CONTEXT + self.encoder.num_context), np.int64)
        sequences[:, :FIRST_CONTEXT] = np.stack(
            [
                requests.user_id,
                *[np.zeros(num_requests, np.int64)] * 3,
                requests.time,
                requests.counts,
                candidates.counts,
            ],
            axis=1,
        )
        sequences[:, FIRST_CONTEXT:] = requests.context
        num_events, num_items = len(requests.ints), len(candidates.ints)
        owner = np.concatenate(
            [
                np.repeat(2 * np.arange(num_requests), requests.counts),
                np.repeat(2 * np.arange(num_requests) + 1, candidates.counts),
            ]
        )
        order = np.argsort(owner, kind="stable")
        codes = np.zeros((num_events + num_items, self.encoder.num_codes), np.uint8)
        codes[:num_events] = requests.codes
        codes[:, -1] = 0  # nothing is a target
        gathered = Gathered(
            sequences=sequences,
            ints=np.concatenate([requests.ints, candidates.ints])[order],
            codes=codes[order],
            floats=candidates.floats,
            num_clipped=0,
        )
        return assemble(
            gathered,
            self.encoder,
            seed=0,
            window=0,
            position=StreamPosition((0,), 0),
            num_rejected={},
        )

    @property
    def _of_actions(self) -> set[str]:
        """Columns of events that say what the user did, which is not known of a candidate."""
        data = self.data
        names = {*data.actions, *data.positive, *(t.action for t in data.tasks.values())}
        read = {x.column or name for name, x in data.item_features.items() if not x.is_counter}
        counted = {x.column for x in data.item_features.values() if x.is_counter}
        return (names | counted) - read - set(data.dense_features)

    def _columns(
        self,
        place: str,
        what: str,
        given: Columns,
        num_rows: int,
        optional: set[str] | frozenset[str] = frozenset(),
    ) -> dict[str, pa.Array]:
        found = {}
        labels = {t.action for t in self.data.tasks.values()} - set(self.data.actions)
        dense = set(self.encoder.dense_features)  # of model.encoder=dlrm, which has no Scorer
        counted = {x.column for x in self.data.item_features.values() if x.is_counter}
        unread = (labels | dense | counted | set(self.data.positive)) - set(self.data.actions)
        for column in self.encoder.columns:
            if column.place != place:
                continue
            if column.name not in given:
                if column.name in optional | unread:
                    found[column.name] = pa.nulls(num_rows, TYPES[column.kind])
                    continue
                raise ValueError(
                    f"{what} lacks the column {column.name!r}, which {column.wanted_by} reads; got "
                    f"{sorted(given)}"
                )
            found[column.name] = column_array(what, column, given[column.name], num_rows)
        return found

    def _context(self, given: Columns, user_id: Ints) -> Ints:
        columns = {USER_ID: pa.array(user_id)}
        for column in self.encoder.columns:
            if column.place == "context":
                if column.name not in given:
                    raise ValueError(
                        f"context lacks the column {column.name!r}, which {column.wanted_by} "
                        f"reads; got {sorted(given)}"
                    )
                columns[column.name] = column_array(
                    "context", column, given[column.name], len(user_id)
                )
        return self.encoder.encode_context(columns, len(user_id))

    def _encode(
        self, columns: dict[str, pa.Array], num_rows: int, context: Ints, given: Columns
    ) -> tuple[Ints, NDArray[np.uint8], NDArray[np.float32]]:
        encoder = self.encoder
        items = columns[EVENT_ITEM_ID]
        for name in (EVENT_ITEM_ID, EVENT_TIMESTAMP):
            if columns[name].null_count:
                raise ValueError(f"{name} must not be null, got {columns[name].null_count} nulls")
        item_id = np.asarray(items.to_numpy(zero_copy_only=False), np.int64)
        if (item_id < 0).any():
            raise ValueError(f"item_id must be at least 0, got {int(item_id.min())}")
        if not encoder.merges_context:
            context = np.zeros((num_rows, encoder.num_context), np.int64)
        rows = encoder.encode(columns, item_id, context, np.arange(num_rows + 1))
        ints = rows.ints.reshape(num_rows, encoder.num_ints)
        for slot in encoder.item_slots:
            if slot.feature.is_counter and slot.name in given:
                values = np.asarray(given[slot.name], np.float64)
                bits = values.astype(np.float32).astype(np.float64)
                bits = np.where(np.isnan(bits), np.nan, bits + 0.0)
                ints[:, slot.first] = bits.view(np.int64)
        codes = rows.codes.reshape(num_rows, encoder.num_codes)
        floats = rows.floats.reshape(num_rows, encoder.num_floats)
        numbers = [read_numbers(ints, x) for x in encoder.item_slots if x.feature.is_number]
        check_finite(numbers, floats, self.data.tasks)
        return ints, codes, floats


def rows_of(counts: Ints, chosen: Ints) -> Ints:
    """Return which rows belong to the chosen of groups of rows.

    Args:
        counts: (B,) int64: rows of each group, which follow one another.
        chosen: (n,) int64: groups.
    """
    ends = np.cumsum(counts)
    rows = [np.arange(ends[b] - counts[b], ends[b]) for b in chosen]
    return np.concatenate(rows) if rows else np.empty(0, np.int64)


def _is_all(chosen: Ints, count: int) -> bool:
    """Return whether nothing is left out, so that nothing has to be copied."""
    if len(chosen) != count:
        return False
    return count == 1 or bool((chosen == np.arange(count)).all())
