"""Histories of one partition's users, and the one pass that reads and extends them.

All events lie in one arena. A user owns one region of it: consecutive rows, sorted by (timestamp,
arrival), whose capacity is one of a few size classes. The newest `keep` events of a user are what
can ever be read. What a region holds beyond them never shows: batches do not depend on the layout.

Letters: n events of history, m events of a piece of a session, keep = max_events + overlap_slack.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipelines.event_memory import EventColumns, Spill
from pipelines.keyed_random import U, mix, sequence_key, uniform

Ints = NDArray[np.int64]

TIMESTAMP = 1  # column of EventRows.ints; column 0 is the item id

# Columns of SequenceRows.rows; the ids of the context features follow.
USER, SESSION, PARTITION, PIECE, ANCHOR, NUM_HISTORY, NUM_EVENTS, FIRST_CONTEXT = range(8)

MOST = 1 << 30  # where the count of a user's events stops

# Slots of HistoryStore.state.
NUM_USERS, HIGH, FREE = range(3)
# Slots of Progress: next session, sequences, events, supervised events, cut sequences.
NEXT, SEQUENCES, EVENTS, SUPERVISED, CLIPPED = range(5)


class EventRows(NamedTuple):
    """Encoded events, one a row, flattened."""

    ints: Ints
    """(E * I,) int64: item id, timestamp, features (pipelines/feature_columns.py)."""
    floats: NDArray[np.float32]
    """(E * G,) float32: labels and dense features; G = 0 where they are not kept."""
    codes: NDArray[np.uint8]
    """(E * S,) uint8: action codes, then whether the event is positive."""


class SessionRows(NamedTuple):
    """Decoded sessions of one partition, in the order of the log."""

    user_id: Ints
    """(n,) int64."""
    session_id: Ints
    """(n,) int64."""
    start_ts: Ints
    """(n,) int64 s."""
    offsets: Ints
    """(n + 1,) int64: events of session s are offsets[s]:offsets[s + 1]."""
    reason: NDArray[np.uint8]
    """(n,) uint8: 0 is usable; else why the session is skipped."""
    context: Ints
    """(n, X) int64: columns of the context features."""
    first_piece: Ints
    """(n,) int64: number of the first piece here; above 0 in later slices of a long session."""


class SequenceRows(NamedTuple):
    """Where a pass writes the sequences of a batch; events of a sequence: history, then session."""

    rows: Ints
    """(B, FIRST_CONTEXT + X) int64."""
    events: EventRows
    """ints and codes of all events; floats of the supervised ones only."""


class Arena(NamedTuple):
    """State of a store as the kernels see it."""

    table: NDArray[np.int32]
    """Open addressing: user slot, -1 empty; a power of two long."""
    user_id: Ints
    """Per user slot."""
    total: NDArray[np.int32]
    """Events ever appended, or MOST where they are more."""
    base: Ints
    """First row of the region."""
    length: NDArray[np.int32]
    """Rows in use."""
    size_class: NDArray[np.int8]
    """Index into `capacities`; -1: no region yet."""
    capacities: Ints
    """Rows of a region of each size class, ascending."""
    class_of: Ints
    """Smallest size class that holds so many rows."""
    free: Ints
    """First row of a free region of each size class, -1 none; its item id links to the next."""
    state: Ints
    """NUM_USERS, HIGH (rows handed out), FREE (rows in free regions)."""
    events: EventRows
    """Rows of all regions."""


class Rules(NamedTuple):
    """What the kernels need to know of the configuration."""

    seed: int
    purpose: int
    max_events: int
    """Newest events of history in a sequence."""
    keep: int
    """Newest events of a user that can ever be read."""
    extra: int
    """Rows of a full region beyond `keep`: it slides once for so many events."""
    max_session_events: int
    sampled_rate: float
    """k of min(1, k / n), or infinity."""
    supervise_history: bool
    num_ints: int
    num_floats: int
    """Of a session's event."""
    num_kept_floats: int
    """Of an event of history: num_floats if history is supervised, else 0."""
    num_codes: int


class HistoryStore:
    """Histories of one partition's users, as a function of the sessions appended so far."""

    def __init__(self, rules: Rules, spill: Spill | None = None) -> None:
        """Make an empty store, whose events leave memory by the rule `spill`; None: never."""
        self.rules = rules
        self._memory = EventColumns(
            rules.num_ints, rules.num_kept_floats, rules.num_codes, spill or Spill()
        )
        capacities = size_classes(rules.keep, rules.extra)
        self.arena = Arena(
            table=np.full(64, -1, np.int32),
            user_id=np.zeros(32, np.int64),
            total=np.zeros(32, np.int32),
            base=np.zeros(32, np.int64),
            length=np.zeros(32, np.int32),
            size_class=np.full(32, -1, np.int8),
            capacities=capacities,
            class_of=np.searchsorted(capacities, np.arange(capacities[-1] + 1)),
            free=np.full(len(capacities), -1, np.int64),
            state=np.zeros(3, np.int64),
            events=_no_events(),
        )

    @property
    def num_users(self) -> int:
        """Users with a history."""
        return int(self.arena.state[NUM_USERS])

    @property
    def num_bytes(self) -> int:
        """Bytes handed out to histories, and those of the index of users."""
        arena, rules = self.arena, self.rules
        event = 8 * rules.num_ints + 4 * rules.num_kept_floats + rules.num_codes
        user = arena.user_id.itemsize + arena.total.itemsize + arena.base.itemsize
        user += arena.length.itemsize + arena.size_class.itemsize
        index = len(arena.user_id) * user + arena.table.nbytes
        return int(arena.state[HIGH]) * event + index

    def pack(self, first: int, out: EventRows, offsets: NDArray[np.int32]) -> int:
        """Copy the newest `keep` events of users until `out` or `offsets` is full.

        Args:
            first: user slot to start with.
            out: room for `keep` events or more.
            offsets: (n + 1,) int32: set so that events of slot first + i are out's rows
                offsets[i]:offsets[i + 1].

        Returns:
            The user slot to go on with.
        """
        return int(_pack(self.arena, self.rules, first, self.num_users, out, offsets))

    def restore(self, user_id: Ints, total: Any, lengths: Any, events: EventRows) -> None:
        """Add users, none of whom is there, with the histories that `pack` gave.

        Args:
            user_id: (n,) int64.
            total: (n,) int32: events ever appended.
            lengths: (n,) int32: of the history, at most `keep`.
            events: of all, in the order of the users.
        """
        self._reserve_users(len(user_id))
        progress = np.zeros(2, np.int64)  # next user, next event
        while True:
            _restore(user_id, total, lengths, events, self.arena, self.rules, progress)
            if progress[0] == len(user_id):
                return
            self._reserve_rows()

    @property
    def in_files(self) -> bool:
        """Whether the events have left memory."""
        return self._memory.in_files

    def advance(
        self,
        sessions: SessionRows,
        events: EventRows,
        first: int,
        last: int,
        *,
        partition: int,
        out: SequenceRows,
        progress: Ints,
    ) -> None:
        """Read and extend the histories with sessions first .. last - 1, in order.

        For each usable session, and each piece of a long one: the sequence is written to `out`,
        then its events join the history.

        Args:
            sessions: decoded sessions.
            events: their events.
            first: session to start with.
            last: session to stop before.
            partition: number written beside each sequence.
            out: room for the sequences.
            progress: (5,) int64: how much of `out` is in use; updated.
        """
        self._run(sessions, events, first, last, partition, out, progress, gather=True)

    def look_up(
        self,
        sessions: SessionRows,
        events: EventRows,
        first: int,
        last: int,
        *,
        partition: int,
        out: SequenceRows,
        progress: Ints,
    ) -> None:
        """Do as `advance` does, without extending the histories."""
        self._run(
            sessions, events, first, last, partition, out, progress, gather=True, append=False
        )

    def extend(self, sessions: SessionRows, events: EventRows, first: int, last: int) -> None:
        """Do as `advance` does, without making sequences."""
        nothing = SequenceRows(np.empty((0, FIRST_CONTEXT), np.int64), _no_events())
        self._run(sessions, events, first, last, 0, nothing, empty_progress(), gather=False)

    def _run(
        self,
        sessions: SessionRows,
        events: EventRows,
        first: int,
        last: int,
        partition: int,
        out: SequenceRows,
        progress: Ints,
        *,
        gather: bool,
        append: bool = True,
    ) -> None:
        self._reserve_users(last - first)
        high, free = self.arena.state[HIGH], self.arena.state[FREE]
        if free * 12 > high and high > 1 << 16:
            self.compact()
        progress[NEXT] = first
        while True:
            _advance(
                sessions,
                events,
                last,
                partition,
                self.arena,
                self.rules,
                out,
                progress,
                gather,
                append,
            )
            if progress[NEXT] == last:
                return
            self._reserve_rows()

    def compact(self) -> None:
        """Close the gaps that users left who moved to larger regions."""
        order = np.argsort(self.arena.base[: self.num_users], kind="stable")
        _compact(order, self.arena, self.rules)

    def _reserve_users(self, more: int) -> None:
        arena, need = self.arena, self.num_users + more
        if need > len(arena.user_id):
            size = max(need, len(arena.user_id) * 9 // 8)
            size_class = np.full(size, -1, np.int8)
            size_class[: len(arena.size_class)] = arena.size_class
            arena = arena._replace(
                user_id=np.resize(arena.user_id, size),
                total=np.resize(arena.total, size),
                base=np.resize(arena.base, size),
                length=np.resize(arena.length, size),
                size_class=size_class,
            )
        if need * 10 > len(arena.table) * 7:
            table = np.full(1 << int(need / 0.7).bit_length(), -1, np.int32)
            _index_users(table, arena.user_id, self.num_users)
            arena = arena._replace(table=table)
        self.arena = arena

    def reserve(self, num_events: int) -> None:
        """Make room for so many events of new users at once, instead of as they come.

        Memory that moves while it grows loses its large pages: it took a restore 0.2 s/GB.
        """
        slack = num_events // 7  # size classes are up to 15 % apart
        self._reserve_rows(int(self.arena.state[HIGH]) + num_events + slack)

    def _reserve_rows(self, least: int = 4096) -> None:
        old = len(self.arena.events.codes) // self.rules.num_codes
        size = max(old * 5 // 4, old + 64 * int(self.arena.capacities[-1]), least)
        # The rows move where they grow: nothing may view them meanwhile.
        self.arena = self.arena._replace(events=_no_events())
        self.arena = self.arena._replace(events=EventRows(*self._memory.resize(size)))


def event_widths(rules: Rules) -> tuple[int, int, int]:
    """Return how many ints, floats and codes an event of history has."""
    return rules.num_ints, rules.num_kept_floats, rules.num_codes


def _no_events() -> EventRows:
    return EventRows(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.uint8))


def empty_progress() -> Ints:
    """Return the progress of an empty `out`."""
    return np.zeros(5, np.int64)


def size_classes(keep: int, extra: int, *, first: int = 4, ratio: float = 1.15) -> Ints:
    """Return the capacities of regions, ascending, the last of which is keep + extra rows."""
    capacities = []
    size = first
    while size < keep:
        capacities.append(size)
        size = max(size + 1, int(size * ratio))
    return np.array([*capacities, keep + extra], np.int64)


@njit(inline="always")
def _find(arena: Any, user_id: Any) -> Any:
    """Return the slot of a user, who is added if new."""
    table = arena.table
    mask = U(len(table) - 1)
    i = mix(U(user_id)) & mask
    while True:
        slot = np.int64(table[i])
        if slot < 0:
            slot = arena.state[NUM_USERS]
            arena.state[NUM_USERS] = slot + 1
            table[i] = np.int32(slot)
            arena.user_id[slot] = user_id
            arena.total[slot] = 0
            arena.length[slot] = 0
            arena.size_class[slot] = -1
            return slot
        if arena.user_id[slot] == user_id:
            return slot
        i = (i + U(1)) & mask


@njit(nogil=True, cache=True)
def _index_users(table: Any, user_id: Any, num_users: int) -> None:
    mask = U(len(table) - 1)
    for slot in range(num_users):
        i = mix(U(user_id[slot])) & mask
        while table[i] >= 0:
            i = (i + U(1)) & mask
        table[i] = np.int32(slot)


@njit(inline="always")
def copy_rows(to: Any, to_row: int, source: Any, row: int, num_rows: int, width: int) -> None:
    """Copy rows of `width` values, ascending: safe downwards within one array."""
    # Unsigned indices: signed ones are tested for wrap-around, which keeps LLVM from vectorising.
    t, s = np.uintp(to_row * width), np.uintp(row * width)
    for i in range(np.uintp(num_rows * width)):
        to[t + i] = source[s + i]


@njit(inline="always")
def _copy_kept(to: Any, to_row: int, source: Any, row: int, num_rows: int, rules: Any) -> None:
    """Copy rows into the arena, without the floats if histories keep none."""
    copy_rows(to.ints, to_row, source.ints, row, num_rows, rules.num_ints)
    copy_rows(to.codes, to_row, source.codes, row, num_rows, rules.num_codes)
    if rules.num_kept_floats > 0:
        copy_rows(to.floats, to_row, source.floats, row, num_rows, rules.num_floats)


@njit(inline="always")
def _ensure(arena: Any, slot: int, num_rows: int, rules: Any) -> None:
    """Give a user a region of at least so many rows, or of the largest size class."""
    capacities = arena.capacities
    old = arena.size_class[slot]
    if old >= 0 and capacities[old] >= min(num_rows, capacities[-1]):
        return
    new = arena.class_of[min(num_rows, capacities[-1])]
    to = arena.free[new]
    if to >= 0:
        arena.free[new] = arena.events.ints[to * rules.num_ints]
        arena.state[FREE] -= capacities[new]
    else:
        to = arena.state[HIGH]
        arena.state[HIGH] += capacities[new]
    if old >= 0:
        base = arena.base[slot]
        _copy_kept(arena.events, to, arena.events, base, arena.length[slot], rules)
        arena.events.ints[base * rules.num_ints] = arena.free[old]
        arena.free[old] = base
        arena.state[FREE] += capacities[old]
    arena.base[slot] = to
    arena.size_class[slot] = new


@njit(inline="always")
def _append(arena: Any, slot: int, events: Any, first: int, num_events: int, rules: Any) -> None:
    """Merge at most `extra` events, sorted by time, into a region that _ensure made large."""
    held, length, base = arena.events, arena.length[slot], arena.base[slot]
    num_ints = rules.num_ints
    if length + num_events > arena.capacities[arena.size_class[slot]]:
        # Safe before the merge: what this drops can never be among the newest `keep` again.
        _copy_kept(held, base, held, base + length - rules.keep, rules.keep, rules)
        length = rules.keep
    old, new, to = base + length - 1, first + num_events - 1, base + length + num_events - 1
    # From the back, so that only events newer than those that arrive are moved. Of equal times the
    # earlier arrival stays in front.
    while new >= first and old >= base:
        if held.ints[old * num_ints + TIMESTAMP] <= events.ints[new * num_ints + TIMESTAMP]:
            _copy_kept(held, to, events, new, 1, rules)
            new -= 1
        else:
            _copy_kept(held, to, held, old, 1, rules)
            old -= 1
        to -= 1
    _copy_kept(held, base, events, first, new - first + 1, rules)
    arena.length[slot] = length + num_events


@njit(nogil=True, cache=True)
def _advance(
    sessions: Any,
    events: Any,
    last: int,
    partition: int,
    arena: Any,
    rules: Any,
    out: Any,
    progress: Any,
    gather: bool,
    append: bool,
) -> None:
    """Take sessions progress[NEXT] .. last - 1; stop early where the arena may lack rows."""
    num_ints = rules.num_ints
    num_context = sessions.context.shape[1]
    num_rows = len(arena.events.codes) // rules.num_codes
    session = progress[NEXT]
    while session < last:
        if sessions.reason[session] != 0:
            session += 1
            continue
        if arena.state[HIGH] + arena.capacities[-1] > num_rows:
            break
        user_id, session_id = sessions.user_id[session], sessions.session_id[session]
        begin, end = sessions.offsets[session], sessions.offsets[session + 1]
        slot = _find(arena, user_id)
        if append:
            _ensure(arena, slot, arena.length[slot] + end - begin, rules)
        held, base = arena.events, arena.base[slot]

        first_piece = sessions.first_piece[session]
        for number, first in enumerate(range(begin, end, rules.max_session_events)):
            piece = first_piece + number
            m = min(rules.max_session_events, end - first)
            if gather:
                anchor = sessions.start_ts[session]
                if piece > 0:
                    anchor = events.ints[first * num_ints + TIMESTAMP]
                # History: the newest events strictly before the anchor, among the newest `keep`.
                stop = base + arena.length[slot]
                oldest = max(base, stop - rules.keep)
                while stop > oldest and held.ints[(stop - 1) * num_ints + TIMESTAMP] >= anchor:
                    stop -= 1
                n = min(stop - oldest, rules.max_events)
                key = sequence_key(rules.seed, rules.purpose, user_id, session_id, piece)
                if uniform(key) * (n + m) < rules.sampled_rate:
                    b, e, s = progress[SEQUENCES], progress[EVENTS], progress[SUPERVISED]
                    row = out.rows[b]
                    row[USER], row[SESSION], row[PARTITION] = user_id, session_id, partition
                    row[PIECE], row[ANCHOR], row[NUM_HISTORY], row[NUM_EVENTS] = piece, anchor, n, m
                    for c in range(num_context):
                        row[FIRST_CONTEXT + c] = sessions.context[session, c]
                    copy_rows(out.events.ints, e, held.ints, stop - n, n, num_ints)
                    copy_rows(out.events.codes, e, held.codes, stop - n, n, rules.num_codes)
                    copy_rows(out.events.ints, e + n, events.ints, first, m, num_ints)
                    copy_rows(out.events.codes, e + n, events.codes, first, m, rules.num_codes)
                    if rules.supervise_history:
                        copy_rows(out.events.floats, s, held.floats, stop - n, n, rules.num_floats)
                        s += n
                    copy_rows(out.events.floats, s, events.floats, first, m, rules.num_floats)
                    if n < rules.max_events and arena.total[slot] > rules.keep:
                        progress[CLIPPED] += 1
                    progress[SEQUENCES], progress[EVENTS], progress[SUPERVISED] = (
                        b + 1,
                        e + n + m,
                        s + m,
                    )
            if append:
                for start in range(first, first + m, rules.extra):
                    _append(arena, slot, events, start, min(rules.extra, first + m - start), rules)
                arena.total[slot] = min(arena.total[slot] + m, MOST)
        session += 1
    progress[NEXT] = session


@njit(nogil=True, cache=True)
def _compact(order: Any, arena: Any, rules: Any) -> None:
    """Slide the regions down in the order of their addresses."""
    high = np.int64(0)
    for slot in order:
        if arena.size_class[slot] >= 0:
            base = arena.base[slot]
            _copy_kept(arena.events, high, arena.events, base, arena.length[slot], rules)
            arena.base[slot] = high
            high += arena.capacities[arena.size_class[slot]]
    arena.free[:] = -1
    arena.state[HIGH], arena.state[FREE] = high, 0


@njit(nogil=True, cache=True)
def _pack(arena: Any, rules: Any, first: int, last: int, out: Any, offsets: Any) -> Any:
    """Copy the newest `keep` events of slots first, ... until there is no room; return the next."""
    room = len(out.codes) // rules.num_codes
    end = np.int64(0)
    slot = first
    while slot < last and slot - first < len(offsets) - 1:
        n = min(np.int64(arena.length[slot]), rules.keep)
        if end + n > room:
            break
        row = arena.base[slot] + arena.length[slot] - n
        _copy_kept(out, end, arena.events, row, n, rules)
        end += n
        offsets[slot - first + 1] = end
        slot += 1
    return slot


@njit(nogil=True, cache=True)
def _restore(
    user_id: Any, total: Any, lengths: Any, events: Any, arena: Any, rules: Any, progress: Any
) -> None:
    """Add users progress[0], ...; stop early where the arena may lack rows."""
    num_rows = len(arena.events.codes) // rules.num_codes
    user, row = progress[0], progress[1]
    while user < len(user_id):
        if arena.state[HIGH] + arena.capacities[-1] > num_rows:
            break
        n = np.int64(lengths[user])
        slot = _find(arena, user_id[user])
        _ensure(arena, slot, n, rules)
        _copy_kept(arena.events, arena.base[slot], events, row, n, rules)
        arena.length[slot] = n
        arena.total[slot] = total[user]
        row += n
        user += 1
    progress[0], progress[1] = user, row
