"""Which rows of one table which ids have, and how that changes as batches come.

Letters: E rows of the table, n ids with a row, m ids of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from embeddings.config import TableConfig
from embeddings.hashing import hash_ids
from embeddings.sorted_ids import MISSING, SortedIds

FREE = -1
"""Last step of a row that no id has; row 0, of unknown ids, always has it."""
EVICTED_SHARE = 64
"""A full table frees one row in so many at once: the order of all rows is found that much less
often."""
FORGOTTEN_SHARE = 8
"""Likewise, of the ids that wait."""
SECONDS_A_DAY = 86_400
SWEEPS_A_TTL = 64
"""How often, within the time after which ids lose their rows, it is looked for such ids."""

Sync = Callable[[Tensor], None]
"""Takes, in place, the maximum over ranks."""


@dataclass(frozen=True)
class Changes:
    """What a batch changed: rows to be set anew."""

    freed: Tensor
    """(f,) int64 rows whose id is gone; some may be among `rows`."""
    rows: Tensor
    """(a,) int64 rows of new ids."""
    ids: Tensor
    """(a,) int64 the new ids."""


class IdMap:
    """A row of its own for each id in use.

    After a batch (`observe`), on every rank alike:

    1. Rows that it looked up are marked with its step and time.
    2. Where a time-out is due, ids not looked up for ttl_days lose their rows.
    3. Events of ids without a row are counted; an id with admit_after of them is due.
    4. The due ids get rows, those with most events first. If rows are lacking, the ids looked up
       longest ago lose theirs, never those of this batch.

    Ties go by `hash_ids`. So the map is a function of the global batches alone: neither the order
    within a batch nor the number of ranks enters.

    Args:
        table: its `dynamic` says when ids come and go.
        device: of all tensors.

    Attributes:
        id_E: (E,) int64: the id of each row, 0 where there is none.
        last_step_E: (E,) int32: last step whose batch looked the row up, FREE without an id. Of
            this rank's batches until `sync` is called.
        last_time_E: (E,) int64 s, likewise; (0,) without ttl_days.
        waiting: ids without a row, with their `count` of events and the `step` of the last one.
        now: latest time seen, s.
        admitted, evicted, expired: ids that got a row; lost it since the table was full; since they
            were not looked up for too long.
        refused: due ids that found no row, counted each time.
        forgotten: ids that waited, dropped since too many did.
    """

    def __init__(self, table: TableConfig, device: torch.device) -> None:
        self.config = table.dynamic
        self.num_rows = table.num_embeddings
        self.max_waiting = 0
        if self.config.admit_after > 1:
            self.max_waiting = self.config.max_waiting or self.num_rows
        self.ttl = round(self.config.ttl_days * SECONDS_A_DAY)
        self.device = device
        self.id_E = torch.zeros(self.num_rows, dtype=torch.int64, device=device)
        self.last_step_E = torch.full_like(self.id_E, FREE, dtype=torch.int32)
        self.last_time_E = torch.zeros_like(self.id_E[: self.num_rows if self.ttl else 0])
        self.index = SortedIds({"row": torch.int32}, device)
        self.waiting = SortedIds({"count": torch.int64, "step": torch.int64}, device)
        self.now = self.swept = 0
        self.admitted = self.evicted = self.expired = self.refused = self.forgotten = 0

    @property
    def num_used(self) -> int:
        """Rows that have an id."""
        return len(self.index)

    def rows_of(self, ids_m: Tensor) -> Tensor:
        """Return (m,) int64: the row of each id, 0 where it has none."""
        place_m = self.index.find(ids_m)
        if not len(self.index):
            return torch.zeros_like(place_m)
        row_m = self.index.columns["row"][place_m.clamp_min(0)].long()
        return row_m.where(place_m != MISSING, 0)

    def draw(self, numbers_m: Tensor) -> Tensor:
        """Return (m,) int64: a used row for each of some random numbers >= 0; 0 without any."""
        if not len(self.index):
            return torch.zeros_like(numbers_m)
        return self.index.columns["row"][numbers_m % len(self.index)].long()

    def is_used(self) -> Tensor:
        """Return (E,) bool: which rows have an id."""
        return self.last_step_E != FREE

    def observe(
        self, rows: Tensor, ids_m: Tensor, count_m: Tensor, *, step: int, time: int, sync: Sync
    ) -> Changes:
        """Take note of a batch.

        Args:
            rows: rows that this rank looked up, int64, repeats and 0 allowed.
            ids_m: ids without a row that events of the global batch have, distinct and ascending.
            count_m: int64: those events.
            step: of the batch, ascending, below 2^31.
            time: of the batch, s.
            sync: called on all ranks or none.
        """
        self.now = max(self.now, time)
        self._mark(rows, step)
        freed = [self._expire(sync)]
        due = self._count(ids_m, count_m, step)
        lacking = len(due[0]) - (self.num_rows - 1 - self.num_used)
        if lacking > 0 and self.config.when_full == "evict":
            freed.append(self._evict(lacking, step, sync))
        rows, ids = self._admit(*due, step)
        self._forget()
        return Changes(torch.cat(freed), rows, ids)

    def synchronise(self, sync: Sync) -> None:
        """Let this rank's marks be those of all ranks."""
        sync(self.last_step_E)
        if self.ttl:
            sync(self.last_time_E)

    def state(self) -> dict[str, Tensor]:
        """Return tensors of fixed shapes; `load_state` takes them on any number of ranks."""
        waiting = {
            "ids": self.waiting.ids,
            "count": self.waiting.columns["count"],
            "step": self.waiting.columns["step"],
        }
        counters = [getattr(self, name) for name in COUNTERS]
        return {
            "id": self.id_E,
            "last_step": self.last_step_E,
            **({"last_time": self.last_time_E} if self.ttl else {}),
            **{
                f"waiting_{name}": self._padded(x)
                for name, x in waiting.items()
                if self.max_waiting
            },
            "counters": torch.tensor(counters),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned."""
        self.id_E.copy_(state["id"])
        self.last_step_E.copy_(state["last_step"])
        if self.ttl:
            self.last_time_E.copy_(state["last_time"])
        row_n = self.is_used().nonzero()[:, 0]
        ids_n, order = self.id_E[row_n].sort()
        self.index = SortedIds({"row": torch.int32}, self.device)
        self.index.insert(ids_n, {"row": row_n[order]})
        self.waiting.keep(torch.zeros(len(self.waiting), dtype=torch.bool, device=self.device))
        if self.max_waiting:
            ids, count, step = (
                state[f"waiting_{name}"].to(self.device) for name in ("ids", "count", "step")
            )
            is_there = count > 0
            self.waiting.insert(ids[is_there], {"count": count[is_there], "step": step[is_there]})
        for name, value in zip(COUNTERS, state["counters"].tolist(), strict=True):
            setattr(self, name, value)

    def _mark(self, rows: Tensor, step: int) -> None:
        self.last_step_E.index_fill_(0, rows, step)
        self.last_step_E[0] = FREE
        if self.ttl:
            self.last_time_E.index_fill_(0, rows, self.now)

    def _expire(self, sync: Sync) -> Tensor:
        if not self.ttl or self.now - self.swept < self.ttl // SWEEPS_A_TTL:
            return self.id_E[:0]
        self.swept = self.now
        sync(self.last_time_E)
        is_old_n = self.last_time_E[self.index.columns["row"].long()] < self.now - self.ttl
        rows = self._remove(is_old_n)
        self.expired += len(rows)
        return rows

    def _evict(self, lacking: int, step: int, sync: Sync) -> Tensor:
        sync(self.last_step_E)
        step_n = self.last_step_E[self.index.columns["row"].long()].long()
        # Distinct but for collisions of 32 bits, which the order of the ids then decides.
        order_n = _by_step(step_n, self.index.ids).argsort(stable=True)
        num = min(max(lacking, self.num_rows // EVICTED_SHARE), int((step_n < step).sum()))
        is_old_n = torch.zeros_like(order_n, dtype=torch.bool)
        is_old_n[order_n[:num]] = True
        rows = self._remove(is_old_n)
        self.evicted += len(rows)
        return rows

    def _remove(self, gone_n: Tensor) -> Tensor:
        rows = self.index.columns["row"][gone_n].long()
        if len(rows):
            self.index.keep(~gone_n)
            self.last_step_E[rows] = FREE
            self.id_E[rows] = 0
        return rows

    def _count(self, ids_m: Tensor, count_m: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the ids that are due, ascending, and their events."""
        if self.config.admit_after == 1:
            return ids_m, count_m
        place_m = self.waiting.find(ids_m)
        is_there_m = place_m != MISSING
        place, columns = place_m[is_there_m], self.waiting.columns
        columns["count"][place] += count_m[is_there_m]
        columns["step"][place] = step
        new_ids, new_count = ids_m[~is_there_m], count_m[~is_there_m]
        self.waiting.insert(new_ids, {"count": new_count, "step": torch.full_like(new_count, step)})
        is_due = self.waiting.columns["count"] >= self.config.admit_after
        return self.waiting.ids[is_due], self.waiting.columns["count"][is_due]

    def _admit(self, ids: Tensor, count: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return rows and ids of those that got one."""
        if not len(ids):
            return ids, ids
        free_rows = (self.last_step_E[1:] == FREE).nonzero()[:, 0] + 1
        if len(ids) > len(free_rows):
            self.refused += len(ids) - len(free_rows)
            by_hash = hash_ids(ids).argsort(stable=True)
            by_count = count[by_hash].argsort(stable=True, descending=True)
            ids = ids[by_hash[by_count][: len(free_rows)]].sort().values
        rows = free_rows[: len(ids)]
        self.admitted += len(ids)
        self.index.insert(ids, {"row": rows})
        self.id_E[rows] = ids
        self.last_step_E[rows] = step
        if self.ttl:
            self.last_time_E[rows] = self.now
        if len(self.waiting):
            still = torch.ones(len(self.waiting), dtype=torch.bool, device=self.device)
            still[self.waiting.find(ids)] = False
            self.waiting.keep(still)
        return rows, ids

    def _forget(self) -> None:
        excess = len(self.waiting) - self.max_waiting
        if excess <= 0:
            return
        num = max(excess, self.max_waiting // FORGOTTEN_SHARE)
        order = _by_step(self.waiting.columns["step"], self.waiting.ids).argsort(stable=True)
        still = torch.ones(len(self.waiting), dtype=torch.bool, device=self.device)
        still[order[:num]] = False
        self.waiting.keep(still)
        self.forgotten += num

    def _padded(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, self.max_waiting - len(x)))


COUNTERS = ("now", "swept", "admitted", "evicted", "expired", "refused", "forgotten")


def _by_step(step_n: Tensor, ids_n: Tensor) -> Tensor:
    """Return (n,) int64 keys that sort by step, then by hash."""
    return (step_n << 32) | (hash_ids(ids_n) >> 31)
