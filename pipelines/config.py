"""Configuration of the data side. Free of torch, so that launchers can read it."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

Layout = Literal["interleaved", "merged"]
Anchor = Literal["event", "session"]
Supervise = Literal["session", "all", "sampled"]

# Features that the pipeline itself makes; the others are named by the configuration.
ITEM_ID = "item_id"
TARGET_ITEM_ID = "target_item_id"
NEGATIVE_ITEM_ID = "negative_item_id"


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinConfig:
    """Columns of a second file that are added to each event, or to each session as context."""

    path: str = MISSING
    """Parquet file, folder or glob; one row a key."""
    key: str = MISSING
    """Column of the event log that is looked up."""
    right_key: str = ""
    """Column of this file that it is looked up in; empty means the name of `key`."""
    columns: dict[str, str] = field(default_factory=dict)
    """New name -> column of this file. Null where the key is missing."""
    into: Literal["event", "context"] = "event"
    """Where the columns go: beside each event, or once a session."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CounterConfig:
    """Counts of past events that share a key, as they stood strictly before each event."""

    keys: tuple[str, ...] = MISSING
    """Event columns whose values must agree, for instance (user_id, author_id)."""
    actions: tuple[str, ...] = ()
    """Action columns whose sums over those past events are added to their count."""
    days: int = 0
    """Only events of the last so many days; 0 means all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionizeConfig:
    """How an event log becomes a session-end log."""

    input: str = MISSING
    """Event log: Parquet file, folder or glob."""
    history: str = ""
    """Events before the log, same columns (a missing one is null): they start the users' histories
    and are never supervised. Empty means none."""
    output: str = MISSING
    """Folder of the session-end log."""
    overwrite: bool = False
    """Replace a session-end log that is already there. Anything else that is there is refused."""
    user_id: str = "user_id"
    """Column of the user: integer, or string (then hashed to 64 bits)."""
    item_id: str = "item_id"
    """Column of the item: integer, or string (then hashed to 64 bits)."""
    timestamp: str = "timestamp"
    """Column of the time: Arrow timestamp, or integer in `timestamp_unit`."""
    timestamp_unit: Literal["s", "ms", "us"] = "s"
    """Unit of an integer timestamp. The session-end log holds seconds."""
    order: str = ""
    """Column that breaks ties of the timestamp; empty means the order of the file."""
    session_id: str = ""
    """Column that names the session; empty means sessions are cut where `gap_seconds` pass."""
    gap_seconds: int = 1800
    """A longer silence than this ends a session."""
    actions: tuple[str, ...] = MISSING
    """Action columns: bool, integer or float. Null is unknown, which is not zero."""
    features: tuple[str, ...] = ()
    """Further columns of the event: item features, place, device."""
    joins: tuple[JoinConfig, ...] = ()
    """Features that lie in other files."""
    counters: dict[str, CounterConfig] = field(default_factory=dict)
    """Prefix -> counts to add: columns PREFIX_count and PREFIX_ACTION, float32."""
    partitions: int = 64
    """Number of partitions; an upper bound of the number of ranks."""
    partition_seed: int = 0
    """Seed of the hash of user_id that chooses the partition; recorded in the manifest."""
    timezone: str = "UTC"
    """What hour, weekday and day mean; recorded in the manifest."""
    engine: Literal["duckdb"] = "duckdb"
    """What runs the expression."""
    max_reject_fraction: float = 0.01
    """Stop if more than this share of the events is unusable (null user, item or time)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionConfig:
    """How one action signal becomes a code: 0 unknown, then one code an interval."""

    thresholds: tuple[float, ...] = (0.5,)
    """Ascending bounds: a value v has code 1 + (number of thresholds <= v). A flag needs (0.5,)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """A column of the log that becomes an id."""

    column: str = ""
    """Column of the event or context; empty means the name of the feature."""
    boundaries: tuple[float, ...] = ()
    """Ascending bounds that turn a number into the id of its interval; empty means the column holds
    the id itself. Null is id -1, which every table maps to its row 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """One thing that the ranking head predicts about an event."""

    action: str = MISSING
    """Action column that holds the label; null masks the event for this task."""
    type: Literal["binary", "regression"] = "binary"
    """binary: 1 if the value is at least `threshold`; regression: the transformed value."""
    threshold: float = 0.5
    """Of a binary task, in the unit of the column."""
    scale: float = 1.0
    """Of a regression: the value is divided by this (ms to s: 1000) ..."""
    maximum: float = 0.0
    """... then clipped to this; 0 means no bound ..."""
    log1p: bool = False
    """... then log(1 + x) is taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How a session-end log becomes batches of token sequences."""

    log: str = MISSING
    """Folder of the session-end log, as `gr sessionize` wrote it."""
    layout: Layout = "interleaved"
    """interleaved: item and action are tokens of their own; merged: one token an event."""
    anchor: Anchor = "event"
    """event: each event is predicted from all tokens before it; session: the session's events
    stand at the end as candidates that see the history and themselves only."""
    supervise: Supervise = "session"
    """Which events carry a loss."""
    sampled_rate: float = 1.0
    """Of `supervise: sampled`: k of min(1, k / n), n = events of the sequence."""
    max_history_tokens: int = 256
    """Newest tokens of history kept, after layout; context tokens come on top."""
    max_session_events: int = 256
    """A longer session is split: its earlier part becomes history of the later."""
    context: Literal["none", "prefix"] = "none"
    """prefix: one token a context feature before the history."""
    actions: dict[str, ActionConfig] = field(default_factory=dict)
    """Action columns that the action token encodes."""
    item_features: dict[str, FeatureConfig] = field(default_factory=dict)
    """Features of the event known before the user acts (item, place): part of its item token."""
    context_features: dict[str, FeatureConfig] = field(default_factory=dict)
    """Features of the session."""
    dense_features: tuple[str, ...] = ()
    """Numeric event columns known before the user acts (counters), at ranking positions only."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Tasks of the ranking head."""
    positive: tuple[str, ...] = ()
    """Actions any of which (>= 0.5) makes an event a target of retrieval; empty means every
    event."""
    num_items: int = MISSING
    """Item ids are 0 .. num_items - 1 (the range that negatives are drawn from)."""
    num_negatives: int = 0
    """Uniform negatives drawn for each sequence, keyed by (seed, user, session)."""
    sessions_per_partition: int = 8
    """Sessions of each partition in a global batch: the batch does not depend on the number of
    ranks."""
    window: Literal["none", "hour", "day"] = "day"
    """Barrier across partitions: no session of a window is read before all of the last one are."""
    window_offset_seconds: int = 0
    """Added to end_ts before the window is taken (to cut days at local midnight)."""
    prefetch: int = 4
    """Batches prepared ahead in a thread; 0 means none."""
    max_reject_fraction: float = 0.001
    """Stop once more than this share of the sessions is unusable."""

    def __post_init__(self) -> None:
        check_supervision(self)
        if self.max_session_events < 1:
            raise ValueError(
                f"data.max_session_events must be at least 1, got {self.max_session_events}"
            )
        if self.sessions_per_partition < 1:
            raise ValueError(
                f"data.sessions_per_partition must be at least 1, got {self.sessions_per_partition}"
            )
        for name, task in self.tasks.items():
            if task.scale <= 0:
                raise ValueError(f"data.tasks.{name}.scale must be positive, got {task.scale}")


def check_supervision(data: DataConfig) -> None:
    """Refuse a combination of layout, anchor and supervise outside the table of docs/design.md.

    Raises:
        ValueError: if the combination is not defined; the message says what is.
    """
    if data.layout == "merged" and data.anchor == "event" and data.tasks:
        raise ValueError(
            "data.layout=merged with data.anchor=event cannot rank: the token of an event holds "
            "its own label. Use data.anchor=session, or data.layout=interleaved, or clear "
            "data.tasks to train retrieval only."
        )
    if data.anchor == "session" and data.supervise != "session":
        raise ValueError(
            "data.anchor=session predicts the session's events only, "
            f"got data.supervise={data.supervise}. Use data.supervise=session, or data.anchor=event."
        )
