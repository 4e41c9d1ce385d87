"""What a server knows without being told: histories and contexts of users, features of items.

Letters: U users, E events, n events of a user, I and S columns of an encoded event, X columns of an
encoded context.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.config import DataConfig
from pipelines.event_memory import spill_of
from pipelines.feature_columns import UNKNOWN_ID
from pipelines.features import EventEncoder
from pipelines.history import TIMESTAMP, EventRows, HistoryStore, Ints
from pipelines.partition import PartitionReader
from pipelines.rejects import RejectLog
from pipelines.segments import LogSegments
from pipelines.stream import history_rules

ROOM = 1 << 20
"""Events copied at a time."""


@dataclass(frozen=True)
class UserHistory:
    """The newest events of a user, encoded, in the order of time."""

    ints: Ints
    """(n, I) int64."""
    codes: NDArray[np.uint8]
    """(n, S + 1)."""
    context: Ints
    """(X,) int64, of the newest session."""


class UserStore:
    """Histories of a log's users, to which events can be added.

    The log's are in arrays; those of users with added events in a dictionary beside them.

    Args:
        encoder: of the events.
        user_id: (U,) int64, ascending.
        offsets: (U + 1,) int64: events of user u are offsets[u]:offsets[u + 1].
        ints: (E, I) int64.
        codes: (E, S + 1) uint8.
        contexts: (U, X) int64.
        items: (n, I) int64, ascending item ids: the newest event of each item.
        keep: newest events of a user that are kept.
    """

    def __init__(
        self,
        encoder: EventEncoder,
        *,
        user_id: Ints,
        offsets: Ints,
        ints: Ints,
        codes: NDArray[np.uint8],
        contexts: Ints,
        items: Ints,
        keep: int,
    ) -> None:
        self.encoder, self.keep = encoder, keep
        self._user_id, self._offsets = user_id, offsets
        self._ints, self._codes, self._contexts = ints, codes, contexts
        self._items = items
        self._changed: dict[int, UserHistory] = {}

    @property
    def num_users(self) -> int:
        """Users that are known."""
        known = np.fromiter(self._changed, np.int64, len(self._changed))
        return len(self._user_id) + int((~np.isin(known, self._user_id)).sum())

    @property
    def num_events(self) -> int:
        """Events that were kept of the log."""
        return len(self._ints)

    @property
    def num_items(self) -> int:
        """Items whose features are known."""
        return len(self._items)

    def users(self) -> Ints:
        """Return the ids of the log's users, ascending."""
        return self._user_id

    def history(self, user_id: int) -> UserHistory | None:
        """Return a user's history, None of an unknown user."""
        changed = self._changed.get(user_id)
        if changed is not None:
            return changed
        place = int(np.searchsorted(self._user_id, user_id))
        if place == len(self._user_id) or self._user_id[place] != user_id:
            return None
        events = slice(self._offsets[place], self._offsets[place + 1])
        return UserHistory(self._ints[events], self._codes[events], self._contexts[place])

    def add(
        self, user_id: int, ints: Ints, codes: NDArray[np.uint8], context: Ints | None = None
    ) -> int:
        """Add events of a user, who may be new; return how many are kept of all that are known.

        Of equal times what was there first stays in front, as in the pass over a log.

        Args:
            user_id: whose they are.
            ints: (n, I) int64, in the order of time.
            codes: (n, S + 1) uint8.
            context: (X,) int64; None leaves it as it is.
        """
        before = self.history(user_id)
        if before is not None:
            ints = np.concatenate([before.ints, ints])
            codes = np.concatenate([before.codes, codes])
            context = before.context if context is None else context
        if context is None:
            context = np.full(self.encoder.num_context, UNKNOWN_ID)
        order = np.argsort(ints[:, TIMESTAMP], kind="stable")[-self.keep :]
        self._changed[user_id] = UserHistory(ints[order], codes[order], context)
        return len(order)

    def item_rows(self, ids: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """Return (n, I) encoded events of items, and (n,) whether their features are known."""
        ids = np.asarray(ids, np.int64)
        if not len(self._items):
            return np.zeros((len(ids), self.encoder.num_ints), np.int64), np.zeros(len(ids), bool)
        place = np.minimum(np.searchsorted(self._items[:, 0], ids), len(self._items) - 1)
        return self._items[place].copy(), self._items[place, 0] == ids


def read_users(data: DataConfig) -> UserStore:
    """Read a session-end log once and return the histories as they stand at its end.

    Args:
        data: names the log; its columns as the run's.

    Raises:
        ValueError: if the log cannot be used, or more than max_reject_fraction of its sessions.
    """
    encoder = EventEncoder(data)
    rules = history_rules(data, encoder, seed=0)
    segments = LogSegments(data, encoder, (), None)
    rejects = RejectLog(data.max_reject_fraction, segments.folder)
    sessions = segments.rows_at(segments.num_steps)
    rejects.expect(int(sessions.sum()))
    users, lengths, ints, codes, contexts = [], [], [], [], []
    items = np.empty((0, encoder.num_ints), np.int64)
    for p in range(segments.num_partitions):
        spill = spill_of(data.history_memory_gb, data.spill_folder)
        reader = PartitionReader(p, segments, encoder, rules, rejects, spill)
        reader.begin(len(segments))
        items = _newest(items, _packed(reader.histories, encoder)[2])
        of_sessions = []
        for span in reader.take(int(sessions[p])):
            block, chosen = span.block, slice(span.first, span.last)
            span.store.extend(block.sessions, block.events, span.first, span.last)
            usable = block.sessions.reason[chosen] == 0
            user = block.sessions.user_id[chosen][usable]
            of_sessions.append((user, block.sessions.context[chosen][usable]))
            first, last = block.sessions.offsets[[span.first, span.last]]
            is_used = np.repeat(usable, np.diff(block.sessions.offsets[span.first : span.last + 1]))
            rows = block.events.ints.reshape(-1, encoder.num_ints)[first:last]
            items = _newest(items, rows[is_used])
        user_id, length, of_user, codes_of_user = _packed(reader.histories, encoder)
        users.append(user_id)
        lengths.append(length)
        ints.append(of_user)
        codes.append(codes_of_user)
        contexts.append(_contexts(user_id, of_sessions, encoder.num_context))
    user_id, length = np.concatenate(users), np.concatenate(lengths)
    order = np.argsort(user_id, kind="stable")
    all_ints, all_codes = np.concatenate(ints), np.concatenate(codes)
    first = np.cumsum(length) - length
    offsets = np.zeros(len(order) + 1, np.int64)
    np.cumsum(length[order], out=offsets[1:])
    event = np.repeat(first[order] - offsets[:-1], length[order]) + np.arange(len(all_ints))
    return UserStore(
        encoder,
        user_id=user_id[order],
        offsets=offsets,
        ints=all_ints[event],
        codes=all_codes[event],
        contexts=np.concatenate(contexts)[order],
        items=items,
        keep=rules.keep,
    )


def _packed(
    store: HistoryStore, encoder: EventEncoder
) -> tuple[Ints, Ints, Ints, NDArray[np.uint8]]:
    """Return users, lengths, ints and codes of the newest events, rules.keep a user at most."""
    rules, num_users = store.rules, store.num_users
    room = max(ROOM, rules.keep)
    out = EventRows(
        np.empty(room * rules.num_ints, np.int64),
        np.empty(room * rules.num_kept_floats, np.float32),
        np.empty(room * rules.num_codes, np.uint8),
    )
    lengths, ints, codes = [], [], []
    slot = 0
    while slot < num_users:
        offsets = np.zeros(num_users - slot + 1, np.int32)
        after = store.pack(slot, out, offsets)
        ends = offsets[: after - slot + 1].astype(np.int64)
        num_events = int(ends[-1])
        lengths.append(np.diff(ends))
        ints.append(out.ints.reshape(-1, rules.num_ints)[:num_events].copy())
        codes.append(out.codes.reshape(-1, rules.num_codes)[:num_events].copy())
        slot = after
    return (
        store.arena.user_id[:num_users].copy(),
        np.concatenate([*lengths, np.empty(0, np.int64)]),
        np.concatenate([*ints, np.empty((0, rules.num_ints), np.int64)]),
        np.concatenate([*codes, np.empty((0, rules.num_codes), np.uint8)]),
    )


def _newest(items: Ints, ints: Ints) -> Ints:
    """Return the newest event of each item, ascending ids; of equal times the later argument's."""
    both = np.concatenate([items, ints])
    order = np.lexsort((both[:, TIMESTAMP], both[:, 0]))
    ids = both[order, 0]
    is_last = np.append(ids[1:] != ids[:-1], True)[: len(ids)]
    newest: Ints = both[order[is_last]]
    return newest


def _contexts(user_id: Ints, of_sessions: Sequence[tuple[Ints, Ints]], num_context: int) -> Ints:
    """Return (U, X): the context of each user's last session, unknown without one."""
    found = np.full((len(user_id), num_context), UNKNOWN_ID)
    if not of_sessions or not num_context:
        return found
    users = np.concatenate([x for x, _ in of_sessions])[::-1]
    contexts = np.concatenate([x for _, x in of_sessions])[::-1]
    last, place = np.unique(users, return_index=True)
    has = np.isin(user_id, last)
    found[has] = contexts[place[np.searchsorted(last, user_id[has])]]
    return found
