"""From questions to recommendations: encode histories, retrieve, rank, with one checkpoint.

Letters: B questions, n results, m candidates, I and S columns of an encoded event, X of a context.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from gr.config import TrainConfig
from gr.evaluate import load_learnt
from gr.inference.catalogue import ItemCatalogue, catalogue_of
from gr.inference.encoded import EncodedHistory
from gr.inference.mfalcon import Scorer, trainer_lookup
from gr.inference.prefix import why_unstable
from gr.inference.requests import Candidates, Requests
from gr.inference.retrieval import ExactIndex, FaissIndex
from gr.inference.score_tables import RETRIEVAL, prediction
from gr.inference.series import hide
from gr.inference.user_store import UserHistory, UserStore, read_users
from gr.logs import open_log
from gr.model import SequenceModel
from gr.parallel import World
from gr.runlog import RunDir
from gr.trainer import Trainer
from pipelines.history import TIMESTAMP, Ints

Scores = NDArray[np.float32]
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked about one user at one time."""

    user_id: int
    time: int
    """s: when the prediction is made; later events are not read."""
    history: UserHistory
    """Events before the time, the newest `Recommender.max_events` at most."""
    candidates: Ints | None = None
    """(m, I) encoded items to score (`Recommender.item_rows`); None: `retrieve` finds them."""
    retrieve: int = 0
    """How many items to find in the catalogue."""
    exclude: Ints = field(default_factory=lambda: _NONE)
    """Ids that must not be found."""
    allow: Ints | None = None
    """The only ids that may be found; None: all."""
    rank_by: Mapping[str, float] | None = None
    """Task, or retrieval -> weight in the sum by which results are ordered; None: the first task,
    or retrieval where the model ranks nothing."""
    top: int | None = None
    """Results to return; None: all."""


@dataclass(frozen=True)
class Recommendation:
    """Items, best first; of equal order by id."""

    item_ids: Ints
    """(n,) int64."""
    order: NDArray[np.float64]
    """(n,): the weighted sum."""
    scores: dict[str, Scores]
    """Task -> (n,): probability, or value in the unit of the log; retrieval -> (n,) dot products
    with the user's vector, where the items were retrieved."""
    num_history: int
    """Events that the model read."""
    reused_tokens: int = 0
    """Tokens of them whose keys and values an earlier request had left."""
    encoded_anew: str = ""
    """Why the whole history was encoded; empty: it was not."""


class Recommender:
    """Answers questions with one checkpoint.

    Args:
        scorer: encodes histories and scores candidates.
        index: of the catalogue; None if the model has no retrieval head.
        store: users and items that are known.
        step: of the checkpoint.
    """

    def __init__(
        self, scorer: Scorer, index: ExactIndex | None, store: UserStore, *, step: int = 0
    ) -> None:
        self.scorer, self.index, self.store, self.step = scorer, index, store, step
        self.tasks = scorer.config.data.tasks if scorer.model.ranking is not None else {}
        self.encoder = scorer.encoder
        self.max_events = scorer.encoder.max_events

    @property
    def catalogue(self) -> ItemCatalogue | None:
        """The items that can be found; None without retrieval."""
        return None if self.index is None else self.index.catalogue

    def item_rows(self, ids: Ints, *, time: int, context: Ints) -> Ints:
        """Return (m, I) encoded candidates, with the features that their newest event had.

        Counters, which hold at the time of an event only, are unknown.

        Args:
            ids: (m,) int64.
            time: of the prediction, s.
            context: (X,) int64, of the user.
        """
        rows, is_known = self.store.item_rows(ids)
        encoder = self.encoder.encoder
        for slot in encoder.item_slots:
            if slot.feature.is_counter:
                hide(rows, slot)
            else:
                unknown = rows[~is_known]
                hide(unknown, slot)
                rows[~is_known] = unknown
        rows[:, 0], rows[:, TIMESTAMP] = ids, time
        if encoder.merges_context:
            rows[:, encoder.num_ints - encoder.num_context :] = context
        return rows

    def check_items(self, ids: Ints) -> None:
        """Refuse items that the model does not know.

        Raises:
            ValueError: naming the first.
        """
        if self.catalogue is not None:
            self.catalogue.check(ids)

    def check(self, question: Question) -> None:
        """Refuse a question that has no answer.

        Raises:
            ValueError: saying what it lacks.
        """
        if (question.candidates is None) == (question.retrieve == 0):
            raise ValueError(
                "expected candidates, or retrieve: how many to find in the catalogue; got "
                f"{'neither' if question.candidates is None else 'both'}"
            )
        if question.retrieve:
            if self.index is None:
                raise ValueError("the model has no retrieval head: give candidates")
            if not len(question.history.ints):
                raise ValueError(
                    "the history is empty before the time of the request, so there is nothing to "
                    "retrieve by: give candidates, or a history"
                )
        if question.candidates is not None and not self.tasks and self.index is None:
            raise ValueError("the model has neither a ranking nor a retrieval head")
        known = {*self.tasks, *([RETRIEVAL] if self._compares(question) else [])}
        unknown = sorted({*(question.rank_by or {})} - known)
        if unknown:
            raise ValueError(f"rank_by names {unknown}: expected some of {sorted(known)}")

    @torch.no_grad()
    def answer(self, questions: Sequence[Question]) -> list[Recommendation]:
        """Answer questions together; each as if it were alone.

        Raises:
            ValueError: if one has no answer, or an id is outside a static table.
        """
        for question in questions:
            self.check(question)
        requests = requests_of(questions)
        if any(self._compares(question) for question in questions):
            encoded = self.scorer.encode_history(requests)
            ids, rows, retrieval = self._candidates(questions, encoded.user_vectors)
            ranking = self._score(encoded, ids, rows)
        else:
            ids, rows, retrieval = self._candidates(questions, None)
            candidates = self._encoded_items(ids, rows)
            encoded, scored = self.scorer.answer(requests, candidates)
            ranking = scored.ranking
        counts = np.array([len(x) for x in ids], np.int64)
        scores: list[dict[str, Scores]] = [{} for _ in questions]
        for name, outputs in ranking.items():
            values = prediction(outputs.float().cpu(), self.tasks[name]).float().numpy()
            for b, part in enumerate(np.split(values, np.cumsum(counts)[:-1])):
                scores[b][name] = part
        for b, found in enumerate(retrieval):
            if found is not None:
                scores[b][RETRIEVAL] = found
        return [
            replace(
                _ordered(question, ids[b], scores[b], tuple(self.tasks)),
                reused_tokens=int(encoded.reused[b]),
                encoded_anew=encoded.reasons[b],
            )
            for b, question in enumerate(questions)
        ]

    def _encoded_items(self, ids: Sequence[Ints], rows: Sequence[Ints]) -> Candidates:
        counts = np.array([len(x) for x in ids], np.int64)
        num_floats = self.encoder.encoder.num_floats
        floats = np.full((int(counts.sum()), num_floats), np.nan, np.float32)
        return Candidates(counts, np.concatenate([*rows, *_no_rows(self)]), floats)

    def _score(
        self, encoded: EncodedHistory, ids: Sequence[Ints], rows: Sequence[Ints]
    ) -> dict[str, torch.Tensor]:
        if not self.tasks:
            return {}
        return self.scorer.score(encoded, self._encoded_items(ids, rows)).ranking

    @torch.no_grad()
    def raw(self, question: Question) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Return what the heads say of a question's candidates and its user, as they say it."""
        assert question.candidates is not None
        encoded = self.scorer.encode_history(requests_of([question]))
        ids = [question.candidates[:, 0]]
        ranking = self._score(encoded, ids, [question.candidates])
        return ranking, None if encoded.user_vectors is None else encoded.user_vectors[0]

    def _compares(self, question: Question) -> bool:
        """Return whether a question's items are compared with the user's vector."""
        return self.index is not None and (question.retrieve > 0 or not self.tasks)

    def _candidates(
        self, questions: Sequence[Question], vectors: torch.Tensor | None
    ) -> tuple[list[Ints], list[Ints], list[Scores | None]]:
        """Return of each question the ids, the rows, and the scores of what was retrieved."""
        found = self._retrieve(questions, vectors)
        ids: list[Ints] = []
        rows: list[Ints] = []
        scores: list[Scores | None] = []
        for b, question in enumerate(questions):
            if b in found:
                chosen, score = found[b]
                of_user = question.history.context
                rows.append(self.item_rows(chosen, time=question.time, context=of_user))
            else:
                assert question.candidates is not None
                chosen, score = question.candidates[:, 0], None
                rows.append(question.candidates)
            ids.append(chosen)
            scores.append(score)
        return ids, rows, scores

    def _retrieve(
        self, questions: Sequence[Question], vectors: torch.Tensor | None
    ) -> dict[int, tuple[Ints, Scores]]:
        """Return ids and scores by number of the question, of those compared with the user."""
        compared = [b for b, question in enumerate(questions) if self._compares(question)]
        if not compared:
            return {}
        assert self.index is not None
        assert vectors is not None
        k, allow = [], []
        for b in compared:
            own = questions[b].candidates
            k.append(questions[b].retrieve if own is None else len(own))
            allow.append(questions[b].allow if own is None else own[:, 0])
        best = self.index.search(
            vectors[compared],
            max(1, *k),
            exclude=[questions[b].exclude for b in compared],
            allow=allow,
        )
        found = {}
        for place, b in enumerate(compared):
            is_there = best.scores[place, : k[place]] > -np.inf
            chosen = best.ids[place, : k[place]][is_there]
            found[b] = chosen, best.scores[place, : k[place]][is_there]
        return found


def requests_of(questions: Sequence[Question]) -> Requests:
    """Return the histories of questions, as a Scorer takes them."""
    histories = [question.history for question in questions]
    return Requests(
        user_id=np.array([question.user_id for question in questions], np.int64),
        time=np.array([question.time for question in questions], np.int64),
        context=np.stack([history.context for history in histories]),
        counts=np.array([len(history.ints) for history in histories], np.int64),
        ints=np.concatenate([history.ints for history in histories]),
        codes=np.concatenate([history.codes for history in histories]),
    )


def before(history: UserHistory, time: int, max_events: int) -> UserHistory:
    """Return the newest events of a history strictly before a time."""
    end = int(np.searchsorted(history.ints[:, TIMESTAMP], time, side="left"))
    chosen = slice(max(0, end - max_events), end)
    return UserHistory(history.ints[chosen], history.codes[chosen], history.context)


def load_recommender(
    config: TrainConfig,
    run_dir: str,
    *,
    world: World,
    step: int | None = None,
    faiss: str = "",
    cache_bytes: int = 0,
    tables: str = "fp32",
) -> Recommender:
    """Return what answers questions with a checkpoint, knowing the users of the run's log.

    Args:
        config: `gr.evaluate.run_config` of the run.
        run_dir: the run directory.
        world: one process, and where the model goes.
        step: of the checkpoint; None means the newest.
        faiss: description of a FAISS index in the place of the exact one; empty: exact.
        cache_bytes: memory for keys and values from one request to the next, where the model allows
            it, or on a GPU, where it also holds those of one request.
        tables: fp32, or int4: rows of histories and candidates in 4 bits, in host memory. Retrieval
            compares with the items' vectors as they were trained.

    Raises:
        ValueError: if there is no such checkpoint, it is of another model, or the log cannot be
            used.
    """
    trainer, step = load_trainer(config, run_dir, world=world, step=step)
    return recommender_of(trainer, step, faiss=faiss, cache_bytes=cache_bytes, tables=tables)


def load_trainer(
    config: TrainConfig, run_dir: str, *, world: World, step: int | None = None
) -> tuple[Trainer, int]:
    """Return a trainer with the weights of a checkpoint, and the checkpoint's step.

    Arguments and errors: as `load_recommender`.
    """
    if config.data.window == "epoch":
        raise ValueError(
            "data.window=epoch numbers the users and items of an event log anew, so answers could "
            "not name them: serve a run over a session-end log"
        )
    source = open_log(config.data)
    return load_learnt(config, RunDir(run_dir), world=world, source=source, step=step)


def recommender_of(
    trainer: Trainer, step: int, *, faiss: str = "", cache_bytes: int = 0, tables: str = "fp32"
) -> Recommender:
    """Return what answers questions with a trainer's weights.

    Args:
        trainer: with the weights of a checkpoint.
        step: of the checkpoint.
        faiss: as `load_recommender`.
        cache_bytes: likewise.
        tables: likewise; the trainer's own are gone after int4.

    Raises:
        ValueError: if the model cannot be asked, or the log cannot be used.
    """
    config, device = trainer.config, trainer.world.device
    if not isinstance(trainer.model, SequenceModel):
        raise ValueError(
            "model.encoder=dlrm scores events with counters that only a log holds: use gr recommend"
        )
    if device.type == "cpu" and why_unstable(config):
        cache_bytes = 0
    index: ExactIndex | None = None
    if trainer.model.retrieval is not None:
        catalogue = catalogue_of(trainer)
        index = FaissIndex(catalogue, faiss) if faiss else ExactIndex(catalogue)
    elif faiss:
        raise ValueError("a FAISS index needs a model with a retrieval head (model.head.retrieval)")
    lookup = trainer_lookup(trainer, form=tables)
    # Once, not for each request, which would walk through the modules twice.
    trainer.model.eval()
    scorer = Scorer(config, trainer.model, lookup, device, cache_bytes=cache_bytes)
    return Recommender(scorer, index, read_users(scorer.encoder.data), step=step)


def _ordered(
    question: Question, ids: Ints, scores: dict[str, Scores], tasks: tuple[str, ...]
) -> Recommendation:
    weights = question.rank_by or {(tasks[0] if tasks else RETRIEVAL): 1.0}
    for name, values in scores.items():
        if not np.isfinite(values).all():
            raise ValueError(
                f"the score {name} of item {int(ids[~np.isfinite(values)][0])} is not finite: look "
                "for absurd values among the features of the request"
            )
    total = np.zeros(len(ids))
    with np.errstate(over="ignore", invalid="ignore"):
        for name, weight in weights.items():
            total += weight * scores[name].astype(np.float64)
    if not np.isfinite(total).all():
        raise ValueError(f"rank_by has weights that are too large: {dict(weights)}")
    best = np.lexsort((ids, -total))[: question.top]
    return Recommendation(
        item_ids=ids[best],
        order=total[best],
        scores={name: values[best] for name, values in scores.items()},
        num_history=len(question.history.ints),
    )


def _no_rows(recommender: Recommender) -> list[Ints]:
    return [np.empty((0, recommender.encoder.encoder.num_ints), np.int64)]
