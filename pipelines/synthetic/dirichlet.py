"""Records of a Dirichlet process over categories, with a vocabulary that opens over time.

Record r holds ids below (f + (1 - f) * r / R) * I only (f: initial_fraction, R: num_records, I:
num_items). It draws 1 to max_categories distinct categories, a prior H over them (uniform on the
simplex) and a concentration alpha; its event n = 1, 2, ... is of a category drawn from H with
probability alpha / (alpha + n - 1), else of category c with probability n_c / (alpha + n - 1),
where n_c of the n - 1 events before are of c; the item is uniform over those of the category that
are open. With repeat=item the second case takes an item of the n - 1 before, each as likely, in
the place of a category: categories follow the same law, and items come back.

Source: arXiv 2402.17152, appendix C, which leaves open how categories and H are drawn. A category
none of whose items is open is not drawn here. repeat=item is not what it says, but what its
published figures have room in (docs/results.md).
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipelines.keyed_random import GOLDEN, Purpose, U, sequence_key, uniform
from pipelines.synthetic.config import DirichletConfig
from pipelines.synthetic.sessions import Ints, Sessions

ACTIONS: dict[str, str] = {}
FEATURES = {"category": "int64"}

# numba takes plain constants.
SYNTHETIC, SYNTHETIC_ITEM = int(Purpose.SYNTHETIC), int(Purpose.SYNTHETIC_ITEM)


class DirichletStream:
    """Makes the records of any users, in any order: each is a function of (seed, record)."""

    def __init__(self, config: DirichletConfig, *, seed: int, start_ts: int) -> None:
        """Assign items to categories: the memory is that of the items.

        Raises:
            ValueError: if fewer than `max_categories` categories have an item that is open from the
                start.
        """
        self.config = config
        self.num_users = config.num_records
        self._seed = seed
        self._start_ts = start_ts
        category = np.empty(config.num_items, np.int64)
        _assign(seed, config.num_categories, category)
        self.items = np.argsort(category, kind="stable")
        """(num_items,): ids by category, ascending within."""
        counts = np.bincount(category, minlength=config.num_categories)
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        """(num_categories + 1,): where the items of each category begin."""
        open_first = np.unique(category[: self.num_open(0)])
        if len(open_first) < config.max_categories:
            raise ValueError(
                f"only {len(open_first)} categories have an item among the first "
                f"{self.num_open(0)} ids, fewer than dirichlet.max_categories="
                f"{config.max_categories}: raise num_items or initial_fraction"
            )

    def num_open(self, record: int) -> int:
        """Return how many ids, counted from 0, may stand in a record."""
        c = self.config
        opened = c.initial_fraction + (1 - c.initial_fraction) * record / c.num_records
        return int(opened * c.num_items)

    def parameters(self, record: int) -> tuple[Ints, NDArray[np.float64], float]:
        """Return (categories, prior, alpha) of a record."""
        c = self.config
        categories = np.empty(c.max_categories, np.int64)
        prior = np.empty(c.max_categories)
        num, alpha, _ = _parameters(
            U(record_key(self._seed, c.first_record + record)),
            self.items,
            self.offsets,
            self.num_open(record),
            c.alpha[0],
            c.alpha[1],
            categories,
            prior,
        )
        return categories[:num], prior[:num], alpha

    def sessions(self, users: Iterable[Ints], chunk_events: int) -> Iterator[Sessions]:
        """Yield the records of users given in ascending order."""
        c = self.config
        step = max(1, chunk_events // c.length)
        for block in users:
            for begin in range(0, len(block), step):
                records = block[begin : begin + step]
                of_process = c.first_record + records
                opened = np.array([self.num_open(int(r)) for r in records])
                shape = (len(records), c.length)
                items, categories = np.empty(shape, np.int64), np.empty(shape, np.int64)
                _fill(
                    of_process,
                    opened,
                    self._seed,
                    self.items,
                    self.offsets,
                    c.max_categories,
                    c.alpha[0],
                    c.alpha[1],
                    c.repeat == "item",
                    items,
                    categories,
                )
                starts = self._start_ts + of_process * c.seconds_per_record
                times = starts[:, None] + np.arange(c.length)
                yield Sessions(
                    user_id=records,
                    session_id=np.zeros(len(records), np.int64),
                    offsets=np.arange(len(records) + 1) * c.length,
                    item_id=items.reshape(-1),
                    timestamp=times.reshape(-1),
                    columns={"category": categories.reshape(-1)},
                )

    def best_hit_rate(self, records: Ints, k: int) -> float:
        """Return the HR@k over these records, but for their first events, that no model can exceed.

        A ranking that knew categories, prior and concentration of each record, and which items are
        open, would know of each event the category's probability given those before it,
        (alpha H_c + n_c) / (alpha + n - 1), and nothing of the item within: its k best are items of
        the category with the largest share for each of its open items, then of the next. With
        repeat=item n_c falls to the items that were seen, by how often each was.

        Args:
            records: numbers of records.
            k: cut-off of the hit rate.
        """
        total, num = 0.0, 0
        for record in records.tolist():
            categories, prior, alpha = self.parameters(record)
            opened = np.array([self._num_open_of(c, record) for c in categories])
            (made,) = self.sessions([np.array([record])], self.config.length)
            n = np.arange(1, self.config.length)[:, None]
            anew = alpha * prior / (alpha + n) / opened  # of an item, if its category is drawn
            if self.config.repeat == "item":
                share, room = self._with_seen_items(made, anew, opened, alpha, categories)
            else:
                drawn = made.columns["category"][:, None] == categories
                before = np.cumsum(drawn, 0)[:-1]  # of events 2 .. length
                share = anew + before / (alpha + n) / opened
                room = np.broadcast_to(opened, share.shape)
            order = np.argsort(-share, axis=1)
            room = np.take_along_axis(room, order, 1)
            left = np.maximum(0, k - (np.cumsum(room, 1) - room))
            taken = np.minimum(room, left)
            total += float((np.take_along_axis(share, order, 1) * taken).sum())
            num += len(share)
        return total / num

    def _with_seen_items(
        self,
        made: Sessions,
        anew: NDArray[np.float64],
        opened: Ints,
        alpha: float,
        categories: Ints,
    ) -> tuple[NDArray[np.float64], Ints]:
        """Return the share of an item, and of how many: unseen by category, then seen, each alone.

        Both are (length - 1, categories + length): for event n = 2 .., of the item of each event
        that is its first, and of which there is none where it comes later.
        """
        item, length = made.item_id, self.config.length
        same = item[:, None] == item
        is_first = np.argmax(same, axis=0) == np.arange(length)
        times = np.cumsum(same & is_first, axis=0)[:-1]
        kind = np.argmax(made.columns["category"][:, None] == categories, axis=1)
        n = np.arange(1, length)[:, None]
        of_seen = anew[:, kind] + times / (alpha + n)
        is_seen = (times > 0).astype(np.int64)
        unseen = opened - is_seen @ (kind[:, None] == np.arange(len(categories)))
        return np.hstack([anew, of_seen]), np.hstack([unseen, is_seen])

    def _num_open_of(self, category: int, record: int) -> int:
        begin, end = self.offsets[category], self.offsets[category + 1]
        return int(np.searchsorted(self.items[begin:end], self.num_open(record)))

    def histories(self, users: Iterable[Ints], chunk_events: int) -> None:
        """Return None: users start without a history."""


@njit(inline="always")
def record_key(seed, record):  # type: ignore[no-untyped-def]
    """Return the uint64 key of a record; its draws are uniform(key + 0), (key + GOLDEN), ..."""
    return sequence_key(seed, SYNTHETIC, record, 0, 0)


@njit(cache=True)
def _assign(seed: Any, num_categories: Any, category: Any) -> None:
    """Fill (num_items,) with the category of each item."""
    for item in range(len(category)):
        u = uniform(sequence_key(seed, SYNTHETIC_ITEM, item, 0, 0))
        category[item] = np.int64(u * num_categories)


@njit(inline="always")
def _num_open_of(items: Any, offsets: Any, category: Any, num_open: Any) -> Any:
    """Return how many items of a category have ids below num_open."""
    begin, end = offsets[category], offsets[category + 1]
    return np.searchsorted(items[begin:end], num_open)


@njit(nogil=True, cache=True)
def _parameters(
    key: Any,
    items: Any,
    offsets: Any,
    num_open: Any,
    least_alpha: Any,
    most_alpha: Any,
    categories: Any,
    prior: Any,
) -> Any:
    """Fill categories and prior; return (number of categories, alpha, number of draws made)."""
    num = 1 + np.int64(uniform(key) * len(categories))
    alpha = least_alpha + uniform(key + GOLDEN) * (most_alpha - least_alpha)
    draws = 2
    found = 0
    while found < num:
        drawn = np.int64(uniform(key + U(draws) * GOLDEN) * (len(offsets) - 1))
        draws += 1
        is_new = _num_open_of(items, offsets, drawn, num_open) > 0
        for other in categories[:found]:
            is_new = is_new and other != drawn
        if is_new:
            categories[found] = drawn
            found += 1
    total = 0.0
    for i in range(num):
        # Exponentials over their sum are uniform on the simplex.
        prior[i] = -np.log1p(-uniform(key + U(draws) * GOLDEN))
        draws += 1
        total += prior[i]
    for i in range(num):
        prior[i] /= total
    return num, alpha, draws


@njit(nogil=True, cache=True)
def _fill(
    records: Any,
    num_open: Any,
    seed: Any,
    items: Any,
    offsets: Any,
    max_categories: Any,
    least_alpha: Any,
    most_alpha: Any,
    is_item_repeated: Any,
    out_items: Any,
    out_categories: Any,
) -> None:
    """Fill (records, length) items and categories; num_open is (records,)."""
    categories = np.empty(max_categories, np.int64)
    prior = np.empty(max_categories, np.float64)
    opened = np.empty(max_categories, np.int64)
    length = out_items.shape[1]
    chosen: Any = np.empty(length, np.int64)  # index of the category of each event
    for r in range(len(records)):
        key = record_key(seed, records[r])
        num, alpha, draws = _parameters(
            key, items, offsets, num_open[r], least_alpha, most_alpha, categories, prior
        )
        for i in range(num):
            opened[i] = _num_open_of(items, offsets, categories[i], num_open[r])
        for n in range(length):
            u = uniform(key + U(draws) * GOLDEN) * (alpha + n)
            v = uniform(key + U(draws + 1) * GOLDEN)
            draws += 2
            if u < alpha:
                i = 0
                left = u / alpha - prior[0]
                while left >= 0 and i < num - 1:
                    i += 1
                    left -= prior[i]
            else:
                # A uniform one of the events before is of category c with probability n_c / n.
                place = min(np.int64(u - alpha), n - 1)
                i = chosen[place]
            chosen[n] = i
            out_categories[r, n] = categories[i]
            if u >= alpha and is_item_repeated:
                out_items[r, n] = out_items[r, place]
            else:
                out_items[r, n] = items[offsets[categories[i]] + np.int64(v * opened[i])]
