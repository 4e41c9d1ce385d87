"""Counts that fade: features of an event that are made in the pass itself.

A counter of a key (the user, the item, or both) with half-life h has at the time a of a prediction
the value

    v(a) = sum over past events i of the key, t_i < a, of  w_i 2^(-(a - t_i) / h)

where w_i is 1, or the known value of an action (unknown: 0). Past events are those of the sessions
that the pass has read, of this partition and its starting histories, and the earlier ones of the
event's own session. a is the event's time, with data.anchor=session the time of its prediction.

One value a key would not do: sessions come in the order of their ends, so events later than a may
have been read. A key holds a sum of what lies before the frontier, a time at or after which all
predictions to come are made, and a list of its newer events. Frontiers are a function of the file
(`frontiers`), so that values do not depend on steps, ranks or restarts. A prediction before the
frontier, of a session longer than a day, or that began long before its segment did, has no value:
it is missing, never wrong.

Letters: n sessions, E events, C counters and W weights of a kind of key.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipelines.feature_columns import MISSING_NUMBER
from pipelines.features import EventEncoder
from pipelines.history import TIMESTAMP, EventRows, Ints, SessionRows
from pipelines.keyed_random import U, mix
from pipelines.location import Location
from pipelines.reader import NO_TIME, read_times
from pipelines.schedule import disordered, filled
from pipelines.schema import END_TS, START_TS

# A session that lasts longer, or that began longer before the end of its segment's last session and
# comes in a later segment, does not hold up the sums of all others.
LONGEST_SECONDS = 86_400
OVERHANG_SECONDS = 4 * 3600

KINDS = ("user", "item", "user_item")
_ITEM, _USER_ITEM = 1, 2
_NEVER = -(1 << 62)
_ALWAYS = 1 << 62

# Slots of CounterTable.state.
NUM_KEYS, NUM_NODES, FREE_NODE = range(3)


class CounterRules(NamedTuple):
    """The counters of one kind of key."""

    kind: int
    """Index into KINDS."""
    columns: Ints
    """(C,) int64: column of an event's ints that each fills."""
    half_lives: NDArray[np.float64]
    """(C,) s."""
    weight: Ints
    """(C,) int64: which of `signals` each sums."""
    signals: Ints
    """(W,) int64: columns of the block's signals."""
    anchor_session: bool
    max_session_events: int
    num_ints: int


class CounterTable(NamedTuple):
    """State of one kind of key as the kernels see it."""

    table: NDArray[np.int32]
    """Open addressing: slot of a key, -1 empty; a power of two long."""
    key: Ints
    base_time: Ints
    """Latest event in the sums, in s; _NEVER without one."""
    values: NDArray[np.float64]
    """(slots, C): sums at base_time."""
    head: NDArray[np.int32]
    """First of the key's newer events, -1 none."""
    node_time: Ints
    node_next: NDArray[np.int32]
    node_weight: NDArray[np.float64]
    """(nodes, W)."""
    state: Ints
    """NUM_KEYS, NUM_NODES (handed out), FREE_NODE (first of those given back, -1 none)."""


def counter_rules(encoder: EventEncoder) -> list[CounterRules]:
    """Return the rules of each kind of key that a configuration counts by."""
    config, slots, signals = encoder.config, encoder.item_slots, encoder.signals
    rules = []
    for kind, name in enumerate(KINDS):
        mine = [slot for slot in slots if slot.feature.counter == name]
        if mine:
            of = [signals.index(slot.feature.column) for slot in mine]
            used = sorted(set(of))
            rules.append(
                CounterRules(
                    kind=kind,
                    columns=np.array([slot.first for slot in mine], np.int64),
                    half_lives=np.array([3600.0 * slot.feature.half_life_hours for slot in mine]),
                    weight=np.array([used.index(i) for i in of], np.int64),
                    signals=np.array(used, np.int64),
                    anchor_session=config.anchor == "session",
                    max_session_events=config.max_session_events,
                    num_ints=encoder.num_ints,
                )
            )
    return rules


def frontiers(path: Location) -> Ints:
    """Return (n,) int64 s: for each session of a file a time that ascends, never after the starts.

    No session from this one on starts earlier, but those that LONGEST_SECONDS and OVERHANG_SECONDS
    leave out.

    Raises:
        ValueError: if the file cannot be opened.
    """
    end_ts = read_times(path, END_TS)
    end_ts = filled(end_ts, disordered(end_ts))
    start_ts = read_times(path, START_TS)
    start_ts = np.where(start_ts == NO_TIME, _ALWAYS, start_ts)
    earliest = np.minimum.accumulate(start_ts[::-1])[::-1]
    if len(end_ts):
        earliest = np.minimum(earliest, end_ts[-1] - OVERHANG_SECONDS)
    ascending: Ints = np.maximum(earliest, end_ts - LONGEST_SECONDS)
    return ascending


class CounterStore:
    """Counters of one kind of key in one partition, as a function of the sessions read so far."""

    def __init__(self, rules: CounterRules) -> None:
        """Start without events."""
        self.rules = rules
        num_counters, num_weights = len(rules.columns), len(rules.signals)
        self.table = CounterTable(
            table=np.full(64, -1, np.int32),
            key=np.zeros(32, np.int64),
            base_time=np.full(32, _NEVER),
            values=np.zeros((32, num_counters)),
            head=np.full(32, -1, np.int32),
            node_time=np.zeros(32, np.int64),
            node_next=np.zeros(32, np.int32),
            node_weight=np.zeros((32, num_weights)),
            state=np.array([0, 0, -1], np.int64),
        )

    def fill(
        self,
        sessions: SessionRows,
        events: EventRows,
        signals: NDArray[np.float64],
        frontier: Ints,
        first: int,
        last: int,
        *,
        extend: bool = True,
    ) -> None:
        """Write the counters of sessions first .. last - 1 into their events, and count these.

        Args:
            sessions: decoded sessions.
            events: their events; the counters' columns are written.
            signals: (E, all signals) float64, without NaN.
            frontier: (n,) int64 s.
            first: session to start with.
            last: session to stop before.
            extend: false: nothing of the sessions is counted beyond themselves.
        """
        self._reserve(int(sessions.offsets[last] - sessions.offsets[first]))
        floats = events.ints.view(np.float64)
        _fill(
            sessions, events.ints, floats, signals, frontier, first, last, extend,
            self.rules, self.table,
        )  # fmt: skip

    def count(
        self, sessions: SessionRows, events: EventRows, signals: NDArray[np.float64], frontier: int
    ) -> None:
        """Count the events of starting histories, in any order; `frontier` is that of the log."""
        self._reserve(int(sessions.offsets[-1]))
        _count(sessions, events.ints, signals, frontier, self.rules, self.table)

    def _reserve(self, more: int) -> None:
        table = self.table
        keys, nodes = int(table.state[NUM_KEYS]) + more, int(table.state[NUM_NODES]) + more
        if keys > len(table.key):
            size = max(keys, len(table.key) * 5 // 4)
            table = table._replace(
                key=_grown(table.key, size, 0),
                base_time=_grown(table.base_time, size, _NEVER),
                values=_grown(table.values, size, 0.0),
                head=_grown(table.head, size, -1),
            )
        if nodes > len(table.node_time):
            size = max(nodes, len(table.node_time) * 5 // 4)
            table = table._replace(
                node_time=_grown(table.node_time, size, 0),
                node_next=_grown(table.node_next, size, 0),
                node_weight=_grown(table.node_weight, size, 0.0),
            )
        if keys * 10 > len(table.table) * 7:
            index = np.full(1 << int(keys / 0.7).bit_length(), -1, np.int32)
            _index(index, table.key, int(table.state[NUM_KEYS]))
            table = table._replace(table=index)
        self.table = table

    def rows(self, first: int, last: int) -> tuple[Any, ...]:
        """Return what a snapshot holds of keys first .. last - 1, in the order of their slots.

        Returns:
            key (n,), base_time (n,), values (n * C,), newer events of each (n,), and of these, in
            order, times (m,) and weights (m * W,).
        """
        table = self.table
        counts = np.empty(last - first, np.int64)
        most = int(table.state[NUM_NODES])
        times = np.empty(most, np.int64)
        weights = np.empty((most, len(self.rules.signals)))
        m = _list_nodes(table, first, last, counts, times, weights)
        return (
            table.key[first:last],
            table.base_time[first:last],
            table.values[first:last].reshape(-1),
            counts,
            times[:m],
            weights[:m].reshape(-1),
        )

    def restore(
        self, key: Ints, base_time: Ints, values: Any, counts: Ints, times: Ints, weights: Any
    ) -> None:
        """Add keys, none of which is there, as `rows` gave them."""
        self._reserve(max(len(key), len(times)))
        _restore(
            key,
            base_time,
            values.reshape(len(key), len(self.rules.columns)),
            counts,
            times,
            weights.reshape(len(times), len(self.rules.signals)),
            self.table,
        )


def _grown(values: Any, size: int, fill: Any) -> Any:
    grown = np.full((size, *values.shape[1:]), fill, values.dtype)
    grown[: len(values)] = values
    return grown


@njit(inline="always")
def _key_of(user_id: Any, item_id: Any, kind: Any) -> Any:
    if kind == _ITEM:
        return item_id
    if kind == _USER_ITEM:
        # Two of n pairs share a key with a probability of about n^2 / 2^65.
        return np.int64(mix(mix(U(user_id)) ^ U(item_id)))
    return user_id


@njit(inline="always")
def _find(table: Any, key: Any) -> Any:
    """Return the slot of a key, which is added if new."""
    mask = U(len(table.table) - 1)
    i = mix(U(key)) & mask
    while True:
        slot = np.int64(table.table[i])
        if slot < 0:
            slot = table.state[NUM_KEYS]
            table.state[NUM_KEYS] = slot + 1
            table.table[i] = np.int32(slot)
            table.key[slot] = key
            return slot
        if table.key[slot] == key:
            return slot
        i = (i + U(1)) & mask


@njit(nogil=True, cache=True)
def _index(index: Any, keys: Any, num_keys: int) -> None:
    mask = U(len(index) - 1)
    for slot in range(num_keys):
        i = mix(U(keys[slot])) & mask
        while index[i] >= 0:
            i = (i + U(1)) & mask
        index[i] = np.int32(slot)


@njit(inline="always")
def _add(table: Any, slot: Any, time: Any, weights: Any, row: Any, of: Any, rules: Any) -> None:
    """Add an event, of any time, to the sums of a key; its weights are weights[row, of]."""
    base = table.base_time[slot]
    for c in range(len(rules.columns)):
        weight = weights[row, of[rules.weight[c]]]
        if base == _NEVER:
            table.values[slot, c] = weight
        elif time >= base:
            fade = np.exp2((base - time) / rules.half_lives[c])
            table.values[slot, c] = table.values[slot, c] * fade + weight
        else:
            table.values[slot, c] += weight * np.exp2((time - base) / rules.half_lives[c])
    table.base_time[slot] = max(base, time)


@njit(inline="always")
def _push(table: Any, slot: Any, time: Any, signals: Any, row: Any, rules: Any) -> None:
    """Put an event in front of the newer ones of a key."""
    node = table.state[FREE_NODE]
    if node >= 0:
        table.state[FREE_NODE] = table.node_next[node]
    else:
        node = table.state[NUM_NODES]
        table.state[NUM_NODES] = node + 1
    table.node_time[node] = time
    for w in range(len(rules.signals)):
        table.node_weight[node, w] = signals[row, rules.signals[w]]
    table.node_next[node] = table.head[slot]
    table.head[slot] = np.int32(node)


@njit(inline="always")
def _give_back(table: Any, node: Any) -> None:
    table.node_next[node] = table.state[FREE_NODE]
    table.state[FREE_NODE] = node


@njit(inline="always")
def _advance_frontier(table: Any, slot: Any, frontier: Any, order: Any, rules: Any) -> None:
    """Move the newer events of a key that lie before the frontier into its sums."""
    before = np.int32(-1)
    node = table.head[slot]
    while node >= 0:
        following = table.node_next[node]
        if table.node_time[node] < frontier:
            _add(table, slot, table.node_time[node], table.node_weight, node, order, rules)
            if before < 0:
                table.head[slot] = following
            else:
                table.node_next[before] = following
            _give_back(table, node)
        else:
            before = node
        node = following


@njit(nogil=True, cache=True)
def _fill(
    sessions: Any,
    ints: Any,
    floats: Any,
    signals: Any,
    frontier: Any,
    first: int,
    last: int,
    extend: bool,
    rules: Any,
    table: Any,
) -> None:
    order = np.arange(len(rules.signals))
    for session in range(first, last):
        if sessions.reason[session] != 0:
            continue
        user_id = sessions.user_id[session]
        begin, end = sessions.offsets[session], sessions.offsets[session + 1]
        anchor = sessions.start_ts[session]
        for e in range(begin, end):
            row = e * rules.num_ints
            time = ints[row + TIMESTAMP]
            place = e - begin
            if not rules.anchor_session:
                anchor = time
            elif place % rules.max_session_events == 0 and (
                place > 0 or sessions.first_piece[session] > 0
            ):
                anchor = time  # of a later piece of the session
            slot = _find(table, _key_of(user_id, ints[row], rules.kind))
            if extend:  # else the state stays as it is, to the bit
                _advance_frontier(table, slot, frontier[session], order, rules)
            base = table.base_time[slot]
            for c in range(len(rules.columns)):
                column, half_life = row + rules.columns[c], rules.half_lives[c]
                if base >= anchor:
                    ints[column] = MISSING_NUMBER
                    continue
                value = 0.0
                if base != _NEVER:
                    value = table.values[slot, c] * np.exp2((base - anchor) / half_life)
                node = table.head[slot]
                while node >= 0:
                    age = anchor - table.node_time[node]
                    if age > 0:
                        value += table.node_weight[node, rules.weight[c]] * np.exp2(
                            -age / half_life
                        )
                    node = table.node_next[node]
                floats[column] = np.float64(np.float32(value))
            _push(table, slot, time, signals, e, rules)
        if not extend:
            for e in range(end - 1, begin - 1, -1):
                slot = _find(table, _key_of(user_id, ints[e * rules.num_ints], rules.kind))
                node = table.head[slot]
                table.head[slot] = table.node_next[node]
                _give_back(table, node)


@njit(nogil=True, cache=True)
def _count(sessions: Any, ints: Any, signals: Any, frontier: int, rules: Any, table: Any) -> None:
    for session in range(len(sessions.user_id)):
        if sessions.reason[session] != 0:
            continue
        for e in range(sessions.offsets[session], sessions.offsets[session + 1]):
            row = e * rules.num_ints
            time = ints[row + TIMESTAMP]
            slot = _find(table, _key_of(sessions.user_id[session], ints[row], rules.kind))
            if time < frontier:
                _add(table, slot, time, signals, e, rules.signals, rules)
            else:
                _push(table, slot, time, signals, e, rules)


@njit(nogil=True, cache=True)
def _list_nodes(table: Any, first: int, last: int, counts: Any, times: Any, weights: Any) -> Any:
    m = 0
    for slot in range(first, last):
        begin = m
        node = table.head[slot]
        while node >= 0:
            times[m] = table.node_time[node]
            weights[m] = table.node_weight[node]
            m += 1
            node = table.node_next[node]
        counts[slot - first] = m - begin
    return m


@njit(nogil=True, cache=True)
def _restore(
    key: Any, base_time: Any, values: Any, counts: Any, times: Any, weights: Any, table: Any
) -> None:
    m = 0
    for i in range(len(key)):
        slot = _find(table, key[i])
        table.base_time[slot] = base_time[i]
        table.values[slot] = values[i]
        table.head[slot] = -1
        before = -1
        for _ in range(counts[i]):
            node = table.state[NUM_NODES]
            table.state[NUM_NODES] = node + 1
            table.node_time[node], table.node_next[node] = times[m], -1
            table.node_weight[node] = weights[m]
            if before < 0:
                table.head[slot] = np.int32(node)
            else:
                table.node_next[before] = np.int32(node)
            before = node
            m += 1
