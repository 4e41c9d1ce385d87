"""What a run reads: a session-end log for one pass, or the event log of many epochs."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from pipelines.config import DataConfig
from pipelines.manifest import Manifest
from pipelines.segments import read_manifests
from pipelines.user_sequences import UserSequences, read_user_sequences


@dataclass(frozen=True)
class Log:
    """What is known of a log before its first batch."""

    fingerprint: str
    """The same on all ranks, if they read the same."""
    utc_offset: int
    """Seconds to add to a timestamp for local time."""
    sequences_per_step: int
    """Of a global batch, about."""
    num_examples: int
    """Of the whole run."""
    summary: str
    """For the first lines of a run."""
    users: UserSequences | None = None
    """With data.window=epoch."""


def open_log(data: DataConfig) -> Log:
    """Return what there is to know of `data.log`; user sequences are read as a whole.

    Raises:
        ValueError: if there is no such log, or it does not fit the configuration.
    """
    if data.window == "epoch":
        users = read_user_sequences(data)
        return Log(
            fingerprint=users.fingerprint,
            utc_offset=0,
            sequences_per_step=data.leave_one_out.users_per_batch,
            num_examples=users.num_users * data.leave_one_out.epochs,
            summary=f"{data.leave_one_out.epochs} epochs of {users.describe()}",
            users=users,
        )
    manifests = read_manifests(data.log)
    first = manifests[0]
    return Log(
        fingerprint=json.dumps([part.sha256 for part in first.parts]),
        utc_offset=utc_offset_seconds(first),
        sequences_per_step=data.sessions_per_partition * first.partitions,
        num_examples=sum(each.num_sessions for each in manifests),
        summary=f"{_total(manifests, 'num_sessions')} sessions with "
        f"{_total(manifests, 'num_events')} events in {first.partitions} partitions",
    )


def _total(manifests: Iterable[Manifest], count: str) -> str:
    return f"{sum(getattr(each, count) for each in manifests):,}"


def window_name(window: int, data: DataConfig) -> str:
    """Return a window as a date, or a date and hour, in the time that windows are cut in.

    With data.window=epoch: the number of epochs trained.
    """
    if data.window == "epoch":
        return f"epoch {window:04d}"
    seconds = window * (86_400 if data.window == "day" else 3_600)
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.strftime("%Y-%m-%d" if data.window == "day" else "%Y-%m-%dT%H")


def utc_offset_seconds(manifest: Manifest) -> int:
    """Return what to add to a timestamp for local time, as it stands when the log starts."""
    start = datetime.fromtimestamp(manifest.start_ts, ZoneInfo(manifest.timezone))
    offset = start.utcoffset()
    assert offset is not None
    return int(offset.total_seconds())
