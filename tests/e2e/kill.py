"""A job without a model that is killed at a drawn point: it reads, remembers and saves.

Each attempt is a fork, so that a point costs a fraction of a second.
"""

import hashlib
import os
import signal
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

import gr.checkpoint
import pipelines.history
import pipelines.reader
import pipelines.snapshot
import pipelines.stream
from gr.checkpoint import CheckpointManager
from pipelines.batch import StreamPosition
from pipelines.config import DataConfig
from pipelines.stream import SessionStream, Snapshots
from tests.pipelines.logs import content
from tests.pipelines.session_log import session, write_log

EVERY = 4
# Phase -> functions that it passes through, as (owner, name).
PHASES = {
    "reading": [(pipelines.reader, "_decode")],
    "mid-batch": [(pipelines.history.HistoryStore, "advance"), (pipelines.stream, "assemble")],
    "snapshot": [(pipelines.snapshot, "_checksum"), (pipelines.snapshot, "write_snapshot")],
    "tensors": [(gr.checkpoint, "dcp_save")],
    "record": [(gr.checkpoint, "write_atomically"), (gr.checkpoint, "_remove")],
    "fsync": [(os, "fsync")],
    "rename": [(Path, "replace"), (Path, "rename")],
}


@dataclass(frozen=True)
class Point:
    """The `number`th time that a function of a phase is entered, or left."""

    phase: str
    number: int
    before: bool


def write_numbered_log(folder: Path) -> list[int]:
    """Write a log whose items number its events; return those of the sessions that are usable."""
    random, number, usable, partitions = Random(3), 0, [], []
    for p in range(4):
        rows = []
        for n in range(36):
            time = 400 * n + random.randrange(300)
            events = []
            for _ in range(random.randrange(1, 6)):
                time += random.randrange(90)
                events.append({"t": time, "item": number, "click": random.random() < 0.5})
                number += 1
            rows.append(session(random.randrange(5) * 4 + p, n, events))
            if n == 7:
                rows[-1]["session_id"] = None
            else:
                usable += [e["item"] for e in events]
        rows.sort(key=lambda row: row["end_ts"])
        partitions.append(rows)
    starts = [[session(p, -1, [{"t": 0, "item": 1, "click": True}])] for p in range(4)]
    write_log(folder, partitions, starts, row_group_size=11)
    return usable


def consume(config: DataConfig, run: Path, world_size: int) -> None:
    """Read the log to its end, all ranks in step, and save what was read every few steps."""
    checkpoints = CheckpointManager(run / "checkpoints", keep=2)
    snapshots = Snapshots(run / "histories", lambda step: step % EVERY == 0)
    batches, events, rejected, position, histories = [], [], 0, None, None
    if restored := checkpoints.latest():
        stored = checkpoints.read(restored, "progress")
        batches, events, rejected = stored["batches"], stored["events"], stored["rejected"]
        position = StreamPosition(tuple(stored["rows"]), restored)
        histories = checkpoints.path(restored) / "histories"
        assert histories.is_dir()
    streams = [
        SessionStream(
            config,
            seed=0,
            rank=rank,
            world_size=world_size,
            position=position,
            histories=histories,
            snapshots=snapshots,
        )
        for rank in range(world_size)
    ]

    def save(position: StreamPosition) -> None:
        progress = {"batches": batches, "events": events, "rejected": rejected}
        progress["rows"] = list(position.rows)
        state = {"progress": progress, "model": {"weight": torch.ones(3)}}
        checkpoints.save(position.step, state, folders=[snapshots.path(position.step)])

    for shares in zip(*streams, strict=True):
        for share in shares:
            batches.append(hashlib.sha256(repr(content(share)).encode()).hexdigest()[:12])
            rejected += sum(share.num_rejected.values())
            items, first = share.ids["item_id"], 0
            for length, m in zip(items.lengths(), share.num_candidates, strict=True):
                first += int(length)
                events += items.values()[first - int(m) : first].tolist()
        position = shares[0].position
        if position.step % EVERY == 0:
            save(position)
    if position.step % EVERY and position.step != restored:  # or it was killed after its last save
        save(position)


def attempt(config: DataConfig, run: Path, world_size: int, point: Point | None) -> Counter:
    """Consume in a process of its own, which kills itself at `point`; return how often it passed.

    A process that is not killed must end well.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            passed = watch(point)
            consume(config, run, world_size)
            text = "\n".join(f"{phase}\t{n}" for phase, n in passed.items())
            (run / "passed").write_text(text)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if point is not None:
        assert os.WIFSIGNALED(status), f"ended before {point}"
        assert os.WTERMSIG(status) == signal.SIGKILL
        return Counter()
    assert status == 0
    rows = (line.split("\t") for line in (run / "passed").read_text().splitlines())
    return Counter({phase: int(n) for phase, n in rows})


def watch(point: Point | None) -> Counter:
    """Count the calls of every phase, and kill this process at `point`."""
    passed: Counter = Counter()

    def wrap(phase, function):
        def watched(*args, **kwargs):
            passed[phase] += 1
            here = point == Point(phase, passed[phase], True)
            leaves = point == Point(phase, passed[phase], False)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if leaves:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return watched

    for phase, functions in PHASES.items():
        for owner, name in functions:
            setattr(owner, name, wrap(phase, getattr(owner, name)))
    # partition.py holds the function under a name of its own.
    with suppress(AttributeError):
        pipelines.partition.write_snapshot = pipelines.snapshot.write_snapshot
    return passed


def outcome(run: Path) -> dict:
    """Return what the last checkpoint of a finished run remembers."""
    checkpoints = CheckpointManager(run / "checkpoints")
    return checkpoints.read(checkpoints.latest(), "progress")
