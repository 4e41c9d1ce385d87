"""A session-end log of sequences whose lengths are given, for benchmarks of training."""

from pathlib import Path

import numpy as np

from pipelines.history import Ints
from pipelines.manifest import Manifest, PartitionFile, log_schema, write_manifest
from pipelines.portable_hash import partition_of
from pipelines.schema import history_name, part_name
from pipelines.session_writer import WrittenFiles, check_file, write_sessions
from pipelines.synthetic.sessions import Sessions

ACTIONS = {"like": "bool", "share": "bool"}
"""Three in ten events are liked; none is shared."""
START = 1_700_000_000
ITEM_EXPONENT = 1.05
"""Of the popularity of items, by their rank: that of a large log."""


def zipf_lengths(count: int, exponent: float, longest: int, seed: int = 0) -> Ints:
    """Return (count,) lengths: Zipf's law, all that is above `longest` taken as `longest`."""
    drawn: Ints = np.random.default_rng(seed).zipf(exponent, count)
    return np.minimum(drawn, longest)


def write_bench_log(
    folder: Path, tokens: Ints, *, partitions: int, num_items: int, seed: int = 0
) -> None:
    """Write one session of one event for each sequence, all before it as its user's history.

    Args:
        folder: new.
        tokens: (S,) tokens of each sequence in the interleaved layout, two an event; S is a
            multiple of `partitions`. Sequence s is the (s // partitions)th of partition
            s % partitions.
        partitions: of the log.
        num_items: ids are 0 .. num_items - 1.
        seed: of items and actions.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    schema = log_schema(ACTIONS, {}, {})
    rounds = len(tokens) // partitions
    users = _users(partitions, rounds)
    log, past = WrittenFiles(), WrittenFiles()
    parts: list[PartitionFile] = []
    histories: list[PartitionFile] = []
    for p in range(partitions):
        before = np.maximum(tokens[p::partitions] // 2 - 1, 0)
        end = START + np.arange(rounds)
        for name, written, files, session_id, num_events, first in (
            (history_name(p), past, histories, -1, before, START - 10_000),
            (part_name(p), log, parts, 0, np.ones_like(before), end),
        ):
            order = np.argsort(num_events, kind="stable")  # histories end in this order
            sessions = _sessions(
                users[p][order], session_id, num_events[order], first, num_items, rng
            )
            write_sessions(iter([sessions.as_log(schema)]), folder / name, schema)
            files.append(check_file(folder / name, p, partitions, 0, written))
    write_manifest(
        Manifest(
            folder=folder,
            partitions=partitions,
            partition_seed=0,
            timezone="UTC",
            actions=ACTIONS,
            features={},
            context={},
            parts=tuple(parts),
            histories=tuple(histories),
            start_ts=log.start_ts,
            end_ts=log.end_ts,
            num_rows_read=sum(file.num_events for file in (*parts, *histories)),
            num_duplicates=0,
            rejects={},
            nulls=dict.fromkeys(("item_id", "timestamp", *ACTIONS), 0),
            config={},
        )
    )


def _sessions(
    user_id: Ints,
    session_id: int,
    num_events: Ints,
    first: Ints | int,
    num_items: int,
    rng: np.random.Generator,
) -> Sessions:
    has_any = num_events > 0
    user_id, num_events = user_id[has_any], num_events[has_any]
    offsets = np.concatenate([[0], np.cumsum(num_events)])
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], num_events)
    starts = np.broadcast_to(first, has_any.shape)[has_any]
    return Sessions(
        user_id=user_id,
        session_id=np.full(len(user_id), session_id),
        offsets=offsets,
        item_id=_items(int(offsets[-1]), num_items, rng),
        timestamp=np.repeat(starts, num_events) + place,
        columns={
            "like": rng.random(len(place)) < 0.3,
            "share": np.zeros(len(place), bool),
        },
    )


def _items(count: int, num_items: int, rng: np.random.Generator) -> Ints:
    """Return (count,) ids; popularity falls as a power of the rank, ranks are spread over ids."""
    power = 1 - ITEM_EXPONENT
    rank = ((num_items**power - 1) * rng.random(count) + 1) ** (1 / power) - 1
    spread: Ints = np.minimum(rank, num_items - 1).astype(np.int64) * 2_654_435_761 % num_items
    return spread


def _users(partitions: int, count: int) -> list[Ints]:
    """Return `count` user ids of each partition."""
    candidates = np.arange(2 * partitions * count + 1000 * partitions)
    owner = partition_of(candidates, 0, partitions)
    return [candidates[owner == p][:count] for p in range(partitions)]
