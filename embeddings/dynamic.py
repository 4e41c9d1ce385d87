"""Tables whose ids come and go: raw ids to rows on the device, on all ranks alike.

Letters: T dynamic tables, R ranks, E rows of a table, n values of a batch, D width of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import EmbeddingsConfig
from embeddings.id_map import Changes, IdMap
from embeddings.initial import rows_of_ids
from embeddings.memory import map_bytes
from embeddings.tables import Tables
from embeddings.vocabulary import UNKNOWN_ID

_BEFORE_ANY = -(2**62)


@dataclass(frozen=True)
class Sightings:
    """What one batch of a rank shows of the ids of dynamic tables, by table."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    """(n,) int64 rows that were looked up, 0 for an id without one."""
    num_ids: dict[str, int] = field(default_factory=dict)
    """Values looked up, the unknown id too."""
    num_unknown: dict[str, Tensor] = field(default_factory=dict)
    """() int64: those of `num_ids` whose id is known, but has no row."""
    new_ids: dict[str, Tensor] = field(default_factory=dict)
    """(m,) int64 ids without a row that events have, once an event."""


class DynamicVocabulary:
    """Maps raw ids to rows, and lets ids come and go, for the tables with `ids: dynamic`.

    Each rank holds the whole map, of 24 bytes a row (32 with ttl_days), on its device. So an id
    finds its row without asking other ranks, and a checkpoint fits any number of them. A step sends
    only the ids that have no row yet; when ids lose their rows, ranks exchange which they used.

    In a step: `map` the batch, `observe` what was mapped, and after the update of the tables
    `apply`. Only then have new ids their row: a batch is scored and learnt from with the vocabulary
    that the batches before it made.

    Args:
        config: the tables.
        device: of the maps; that of the batches.
        seed: of the rows of new ids.
        drawn: features whose values are random numbers >= 0 that stand for any id in use
            (negatives), not ids.
        process_group: ranks that train together; None means the default group, if there is one.
    """

    def __init__(
        self,
        config: EmbeddingsConfig,
        *,
        device: torch.device,
        seed: int,
        drawn: tuple[str, ...] = (),
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.seed = seed
        self.drawn = drawn
        self.group = process_group
        self.maps = {
            name: IdMap(table, device)
            for name, table in config.tables.items()
            if table.ids == "dynamic"
        }
        self.table_of = {f: name for name in self.maps for f in config.tables[name].features}
        self._changes: dict[str, Changes] = {}
        # Lookups since the last metrics, and those without a row.
        self._lookups = {name: [0, 0] for name in self.maps}

    def map(
        self, ids: KeyedJaggedTensor, is_event: Mapping[str, Tensor]
    ) -> tuple[KeyedJaggedTensor, Sightings]:
        """Return `ids` with rows in the place of the ids of dynamic tables, and what it shows.

        Args:
            ids: by feature, on the device; those of other tables are rows already.
            is_event: feature -> (n,) bool: values that count towards a row of their id. Those of
                other features do not; they still keep a row in use.
        """
        if not self.maps:
            return ids, Sightings()
        bounds, values = ids.offset_per_key(), ids.values()
        rows = values.clone()
        parts: dict[str, list[tuple[Tensor, Tensor, Tensor | None]]] = {n: [] for n in self.maps}
        for i, feature in enumerate(ids.keys()):
            if feature not in self.table_of:
                continue
            name = self.table_of[feature]
            part = slice(bounds[i], bounds[i + 1])
            if feature in self.drawn:
                rows[part] = self.maps[name].draw(values[part])
                continue
            rows[part] = self.maps[name].rows_of(values[part])
            parts[name].append((values[part], rows[part], is_event.get(feature)))
        mapped = KeyedJaggedTensor(
            keys=ids.keys(),
            values=rows,
            lengths=ids.lengths(),
            stride=ids.stride(),
            offset_per_key=bounds,
        )
        return mapped, _sightings(parts, rows[:0])

    def observe(self, seen: Sightings, *, step: int, time: int | None) -> None:
        """Take note of a batch, on all ranks alike.

        Args:
            seen: of this rank's share, from `map`; all of `map` came after the last `observe`.
            step: of the batch, ascending.
            time: of this rank's share, s; None of an empty one.
        """
        if not self.maps:
            return
        own = {name: torch.unique(seen.new_ids[name], return_counts=True) for name in self.maps}
        header = [[_BEFORE_ANY if time is None else time, 0, 0]]
        unknown = torch.stack([seen.num_unknown[name] for name in self.maps]).tolist()
        for (name, (ids, _)), num_unknown in zip(own.items(), unknown, strict=True):
            header.append([ids.numel(), seen.num_ids[name], num_unknown])
        headers = self._gather(torch.tensor(header, device=self.device))
        counts = headers.tolist()
        latest = max(rank[0][0] for rank in counts)
        sizes = [[table[0] for table in rank[1:]] for rank in counts]
        pairs = self._exchange(own, sizes)
        for i, (name, id_map) in enumerate(self.maps.items()):
            self._lookups[name][0] += sum(rank[i + 1][1] for rank in counts)
            self._lookups[name][1] += sum(rank[i + 1][2] for rank in counts)
            self._changes[name] = id_map.observe(
                seen.rows[name], *pairs[name], step=step, time=latest, sync=self._maximum
            )

    def apply(self, tables: Tables) -> None:
        """Give new ids their first row, without moments, and clear the rows that ids have lost.

        The row of an id is drawn from (seed, table, id). After the update with the batch that
        `observe` took note of, on all ranks alike.
        """
        for name, changes in self._changes.items():
            table = self.config.tables[name]
            if changes.freed.numel():
                tables.set_rows(
                    name, changes.freed, torch.zeros(len(changes.freed), table.dim).to(self.device)
                )
            if changes.rows.numel():
                drawn = rows_of_ids(table, changes.ids, table=name, seed=self.seed)
                tables.set_rows(name, changes.rows, drawn)
        self._changes = {}

    def changed_rows(self, table: str) -> Tensor:
        """Return the rows that `apply` is about to set, int64, repeats allowed."""
        changes = self._changes[table]
        return torch.cat([changes.freed, changes.rows])

    def is_used(self, table: str) -> Tensor:
        """Return (E,) bool: the rows of a dynamic table that stand for an id."""
        return self.maps[table].is_used()

    def ids(self, table: str) -> Tensor:
        """Return (E,) int64 raw ids of the rows of a dynamic table, else UNKNOWN_ID."""
        id_map = self.maps[table]
        return id_map.id_E.where(id_map.is_used(), UNKNOWN_ID)

    def summary(self) -> str:
        """Return one line a dynamic table: what its map takes, and when ids come and go."""
        lines = []
        for name in self.maps:
            table = self.config.tables[name]
            rules = [f"a row after {table.dynamic.admit_after} event(s)"]
            if table.dynamic.ttl_days:
                rules.append(f"none after {table.dynamic.ttl_days:g} days without a lookup")
            rules.append(f"when full: {table.dynamic.when_full}")
            lines.append(
                f"{name}: dynamic ids, {', '.join(rules)}; map of {map_bytes(table):,} bytes on "
                "every rank"
            )
        return "\n".join(lines)

    def take_metrics(self) -> dict[str, float]:
        """Return what became of the ids, over all ranks.

        Totals of the run, but for `occupancy` (share of the rows in use) and `unknown` (share of
        the known ids looked up since the last call that had no row).
        """
        metrics: dict[str, float] = {}
        for name, id_map in self.maps.items():
            lookups, unknown = self._lookups[name]
            self._lookups[name] = [0, 0]
            values = {
                "admitted": id_map.admitted,
                "evicted": id_map.evicted,
                "expired": id_map.expired,
                "refused": id_map.refused,
                "forgotten": id_map.forgotten,
                "waiting": len(id_map.waiting),
                "occupancy": id_map.num_used / (id_map.num_rows - 1),
                "unknown": unknown / max(lookups, 1),
            }
            metrics |= {f"vocabulary/{name}/{key}": value for key, value in values.items()}
        return metrics

    def checkpoint_state(self) -> dict[str, dict[str, Tensor]]:
        """Return the maps, alike on all ranks, to be saved or loaded in place. On all ranks."""
        state = {}
        for name, id_map in self.maps.items():
            id_map.synchronise(self._maximum)
            state[name] = {**id_map.state(), "lookups": torch.tensor(self._lookups[name])}
        return state

    def load_checkpoint_state(self, state: Mapping[str, dict[str, Tensor]]) -> None:
        """Take over a state that `checkpoint_state` returned and a loader filled."""
        for name, id_map in self.maps.items():
            id_map.load_state(state[name])
            self._lookups[name] = state[name]["lookups"].tolist()

    def _exchange(
        self, own: dict[str, tuple[Tensor, Tensor]], sizes: list[list[int]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the distinct new ids of all ranks, ascending, and their events, by table."""
        if len(sizes) == 1:
            return own
        longest = max(sum(rank) for rank in sizes)
        sent = torch.zeros(longest, 2, dtype=torch.int64, device=self.device)
        torch.cat(
            [torch.stack(pair, 1) for pair in own.values()], out=sent[: sum(sizes[self._rank()])]
        )
        parts = [
            part[: sum(rank)].split(rank)
            for part, rank in zip(self._gather(sent), sizes, strict=True)
        ]
        merged = {}
        for name, lots in zip(own, zip(*parts, strict=True), strict=True):
            ids, counts = torch.cat(lots).unbind(1)
            distinct, place = torch.unique(ids, return_inverse=True)
            merged[name] = (distinct, torch.zeros_like(distinct).index_add_(0, place, counts))
        return merged

    def _gather(self, x: Tensor) -> Tensor:
        """Return (R, *x.shape): `x` of each rank."""
        size = self._size()
        if size == 1:
            return x[None]
        gathered = x.new_empty(size * len(x), *x.shape[1:])
        if x.numel():
            dist.all_gather_into_tensor(gathered, x, group=self.group)
        return gathered.view(size, *x.shape)

    def _maximum(self, x: Tensor) -> None:
        if self._size() > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)

    def _size(self) -> int:
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    def _rank(self) -> int:
        return dist.get_rank(self.group) if dist.is_initialized() else 0


def _sightings(
    parts: Mapping[str, list[tuple[Tensor, Tensor, Tensor | None]]], nothing: Tensor
) -> Sightings:
    seen = Sightings()
    for name, lots in parts.items():
        new, num_unknown = [nothing], nothing.new_zeros(())
        for ids, rows, is_event in lots:
            is_unknown = (rows == 0) & (ids != UNKNOWN_ID)
            num_unknown = num_unknown + is_unknown.sum()
            if is_event is not None:
                new.append(ids[is_unknown & is_event])
        seen.rows[name] = torch.cat([nothing, *(rows for _, rows, _ in lots)])
        seen.num_ids[name] = sum(ids.numel() for ids, _, _ in lots)
        seen.num_unknown[name] = num_unknown
        seen.new_ids[name] = torch.cat(new)
    return seen
