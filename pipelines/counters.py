"""Counts of past events: the hand-made features of models that read no sequence."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pipelines.config import CounterConfig

if TYPE_CHECKING:
    import ibis.expr.types as ir

_DAY_US = 86_400_000_000


def counter_names(prefix: str, counter: CounterConfig) -> list[str]:
    """Return the names of the columns that a counter adds."""
    return [
        f"{prefix}_count",
        *(f"{prefix}_{action}" for action in counter.actions),
        *(f"{prefix}_known_{action}" for action in counter.known),
    ]


def with_counters(
    events: "ir.Table",
    counters: Mapping[str, CounterConfig],
    *,
    columns: Mapping[str, str],
    place: Sequence[str],
    prefix: str,
) -> "ir.Table":
    """Return `events` with the columns of each counter as they stood strictly before each event.

    Of an event at time t, the past events are those with equal keys and a time within
    [t - days, t), or before t if days is 0; other events of the same time are not among them.
    Columns are float32, null where a key is null: the count of past events; for each action the sum
    of its known values (0 if there is none); for each of `known` the count of those that know it.

    Args:
        events: Ibis table with `time` (int64 us).
        counters: prefix -> what is counted.
        columns: column as a counter names it -> column of `events`.
        place: columns that order all events, `time` first.
        prefix: of the names of the new columns.
    """
    import ibis

    running = {}
    for name, counter in counters.items():
        keys = [events[columns[key]] for key in counter.keys]
        if counter.days:
            past = ibis.range_window(
                preceding=(counter.days * _DAY_US, 1), group_by=keys, order_by=events["time"]
            )
        else:
            # Rows before this one: a range that ends before this time took DuckDB 4 times as long.
            past = ibis.window(rows=(None, -1), group_by=keys, order_by=list(place))
        totals = _totals(events, counter, columns)
        for new, total in zip(counter_names(name, counter), totals, strict=True):
            running[prefix + new] = total.over(past).fill_null(0).cast("float64")
    events = events.mutate(**running)
    exact = {}
    for name, counter in counters.items():
        keys = [events[columns[key]] for key in counter.keys]
        # The first event of a time has no other event of that time before it.
        same_time = ibis.window(group_by=[*keys, events["time"]], order_by=list(place))
        has_keys = ibis.and_(*(key.notnull() for key in keys))
        for new in counter_names(name, counter):
            total = events[prefix + new]
            total = total if counter.days else total.first().over(same_time)
            exact[prefix + new] = has_keys.ifelse(total, ibis.null()).cast("float32")
    return events.mutate(**exact)


def _totals(
    events: "ir.Table", counter: CounterConfig, columns: Mapping[str, str]
) -> "Iterator[ir.NumericScalar]":
    """Yield what is summed, in the order of `counter_names`."""
    yield events.count()
    for action in counter.actions:
        yield events[columns[action]].cast("float64").sum()
    for action in counter.known:
        yield events[columns[action]].count()
