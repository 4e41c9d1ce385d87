"""Requests and answers as JSON: pydantic models, those of requests made of the run's columns."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from gr.serve_config import ServeConfig
from pipelines.features import Column
from pipelines.reader import END_OF_TIME

MOST_STEPS, MOST_WIDTH = 20, 64
"""Of one request for sequences: it encodes up to so many histories so many times."""
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Time = Field(ge=0, lt=END_OF_TIME, description="seconds since 1970 UTC")
_TYPES: dict[str, Any] = {
    "integer": bool | Int64,
    "number": bool | Int64 | float,
    "integers": list[Int64],
    "numbers": list[float],
}


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
    reused_tokens: int = Field(description="tokens whose keys and values an earlier request left")
    encoded_anew: str = Field(description="why the whole history was encoded; empty: it was not")
    checkpoint_step: int


class NextItems(BaseModel):
    """A sequence of next items."""

    item_ids: list[int]
    log_prob: float = Field(description="log of the sequence's probability")
    score: float = Field(description="log_prob / length ^ length_power")


class SequencesAnswer(BaseModel):
    """Sequences, best first."""

    user_id: int
    time: int
    sequences: list[NextItems]
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
    sequences: type[BaseModel]
    events: type[BaseModel]


def request_schemas(
    config: ServeConfig,
    *,
    event_columns: list[Column],
    feature_columns: list[Column],
    context_columns: list[Column],
    merges_context: bool,
    scores: list[str],
) -> Schemas:
    """Return the models of requests.

    Args:
        config: bounds.
        event_columns: of an event, beside item_id and timestamp.
        feature_columns: of a candidate, beside item_id.
        context_columns: of a session.
        merges_context: whether events have a context of their own.
        scores: what results can be ordered by.
    """
    context = _model("Context", context_columns)
    of_event = [*event_columns, *(context_columns if merges_context else [])]
    ids = (Int64, ...)
    event = _model("Event", of_event, item_id=ids, timestamp=(int, Time))
    candidate = _model("Candidate", feature_columns, item_id=ids)
    an_id = Field(None, description="whose history is read")
    whose: dict[str, Any] = {
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
        "exclude": (list[Int64] | None, Field(None, description="items not to find")),
        "exclude_seen": (bool, Field(False, description="nor those of the history")),
        "allow": (list[Int64] | None, Field(None, description="the only items to find")),
    }
    question: dict[str, Any] = {
        **whose,
        "candidates": (
            list[Int64 | candidate] | None,  # type: ignore[valid-type]
            Field(None, description="items to score: ids, or ids with features"),
        ),
        "retrieve": (int | None, Field(None, ge=1, description="find so many items")),
        "rank_by": (
            dict[str, float] | None,
            Field(None, description=f"weights of some of {', '.join(scores)}"),
        ),
        "top": (int | None, Field(None, ge=1, description="items to return; all if not given")),
    }
    sequences: dict[str, Any] = {
        **whose,
        "steps": (int, Field(ge=1, le=MOST_STEPS, description="items of a sequence, at most")),
        "min_steps": (int, Field(0, ge=0, le=MOST_STEPS, description="at least; 0: as steps")),
        "width": (
            int,
            Field(8, ge=1, le=MOST_WIDTH, description="sequences to follow"),
        ),
        "results": (int, Field(8, ge=1, le=MOST_WIDTH, description="to return, at most")),
        "actions": (
            dict[str, float] | None,
            Field(None, description="what the user does with each; else predicted"),
        ),
        "seconds": (int, Field(1, ge=1, le=10**9, description="from one item to the next")),
        "repeats": (bool, Field(False, description="whether an item may come twice")),
        "length_power": (float, Field(1.0, ge=0, le=10)),
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
        create_model("SequencesQuestion", __config__=STRICT, **sequences),
        create_model("Events", __config__=STRICT, **events),
    )


def _model(name: str, columns: list[Column], **required: Any) -> type[BaseModel]:
    """Return a model with a field a column, which is unknown where it is left out."""
    fields: dict[str, Any] = dict(required)
    for column in columns:
        # An alias, because a column may be called what a model may not.
        field = Field(None, alias=column.name, description=column.wanted_by)
        fields.setdefault(attribute(column.name), (_TYPES[column.kind] | None, field))
    return create_model(name, __config__=STRICT, **fields)


def attribute(name: str) -> str:
    """Return the name that a column has as a field of a model."""
    return f"column_{name.encode().hex()}"
