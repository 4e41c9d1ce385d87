"""From JSON to questions and from recommendations to JSON.

Letters: n events, m candidates.
"""

from typing import Any

import numpy as np

from gr.inference.beam import PREDICTED, FoundSequence, SequenceQuestion, check
from gr.inference.engine import Question, Recommendation, Recommender, before
from gr.inference.requests import Requests
from gr.inference.schemas import (
    Added,
    Answer,
    Item,
    NextItems,
    SequencesAnswer,
    attribute,
    request_schemas,
)
from gr.inference.score_tables import RETRIEVAL
from gr.inference.user_store import UserHistory
from gr.serve_config import ServeConfig
from pipelines.config import ITEM_ID
from pipelines.feature_columns import UNKNOWN_ID
from pipelines.features import Column
from pipelines.history import Ints
from pipelines.reader import END_OF_TIME
from pipelines.schema import EVENT_ITEM_ID, EVENT_TIMESTAMP


class UnknownUserError(ValueError):
    """There is no history of the user."""


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
        self.schemas = request_schemas(
            config,
            event_columns=self.event_columns,
            feature_columns=self.feature_columns,
            context_columns=self.context_columns,
            merges_context=self.merges_context,
            scores=[*recommender.tasks, RETRIEVAL],
        )

    def question(self, body: Any, now: int) -> Question:
        """Return what a request asks.

        Args:
            body: a `schemas.question`.
            now: time of a request that names none, s.

        Raises:
            UnknownUserError: if it relies on a history that is not there.
            ValueError: if it asks for what there is not.
        """
        user_id, time, history = self._whose(body, now)
        recommender = self.recommender
        candidates = None
        if body.candidates is not None:
            candidates = self._candidates(body.candidates, user_id, time, history.context)
        retrieve = body.retrieve or 0
        if retrieve > self.config.max_candidates:
            raise ValueError(
                f"retrieve must be at most {self.config.max_candidates}, got {retrieve}"
            )
        exclude, allow = self._filters(body, history)
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

    def sequence_question(self, body: Any, now: int) -> SequenceQuestion:
        """Return what a request for sequences asks; as `question` does.

        Args:
            body: a `schemas.sequences`.
            now: time of a request that names none, s.
        """
        user_id, time, history = self._whose(body, now)
        exclude, allow = self._filters(body, history)
        question = SequenceQuestion(
            user_id=user_id,
            time=time,
            history=history,
            steps=body.steps,
            min_steps=body.min_steps,
            width=body.width,
            results=body.results,
            actions=PREDICTED if body.actions is None else body.actions,
            seconds=body.seconds,
            repeats=body.repeats,
            length_power=body.length_power,
            exclude=exclude,
            allow=allow,
        )
        check(self.recommender, question)
        return question

    def sequences_answer(
        self, question: SequenceQuestion, found: list[FoundSequence]
    ) -> SequencesAnswer:
        """Return the answer to a question for sequences."""
        return SequencesAnswer(
            user_id=question.user_id,
            time=question.time,
            sequences=[
                NextItems(item_ids=list(x.item_ids), log_prob=x.log_prob, score=x.score)
                for x in found
            ],
            checkpoint_step=self.recommender.step,
        )

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
            reused_tokens=found.reused_tokens,
            encoded_anew=found.encoded_anew,
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

    def _whose(self, body: Any, now: int) -> tuple[int, int, UserHistory]:
        """Return user, time and history of a request."""
        time = now if body.time is None else body.time
        user_id = -1 if body.user_id is None else body.user_id
        return user_id, time, self._history(body, user_id, time)

    def _filters(self, body: Any, history: UserHistory) -> tuple[Ints, Ints | None]:
        """Return what must not be found, and the only items that may be."""
        exclude = np.array(body.exclude or [], np.int64)
        if body.exclude_seen:
            exclude = np.concatenate([exclude, history.ints[:, 0]])
        allow = None if body.allow is None else np.array(body.allow, np.int64)
        if allow is not None:
            self.recommender.check_items(allow)
        return exclude, allow

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
            is_given = np.array([attribute(name) in x.model_fields_set for x in bodies])
            chosen = slice(slot.first, slot.first + slot.width)
            if not slot.feature.is_counter:
                rows[places[is_given], chosen] = encoded[is_given, chosen]

    @property
    def _of_context(self) -> list[str]:
        return [x.name for x in self.context_columns]

    def _check_items(self, ids: Ints) -> None:
        self.recommender.check_items(ids[ids != UNKNOWN_ID])


def _columns(columns: list[Column], bodies: list[Any]) -> dict[str, list[Any]]:
    """Return column -> a value of each; Arrow takes no lists of flags and numbers."""
    kinds: dict[str, Any] = {"integer": int, "number": float}
    found = {}
    for column in columns:
        as_kind = kinds.get(column.kind, list)
        values = [getattr(body, attribute(column.name)) for body in bodies]
        found[column.name] = [None if x is None else as_kind(x) for x in values]
    return found
