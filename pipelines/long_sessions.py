"""Very long sessions, read as several rows of the log so that no batch must hold them whole.

A session of more than `PIECES_PER_SLICE` pieces (data.max_session_events each) becomes slices of so
many pieces. A slice is a row of the stream like any other: steps, plans and positions count it, and
the pieces are those of the session read whole. How many slices a session has is a function of its
number of events alone, so that all ranks, and a run that resumes, agree on the rows.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.history import Ints
from pipelines.location import Location
from pipelines.reader import Block, open_parquet
from pipelines.schema import EVENT_ITEM_ID, EVENTS

PIECES_PER_SLICE = 16


def events_per_slice(max_session_events: int) -> int:
    """Return how many events of a session a row holds at most."""
    return PIECES_PER_SLICE * max_session_events


def read_slices(path: Location, most_events: int, longest: int | None) -> Ints | None:
    """Return (n,) the rows that each session is read as; None if each is one.

    A session whose length cannot be read is one row.

    Args:
        path: Parquet file of sessions.
        most_events: of a row.
        longest: events of the longest session, if the manifest says it: no file is read then for
            logs without long sessions.

    Raises:
        ValueError: if the file cannot be opened.
    """
    if longest is not None and longest <= most_events:
        return None
    parts = []
    with open_parquet(path) as file:
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        items = [p.startswith(f"{EVENTS}.") and p.endswith(f".{EVENT_ITEM_ID}") for p in leaves]
        leaf = items.index(True)
        for group in range(file.num_row_groups):
            described = file.metadata.row_group(group)
            slices = np.ones(described.num_rows, np.int64)
            # Every session has a value, so that the longest has at most the others.
            if described.column(leaf).num_values - described.num_rows + 1 > most_events:
                slices = _slices_of(file, group, leaves[leaf], most_events, slices)
            parts.append(slices)
    every = np.concatenate([np.empty(0, np.int64), *parts])
    return every if (every > 1).any() else None


def _slices_of(file: pq.ParquetFile, group: int, leaf: str, most_events: int, one: Ints) -> Ints:
    try:
        table = file.read_row_group(group, columns=[leaf], use_threads=False)
    except (pa.ArrowException, OSError):
        return one
    lengths = pc.list_value_length(table[EVENTS]).fill_null(0).to_numpy().astype(np.int64)
    slices: Ints = np.maximum(one, -(-lengths // most_events))
    return slices


def in_slices(block: Block, slices: Ints, most_events: int, skip: int = 0) -> Block:
    """Return a block whose rows are slices.

    Args:
        block: of whole sessions.
        slices: (n,) rows of each.
        most_events: of a row.
        skip: slices of the first session that are left out.
    """
    sessions = block.sessions
    row = np.repeat(np.arange(len(slices)), slices)
    number = np.arange(len(row)) - np.repeat(np.cumsum(slices) - slices, slices)
    begin = sessions.offsets[:-1][row] + number * most_events
    begin = np.minimum(begin, sessions.offsets[1:][row])  # of what cannot be read there are none
    offsets = np.append(begin, sessions.offsets[-1])
    row = row[skip:]
    return replace(
        block,
        file_rows=block.first_row + row,
        frontier=None if block.frontier is None else block.frontier[row],
        sessions=sessions._replace(
            user_id=sessions.user_id[row],
            session_id=sessions.session_id[row],
            start_ts=sessions.start_ts[row],
            offsets=offsets[skip:],
            reason=sessions.reason[row],
            context=sessions.context[row],
            first_piece=number[skip:] * PIECES_PER_SLICE,
        ),
    )
