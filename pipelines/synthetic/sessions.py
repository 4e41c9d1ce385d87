"""Sessions as flat arrays, and as Arrow tables of a session-end log or an event log."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.schema import EVENT_ITEM_ID, EVENT_TIMESTAMP, EVENTS

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sessions:
    """S sessions with E events in all."""

    user_id: Ints
    """(S,)."""
    session_id: Ints
    """(S,)."""
    offsets: Ints
    """(S + 1,): events of session s are offsets[s] .. offsets[s + 1] - 1."""
    item_id: Ints
    """(E,)."""
    timestamp: Ints
    """(E,) s, ascending within a session."""
    columns: dict[str, NDArray[Any]]
    """Name -> (E,): actions and features."""

    def as_log(self, schema: pa.Schema) -> pa.Table:
        """Return one row a session; `schema` is that of a session-end log without context."""
        values = {EVENT_ITEM_ID: self.item_id, EVENT_TIMESTAMP: self.timestamp, **self.columns}
        kind = schema.field(EVENTS).type
        events = pa.StructArray.from_arrays(
            [pa.array(values[leaf.name], leaf.type) for leaf in kind.value_type],
            fields=list(kind.value_type),
        )
        columns = [
            pa.array(self.user_id),
            pa.array(self.session_id),
            pa.array(self.timestamp[self.offsets[:-1]]),
            pa.array(self.timestamp[self.offsets[1:] - 1]),
            pa.ListArray.from_arrays(pa.array(self.offsets.astype(np.int32)), events, type=kind),
        ]
        return pa.Table.from_arrays(columns, schema=schema)

    def as_events(self) -> pa.Table:
        """Return one row an event: user_id, item_id, timestamp and the columns."""
        values = {
            "user_id": np.repeat(self.user_id, np.diff(self.offsets)),
            "item_id": self.item_id,
            "timestamp": self.timestamp,
            **self.columns,
        }
        return pa.table(values)
