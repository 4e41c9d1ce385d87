"""The session-end log: one row a session, ordered by end_ts inside each of P partitions.

    user_id int64 | session_id int64 | start_ts int64 | end_ts int64 | context struct<...>
    | events list<struct<item_id int64, timestamp int64, ACTIONS..., FEATURES...>>

A folder holds manifest.json, part-00000.parquet ... (the log) and, where users start with a
history, history-00000.parquet ... (one row a user, same schema, session_id -1, never supervised).
"""

from collections.abc import Iterable

import pyarrow as pa

USER_ID = "user_id"
SESSION_ID = "session_id"
START_TS = "start_ts"
END_TS = "end_ts"
CONTEXT = "context"
EVENTS = "events"
EVENT_ITEM_ID = "item_id"
EVENT_TIMESTAMP = "timestamp"

MANIFEST = "manifest.json"


def part_name(partition: int) -> str:
    """Return the file name of a partition of the log."""
    return f"part-{partition:05d}.parquet"


def history_name(partition: int) -> str:
    """Return the file name of a partition of the starting histories."""
    return f"history-{partition:05d}.parquet"


def session_schema(
    *,
    actions: Iterable[tuple[str, pa.DataType]],
    features: Iterable[tuple[str, pa.DataType]] = (),
    context: Iterable[tuple[str, pa.DataType]] = (),
) -> pa.Schema:
    """Return the Arrow schema of a session-end log.

    Args:
        actions: name and type of each action column of an event.
        features: name and type of each further column of an event.
        context: name and type of each column of the session's context.
    """
    event = pa.struct(
        [
            pa.field(EVENT_ITEM_ID, pa.int64()),
            pa.field(EVENT_TIMESTAMP, pa.int64()),
            *(pa.field(name, kind) for name, kind in actions),
            *(pa.field(name, kind) for name, kind in features),
        ]
    )
    return pa.schema(
        [
            pa.field(USER_ID, pa.int64()),
            pa.field(SESSION_ID, pa.int64()),
            pa.field(START_TS, pa.int64()),
            pa.field(END_TS, pa.int64()),
            pa.field(CONTEXT, pa.struct([pa.field(name, kind) for name, kind in context])),
            pa.field(EVENTS, pa.list_(event)),
        ]
    )
