"""Configuration of the data side. Free of torch, so that launchers can read it."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from omegaconf import MISSING

Layout = Literal["interleaved", "merged"]
Anchor = Literal["event", "session"]
Supervise = Literal["session", "all", "sampled"]

# Features that the pipeline itself makes; the others are named by the configuration.
ITEM_ID = "item_id"
TARGET_ITEM_ID = "target_item_id"
NEGATIVE_ITEM_ID = "negative_item_id"

MAX_THRESHOLDS = 254  # codes are bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinConfig:
    """Columns of a second file that are added to each event, or to each session as context."""

    path: str = MISSING
    """Parquet or Arrow IPC file, folder or glob, path or URL; one row a key."""
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
    """Columns of the event log, or joined to it, whose values must agree, for instance (user_id,
    author_id). A null agrees with nothing: all columns of the counter are then null."""
    actions: tuple[str, ...] = ()
    """Action columns whose sums of known values over those past events are added to the count."""
    known: tuple[str, ...] = ()
    """Action columns for which the past events that know the action are counted too."""
    days: int = 0
    """Only events of the last so many days (24 h each); 0 means all."""

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueError("keys of a counter must name at least one column, got none")
        if self.days < 0:
            raise ValueError(f"days of a counter must be 0 (all) or more, got {self.days}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionizeConfig:
    """How an event log becomes a session-end log."""

    input: str = MISSING
    """Event log: Parquet or Arrow IPC file, folder or glob; a path or a URL."""
    history: str = ""
    """Events before the log, same columns (a missing one is null): they start the users' histories
    and are never supervised. Empty means none."""
    output: str = MISSING
    """Folder of the session-end log; a path or a URL."""
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
    duplicates: Literal["exact", "event", "keep"] = "exact"
    """Rows that are dropped and counted. exact: those that repeat an earlier row in every column
    read, `order` aside; event: those that repeat its user, item and time; keep: none."""
    actions: tuple[str, ...] = MISSING
    """Action columns: bool, integer or float. Null is unknown, which is not zero."""
    features: tuple[str, ...] = ()
    """Further columns of the event: item features, place, device. Strings are hashed to 64 bits;
    lists of integers or strings stay lists."""
    context: tuple[str, ...] = ()
    """Columns that hold for the whole session, as its first event has them."""
    joins: tuple[JoinConfig, ...] = ()
    """Features that lie in other files."""
    split: dict[str, str] = field(default_factory=dict)
    """Column of `features`, `context` or `joins` whose text holds several values -> what is between
    them (genres: '|'): it becomes the list of those that are not empty."""
    counters: dict[str, CounterConfig] = field(default_factory=dict)
    """Prefix -> counts to add: float32 columns PREFIX_count, PREFIX_ACTION, PREFIX_known_ACTION;
    null in the starting histories."""
    partitions: int = 64
    """Number of partitions; an upper bound of the number of ranks."""
    partition_seed: int = 0
    """Seed of the hash of user_id that chooses the partition; recorded in the manifest."""
    timezone: str = "UTC"
    """What hour, weekday and day mean; recorded in the manifest."""
    engine: Literal["duckdb", "spark"] = "duckdb"
    """What runs the expression. spark: needs requirements/spark.txt and Java 17."""
    spark: dict[str, str] = field(default_factory=dict)
    """Settings of Spark, such as spark.master (else local, on `threads`)."""
    memory_gb: float = 2.0
    """Memory of the engine (Spark: of its driver); what needs more is spilled to disk beside the
    output."""
    threads: int = 0
    """Threads of the engine; 0 means one a core."""
    max_reject_fraction: float = 0.01
    """Stop if more than this share of the events is unusable (null user, item or time)."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("partitions", self.partitions, 1),
            ("gap_seconds", self.gap_seconds, 0),
            ("partition_seed", self.partition_seed, 0),
            ("threads", self.threads, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.spark and self.engine != "spark":
            raise ValueError(f"spark is set but engine={self.engine} does not read it: remove it")
        if self.memory_gb <= 0:
            raise ValueError(f"memory_gb must be positive, got {self.memory_gb}")
        if not 0 <= self.max_reject_fraction <= 1:
            raise ValueError(
                f"max_reject_fraction must be within 0 and 1, got {self.max_reject_fraction}"
            )


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
    max_values: int = 0
    """0: the column holds one value. More: it holds a list (genres, followed creators), the first
    so many values of which are a bag that the model pools (model.pooling). A null list is a bag of
    the unknown id; an empty one is an empty bag. Each event of history takes 8 (max_values + 1)
    bytes for it."""
    encoding: Literal["id", "zscore", "quantile"] = "id"
    """id: a row of an embedding table. zscore, quantile: the column is a number, which the model
    standardises, or sorts into `bins` equally full bins, by the values of earlier batches; missing
    is a value of its own."""
    bins: int = 16
    """Of `encoding: quantile`."""
    counter: Literal["none", "user", "item", "user_item"] = "none"
    """Of an item feature: instead of being read, the number is counted in the pass: past events of
    the same user, item or both, each fading by `half_life_hours`, as they stood at the prediction's
    time (pipelines/decayed_counters.py). `column` names the action whose known values are summed;
    empty: events are counted. Of an item the events of its partition's users alone are seen."""
    half_life_hours: float = 0.0
    """Of `counter`: an event counts half after so long."""

    @property
    def is_bag(self) -> bool:
        """Whether a token has several values of it."""
        return self.max_values > 0

    @property
    def is_number(self) -> bool:
        """Whether the model gets its value, not an id."""
        return self.encoding != "id"

    @property
    def is_counter(self) -> bool:
        """Whether it is counted in the pass, not read."""
        return self.counter != "none"


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
    prior: float | None = None
    """What is known of the mean label before training (binary: share of positives; regression: in
    the transformed unit), say from an earlier log: where the head's bias starts. None: at 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StochasticLengthConfig:
    """Long sequences train on a part of their history most of the time; `gr evaluate` reads all."""

    selection: Literal["none", "greedy", "random", "weighted"] = "none"
    """Which events of history stay where a sequence is cut. none: no sequence is cut; greedy: the
    newest; random: any, equally likely; weighted: the newer an event, the likelier, by
    1 - age / sum of ages."""
    alpha: float = 1.6
    """Above 1, at most 2: a sequence of more than N^(alpha / 2) tokens is cut to so many, but stays
    whole with probability N^alpha / tokens^2."""
    max_length: int = 0
    """N, tokens of the longest sequence; 0 means max_history_tokens."""
    balance: bool = False
    """Ranks choose which long sequences stay whole so that each bears the same load
    (pipelines/balance.py). Batches then depend on the number of ranks."""
    recalibrate_steps: int = 100
    """Of `balance`: steps over which the load that ranks aim at is measured; it holds two such
    periods later. More than data.prefetch + 2."""

    def __post_init__(self) -> None:
        if not 1 < self.alpha <= 2:
            raise ValueError(
                f"data.stochastic_length.alpha must be above 1 and at most 2, got {self.alpha}"
            )
        if self.max_length < 0:
            raise ValueError(
                "data.stochastic_length.max_length must be 0 (max_history_tokens) or more, got "
                f"{self.max_length}"
            )
        others = (self.alpha, self.max_length, self.balance)
        if self.selection == "none" and others != (1.6, 0, False):
            raise ValueError(
                f"data.stochastic_length has alpha={self.alpha}, max_length={self.max_length} and "
                f"balance={self.balance}, but selection=none cuts nothing: say selection=greedy, "
                "random or weighted"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaveOneOutConfig:
    """Many epochs over user sequences in memory, as in public tables; of data.window=epoch."""

    epochs: int = 0
    """Each takes every user once."""
    hold_out: Literal["test", "validation"] = "test"
    """What is scored after an epoch. test: the last event of each user, after training on those
    before it. validation: the one before the last, after training on those before that: what
    chooses the epoch, and every setting, without a look at the test event."""
    users_per_batch: int = 128
    """Users of a global training batch."""
    scored_users_per_batch: int = 1024
    """The same of a batch that is only scored."""
    eval_every: int = 1
    """Epochs from one scoring to the next; after the last epoch there is one in any case."""
    min_events: int = 5
    """Users and items with fewer events in the log are left out."""

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 0),
            ("users_per_batch", 1),
            ("scored_users_per_batch", 1),
            ("eval_every", 1),
            ("min_events", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"data.leave_one_out.{name} must be at least {least}, got {getattr(self, name)}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How a session-end log becomes batches of token sequences."""

    log: str = MISSING
    """Folder (path or URL) of the session-end log, as `gr sessionize` wrote it, or a folder of such
    folders: the segments of a log, read in the order of their names. With `window: epoch` an event
    log."""
    follow: bool = False
    """Go on with segments that land while the log is read, until none has come for
    `follow_idle_seconds`."""
    follow_idle_seconds: float = 3600.0
    """How long `follow` waits for the next segment."""
    history_memory_gb: float = 0.0
    """Memory of one partition's histories in GB (10^9 bytes); what outgrows it moves to a
    memory-mapped file. 0: no bound."""
    spill_folder: str = ""
    """Where such files lie, deleted when the process ends; empty: the system's folder for temporary
    files."""
    layout: Layout = "interleaved"
    """interleaved: item and action are tokens of their own; merged: one token an event."""
    anchor: Anchor = "event"
    """event: each event is predicted from all tokens before it; session: the session's events
    stand at the end as candidates that see the history and themselves only."""
    supervise: Supervise = "session"
    """Which events carry a loss. session: the session's; all: those of the history too (unknown
    labels stay masked); sampled: as all, in a share of the sequences; the others are left out."""
    sampled_rate: float = 1.0
    """Of `supervise: sampled`: k of min(1, k / n), n = events of the sequence before stochastic
    length drops any."""
    max_history_tokens: int = 256
    """Newest tokens of history kept, after layout: whole events (interleaved: two tokens each).
    Context tokens come on top."""
    max_session_events: int = 256
    """A longer session is split: its earlier part becomes history of the later, which starts at
    its own first event. More than 16 such pieces are spread over batches, 16 a session's place."""
    stochastic_length: StochasticLengthConfig = field(default_factory=StochasticLengthConfig)
    """What long sequences keep of those."""
    overlap_slack: int = 64
    """Events held of each user beyond `max_history_tokens`, so that a session finds its history
    behind so many events of sessions that overlap with it in time. What it lacks is counted."""
    context: Literal["none", "prefix", "merged"] = "none"
    """prefix: one token a context feature before the history. merged: each context feature is a
    slowly changing series; of each run of equal values in a sequence the first is a token, in front
    of the event that it begins with (unknown begins no run). Its tokens come on top of
    max_history_tokens; stochastic length counts them."""
    actions: dict[str, ActionConfig] = field(default_factory=dict)
    """Action columns that the action token encodes."""
    item_features: dict[str, FeatureConfig] = field(default_factory=dict)
    """Features of the event known before the user acts (item, place): part of its item token."""
    action_context: tuple[str, ...] = ()
    """Those of `item_features` that say how the user acted too (device, place, hour): part of the
    action as well, by a projection of their own."""
    context_features: dict[str, FeatureConfig] = field(default_factory=dict)
    """Features of the session: tokens of their own by `context`; model.encoder=dlrm reads them in
    any case."""
    dense_features: tuple[str, ...] = ()
    """Numeric event columns known before the user acts (counters), at ranking positions only."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Tasks of the ranking head."""
    positive: tuple[str, ...] = ()
    """Actions any of which (>= 0.5) makes an event a target of retrieval; empty means every
    event."""
    num_items: int = MISSING
    """Item ids are 0 .. num_items - 1 (the range that negatives are drawn from). 0: ids have no
    range; negatives are drawn from the items that the table of item_id holds (ids: dynamic)."""
    num_negatives: int = 0
    """Uniform negatives drawn for each sequence, keyed by (seed, user, session)."""
    sessions_per_partition: int = 8
    """Sessions of each partition in a global batch: the batch does not depend on the number of
    ranks."""
    fill: Literal["sessions", "tokens", "flops"] = "sessions"
    """What ends a batch. sessions: sessions_per_partition; tokens, flops: `budget`, by a plan made
    before the pass (pipelines/budget.py). Such batches depend on the number of ranks."""
    budget: float = 0.0
    """Of `fill`: tokens, or FLOPs of the encoder's training, of one rank in one step. Only a single
    session, or 16 pieces of one, that is larger goes beyond it."""
    window: Literal["none", "hour", "day", "epoch"] = "day"
    """Barrier across partitions: no session of a window is read before all of the last one are.
    epoch: `log` is an event log (Parquet with user_id, item_id, timestamp), read as
    `leave_one_out` says."""
    leave_one_out: LeaveOneOutConfig = field(default_factory=LeaveOneOutConfig)
    """Of `window: epoch`."""
    window_offset_seconds: int = 0
    """Added to end_ts before the window is taken (to cut days at local midnight)."""
    prefetch: int = 4
    """Batches prepared ahead in a thread; 0 means none."""
    max_reject_fraction: float = 0.001
    """Stop once more than this share of the sessions is unusable."""

    def __post_init__(self) -> None:
        check_supervision(self)
        check_ranges(self)
        check_features(self)
        check_balance(self)
        check_epochs(self)
        if self.context != "none" and not self.context_features:
            raise ValueError(
                f"data.context={self.context} has no feature to make tokens of: name "
                "data.context_features, or use data.context=none"
            )
        if self.dense_features and not self.tasks:
            raise ValueError(
                "data.dense_features are read at ranking positions, but data.tasks is empty: clear "
                "data.dense_features, or name a task"
            )


def check_epochs(data: DataConfig) -> None:
    """Refuse settings of one pass in many epochs, and the other way round.

    Raises:
        ValueError: naming the settings and what to change.
    """
    if data.window != "epoch":
        if data.leave_one_out != LeaveOneOutConfig():
            raise ValueError(
                f"data.leave_one_out is read with data.window=epoch only, got {data.window}: set "
                "data.window=epoch, or leave it out"
            )
        return
    if data.leave_one_out.epochs < 1:
        raise ValueError("data.window=epoch needs data.leave_one_out.epochs of 1 or more, got 0")
    if data.max_history_tokens < 2:
        raise ValueError(
            "data.window=epoch predicts from earlier events: data.max_history_tokens must be at "
            f"least 2, got {data.max_history_tokens}"
        )
    expected = {
        "supervise": "all",
        "anchor": "event",
        "context": "none",
        "fill": "sessions",
        "follow": False,
        "sessions_per_partition": 8,
        "window_offset_seconds": 0,
    }
    wrong = [f"data.{k}={getattr(data, k)}" for k, v in expected.items() if getattr(data, k) != v]
    if data.context_features:
        wrong.append("data.context_features")
    wrong += [
        f"data.item_features.{n}.counter" for n, x in data.item_features.items() if x.is_counter
    ]
    if data.stochastic_length.balance:
        wrong.append("data.stochastic_length.balance")
    if wrong:
        raise ValueError(
            f"data.window=epoch reads user sequences without sessions; it needs supervise=all and "
            f"does not go with {', '.join(wrong)}: leave that out"
        )


def id_features(data: DataConfig) -> tuple[str, ...]:
    """Return the features whose ids a batch brings, in the order of SequenceBatch.ids."""
    features = {**data.item_features, **data.context_features}
    names = [name for name, x in features.items() if not x.is_bag and not x.is_number]
    names = [ITEM_ID, *names, TARGET_ITEM_ID]
    if data.num_negatives > 0:
        names.append(NEGATIVE_ITEM_ID)
    return tuple(names)


def bag_features(data: DataConfig) -> tuple[str, ...]:
    """Return the features with several ids a token, in the order of SequenceBatch.bags."""
    features = {**data.item_features, **data.context_features}
    return tuple(name for name, feature in features.items() if feature.is_bag)


def number_features(data: DataConfig) -> tuple[str, ...]:
    """Return the features whose values a batch brings, in the order of SequenceBatch.numbers."""
    features = {**data.item_features, **data.context_features}
    return tuple(name for name, feature in features.items() if feature.is_number)


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
            "data.anchor=session predicts the session's events only, got "
            f"data.supervise={data.supervise}. Use data.supervise=session, or data.anchor=event."
        )
    if data.supervise != "session" and data.context == "prefix":
        raise ValueError(
            "data.context=prefix holds what is known at the session's start, which the predictions "
            f"of the history must not know: data.supervise must be session, got {data.supervise}. "
            "Use data.supervise=session, or data.context=none."
        )
    if data.sampled_rate != 1.0 and data.supervise != "sampled":
        raise ValueError(
            f"data.sampled_rate={data.sampled_rate} works with data.supervise=sampled only; "
            f"data.supervise={data.supervise}. Leave it out, or use data.supervise=sampled."
        )


def check_features(data: DataConfig) -> None:
    """Refuse features that contradict themselves or have no token.

    Raises:
        ValueError: naming the feature and what to change.
    """
    groups = {"item_features": data.item_features, "context_features": data.context_features}
    for group, features in groups.items():
        for name, feature in features.items():
            key = f"data.{group}.{name}"
            _check_ascending(f"{key}.boundaries", feature.boundaries)
            if feature.max_values < 0:
                raise ValueError(
                    f"{key}.max_values must be 0 (one value) or more, got {feature.max_values}"
                )
            if feature.is_number and (feature.boundaries or feature.is_bag):
                raise ValueError(
                    f"{key}.encoding={feature.encoding} reads one number, which boundaries or "
                    f"max_values make ids of; got boundaries={list(feature.boundaries)} and "
                    f"max_values={feature.max_values}: leave them out, or use encoding=id"
                )
            if feature.encoding == "quantile" and feature.bins < 2:
                raise ValueError(f"{key}.bins must be at least 2, got {feature.bins}")
            if feature.encoding != "quantile" and feature.bins != 16:
                raise ValueError(
                    f"{key}.bins={feature.bins} is read with encoding=quantile only, got encoding="
                    f"{feature.encoding}: leave it out"
                )
            if feature.is_counter != (feature.half_life_hours > 0):
                raise ValueError(
                    f"{key} has counter={feature.counter} and half_life_hours="
                    f"{feature.half_life_hours}: a counter needs a positive half-life, other "
                    "features have none"
                )
            if feature.is_counter and (not feature.is_number or group == "context_features"):
                raise ValueError(
                    f"{key}.counter is a number that each event has: make it one of "
                    "data.item_features, with encoding=zscore or quantile"
                )
            if feature.is_bag and group == "context_features" and data.context == "none":
                raise ValueError(
                    f"{key} holds several values, which belong to a token, but data.context=none "
                    "has none for it: use data.context=prefix or merged"
                )
    plain = [n for n, x in data.item_features.items() if not x.is_bag and not x.is_number]
    if set(data.action_context) - set(plain) or len(set(data.action_context)) < len(
        data.action_context
    ):
        raise ValueError(
            "data.action_context must name features of data.item_features that are ids, one value "
            f"a token, each once, got {list(data.action_context)}; data.item_features has {plain}"
        )


def check_balance(data: DataConfig) -> None:
    """Refuse settings of `fill` and of balanced stochastic length that contradict each other.

    Raises:
        ValueError: naming the settings and what to change.
    """
    if data.fill != "sessions" and data.context == "merged":
        raise ValueError(
            f"data.fill={data.fill} plans batches before values are read, so it cannot know how "
            "many tokens data.context=merged adds: use data.context=prefix, or data.fill=sessions"
        )
    if (data.budget > 0) != (data.fill != "sessions"):
        raise ValueError(
            f"data.fill={data.fill} with data.budget={data.budget}: fill=tokens and fill=flops "
            "need a positive budget, fill=sessions reads none"
        )
    if data.fill != "sessions" and data.sessions_per_partition != 8:
        raise ValueError(
            f"data.sessions_per_partition={data.sessions_per_partition} is not read with "
            f"data.fill={data.fill}, which fills batches to data.budget: leave it out"
        )
    lengths = data.stochastic_length
    if lengths.balance and data.fill != "sessions":
        raise ValueError(
            "data.stochastic_length.balance evens out batches of equally many sessions, but "
            f"data.fill={data.fill} makes them even already: use one of them"
        )
    if lengths.balance and lengths.recalibrate_steps <= data.prefetch + 2:
        raise ValueError(
            "data.stochastic_length.recalibrate_steps must be above data.prefetch + 2 = "
            f"{data.prefetch + 2}, got {lengths.recalibrate_steps}"
        )


def check_ranges(data: DataConfig) -> None:
    """Refuse numbers out of range.

    Raises:
        ValueError: naming the key, the range and the number.
    """
    at_least = {
        "max_history_tokens": 0,
        "max_session_events": 1,
        "overlap_slack": 0,
        "num_items": 0,
        "num_negatives": 0,
        "sessions_per_partition": 1,
        "prefetch": 0,
    }
    for key, least in at_least.items():
        value = getattr(data, key)
        if value != MISSING and value < least:
            raise ValueError(f"data.{key} must be at least {least}, got {value}")
    for key in ("follow_idle_seconds", "history_memory_gb"):
        if getattr(data, key) < 0:
            raise ValueError(f"data.{key} must be at least 0, got {getattr(data, key)}")
    if data.sampled_rate <= 0:
        raise ValueError(f"data.sampled_rate must be positive, got {data.sampled_rate}")
    if data.stochastic_length.selection != "none" and data.max_history_tokens < 1:
        raise ValueError(
            "data.stochastic_length has no history to drop with data.max_history_tokens=0: use "
            "selection=none"
        )
    if not 0 <= data.max_reject_fraction <= 1:
        raise ValueError(
            f"data.max_reject_fraction must be from 0 to 1, got {data.max_reject_fraction}"
        )
    for name, task in data.tasks.items():
        if task.type == "binary" and task.prior is not None and not 0 < task.prior < 1:
            raise ValueError(f"data.tasks.{name}.prior must be between 0 and 1, got {task.prior}")
        if task.scale <= 0:
            raise ValueError(f"data.tasks.{name}.scale must be positive, got {task.scale}")
    for name, action in data.actions.items():
        if not 1 <= len(action.thresholds) <= MAX_THRESHOLDS:
            raise ValueError(
                f"data.actions.{name}.thresholds must hold 1 to {MAX_THRESHOLDS} numbers, got "
                f"{len(action.thresholds)}"
            )
        _check_ascending(f"data.actions.{name}.thresholds", action.thresholds)
    made = {ITEM_ID, TARGET_ITEM_ID, NEGATIVE_ITEM_ID}
    names = [*data.item_features, *data.context_features]
    taken = sorted({name for name in names if names.count(name) > 1 or name in made})
    if taken:
        raise ValueError(
            "data.item_features and data.context_features must not share names, nor take "
            f"{sorted(made)}, got {taken} again: rename them and say the column in `column`"
        )


def _check_ascending(key: str, values: tuple[float, ...]) -> None:
    if any(a >= b for a, b in pairwise(values)):
        raise ValueError(f"{key} must be ascending, got {values}")
