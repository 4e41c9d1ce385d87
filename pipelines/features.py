"""From columns of the log to codes, ids and labels: what is computed once for each event."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.config import ActionConfig, DataConfig, FeatureConfig, TaskConfig, id_features
from pipelines.feature_columns import (
    MISSING_NUMBER,
    Floats,
    end_of,
    fill_columns,
    integers,
    numbers,
    slots,
)
from pipelines.history import EventRows, Ints
from pipelines.schema import EVENT_ITEM_ID, EVENT_TIMESTAMP, USER_ID
from pipelines.unify import layout_rules

Place = Literal["session", "context", "events"]
Kind = Literal["integer", "number", "integers", "numbers"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the log that the configuration needs."""

    place: Place
    """session: of the row itself."""
    name: str
    kind: Kind
    """integer: a whole number or a flag; number: also floating point; integers, numbers: lists."""
    wanted_by: str
    """Key of the configuration, for messages."""


class EventEncoder:
    """Encodes events as rows.

    ints: item id, timestamp, item features, with data.context=merged the context features too.
    floats: labels, dense features. codes: action codes, then 1 where the event is positive.
    """

    def __init__(self, config: DataConfig) -> None:
        """Take what concerns events from the configuration."""
        self.config = config
        # The labels and dense features are read at ranking positions only.
        self.dense_features = config.dense_features if config.tasks else ()
        self.item_slots = slots(config.item_features, 2)
        self.num_ints = end_of(self.item_slots, 2)
        self.context_slots = slots(config.context_features, 0)
        self.num_context = end_of(self.context_slots, 0)
        """Columns of the context of a session."""
        self.merges_context = config.context == "merged"
        self.series_slots = slots(config.context_features, self.num_ints)
        """The same in a row of an event, if they are merged."""
        self.num_ints += self.num_context * self.merges_context
        self.num_floats = len(config.tasks) + len(self.dense_features)
        self.num_codes = len(config.actions) + 1
        self.layout = layout_rules(config)
        self.id_keys = id_features(config)
        """Keys of SequenceBatch.ids."""
        features = config.item_features.values()
        self.signals = list(dict.fromkeys(x.column for x in features if x.is_counter))
        """Columns that counters sum, each once; empty text stands for the number of events."""

    @property
    def columns(self) -> list[Column]:
        """Columns of the log that are decoded."""
        config = self.config
        columns = [
            Column("events", EVENT_ITEM_ID, "integer", "every log"),
            Column("events", EVENT_TIMESTAMP, "integer", "every log"),
        ]
        for name in config.actions:
            columns.append(Column("events", name, "number", f"data.actions.{name}"))
        for name in config.positive:
            columns.append(Column("events", name, "number", "data.positive"))
        for name, task in config.tasks.items():
            columns.append(Column("events", task.action, "number", f"data.tasks.{name}.action"))
        for name in self.dense_features:
            columns.append(Column("events", name, "number", "data.dense_features"))
        for name, feature in config.item_features.items():
            if feature.is_counter:
                if feature.column:
                    key = f"data.item_features.{name}"
                    columns.append(Column("events", feature.column, "number", key))
                continue
            columns.append(_feature_column("events", name, feature, f"data.item_features.{name}"))
        for name, feature in config.context_features.items():
            place: Place = "session" if feature.column == USER_ID else "context"
            columns.append(_feature_column(place, name, feature, f"data.context_features.{name}"))
        return columns

    def encode(
        self, events: Mapping[str, pa.Array], item_id: Ints, context: Ints, offsets: Ints
    ) -> EventRows:
        """Encode the events of some sessions.

        Args:
            events: column -> (E,) values; null is unknown.
            item_id: (E,) int64, without nulls.
            context: (n, X) int64, `encode_context` of the sessions.
            offsets: (n + 1,) int64: events of session s are offsets[s]:offsets[s + 1].

        Returns:
            Rows in the order of `events`.
        """
        config, num_events = self.config, len(item_id)
        signals: dict[str, Floats] = {}
        for name in {*config.actions, *config.positive, *(t.action for t in config.tasks.values())}:
            signals[name] = numbers(events[name])

        ints = np.empty((num_events, self.num_ints), np.int64)
        ints[:, 0] = item_id
        ints[:, 1] = integers(events[EVENT_TIMESTAMP])
        for slot in self.item_slots:
            if slot.feature.is_counter:  # pipelines.decayed_counters writes it
                ints[:, slot.first] = MISSING_NUMBER
                continue
            fill_columns(events[slot.feature.column or slot.name], slot, ints)
        if self.merges_context:
            ints[:, self.num_ints - self.num_context :] = np.repeat(
                context, np.diff(offsets), axis=0
            )

        floats = np.empty((num_events, self.num_floats), np.float32)
        with np.errstate(
            over="ignore"
        ):  # too large for float32 is infinite, which the reader refuses
            for i, task in enumerate(config.tasks.values()):
                floats[:, i] = task_labels(signals[task.action], task)
            for i, name in enumerate(self.dense_features, start=len(config.tasks)):
                floats[:, i] = numbers(events[name])

        codes = np.empty((num_events, self.num_codes), np.uint8)
        for i, (name, action) in enumerate(config.actions.items()):
            codes[:, i] = action_codes(signals[name], action)
        codes[:, -1] = not config.positive
        for name in config.positive:
            codes[:, -1] |= signals[name] >= 0.5
        return EventRows(ints.reshape(-1), floats.reshape(-1), codes.reshape(-1))

    def counter_signals(self, events: Mapping[str, pa.Array], num_events: int) -> Floats | None:
        """Return (E, signals) float64: what counters sum, NaN where unknown; None without any."""
        if not self.signals:
            return None
        columns = [numbers(events[x]) if x else np.ones(num_events) for x in self.signals]
        return np.stack(columns, axis=1)

    def encode_context(self, columns: Mapping[str, pa.Array], num_sessions: int) -> Ints:
        """Return (n, X) int64: the context features of some sessions.

        Args:
            columns: column of the context, and user_id, -> (n,) values; null is unknown.
            num_sessions: n.
        """
        rows = np.empty((num_sessions, self.num_context), np.int64)
        for slot in self.context_slots:
            fill_columns(columns[slot.feature.column or slot.name], slot, rows)
        return rows


def action_codes(values: Floats, action: ActionConfig) -> NDArray[np.uint8]:
    """Return the code of each value: 1 + number of thresholds <= value; 0 where it is NaN."""
    codes = 1 + np.searchsorted(action.thresholds, values, side="right")
    codes[np.isnan(values)] = 0
    return codes.astype(np.uint8)


def task_labels(values: Floats, task: TaskConfig) -> Floats:
    """Return the label of each value, NaN where it is NaN.

    binary: 1 if value >= threshold. regression: x = value / scale, min(x, maximum), log(1 + x).
    """
    if task.type == "binary":
        return np.where(np.isnan(values), np.nan, (values >= task.threshold).astype(np.float64))
    labels = values / task.scale
    if task.maximum > 0:
        labels = np.minimum(labels, task.maximum)
    if task.log1p:
        # Below -1 there is no logarithm: infinite, so that the reader refuses the session.
        labels = np.where(labels > -1.0, np.log1p(np.maximum(labels, -1.0 + 1e-12)), -np.inf)
        labels[np.isnan(values)] = np.nan
    return labels


def _feature_column(place: Place, name: str, feature: FeatureConfig, key: str) -> Column:
    kind: Kind = "number" if feature.boundaries or feature.is_number else "integer"
    if feature.is_bag:
        kind = "numbers" if feature.boundaries else "integers"
    return Column(place, feature.column or name, kind, key)
