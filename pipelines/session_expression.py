"""Events to ordered rows of sessions: the Ibis expression of `sessionize`, step by step.

Columns on the way. raw_NAME: as read. reason: why the event is unusable, or null. user_id, item_id,
time (int64 us), order, source, file, row: what an event is and its place. event_NAME, context_NAME:
what goes into the log.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipelines import counters
from pipelines.config import JoinConfig, SessionizeConfig
from pipelines.event_log import Kind
from pipelines.portable_hash import partition_of, string_id_column
from pipelines.schema import END_TS, EVENT_TIMESTAMP, SESSION_ID, START_TS, USER_ID
from pipelines.session_writer import CONTEXT_PREFIX, EVENT_PREFIX, PARTITION

if TYPE_CHECKING:
    import ibis.expr.types as ir

# Rows of a file below 2^40, files below 2^23.
_ROW_BITS = 40
HISTORY, LOG = 0, 1
HISTORY_SESSION = -1

_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}
_US = 1_000_000
# Start of the year 10000: a later time is one in a finer unit than the configuration says.
_LAST_SECOND = 253_402_300_800
# Order of a user's events: by time, then as the user says, then as they lie in the files.
_PLACE = ("time", "order", "source", "file", "row")


def with_time_and_reason(
    rows: "ir.Table", config: SessionizeConfig, kinds: dict[str, Kind]
) -> "ir.Table":
    """Return `rows` with time, order and reason; the reason is null where the event is usable."""
    import ibis

    stamp = rows["raw_" + config.timestamp]
    unit = "us" if kinds[config.timestamp] == "timestamp" else config.timestamp_unit
    per_second = _PER_SECOND[unit]
    too_late = stamp >= _LAST_SECOND * per_second
    item = rows["raw_" + config.item_id]
    reasons = [
        (rows["raw_" + config.user_id].isnull(), f"{config.user_id} is null"),
        (item.isnull(), f"{config.item_id} is null"),
        (stamp.isnull(), f"{config.timestamp} is null"),
        (stamp < 0, f"{config.timestamp} is negative"),
        (too_late, f"{config.timestamp} is after the year 9999 in timestamp_unit={unit}"),
    ]
    if kinds[config.item_id] == "integer":
        reasons.append((item < 0, f"{config.item_id} is negative"))
    if config.session_id:
        unnamed = rows["raw_" + config.session_id].isnull() & (rows["source"] == LOG)
        reasons.append((unnamed, f"{config.session_id} is null"))
    order = rows["raw_" + config.order] if config.order else ibis.literal(0)
    return rows.mutate(
        # A time out of range would overflow; its row is rejected.
        time=too_late.ifelse(ibis.null(), stamp) * (_US // per_second),
        order=order,
        reason=ibis.cases(*reasons, else_=ibis.null("string")),
    )


def with_join(events: "ir.Table", join: JoinConfig, right: "ir.Table") -> "ir.Table":
    """Return `events` with the columns of a second table, null where it lacks the key.

    Args:
        events: has raw_KEY.
        join: key and columns.
        right: has raw_ columns; each key once.
    """
    key = "raw_" + (join.right_key or join.key)
    columns = {"raw_" + new: right["raw_" + old] for new, old in join.columns.items()}
    table = right.filter(right[key].notnull()).select(right_key=right[key], **columns)
    joined = events.left_join(table, events["raw_" + join.key] == table["right_key"])
    return joined.drop("right_key")


def with_ids(
    events: "ir.Table",
    config: SessionizeConfig,
    kinds: dict[str, Kind],
    event_columns: Sequence[str],
    context_columns: Sequence[str],
    hex_to_integer: "Callable[[ir.StringValue], ir.IntegerValue]",
) -> "ir.Table":
    """Return the columns that the log needs, strings as 64-bit ids."""

    def value(name: str) -> Any:
        column, kind = events["raw_" + name], kinds[name]
        if name in config.split:
            column, kind = column.split(config.split[name]), "strings"
            column = column.filter(lambda text: text != "")
        if kind == "strings":
            return column.map(lambda text: string_id_column(text, hex_to_integer))
        return string_id_column(column, hex_to_integer) if kind == "string" else column

    columns = {name: events[name] for name in _PLACE}
    columns["user_id"] = value(config.user_id)
    columns["item_id"] = value(config.item_id)
    if config.session_id:
        columns["named_session"] = value(config.session_id)
    columns.update({EVENT_PREFIX + name: value(name) for name in event_columns})
    columns.update({CONTEXT_PREFIX + name: value(name) for name in context_columns})
    return events.select(**columns)


def without_repeats(events: "ir.Table", config: SessionizeConfig) -> "ir.Table":
    """Return `events` less the rows that repeat an earlier one by the rule of config.duplicates."""
    import ibis

    if config.duplicates == "keep":
        return events
    same = ["source", "user_id", "item_id", "time"]
    if config.duplicates == "exact":
        same += [name for name in events.columns if name not in ("order", "file", "row", *same)]
        if not config.order:
            return _first_of_equals(events, same)
    earlier = ibis.row_number().over(group_by=same, order_by=["order", "file", "row"])
    numbered = events.mutate(repeat=earlier)
    return numbered.filter(numbered["repeat"] == 0).drop("repeat")


def _first_of_equals(events: "ir.Table", same: Sequence[str]) -> "ir.Table":
    """Return the first row by (file, row) of those that agree in all else; order is a constant.

    An aggregation took DuckDB a third of the time of a window's sort.
    """
    import ibis

    place = (events["file"] << _ROW_BITS) | events["row"]
    first = events.group_by(list(same)).agg(place=place.min())
    columns = {name: first[name] for name in same}
    columns["order"] = ibis.literal(0)
    columns["file"] = first["place"] >> _ROW_BITS
    columns["row"] = first["place"] & (2**_ROW_BITS - 1)
    return first.select(**{name: columns[name] for name in events.columns})


def in_partitions(events: "ir.Table", config: SessionizeConfig) -> "ir.Table":
    """Return the events of one source with their partition, as session_cutter reads them."""
    spent = ["source"] if config.order else ["source", "order"]
    partition = partition_of(events[USER_ID], config.partition_seed, config.partitions)
    return events.mutate(**{PARTITION: partition}).drop(*spent)


def from_partitions(rows: "ir.Table", config: SessionizeConfig, source: int) -> "ir.Table":
    """Return the events that rows of `in_partitions` stand for."""
    import ibis

    order = {} if config.order else {"order": ibis.literal(0)}
    return rows.mutate(source=ibis.literal(source), **order)


def with_counters(events: "ir.Table", config: SessionizeConfig) -> "ir.Table":
    """Return the events of the log with the columns of every counter; histories count as past."""
    log = events.filter(events["source"] == LOG)
    if not config.counters:
        return log
    named = [x for y in config.counters.values() for x in (*y.keys, *y.actions, *y.known)]
    columns = {name: EVENT_PREFIX + name for name in named}
    columns |= {config.user_id: "user_id", config.item_id: "item_id"}
    # Windows sort whole rows, so they get only the columns that they need.
    used = [columns[name] for name in named]
    counted = counters.with_counters(
        events.select(*dict.fromkeys((*_PLACE, *used))),
        config.counters,
        columns=columns,
        place=_PLACE,
        prefix=EVENT_PREFIX,
    )
    counted = counted.filter(counted["source"] == LOG)
    spent = dict.fromkeys(("source", "time", "order", *used))
    counted = counted.drop(*spent)
    return log.join(counted, ["file", "row"])


def in_sessions(events: "ir.Table", config: SessionizeConfig) -> "ir.Table":
    """Return `events` with session_id."""
    import ibis

    if config.session_id:
        return events.rename(session_id="named_session")
    # A user's sessions are numbered from 0 in order of time.
    silence = events["time"] - events["time"].lag().over(group_by="user_id", order_by=_PLACE)
    starts = (silence > config.gap_seconds * _US).ifelse(1, ibis.null())
    events = events.mutate(starts=starts)
    so_far = ibis.cumulative_window(group_by="user_id", order_by=_PLACE)
    # A count: sums of integers are 128 bits wide in DuckDB.
    return events.mutate(session_id=events["starts"].count().over(so_far)).drop("starts")


def without_counters(events: "ir.Table", config: SessionizeConfig) -> "ir.Table":
    """Return the events of the starting histories, counters null."""
    import ibis

    names = [name for x, y in config.counters.items() for name in counters.counter_names(x, y)]
    events = events.filter(events["source"] == HISTORY)
    return events.mutate(**{EVENT_PREFIX + name: ibis.null("float32") for name in names})


def as_histories(events: "ir.Table", config: SessionizeConfig) -> "ir.Table":
    """Return the events of the starting histories, one session a user."""
    import ibis

    return events.mutate(session_id=ibis.literal(HISTORY_SESSION, "int64"))


def in_order(events: "ir.Table", config: SessionizeConfig) -> "ir.Table":
    """Return events in the order in which the log holds them, as `write_partitions` reads them."""
    whole = {"group_by": [USER_ID, SESSION_ID]}
    # Ibis divides as floats, which is exact for whole seconds only.
    second = (events["time"] - events["time"] % _US) // _US
    events = events.mutate(
        **{
            PARTITION: partition_of(events[USER_ID], config.partition_seed, config.partitions),
            START_TS: second.min().over(**whole),
            END_TS: second.max().over(**whole),
            EVENT_PREFIX + "item_id": events["item_id"],
            EVENT_PREFIX + EVENT_TIMESTAMP: second,
        }
    )
    events = events.order_by([PARTITION, END_TS, USER_ID, SESSION_ID, *_PLACE])
    keep = [PARTITION, USER_ID, SESSION_ID, START_TS, END_TS]
    return events.select(
        *keep, *(x for x in events.columns if x.startswith((EVENT_PREFIX, CONTEXT_PREFIX)))
    )
