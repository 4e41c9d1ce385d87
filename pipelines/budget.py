"""Batches filled to a budget of tokens or FLOPs: which sessions each global step reads then.

Before the pass, a plan: the sizes of all sessions are read, each session's cost follows from how
many events its user has had, partitions are dealt out to ranks so that their totals are alike, and
every rank's sessions are cut into steps. All ranks make the plan
of all ranks, so they agree on the number of steps without a word. A cost is exact unless sessions
overlap or are skipped; then it is too high, and the batch is smaller than the budget.
"""

import heapq
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numba import njit

from pipelines.batch import StreamPosition
from pipelines.config import DataConfig
from pipelines.cost import CostRules, sequence_cost
from pipelines.feature_columns import integers
from pipelines.history import Ints, Rules
from pipelines.location import Location
from pipelines.long_sessions import events_per_slice
from pipelines.reader import explain_corruption, open_parquet
from pipelines.schedule import Schedule
from pipelines.schema import EVENT_ITEM_ID, EVENTS, SESSION_ID, USER_ID
from pipelines.stochastic_length import LengthRules, draw_kept

ROWS_PER_READ = 1 << 16
# A step is full at this share of the budget. Once a session did not fit, so many more are tried.
FULL = 0.99
LOOK_AHEAD = 512

_NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class SessionSizes:
    """Sessions of a partition, as far as a plan needs to know them."""

    user_id: Ints
    """(n,) int64."""
    session_id: Ints
    """(n,) int64."""
    num_events: Ints
    """(n,) int64."""
    first_piece: Ints
    """(n,) int64: number of the first piece; above 0 in later slices of a long session."""


@dataclass(frozen=True)
class BudgetSchedule(Schedule):
    """A schedule whose steps take as many sessions of each partition as the plan says.

    It knows no steps before `first_step`.
    """

    rows: Ints
    """(S + 1, P) int64: sessions of each partition consumed by the first `first_step` + s steps."""
    first_step: int
    """Steps before the plan."""

    def rows_at(self, step: int) -> Ints:
        """Return (P,) int64: sessions of each partition consumed by the first `step` steps."""
        rows: Ints = self.rows[step - self.first_step]
        return rows

    def end_of_window(self, step: int) -> int | None:
        """Return the step after the window that starts at `step`; None if none starts there."""
        i = self._index(step)
        # A plan may begin within a window.
        opens = step < self.num_steps and (self.rows_at(step) == self.rows_before[i]).all()
        return int(self.steps_before[i + 1]) if opens else None


class Planner:
    """Cuts the segments of a log into steps, one after another.

    Args:
        config: says what the budget is.
        rules: of histories.
        lengths: of stochastic length, None without.
        costs: of a sequence, in the unit of the budget.
        world_size: number of ranks.
        start: position that the steps begin at; None is the start of the log.
    """

    def __init__(
        self,
        config: DataConfig,
        rules: Rules,
        lengths: LengthRules | None,
        costs: CostRules,
        *,
        world_size: int,
        start: StreamPosition | None,
    ) -> None:
        self._config, self._rules, self._lengths, self._costs = config, rules, lengths, costs
        self._world_size = world_size
        self._start = start if start and start.step > 0 else None
        self._num_begun = max(1, len(self._start.segments)) if self._start else 0
        self._num_planned = 0
        self._seen: list[SessionSizes] = []
        self._rows_before: Ints = np.zeros(0, np.int64)
        self.owned: list[list[int]] = []
        """Partitions of each rank: by their cost in the first segment."""

    def plan(
        self,
        schedule: Schedule,
        end_ts: Sequence[Ints],
        parts: Sequence[Location | None],
        slices: Sequence[Ints | None],
        histories: Sequence[Location | None],
    ) -> BudgetSchedule:
        """Return the steps of the next segment.

        Args:
            schedule: says where windows begin.
            end_ts: for each partition (n_p,) int64 s, ascending.
            parts: file of each partition; None: it cannot be used.
            slices: for each partition the rows that each session is read as; None: one.
            histories: files of the starting histories, or none.

        Raises:
            ValueError: if `start` is no position of this log.
        """
        if not self._seen:
            self._seen = [_nothing()] * len(parts)
            self._rows_before = np.zeros(len(parts), np.int64)
        costs = []
        for p, path in enumerate(parts):
            if histories:
                self._seen[p] = _merged(self._seen[p], _sizes(histories[p], 0))
            sizes = _sizes(path, len(end_ts[p]))
            of_session = slices[p]
            if of_session is not None and len(of_session) == len(sizes.user_id):
                sizes = in_slices(sizes, of_session, self._rules.max_session_events)
            costs.append(
                estimate_costs(
                    sizes,
                    self._seen[p],
                    rules=self._rules,
                    lengths=self._lengths,
                    costs=self._costs,
                )
            )
            self._seen[p] = _merged(self._seen[p], sizes)
        if not self.owned:
            self.owned = assign_partitions(costs, self._world_size)
        index, rows_before = self._num_planned, self._rows_before
        ends = np.array([len(times) for times in end_ts])
        self._num_planned, self._rows_before = index + 1, rows_before + ends
        start = StreamPosition(rows=(0,) * len(parts), step=0)
        if self._start is not None and index < self._num_begun:
            # Steps before `start` belong to the last segment that has begun.
            rows, step = ends, 0
            if index == self._num_begun - 1:
                if len(self._start.rows) == len(parts):
                    rows = np.array(self._start.rows) - rows_before
                step = self._start.step
            start = StreamPosition(rows=tuple(rows.tolist()), step=step)
        return plan(
            schedule, end_ts, costs, budget=self._config.budget, owned=self.owned, start=start
        )


def _nothing() -> SessionSizes:
    return SessionSizes(*[np.empty(0, np.int64)] * 4)


def _merged(a: SessionSizes, b: SessionSizes) -> SessionSizes:
    """Return one row a user: how many events it has in both."""
    users, slot = np.unique(np.concatenate([a.user_id, b.user_id]), return_inverse=True)
    num_events = np.zeros(len(users), np.int64)
    np.add.at(num_events, slot, np.concatenate([a.num_events, b.num_events]))
    return SessionSizes(users, np.full(len(users), -1), num_events, np.zeros_like(users))


def _sizes(path: Location | None, num_sessions: int) -> SessionSizes:
    """Return the sizes of a file; a damaged one has sessions of one event, which are skipped."""
    if path is not None:
        with suppress(ValueError):
            return read_sizes(path)
    count = np.ones(num_sessions, np.int64)
    return SessionSizes(-count, -count, count, 0 * count)


def read_sizes(path: Location) -> SessionSizes:
    """Return the sizes of a file's sessions.

    Raises:
        ValueError: if the file cannot be read.
    """
    columns: list[tuple[Ints, Ints, Ints]] = []
    with open_parquet(path) as file, explain_corruption(path):
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        wanted = [USER_ID, SESSION_ID]
        wanted += [p for p in leaves if p.startswith(f"{EVENTS}.") and p.endswith(EVENT_ITEM_ID)]
        for batch in file.iter_batches(ROWS_PER_READ, columns=wanted, use_threads=False):
            lengths = batch.column(EVENTS).value_lengths().fill_null(0).cast(pa.int64())
            columns.append(
                (
                    integers(batch.column(USER_ID)),
                    integers(batch.column(SESSION_ID)),
                    integers(lengths),
                )
            )
    if not columns:
        return _nothing()
    user_id, session_id, num_events = (np.concatenate(c) for c in zip(*columns, strict=True))
    return SessionSizes(user_id, session_id, num_events, np.zeros_like(user_id))


def in_slices(sizes: SessionSizes, slices: Ints, max_session_events: int) -> SessionSizes:
    """Return the sizes of slices, of which each session has so many.

    Args:
        sizes: of whole sessions.
        slices: (n,).
        max_session_events: events of a piece.
    """
    most = events_per_slice(max_session_events)
    session = np.repeat(np.arange(len(slices)), slices)
    number = np.arange(len(session)) - np.repeat(np.cumsum(slices) - slices, slices)
    return SessionSizes(
        sizes.user_id[session],
        sizes.session_id[session],
        np.clip(sizes.num_events[session] - number * most, 0, most),
        number * (most // max_session_events),
    )


def estimate_costs(
    sizes: SessionSizes,
    before: SessionSizes,
    *,
    rules: Rules,
    lengths: LengthRules | None,
    costs: CostRules,
) -> Any:
    """Return (n,) float64: the cost of each session, all its pieces.

    Args:
        sizes: of the sessions of a partition, in order.
        before: sizes of what the users' histories start with.
        rules: of histories.
        lengths: of stochastic length, None without.
        costs: of a sequence.
    """
    users = np.concatenate([before.user_id, sizes.user_id])
    _, slot = np.unique(users, return_inverse=True)
    seen = np.zeros(int(slot.max(initial=-1)) + 1, np.int64)
    num_before = len(before.user_id)
    np.add.at(seen, slot[:num_before], before.num_events)
    cost = np.zeros(len(sizes.user_id))
    if lengths is None:
        lengths = LengthRules(
            seed=0,
            selection=0,
            threshold=_NO_LIMIT,
            whole_weight=0.0,
            tokens=costs.tokens,
            max_events=rules.max_events,
            supervise_history=rules.supervise_history,
        )
    _estimate(
        slot[num_before:],
        sizes.user_id,
        sizes.session_id,
        sizes.num_events,
        sizes.first_piece,
        seen,
        rules.max_events,
        rules.max_session_events,
        lengths,
        costs,
        cost,
    )
    return cost


def assign_partitions(costs: Sequence[Any], world_size: int) -> list[list[int]]:
    """Return the partitions of each rank, ascending: the dearest first to whom has the least.

    Args:
        costs: for each partition (n_p,) float64, of the whole log.
        world_size: number of ranks, at most the number of partitions.
    """
    # Load, partitions, rank: partitions without sessions are spread too.
    ranks: list[tuple[float, int, int]] = [(0.0, 0, rank) for rank in range(world_size)]
    owned: list[list[int]] = [[] for _ in range(world_size)]
    totals = [float(cost.sum()) for cost in costs]
    for p in sorted(range(len(costs)), key=lambda p: (-totals[p], p)):
        load, count, rank = heapq.heappop(ranks)
        owned[rank].append(p)
        heapq.heappush(ranks, (load + totals[p], count + 1, rank))
    return [sorted(partitions) for partitions in owned]


def plan(
    schedule: Schedule,
    end_ts: Sequence[Ints],
    costs: Sequence[Any],
    *,
    budget: float,
    owned: Sequence[Sequence[int]],
    start: StreamPosition,
) -> BudgetSchedule:
    """Cut the sessions after `start` into steps.

    Within a window each rank takes its sessions by end_ts while they fit into the budget. One that
    does not fit waits for the next step, and so do those of its partition behind it; others may
    still fill the gap. A session above the budget is a batch by itself.

    Args:
        schedule: says where windows begin.
        end_ts: for each partition (n_p,) int64 s, ascending.
        costs: for each partition (n_p,) float64.
        budget: of a rank in a step, in the unit of the costs.
        owned: partitions of each rank.
        start: where to begin. The plan from a position that it passes through is its rest.

    Raises:
        ValueError: if `start` is no position of this log.
    """
    num_partitions = len(end_ts)
    at = np.array(start.rows, np.int64)
    check_position(schedule, start)
    tables, steps_before = [at[None]], [start.step]
    for w in range(len(schedule.windows)):
        begin = np.maximum(schedule.rows_before[w], at)
        end = np.maximum(schedule.rows_before[w + 1], at)
        steps = []
        for mine in owned:
            partition = np.concatenate([np.full(end[p] - begin[p], p) for p in mine])
            times = np.concatenate([end_ts[p][begin[p] : end[p]] for p in mine])
            cost = np.concatenate([costs[p][begin[p] : end[p]] for p in mine])
            order = np.lexsort((partition, times))
            step = np.full(len(order), -1, np.int64)
            blocked = np.full(num_partitions, -1, np.int64)
            _fill(partition[order], cost[order], budget, blocked, step)
            steps.append((partition[order], step))
        num_steps = max(int(step.max(initial=-1)) + 1 for _, step in steps)
        taken = np.zeros((num_steps, num_partitions), np.int64)
        for partition, step in steps:
            np.add.at(taken, (step, partition), 1)
        tables.append(begin + taken.cumsum(0))
        steps_before.append(steps_before[-1] + num_steps)
    return BudgetSchedule(
        windows=schedule.windows,
        rows_before=schedule.rows_before,
        steps_before=np.array(steps_before),
        sessions_per_partition=schedule.sessions_per_partition,
        rows=np.concatenate(tables),
        first_step=start.step,
    )


def check_position(schedule: Schedule, start: StreamPosition) -> None:
    """Refuse a position that no plan of this log passes through.

    Raises:
        ValueError: if it has another number of partitions, or is within two windows at once.
    """
    rows, bounds = np.array(start.rows), schedule.rows_before
    fits = len(rows) == bounds.shape[1] and start.step >= 0
    if fits and not (rows == bounds[-1]).all():
        fits = bool(((bounds[:-1] <= rows) & (rows <= bounds[1:])).all(axis=1).any())
    if not fits:
        raise ValueError(
            f"position: {start.rows} sessions of its partitions consumed is within no window of "
            f"this log, which begin after {bounds.tolist()[:3]} ... sessions. Resume with the log "
            "and the data.window of the checkpoint."
        )


@njit(nogil=True, cache=True)
def _estimate(
    slot: Any,
    user_id: Any,
    session_id: Any,
    num_events: Any,
    first_piece: Any,
    seen: Any,
    max_events: int,
    max_session_events: int,
    lengths: Any,
    costs: Any,
    out: Any,
) -> None:
    for session in range(len(slot)):
        piece, left = first_piece[session], num_events[session]
        while left > 0:
            m = min(left, max_session_events)
            n = min(seen[slot[session]], max_events)
            n = draw_kept(n, m, user_id[session], session_id[session], piece, lengths)
            out[session] += sequence_cost(n, m, costs)
            seen[slot[session]] += m
            piece, left = piece + 1, left - m


@njit(nogil=True, cache=True)
def _fill(partition: Any, cost: Any, budget: float, blocked: Any, step: Any) -> None:
    """Write the step of each session; `blocked` holds the last step that a partition waits in."""
    head = current = 0
    num_sessions = len(step)
    while head < num_sessions:
        used, num_taken, ahead, i = 0.0, 0, 0, head
        while i < num_sessions and used < FULL * budget and ahead < LOOK_AHEAD:
            # Only what is left counts, so that a plan from here on goes the same way.
            if step[i] < 0:
                ahead += ahead > 0
                if blocked[partition[i]] < current:
                    if num_taken == 0 or used + cost[i] <= budget:
                        step[i] = current
                        used += cost[i]
                        num_taken += 1
                    else:
                        blocked[partition[i]] = current
                        ahead = max(ahead, 1)
            i += 1
        current += 1
        while head < num_sessions and step[head] >= 0:
            head += 1
