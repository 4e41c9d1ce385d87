"""Users whose interest in categories reinforces itself: the stream of MLPerf's DLRM-v3.

A user has K distinct categories and, at each step t, a session with probability `activity`; before
the first step (t = -1) everyone has a history. A session draws its length and a whole alpha. Each
of its events is of category c with probability (alpha / K + n_c) / (alpha + n), where n_c of the
user's n events *before the session* are of c; the item is uniform over the first (t + 1) / T of the
category (at t = -1 as at t = 0). Rating of an event = (r + s) / 2, s the item's own (5, 4, 3, 2, 1
with probability .2, .25, .25, .2, .1) and r drawn from a few levels that depend on the place of the
category among the user's and drift with t (`_levels`).

Source: generative_recommenders/dlrm_v3/streaming_synthetic_data.py at 3bac8b6. That program draws
2,048 candidates a session in the last tenth of the steps, and 32 of a session's events as its
candidates before; here a session is its events, all the way.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numba import njit

from pipelines.keyed_random import GOLDEN, Purpose, U, mix, sequence_key, uniform
from pipelines.synthetic.config import PolyaUrnConfig
from pipelines.synthetic.sessions import Ints, Sessions

ACTIONS = {"rating": "double"}
FEATURES = {"category": "int64"}
HISTORY_SESSION = -1

# numba takes plain constants.
SYNTHETIC, SYNTHETIC_ITEM = int(Purpose.SYNTHETIC), int(Purpose.SYNTHETIC_ITEM)
SYNTHETIC_USER = int(Purpose.SYNTHETIC_USER)
_FIRST_EVENT_DRAW, _DRAWS_PER_EVENT = 5, 3


class PolyaUrnStream:
    """Makes the sessions of any users; memory is that of these users' counts."""

    def __init__(self, config: PolyaUrnConfig, *, seed: int, start_ts: int) -> None:
        """Remember what is to be made."""
        self.config = config
        self.num_users = config.num_users
        self._seed = seed
        self._start_ts = start_ts

    def sessions(self, users: Iterable[Ints], chunk_events: int) -> Iterator[Sessions]:
        """Yield the sessions of users, by step, then by end, then by user."""
        group = _Users(self.config, self._seed, users)
        for t in range(-1, self.config.num_timestamps):
            for chunk in self._step(group, t, chunk_events):
                if t >= 0:
                    yield chunk

    def histories(self, users: Iterable[Ints], chunk_events: int) -> Iterator[Sessions]:
        """Yield what the users did before the first step, by end, then by user."""
        return self._step(_Users(self.config, self._seed, users), -1, chunk_events)

    def alpha(self, user: int, t: int) -> int:
        """Return the concentration of a session."""
        low, high = self.config.alpha
        key = U(sequence_key(self._seed, SYNTHETIC, user, t, 0))
        return int(_alpha(key, low, high))

    def categories(self, user: int) -> Ints:
        """Return (K,): the user's categories in the order of their places."""
        chosen: Ints = _Users(self.config, self._seed, [np.array([user])]).categories[0]
        return chosen

    def _step(self, group: "_Users", t: int, chunk_events: int) -> Iterator[Sessions]:
        c = self.config
        lengths = np.empty(len(group.user_id), np.int64)
        starts = np.empty(len(group.user_id), np.int64)
        _plan(
            group.user_id,
            t,
            self._seed,
            c.activity,
            c.mean_events,
            c.min_events,
            c.seconds_per_timestamp,
            lengths,
            starts,
        )
        starts += self._start_ts + t * c.seconds_per_timestamp
        active = np.flatnonzero(lengths)
        order = active[np.lexsort((group.user_id[active], (starts + lengths)[active]))]
        ends = np.cumsum(lengths[order])
        begin = 0
        while begin < len(order):
            made = ends[begin - 1] if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, made + chunk_events, side="right")))
            yield self._fill(group, order[begin:end], t, lengths, starts)
            begin = end

    def _fill(self, group: "_Users", chosen: Ints, t: int, lengths: Ints, starts: Ints) -> Sessions:
        """Make the sessions of the users at the indices `chosen`, and count their events."""
        c = self.config
        offsets = np.concatenate([[0], np.cumsum(lengths[chosen])])
        items, timestamps, categories = (np.empty(offsets[-1], np.int64) for _ in range(3))
        ratings = np.empty(offsets[-1], np.float64)
        per_category = c.num_items // c.num_categories
        _fill(
            group.user_id,
            group.categories,
            group.counts,
            chosen,
            offsets,
            t,
            self._seed,
            c.alpha[0],
            c.alpha[1],
            per_category,
            int(per_category * max(t + 1, 1) / c.num_timestamps),
            _levels(t, c.categories_per_user),
            starts,
            items,
            timestamps,
            categories,
            ratings,
        )
        return Sessions(
            user_id=group.user_id[chosen],
            session_id=np.full(len(chosen), t if t >= 0 else HISTORY_SESSION),
            offsets=offsets,
            item_id=items,
            timestamp=timestamps,
            columns={"rating": ratings, "category": categories},
        )


class _Users:
    """Users of one partition: their categories, and their events of each so far."""

    def __init__(self, config: PolyaUrnConfig, seed: int, users: Iterable[Ints]) -> None:
        self.user_id = np.concatenate([np.empty(0, np.int64), *users])
        shape = (len(self.user_id), config.categories_per_user)
        self.categories = np.empty(shape, np.int64)
        self.counts = np.zeros(shape, np.int64)
        _choose_categories(self.user_id, seed, config.num_categories, self.categories)


def _levels(t: int, num_categories: int) -> Any:
    """Return (K, 3, 2) float64: (cumulated probability, rating) of each place among K categories.

    The user likes the first quarter of the places best and the last least; all drift with t.
    """
    one, two, three = (0.5 * np.cos((t + shift) * np.pi / 4) for shift in (0, 2, 4))
    quarter, half = num_categories // 4, num_categories // 2
    levels = np.empty((num_categories, 3, 2))
    for place in range(num_categories):
        if place < quarter:
            levels[place] = [(0.8, 4.5 + one), (1.0, 4.0 + two), (1.0, 4.0 + two)]
            continue
        base = 4.5 if place < half else 3.5 if place < 3 * quarter else 2.5
        levels[place] = [(0.1, base + one), (0.9, base - 0.5 + two), (1.0, base - 1.0 + three)]
    return levels


@njit(inline="always")
def _alpha(key: Any, low: Any, high: Any) -> Any:
    return low + np.int64(uniform(key + U(3) * GOLDEN) * (high - low + 1))


@njit(nogil=True, cache=True)
def _choose_categories(user_id: Any, seed: Any, num_categories: Any, out: Any) -> None:
    """Fill (N, K) with K distinct categories of each user."""
    for n in range(len(user_id)):
        key = sequence_key(seed, SYNTHETIC_USER, user_id[n], 0, 0)
        draws = found = 0
        while found < out.shape[1]:
            drawn = np.int64(uniform(key + U(draws) * GOLDEN) * num_categories)
            draws += 1
            is_new = True
            for other in out[n, :found]:
                is_new = is_new and other != drawn
            if is_new:
                out[n, found] = drawn
                found += 1


@njit(nogil=True, cache=True)
def _plan(
    user_id: Any,
    t: Any,
    seed: Any,
    activity: Any,
    mean: Any,
    least: Any,
    seconds: Any,
    lengths: Any,
    starts: Any,
) -> None:
    """Fill (N,) lengths, 0 where a user is not active, and starts (s after the step's)."""
    for n in range(len(user_id)):
        key = sequence_key(seed, SYNTHETIC, user_id[n], t, 0)
        lengths[n] = starts[n] = 0
        if t >= 0 and uniform(key) >= activity:
            continue
        radius = np.sqrt(-2 * np.log1p(-uniform(key + U(1) * GOLDEN)))
        normal = radius * np.cos(2 * np.pi * uniform(key + U(2) * GOLDEN))
        lengths[n] = max(np.int64(np.rint(mean + (mean // 4) * normal)), least)
        starts[n] = np.int64(uniform(key + U(4) * GOLDEN) * (seconds - lengths[n] + 1))


@njit(nogil=True, cache=True)
def _fill(
    user_id: Any,
    categories: Any,
    counts: Any,
    chosen: Any,
    offsets: Any,
    t: Any,
    seed: Any,
    low: Any,
    high: Any,
    per_category: Any,
    num_open: Any,
    levels: Any,
    starts: Any,
    out_item: Any,
    out_timestamp: Any,
    out_category: Any,
    out_rating: Any,
) -> None:
    """Fill the events of sessions, then add them to counts (N, K)."""
    num = categories.shape[1]
    cumulated = np.empty(num, np.float64)
    added = np.empty(num, np.int64)
    for s in range(len(chosen)):
        n = chosen[s]
        key = sequence_key(seed, SYNTHETIC, user_id[n], t, 0)
        alpha = _alpha(key, low, high)
        total = 0.0
        for c in range(num):
            total += alpha / num + counts[n, c]
            cumulated[c] = total
            added[c] = 0
        draw = _FIRST_EVENT_DRAW
        for e in range(offsets[s], offsets[s + 1]):
            u = uniform(key + U(draw) * GOLDEN) * total
            place = 0
            while u >= cumulated[place] and place < num - 1:
                place += 1
            added[place] += 1
            category = categories[n, place]
            index = np.int64(uniform(key + U(draw + 1) * GOLDEN) * num_open)
            item = category * per_category + index
            v = uniform(key + U(draw + 2) * GOLDEN)
            level = 0
            while v >= levels[place, level, 0] and level < 2:
                level += 1
            draw += _DRAWS_PER_EVENT
            out_item[e] = item
            out_timestamp[e] = starts[n] + e - offsets[s]
            out_category[e] = category
            out_rating[e] = (levels[place, level, 1] + _item_rating(seed, item)) / 2
        for c in range(num):
            counts[n, c] += added[c]


@njit(inline="always")
def _item_rating(seed: Any, item: Any) -> Any:
    """Return an item's own rating, a function of its id, so that no table is needed."""
    u = uniform(mix(mix(U(seed)) ^ U(SYNTHETIC_ITEM)) ^ U(item))
    if u < 0.2:
        return 5.0
    if u < 0.45:
        return 4.0
    if u < 0.7:
        return 3.0
    return 2.0 if u < 0.9 else 1.0
