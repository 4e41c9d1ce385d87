"""Several steps ahead: the likeliest sequences of next items, by beam search.

Letters: W sequences of the beam, D item dim, E items, T steps, n events.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gr.inference.encoded import EncodedHistory
from gr.inference.engine import Question, Recommender, before, requests_of
from gr.inference.requests import Candidates
from gr.inference.score_tables import prediction
from gr.inference.user_store import UserHistory
from pipelines.features import action_codes
from pipelines.history import Ints

PREDICTED = "predicted"
_CHUNK = 1 << 16
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class SequenceQuestion:
    """What is asked: which items a user meets next, one after the other."""

    user_id: int
    time: int
    """s: of the first step."""
    history: UserHistory
    """Events before the time."""
    steps: int
    """T: items of the longest sequence."""
    min_steps: int = 0
    """Items of the shortest that is returned; 0: as `steps`."""
    width: int = 8
    """Sequences that are followed at a time; with at least E^(T - 1) the search is exact."""
    results: int = 8
    """Sequences to return, at most."""
    actions: Mapping[str, float] | str = PREDICTED
    """What the user is taken to do with each item: action column -> value, others unknown. Or
    PREDICTED: what the ranking head says, for each action column that is the label of a task: of a
    binary task whether the probability is at least 1/2, of a regression its value."""
    seconds: int = 1
    """From one step to the next."""
    repeats: bool = False
    """Whether an item may come twice in a sequence."""
    length_power: float = 1.0
    """Sequences are ordered by log probability / length ^ this; 0: not normalised."""
    exclude: Ints = field(default_factory=lambda: _NONE)
    """Ids that may not come."""
    allow: Ints | None = None
    """The only ids that may come; None: all."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("width", 1), ("results", 1), ("seconds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.min_steps <= self.steps:
            raise ValueError(
                f"min_steps must be within 0 and steps={self.steps}, got {self.min_steps}"
            )
        if not 0 <= self.length_power < np.inf:
            raise ValueError(f"length_power must be at least 0, got {self.length_power}")


@dataclass(frozen=True)
class FoundSequence:
    """A sequence of next items."""

    item_ids: tuple[int, ...]
    log_prob: float
    """Sum over its items of the log of the softmax over the whole catalogue, as the retrieval loss
    has it; what must not come keeps its share."""
    score: float
    """log_prob / length ^ length_power."""


@dataclass(frozen=True)
class _Beam:
    items: tuple[int, ...]
    log_prob: float
    history: UserHistory


@torch.no_grad()
def beam_search(recommender: Recommender, question: SequenceQuestion) -> list[FoundSequence]:
    """Return the sequences found, best first; of equal scores the one with smaller ids.

    Each step encodes the histories anew, with the items so far as events at their times.

    Raises:
        ValueError: if the model cannot retrieve or predict actions, the history is empty, or an
            action or an item is not known.
    """
    check(recommender, question)
    beams, found = [_Beam((), 0.0, question.history)], list[FoundSequence]()
    shortest = question.min_steps or question.steps
    for step in range(question.steps):
        time = question.time + step * question.seconds
        requests = requests_of([_asked(recommender, question, beam, time) for beam in beams])
        encoded = recommender.scorer.encode_history(requests)
        grown = _grow(recommender, question, beams, encoded)
        if step + 1 >= shortest:
            found += [
                FoundSequence(items, log_prob, log_prob / len(items) ** question.length_power)
                for _, items, log_prob in grown
            ]
        if not grown or step + 1 == question.steps:
            break
        beams = _continued(recommender, question, beams, grown, encoded, time)
    return sorted(found, key=lambda x: (-x.score, x.item_ids))[: question.results]


def check(recommender: Recommender, question: SequenceQuestion) -> None:
    """Refuse a question that has no answer.

    Raises:
        ValueError: saying what it lacks.
    """
    if recommender.index is None:
        raise ValueError("the model has no retrieval head, so it does not say what comes next")
    if not len(before(question.history, question.time, recommender.max_events).ints):
        raise ValueError("the history is empty before the time: there is nothing to go on from")
    data = recommender.scorer.config.data
    if isinstance(question.actions, str):
        if question.actions != PREDICTED:
            raise ValueError(f"actions must be {PREDICTED!r} or values, got {question.actions!r}")
        if not recommender.tasks:
            raise ValueError("the model has no ranking head to predict actions: assume some")
    elif unknown := sorted(set(question.actions) - set(data.actions)):
        raise ValueError(
            f"actions names {unknown}: expected some of {sorted(data.actions)} (data.actions)"
        )
    if question.allow is not None:
        recommender.check_items(question.allow)


def _asked(
    recommender: Recommender, question: SequenceQuestion, beam: _Beam, time: int
) -> Question:
    history = before(beam.history, time, recommender.max_events)
    return Question(user_id=question.user_id, time=time, history=history, retrieve=1)


def _grow(
    recommender: Recommender,
    question: SequenceQuestion,
    beams: Sequence[_Beam],
    encoded: EncodedHistory,
) -> list[tuple[int, tuple[int, ...], float]]:
    """Return the best continuations: number of the beam, items, log probability."""
    assert recommender.index is not None
    assert encoded.user_vectors is not None
    temperature = recommender.scorer.config.loss.temperature
    catalogue = recommender.index.catalogue
    normalizer = log_normalizers(encoded.user_vectors, catalogue.vectors_ED, temperature)
    taken = [() if question.repeats else beam.items for beam in beams]
    best = recommender.index.search(
        encoded.user_vectors,
        min(question.width, len(catalogue.ids)),
        exclude=[np.array([*question.exclude, *items], np.int64) for items in taken],
        allow=[question.allow] * len(beams),
    )
    grown = []
    for b, beam in enumerate(beams):
        for item, score in zip(best.ids[b].tolist(), best.scores[b].tolist(), strict=True):
            if score > -np.inf:
                log_prob = beam.log_prob + score / temperature - float(normalizer[b])
                grown.append((b, (*beam.items, item), log_prob))
    return sorted(grown, key=lambda x: (-x[2], x[1]))[: question.width]


def log_normalizers(user_WD: Tensor, item_ED: Tensor, temperature: float) -> Tensor:
    """Return (W,) float64 on the CPU: log sum over all items of exp(u . x / temperature)."""
    total_W = torch.full((len(user_WD),), -torch.inf, device=user_WD.device)
    for first in range(0, len(item_ED), _CHUNK):
        score_WC = user_WD.float() @ item_ED[first : first + _CHUNK].float().T
        total_W = torch.logaddexp(total_W, (score_WC / temperature).logsumexp(1))
    return total_W.double().cpu()


def _continued(
    recommender: Recommender,
    question: SequenceQuestion,
    beams: Sequence[_Beam],
    grown: Sequence[tuple[int, tuple[int, ...], float]],
    encoded: EncodedHistory,
    time: int,
) -> list[_Beam]:
    """Return beams whose histories hold their newest item, met at `time`."""
    # The scorer takes candidates history after history.
    grown = sorted(grown, key=lambda x: x[0])
    rows = [
        recommender.item_rows(np.array(items[-1:]), time=time, context=beams[b].history.context)
        for b, items, _ in grown
    ]
    codes = _codes(recommender, question, np.concatenate(rows), [b for b, *_ in grown], encoded)
    continued = []
    for n, (b, items, log_prob) in enumerate(grown):
        history = before(beams[b].history, time, recommender.max_events)
        longer = UserHistory(
            np.concatenate([history.ints, rows[n]]),
            np.concatenate([history.codes, codes[n : n + 1]]),
            history.context,
        )
        continued.append(_Beam(items, log_prob, longer))
    return continued


def _codes(
    recommender: Recommender,
    question: SequenceQuestion,
    rows: Ints,
    of_beam: Sequence[int],
    encoded: EncodedHistory,
) -> np.ndarray:
    """Return (n, S + 1) action codes of new events, assumed or predicted."""
    data = recommender.scorer.config.data
    if isinstance(question.actions, str):
        values = _predicted(recommender, rows, of_beam, encoded)
    else:
        values = {name: np.full(len(rows), float(x)) for name, x in question.actions.items()}
    codes = np.zeros((len(rows), recommender.encoder.encoder.num_codes), np.uint8)
    for column, (name, action) in enumerate(data.actions.items()):
        if name in values:
            codes[:, column] = action_codes(values[name], action)
    return codes


def _predicted(
    recommender: Recommender, rows: Ints, of_beam: Sequence[int], encoded: EncodedHistory
) -> dict[str, np.ndarray]:
    """Return what the ranking head says of each action column."""
    counts = np.bincount(np.array(of_beam), minlength=encoded.requests.num_requests)
    floats = np.full((len(rows), recommender.encoder.encoder.num_floats), np.nan, np.float32)
    ranking = recommender.scorer.score(encoded, Candidates(counts, rows, floats)).ranking
    values: dict[str, np.ndarray] = {}
    for name, task in recommender.tasks.items():
        found = prediction(ranking[name].float().cpu(), task).numpy()
        if task.type == "binary":
            found = np.where(found >= 0.5, task.threshold, task.threshold - 1)
        values.setdefault(task.action, found)  # the first task that predicts it
    return values
