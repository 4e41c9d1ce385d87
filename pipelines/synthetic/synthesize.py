"""A synthetic stream to a session-end log or an event log.

Every draw is keyed by (seed, purpose, user, step), so a file can be made without the others:
partitions are written side by side, each in constant memory, and neither chunk size nor threads
change a byte.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numba import njit

from pipelines.event_log_writer import (
    EVENTS_FOLDER,
    HISTORY_FOLDER,
    SUMMARY,
    is_event_log,
    write_events,
    write_summary,
)
from pipelines.location import locate
from pipelines.manifest import Manifest, PartitionFile, log_schema, write_manifest
from pipelines.output_folder import check_output, new_folder
from pipelines.portable_hash import partition_of
from pipelines.schema import MANIFEST, history_name, part_name
from pipelines.session_writer import WrittenFiles, check_file, write_sessions
from pipelines.synthetic import dirichlet, polya_urn
from pipelines.synthetic.config import SyntheticConfig
from pipelines.synthetic.sessions import Ints, Sessions

_USERS_PER_BLOCK = 1 << 20
_partition_of = njit(inline="always")(partition_of)


class Stream(Protocol):
    """What makes sessions."""

    num_users: int
    """User ids are 0 .. num_users - 1."""

    def sessions(self, users: Iterable[Ints], chunk_events: int) -> Iterator[Sessions]:
        """Yield the sessions of users (blocks of ascending ids), ordered by (end, user)."""

    def histories(self, users: Iterable[Ints], chunk_events: int) -> Iterator[Sessions] | None:
        """Yield the users' starting histories in the same order; None if there are none."""


def synthesize(config: SyntheticConfig) -> int:
    """Write the log that `config` describes; it appears complete or not at all.

    Returns:
        The number of events, histories not counted.

    Raises:
        ValueError: if the configuration cannot be met, or `output` may not be replaced.
    """
    output = locate(config.output)
    if config.format == "sessions":
        check_output(output, config.overwrite)
    else:
        check_output(output, config.overwrite, kind="synthetic event log", is_ours=is_event_log)
    stream, actions, features = make_stream(config)
    last = MANIFEST if config.format == "sessions" else SUMMARY
    with new_folder(output, last=last) as (folder, _):
        if config.format == "sessions":
            num_events = _write_log(config, stream, actions, features, folder)
        else:
            num_events = _write_events(config, stream, actions, features, folder)
    return num_events


def make_stream(config: SyntheticConfig) -> tuple[Stream, dict[str, str], dict[str, str]]:
    """Return (the stream, its action columns, its feature columns: name -> Arrow type)."""
    options = {"seed": config.seed, "start_ts": config.start_ts}
    if config.stream == "dirichlet":
        made: Stream = dirichlet.DirichletStream(config.dirichlet, **options)
        return made, dirichlet.ACTIONS, dirichlet.FEATURES
    made = polya_urn.PolyaUrnStream(config.polya_urn, **options)
    return made, polya_urn.ACTIONS, polya_urn.FEATURES


def _users(config: SyntheticConfig, stream: Stream, partition: int) -> Iterator[Ints]:
    """Yield the users of a partition in blocks of ascending ids."""
    for begin in range(0, stream.num_users, _USERS_PER_BLOCK):
        found = np.empty(min(_USERS_PER_BLOCK, stream.num_users - begin), np.int64)
        count = _find(begin, config.partition_seed, config.partitions, partition, found)
        yield found[:count]


@njit(nogil=True, cache=True)
def _find(begin: Any, seed: Any, partitions: Any, partition: Any, found: Any) -> Any:
    count = 0
    for user in range(begin, begin + len(found)):
        if _partition_of(user, seed, partitions) == partition:
            found[count] = user
            count += 1
    return count


def _write_log(
    config: SyntheticConfig,
    stream: Stream,
    actions: dict[str, str],
    features: dict[str, str],
    folder: Path,
) -> int:
    schema = log_schema(actions, features, {})
    log, past = WrittenFiles(), WrittenFiles()

    def write(sessions: Iterator[Sessions], name: str, p: int, into: WrittenFiles) -> PartitionFile:
        write_sessions((chunk.as_log(schema) for chunk in sessions), folder / name, schema)
        return check_file(folder / name, p, config.partitions, config.partition_seed, into)

    def write_partition(p: int) -> tuple[PartitionFile, PartitionFile | None]:
        users = _users(config, stream, p)
        part = write(stream.sessions(users, config.chunk_events), part_name(p), p, log)
        before = stream.histories(_users(config, stream, p), config.chunk_events)
        return part, None if before is None else write(before, history_name(p), p, past)

    written = _in_threads(config, write_partition)
    num_events: int = sum(part.num_events for part, _ in written)
    histories = tuple(history for _, history in written if history is not None)
    write_manifest(
        Manifest(
            folder=folder,
            partitions=config.partitions,
            partition_seed=config.partition_seed,
            timezone="UTC",
            actions=actions,
            features=features,
            context={},
            parts=tuple(part for part, _ in written),
            histories=histories,
            start_ts=log.start_ts,
            end_ts=log.end_ts,
            num_rows_read=num_events + sum(file.num_events for file in histories),
            num_duplicates=0,
            rejects={},
            nulls=dict.fromkeys((*actions, *features), 0),
            config=_made_by(config),
        )
    )
    return num_events


def _write_events(
    config: SyntheticConfig,
    stream: Stream,
    actions: dict[str, str],
    features: dict[str, str],
    folder: Path,
) -> int:
    names = {"user_id": "int64", "item_id": "int64", "timestamp": "int64", **actions, **features}
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in names.items()])

    def write_partition(p: int) -> int:
        sessions = stream.sessions(_users(config, stream, p), config.chunk_events)
        path = folder / EVENTS_FOLDER / part_name(p)
        num_rows = write_events((chunk.as_events() for chunk in sessions), path, schema)
        before = stream.histories(_users(config, stream, p), config.chunk_events)
        if before is not None:
            path = folder / HISTORY_FOLDER / part_name(p)
            write_events((chunk.as_events() for chunk in before), path, schema)
        return num_rows

    num_events: int = sum(_in_threads(config, write_partition))
    write_summary(folder, {"made_by": _made_by(config)})
    return num_events


def _made_by(config: SyntheticConfig) -> dict[str, Any]:
    """Return what the bytes of the log depend on."""
    content = asdict(config)
    for name in ("output", "overwrite", "chunk_events", "threads"):
        del content[name]
    del content["polya_urn" if config.stream == "dirichlet" else "dirichlet"]
    return content


def _in_threads(config: SyntheticConfig, write_partition: Any) -> list[Any]:
    """Write all partitions, some at once; the first failure stops the rest."""
    threads = config.threads or os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        tasks = [pool.submit(write_partition, p) for p in range(config.partitions)]
        try:
            return [task.result() for task in tasks]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
