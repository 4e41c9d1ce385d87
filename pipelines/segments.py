"""The segments of a log: one session-end log, or a folder of them that grows while it is read.

Logs arrive in pieces (say, hourly), each a whole session-end log in a folder of its own whose name
sorts after those before it. Segments are read one after another, so that no batch depends on when a
segment landed. A file that cannot be used is a fault of that file: its sessions are counted as
skipped, the others are read.
"""

import time
from bisect import bisect_right
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.batch import StreamPosition
from pipelines.budget import Planner
from pipelines.config import CounterConfig, DataConfig
from pipelines.counters import counter_names
from pipelines.features import EventEncoder
from pipelines.history import Ints
from pipelines.location import Location, locate
from pipelines.long_sessions import events_per_slice, read_slices
from pipelines.manifest import (
    Manifest,
    PartitionFile,
    check_file,
    is_session_log,
    read_manifest,
)
from pipelines.reader import check_columns, read_end_ts
from pipelines.schedule import Schedule, disordered, filled, make_schedule
from pipelines.schema import MANIFEST

OPEN_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class LogFile:
    """A file of a segment."""

    path: Location
    num_sessions: int
    """As the manifest says."""
    fault: str
    """Why it cannot be used; empty if it can."""
    sha256: str
    """As the manifest says."""
    disordered: NDArray[np.bool_] | None
    """(n,): sessions out of the order of end_ts; None if there are none."""
    slices: Ints | None
    """(n,): rows that each session is read as (pipelines.long_sessions); None if each is one."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One session-end log."""

    name: str
    """Of its folder; empty if it is the whole log."""
    manifest: Manifest
    parts: tuple[LogFile, ...]
    """One a partition."""
    histories: tuple[LogFile, ...]
    """One a partition, or none."""
    schedule: Schedule
    """Of this segment alone; a part with a fault has no sessions in it."""
    first_step: int
    """Global steps before it."""
    first_rows: Ints
    """(P,) int64: sessions of each partition in the segments before it."""
    last_end_ts: int
    """Latest end_ts so far, in s."""


class LogSegments:
    """The segments known so far, in the order in which they are read."""

    def __init__(
        self,
        config: DataConfig,
        encoder: EventEncoder,
        begun: Sequence[str] = (),
        planner: Planner | None = None,
    ) -> None:
        """Read the order of all segments that are there.

        Args:
            config: says where the log is and how it is cut into steps.
            encoder: names the columns that are needed.
            begun: names of segments that come first, in this order.
            planner: cuts segments into steps by cost; None: by numbers of sessions.

        Raises:
            ValueError: if there is no log, none of its files can be used, a segment of `begun` is
                missing, or segments do not fit each other.
        """
        self.folder = locate(config.log)
        self._config, self._encoder, self._planner = config, encoder, planner
        self._segments: list[Segment] = []
        there = segment_names(self.folder)
        missing = [name for name in begun if name not in there]
        if missing:
            raise ValueError(
                f"{self.folder} lacks the segment(s) {missing} that the run has read already: "
                "restore them, or start a new run"
            )
        names = [*begun, *(name for name in there if name not in begun)]
        if config.follow:  # the others land: all ranks are told of each at the same moment
            names = names[: max(1, len(begun))]
        for name in names:
            self.append(name)
        faults = [part.fault for segment in self._segments for part in segment.parts]
        if faults and all(faults):
            raise ValueError(faults[0])

    def __len__(self) -> int:
        return len(self._segments)

    def __getitem__(self, index: int) -> Segment:
        return self._segments[index]

    @property
    def num_partitions(self) -> int:
        """P."""
        return self._segments[0].manifest.partitions

    @property
    def num_steps(self) -> int:
        """Global steps of all segments."""
        last = self._segments[-1]
        return last.first_step + last.schedule.num_steps

    def landed(self) -> str:
        """Return the first segment that is there and not known; empty if there is none."""
        known = {segment.name for segment in self._segments}
        return next(iter(segment_names(self.folder, known)), "")

    def append(self, name: str, *, patience: float = 0.0) -> Segment:
        """Add a segment at the end, and return it.

        Args:
            name: of its folder.
            patience: seconds to wait until it is there.

        Raises:
            ValueError: if it is not there, or does not fit those before it.
        """
        config = self._config
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and not is_session_log(self.folder / name):
            time.sleep(0.1)
        manifest = read_manifest(self.folder / name, check_files=False)
        before = self._segments[-1] if self._segments else None
        if before is not None:
            _check_fit(manifest, before.manifest)
        _check_anchor(manifest, config)
        least = before.last_end_ts if before else 0
        # Of a store each answer is waited for: of many files at once.
        with ThreadPoolExecutor(1 if isinstance(self.folder, Path) else OPEN_AT_ONCE) as pool:
            opened = list(pool.map(lambda file: self._open(manifest, file, least), manifest.parts))
            starts = list(pool.map(lambda file: self._open(manifest, file, 0), manifest.histories))
        parts = [part for part, _ in opened]
        end_ts = [times for _, times in opened]
        histories = tuple(file for file, _ in starts)
        if config.window == "epoch":
            raise ValueError(
                "data.window=epoch reads user sequences of an event log, not the sessions of "
                f"{self.folder}: use data.window=none, hour or day"
            )
        schedule = make_schedule(
            end_ts,
            window=config.window,
            offset_seconds=config.window_offset_seconds,
            sessions_per_partition=config.sessions_per_partition,
        )
        if self._planner is not None:
            schedule = self._planner.plan(
                schedule,
                end_ts,
                [None if part.fault else part.path for part in parts],
                [part.slices for part in parts],
                [None if file.fault else file.path for file in histories],
            )
        segment = Segment(
            name=name,
            manifest=manifest,
            parts=tuple(parts),
            histories=histories,
            schedule=schedule,
            first_step=self.num_steps if before else 0,
            first_rows=before.first_rows + before.schedule.rows_before[-1]
            if before
            else np.zeros(manifest.partitions, np.int64),
            last_end_ts=max(
                before.last_end_ts if before else 0,
                *(int(times[-1]) for times in end_ts if len(times)),
                0,
            ),
        )
        self._segments.append(segment)
        return segment

    def check_windows(self) -> None:
        """Check that no window goes on in a later segment.

        Raises:
            ValueError: if one does: it could not be scored as a whole before it is learnt from.
        """
        last: int | None = None
        for segment in self._segments:
            windows = segment.schedule.windows
            if last is not None and len(windows) and windows[0] <= last:
                raise ValueError(
                    f"{segment.manifest.folder}: its first sessions belong to the last window of "
                    "the segment before it, which frozen evaluation has scored already. Use "
                    "segments of whole windows, a smaller data.window, or eval.mode=progressive."
                )
            last = int(windows[-1]) if len(windows) else last

    def at(self, step: int) -> tuple[Segment, int]:
        """Return the segment that a step reads, and the number of the step within it."""
        index = self._index(step)
        segment = self._segments[index]
        return segment, step - segment.first_step

    def rows_at(self, step: int) -> Ints:
        """Return (P,) int64: sessions of each partition consumed by the first `step` steps."""
        segment, within = self.at(step)
        rows: Ints = segment.first_rows + segment.schedule.rows_at(within)
        return rows

    def num_begun(self, step: int) -> int:
        """Return how many segments the first `step` steps have begun to read."""
        return 0 if step == 0 else self._index(step - 1) + 1

    def position(self, step: int, rows: Ints | None = None) -> StreamPosition:
        """Return where a stream stands after the first `step` steps, `rows_at(step)` if known."""
        names = (segment.name for segment in self._segments[: self.num_begun(step)])
        rows = self.rows_at(step) if rows is None else rows
        return StreamPosition(
            rows=tuple(rows.tolist()), step=step, segments=tuple(filter(None, names))
        )

    def check(self, position: StreamPosition) -> None:
        """Refuse a position of another log.

        Raises:
            ValueError: if `position` is not one that this log passes through.
        """
        if not 0 <= position.step <= self.num_steps:
            raise ValueError(
                f"position: expected a step from 0 to {self.num_steps} for this log, got "
                f"{position.step}. Resume with the log and the data settings of the checkpoint."
            )
        expected = self.position(position.step)
        if position != expected:
            raise ValueError(
                f"position: after step {position.step} of this log {expected.rows} sessions of its "
                f"partitions are consumed, the position says {position.rows}. Resume with the log, "
                "data.sessions_per_partition and data.window of the checkpoint."
            )

    def _index(self, step: int) -> int:
        """Return the segment of a step, the last one for the step after all."""
        return bisect_right(self._segments, step, key=lambda segment: segment.first_step) - 1

    def _open(self, manifest: Manifest, file: PartitionFile, least: int) -> tuple[LogFile, Ints]:
        """Return a file and the ascending end_ts of its rows, none if it has a fault."""
        path = manifest.folder / file.name
        end_ts, flags, fault = np.empty(0, np.int64), np.empty(0, bool), ""
        slices = None
        try:
            check_file(manifest, file)
            check_columns(path, self._encoder.columns)
            if file in manifest.parts:
                end_ts = read_end_ts(path)
                flags = disordered(end_ts)
                end_ts = filled(end_ts, flags, least)
                most = events_per_slice(self._config.max_session_events)
                slices = read_slices(path, most, file.longest_session)
                if slices is not None:
                    end_ts = np.repeat(end_ts, slices)
        except ValueError as error:
            fault = str(error)
        opened = LogFile(
            path=path,
            num_sessions=file.num_sessions,
            fault=fault,
            sha256=file.sha256,
            disordered=flags if flags.any() else None,
            slices=slices,
        )
        return opened, end_ts


def segment_names(folder: str | Location, known: Collection[str] = ()) -> list[str]:
    """Return the names of a log's segments that are there, ascending, without the known ones.

    A folder that is no folder of segments is taken for a single log, of which the name is empty;
    whether it is one is for `read_manifest` to find out.
    """
    folder = locate(folder)
    if not folder.is_dir() or (folder / MANIFEST).exists():
        names = [""]
    else:
        there = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        names = [name for name in there if name in known or is_session_log(folder / name)] or [""]
    return [name for name in names if name not in known]


def read_manifests(folder: str | Location) -> list[Manifest]:
    """Return the manifests of a log's segments that are there; their files are not checked.

    Raises:
        ValueError: if there is no log.
    """
    folder = locate(folder)
    return [read_manifest(folder / name, check_files=False) for name in segment_names(folder)]


def _check_anchor(manifest: Manifest, config: DataConfig) -> None:
    """Refuse features that are later than the prediction."""
    if config.anchor != "session":
        return
    later = {
        name
        for prefix, counter in manifest.config.get("counters", {}).items()
        for name in counter_names(prefix, CounterConfig(**counter))
    }
    item_features = {x.column or name for name, x in config.item_features.items()}
    used = sorted(later & {*config.dense_features, *item_features})
    if used:
        raise ValueError(
            f"data.anchor=session predicts at the start of the session, but {used} of "
            f"{manifest.folder} are counters as they stood before each event, so they know the "
            "events of the session before it. Leave them out, count in the pass instead "
            "(data.item_features.NAME.counter), or use data.anchor=event."
        )


def _check_fit(manifest: Manifest, first: Manifest) -> None:
    for key in ("partitions", "partition_seed", "timezone"):
        found, expected = getattr(manifest, key), getattr(first, key)
        if found != expected:
            raise ValueError(
                f"{manifest.folder}: {key} is {found!r}, the segments before it have {expected!r}: "
                "a user must stay in one partition. Make the segment anew with gr sessionize."
            )
    if manifest.histories:
        raise ValueError(
            f"{manifest.folder} holds starting histories, which only the first segment of a log "
            "may: make the segment anew with gr sessionize and history left empty"
        )
