"""Requests and answers as JSON: their schema, made of the run's columns, and what they mean.

Letters: n events, m candidates.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, create_model

from gr.inference.engine import Question, Recommendation, Recommender, before
from gr.inference.requests import Requests
from gr.inference.score_tables import RETRIEVAL
from gr.inference.user_store import UserHistory
from gr.serve_config import ServeConfig
from pipelines.config import ITEM_ID
from pipelines.feature_columns import UNKNOWN_ID
from pipelines.features import Column
from pipelines.history import Ints
from pipelines.reader import END_OF_TIME
from pipelines.schema import EVENT_ITEM_ID, EVENT_TIMESTAMP

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Time = Field(ge=0, lt=END_OF_TIME, description="seconds since 1970 UTC")
_TYPES: dict[str, Any] = {
    "integer": bool | Int64,
    "number": bool | Int64 | float,
    "integers": list[Int64],
    "numbers": list[float],
}


class UnknownUserError(ValueError):
    """There is no history of the user."""


class Problem(BaseModel):
    """Why a request was not answered."""

    error: str = Field(description="what was expected, what was found, what to do")


class Item(BaseModel):
    """A recommended item."""

    item_id: int
    order: float = Field(description="weighted sum by which the items are ordered")
    scores: dict[str, float] = Field(
        description="task: probability, or value in the unit of the log; retrieval: likeness"
    )


class Answer(BaseModel):
    """Items, best first; of equal order by id."""

    user_id: int
    time: int
    items: list[Item]
    history_events: int = Field(description="events that the model read")
    checkpoint_step: int


class Added(BaseModel):
    """What became of events."""

    user_id: int
    history_events: int = Field(description="events kept of this user")


class UserState(BaseModel):
    """What is known of a user."""

    user_id: int
    history_events: int
    newest_timestamp: int | None


class Health(BaseModel):
    """That the server answers."""

    status: str
    checkpoint_step: int
    users: int
    items: int
    tasks: list[str]
    waiting: int


@dataclass(frozen=True)
class Schemas:
    """Pydantic models of the requests, whose fields are the columns that the run reads."""

    question: type[BaseModel]
    events: type[BaseModel]


class Translator:
    """From JSON to questions, and from recommendations to JSON.

    Args:
        recommender: knows users, items and columns.
        config: bounds.
    """

    def __init__(self, recommender: Recommender, config: ServeConfig) -> None:
        self.recommender, self.config = recommender, config
        columns = recommender.encoder.encoder.columns
        self.event_columns = [
            x
            for x in columns
            if x.place == "events" and x.name not in (EVENT_ITEM_ID, EVENT_TIMESTAMP)
        ]
        self.context_columns = [x for x in columns if x.place == "context"]
        encoder = recommender.encoder.encoder
        of_items = {
            slot.feature.column or slot.name
            for slot in encoder.item_slots
            if not slot.feature.is_counter
        }
        self.feature_columns = [x for x in self.event_columns if x.name in of_items]
        self.merges_context = encoder.merges_context
        self.schemas = self._schemas()

    def question(self, body: Any, now: int) -> Question:
        """Return what a request asks.

        Args:
            body: a `schemas.question`.
            now: time of a request that names none, s.

        Raises:
            UnknownUserError: if it relies on a history that is not there.
            ValueError: if it asks for what there is not.
        """
        time = now if body.time is None else body.time
        user_id = -1 if body.user_id is None else body.user_id
        history = self._history(body, user_id, time)
        recommender = self.recommender
        candidates = None
        if body.candidates is not None:
            candidates = self._candidates(body.candidates, user_id, time, history.context)
        retrieve = body.retrieve or 0
        if retrieve > self.config.max_candidates:
            raise ValueError(
                f"retrieve must be at most {self.config.max_candidates}, got {retrieve}"
            )
        exclude = np.array(body.exclude or [], np.int64)
        if body.exclude_seen:
            exclude = np.concatenate([exclude, history.ints[:, 0]])
        allow = None if body.allow is None else np.array(body.allow, np.int64)
        if allow is not None:
            recommender.check_items(allow)
        if not retrieve and (len(exclude) or allow is not None):
            raise ValueError(
                "exclude, exclude_seen and allow say what may be retrieved: with candidates leave "
                "out what is not wanted"
            )
        question = Question(
            user_id=user_id,
            time=time,
            history=history,
            candidates=candidates,
            retrieve=retrieve,
            exclude=exclude,
            allow=allow,
            rank_by=body.rank_by or None,
            top=body.top,
        )
        recommender.check(question)
        return question

    def answer(self, question: Question, found: Recommendation) -> Answer:
        """Return the answer to a question."""
        scores = {name: values.tolist() for name, values in found.scores.items()}
        return Answer(
            user_id=question.user_id,
            time=question.time,
            items=[
                Item(item_id=i, order=order, scores={name: x[n] for name, x in scores.items()})
                for n, (i, order) in enumerate(
                    zip(found.item_ids.tolist(), found.order.tolist(), strict=True)
                )
            ],
            history_events=found.num_history,
            checkpoint_step=self.recommender.step,
        )

    def add(self, body: Any) -> Added:
        """Add events to a user's history.

        Args:
            body: a `schemas.events`.

        Raises:
            ValueError: if an item is not known.
        """
        context = body.context
        events = self._encode(body.events, body.user_id, END_OF_TIME, context)
        kept = self.recommender.store.add(
            body.user_id, events.ints, events.codes, None if context is None else events.context[0]
        )
        return Added(user_id=body.user_id, history_events=kept)

    def _history(self, body: Any, user_id: int, time: int) -> UserHistory:
        most = self.recommender.max_events
        if body.history is not None:
            events = self._encode(body.history, user_id, time, body.context)
            return UserHistory(events.ints, events.codes, events.context[0])
        if body.user_id is None:
            raise ValueError("expected user_id, whose history is known, or a history")
        stored = self.recommender.store.history(user_id)
        if stored is None:
            raise UnknownUserError(
                f"nothing is known of user {user_id}: give a history, or send its events to /events"
            )
        if body.context is not None:
            given = self._encode([], user_id, time, body.context).context[0]
            stored = UserHistory(stored.ints, stored.codes, given)
        return before(stored, time, most)

    def _encode(self, events: list[Any], user_id: int, time: int, context: Any) -> Requests:
        """Return one request with these events as its history."""
        self._check_items(np.array([x.item_id for x in events], np.int64))
        columns = {
            EVENT_ITEM_ID: [x.item_id for x in events],
            EVENT_TIMESTAMP: [x.timestamp for x in events],
            **_columns(self.event_columns, events),
        }
        if self.merges_context:
            columns |= _columns(self.context_columns, events)
        known = [] if context is None else [context]
        of_user = _columns(self.context_columns, known) if known else {}
        for column in self.context_columns:
            of_user.setdefault(column.name, [None])
        found: Requests = self.recommender.encoder.requests(
            [user_id], [time], columns, [len(events)], of_user
        )
        return found

    def _candidates(self, given: list[Any], user_id: int, time: int, context: Ints) -> Ints:
        """Return the encoded candidates; features that are not given are those of the store."""
        ids = np.array([x if isinstance(x, int) else x.item_id for x in given], np.int64)
        if not len(ids):
            raise ValueError("candidates must not be empty: give some, or retrieve")
        if len(ids) > self.config.max_candidates:
            raise ValueError(
                f"at most {self.config.max_candidates} candidates a request, got {len(ids)}: send "
                "several requests"
            )
        values, counts = np.unique(ids, return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"candidates must be distinct: item {int(values[counts > 1][0])} stands "
                f"{int(counts.max())} times"
            )
        self._check_items(ids)
        recommender = self.recommender
        rows = recommender.item_rows(ids, time=time, context=context)
        described = [(n, x) for n, x in enumerate(given) if not isinstance(x, int)]
        if described:
            self._describe(rows, described, user_id, time)
        return rows

    def _describe(
        self, rows: Ints, described: list[tuple[int, Any]], user_id: int, time: int
    ) -> None:
        """Write the features that candidates bring into their rows."""
        recommender, bodies = self.recommender, [x for _, x in described]
        columns = {ITEM_ID: [x.item_id for x in bodies]}
        columns |= _columns(self.feature_columns, bodies)
        for column in recommender.encoder.encoder.columns:
            if column.place == "events" and column.name != EVENT_TIMESTAMP:
                columns.setdefault(column.name, [None] * len(bodies))
        nobody = recommender.encoder.requests(
            [user_id],
            [time],
            {name: [] for name in (*columns, EVENT_TIMESTAMP, *self._of_context)},
            [0],
            {name: [None] for name in self._of_context},
        )
        encoded = recommender.encoder.candidates(nobody, columns, [len(bodies)]).ints
        places = np.array([n for n, _ in described])
        for slot in recommender.encoder.encoder.item_slots:
            name = slot.feature.column or slot.name
            is_given = np.array([_attribute(name) in x.model_fields_set for x in bodies])
            chosen = slice(slot.first, slot.first + slot.width)
            if not slot.feature.is_counter:
                rows[places[is_given], chosen] = encoded[is_given, chosen]

    @property
    def _of_context(self) -> list[str]:
        return [x.name for x in self.context_columns]

    def _check_items(self, ids: Ints) -> None:
        self.recommender.check_items(ids[ids != UNKNOWN_ID])

    def _schemas(self) -> Schemas:
        config = self.config
        context = _model("Context", self.context_columns)
        of_event = [*self.event_columns, *(self.context_columns if self.merges_context else [])]
        ids = (Int64, ...)
        event = _model("Event", of_event, item_id=ids, timestamp=(int, Time))
        candidate = _model("Candidate", self.feature_columns, item_id=ids)
        an_id = Field(None, description="whose history is read")
        tasks = [*self.recommender.tasks, RETRIEVAL]
        question: dict[str, Any] = {
            "user_id": (Int64 | None, an_id),
            "time": (
                int | None,
                Field(None, ge=0, lt=END_OF_TIME, description="s; now if not given"),
            ),
            "history": (
                list[event] | None,  # type: ignore[valid-type]
                Field(
                    None,
                    max_length=config.max_history,
                    description="in the place of the stored one; what is not before the time is "
                    "not read",
                ),
            ),
            "context": (context | None, Field(None, description="in the place of the stored one")),
            "candidates": (
                list[Int64 | candidate] | None,  # type: ignore[valid-type]
                Field(None, description="items to score: ids, or ids with features"),
            ),
            "retrieve": (int | None, Field(None, ge=1, description="find so many items")),
            "exclude": (list[Int64] | None, Field(None, description="items not to find")),
            "exclude_seen": (bool, Field(False, description="nor those of the history")),
            "allow": (list[Int64] | None, Field(None, description="the only items to find")),
            "rank_by": (
                dict[str, float] | None,
                Field(None, description=f"weights of some of {', '.join(tasks)}"),
            ),
            "top": (int | None, Field(None, ge=1, description="items to return; all if not given")),
        }
        events: dict[str, Any] = {
            "user_id": ids,
            "events": (
                list[event],  # type: ignore[valid-type]
                Field(min_length=1, max_length=config.max_history),
            ),
            "context": (context | None, Field(None, description="of the session; else as before")),
        }
        return Schemas(
            create_model("Question", __config__=STRICT, **question),
            create_model("Events", __config__=STRICT, **events),
        )


def _model(name: str, columns: list[Column], **required: Any) -> type[BaseModel]:
    """Return a model with a field a column, which is unknown where it is left out."""
    fields: dict[str, Any] = dict(required)
    for column in columns:
        # An alias, because a column may be called what a model may not.
        field = Field(None, alias=column.name, description=column.wanted_by)
        fields.setdefault(_attribute(column.name), (_TYPES[column.kind] | None, field))
    return create_model(name, __config__=STRICT, **fields)


def _attribute(name: str) -> str:
    return f"column_{name.encode().hex()}"


def _columns(columns: list[Column], bodies: list[Any]) -> dict[str, list[Any]]:
    return {x.name: [getattr(b, _attribute(x.name)) for b in bodies] for x in columns}
