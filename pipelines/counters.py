"""Counts of past events: the hand-made features of models that read no sequence."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pipelines.config import CounterConfig

if TYPE_CHECKING:
    import ibis.expr.types as ir

_DAY_US = 86_400_000_000


def counter_names(prefix: str, counter: CounterConfig) -> list[str]:
    """Return the names of the columns that a counter adds, in the order of `counter_columns`."""
    return [
        f"{prefix}_count",
        *(f"{prefix}_{action}" for action in counter.actions),
        *(f"{prefix}_known_{action}" for action in counter.known),
    ]


def counter_columns(
    events: "ir.Table",
    counter: CounterConfig,
    *,
    keys: Mapping[str, str],
    actions: Mapping[str, str],
) -> "Iterator[ir.FloatingColumn]":
    """Yield the columns of a counter as they stood strictly before each event's time.

    Of an event at time t, the past events are those with equal keys and a time within
    [t - days, t), or before t if days is 0; other events of the same time are not among them.

    Args:
        events: Ibis table with `time` (int64 us).
        counter: what is counted.
        keys: column as the configuration names it -> column of `events`.
        actions: likewise for the actions.

    Yields:
        float32 columns, null where a key is null: the count of past events; for each action the sum
        of its known values (0 if there is none); for each action of `known` the count of events
        that know it.
    """
    import ibis

    columns = [events[keys[name]] for name in counter.keys]
    earliest = counter.days * _DAY_US if counter.days else None
    past = ibis.range_window(preceding=(earliest, 1), group_by=columns, order_by=events["time"])
    has_keys = ibis.and_(*(column.notnull() for column in columns))
    counts = [events.count().over(past)]
    for name in counter.actions:
        counts.append(events[actions[name]].cast("float64").sum().over(past).fill_null(0))
    for name in counter.known:
        counts.append(events[actions[name]].count().over(past))
    for count in counts:
        yield has_keys.ifelse(count, ibis.null()).cast("float32")
