"""What is reported of predictions that were made before their examples were learnt.

Every number is a function of the set of predictions of a window, whatever their order, so that it
depends neither on the number of ranks nor on where a run was resumed: sums are correctly rounded
(math.fsum). Undefined numbers (AUC of one class, means of nothing) are None.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gr.outcome import TensorsOnTheWay
from gr.retrieval_metrics import RETRIEVAL, RetrievalSeries
from gr.task_metrics import BinarySeries, Columns, Metrics, RegressionSeries, Series
from pipelines.config import TaskConfig

COMPACT_EVERY = 16
"""Updates whose predictions stay on their device before they are moved to the host."""


@dataclass(frozen=True)
class WindowResult:
    """The metrics of one window."""

    window: int
    """As given to `EvalAccumulator.roll`."""
    metrics: Metrics
    """Flat: `ne-click`, `hr@10`, ... Counts are int, undefined values None."""


class EvalAccumulator:
    """Metrics of ranking and retrieval by window (an hour, a day) and over the run.

    A task that is binary gives (L logloss, z logit, p = 1 / (1 + exp(-z)), y label, w weight):
        logloss      sum w L / sum w
        ne           logloss / entropy of the mean label of the same examples
        calibration  sum w p / sum w y
        auc          P(z of a positive > z of a negative), ties half, weighted
        gauc         mean of the AUC of the users who have both labels, weighted by their sum w
    A regression gives mse, mae and rmse in the unit of the scaled value (watch time: s), that is
    after expm1 where the task takes log1p (of at most 100); predictions are cut at the task's
    maximum, as labels are.
    Retrieval gives, from the rank of each target: hr@k = 1[rank <= k], ndcg@k = 1[rank <= k] /
    log2(rank + 1), mrr = 1 / rank, log_pplx = -log probability; means weighted by w.
    num_examples-NAME counts the predictions of weight > 0. A cohort's metrics are those of its
    predictions alone, with /COHORT after their names.

    Memory: 20 bytes a prediction and task while the window is open (retrieval: 16), and 20 bytes a
    prediction of a binary task for the AUC and GAUC of the run, on rank 0, unless `lifetime_auc` is
    off, when these two are None.

    On several ranks each rank updates with its own share, and all call `roll` and `finish` alike;
    rank 0 gets the results, the others none.

    Args:
        tasks: name -> task.
        retrieval: whether ranks will be added.
        ks: cut-offs of hr and ndcg.
        lifetime_auc: keep predictions for the AUC and GAUC of the run.
        cohorts: names of sets of predictions to be scored apart too.

    Source: NE: He et al., "Practical lessons from predicting clicks on ads at Facebook", 2014;
    GAUC (w = 1: by impressions): Zhou et al., "Deep Interest Network", 2018.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskConfig],
        *,
        retrieval: bool = True,
        ks: Iterable[int] = (10, 50),
        lifetime_auc: bool = True,
        cohorts: Iterable[str] = (),
    ) -> None:
        if RETRIEVAL in tasks:
            raise ValueError(f"no task may be called {RETRIEVAL!r}: that names retrieval's metrics")
        self.lifetime_auc = lifetime_auc
        self._tasks = tuple(tasks)
        self._cohorts = tuple(cohorts)
        self._series: dict[str, Series] = {}
        for end in ("", *(f"/{cohort}" for cohort in self._cohorts)):
            for name, task in tasks.items():
                self._series[name + end] = (
                    BinarySeries(name + end)
                    if task.type == "binary"
                    else RegressionSeries(name + end, task)
                )
            if retrieval:
                self._series[RETRIEVAL + end] = RetrievalSeries(ks, end)
        self._window: int | None = None
        self._open = {name: _Records(s.columns) for name, s in self._series.items()}
        self._closed = {name: _Records(s.columns) for name, s in self._series.items()}
        self._sums = {name: np.zeros(s.num_sums) for name, s in self._series.items()}

    def update_ranking(
        self,
        outputs: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        user_id_P: Tensor,
        cohorts: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add predictions to the open window; nothing is waited for on a GPU.

        Args:
            outputs: task -> (P,) as gr.heads.RankingHead returns them.
            labels: task -> (P,), 0 or 1; of a regression transformed, as in the batch.
            weights: task -> (P,); 0 leaves a prediction out.
            user_id_P: int64, for GAUC.
            cohorts: (P,) bool of each cohort.

        Raises:
            ValueError: if no window is open, or a length differs.
        """
        self._require_window()
        for name in self._tasks:
            for end, weight_P in self._weights(weights[name], cohorts):
                self._open[name + end].append(
                    output=outputs[name], label=labels[name], weight=weight_P, user=user_id_P
                )

    def update_retrieval(
        self,
        rank_R: Tensor,
        log_prob_R: Tensor,
        weight_R: Tensor | None = None,
        cohorts: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add ranks to the open window.

        Args:
            rank_R: int64, 1 is best, see gr.retrieval_metrics.catalogue_ranks.
            log_prob_R: log probability of each target.
            weight_R: weights; None means 1.
            cohorts: (R,) bool of each cohort.

        Raises:
            ValueError: if no window is open, or a length differs.
        """
        self._require_window()
        if weight_R is None:
            weight_R = torch.ones_like(log_prob_R)
        for end, weight in self._weights(weight_R, cohorts):
            self._open[RETRIEVAL + end].append(rank=rank_R, log_prob=log_prob_R, weight=weight)

    def _weights(
        self, weight_n: Tensor, cohorts: Mapping[str, Tensor] | None
    ) -> list[tuple[str, Tensor]]:
        """Return (end of the name, weights) of all predictions, and of each cohort."""
        members = cohorts or {}
        return [("", weight_n), *((f"/{c}", weight_n * members[c]) for c in self._cohorts)]

    def take_back(self) -> None:
        """Forget the last update of each kind: of a batch that was scored and then refused."""
        for records in self._open.values():
            records.take_back()

    def roll(self, window: int) -> list[WindowResult]:
        """Say which window the next updates belong to; return the last one if it has ended.

        Raises:
            ValueError: if predictions of the ended window are not finite, a binary label is neither
                0 nor 1, or a target had no rank.
        """
        results = self.finish() if window != self._window else []
        self._window = window
        return results

    def finish(self) -> list[WindowResult]:
        """Close the open window, if there is one, and return its result on rank 0.

        Raises:
            ValueError: as `roll`.
        """
        if self._window is None:
            return []
        window, self._window = self._window, None
        mine = {name: records.columns() for name, records in self._open.items()}
        for records in self._open.values():
            records.clear()
        ranks = _gather_on_rank_0(mine)
        if ranks is None:
            return []
        metrics: Metrics = {}
        for name, series in self._series.items():
            columns = {
                column: torch.cat([rank[name][column] for rank in ranks])
                for column in series.columns
            }
            series.check(columns)
            sums = series.sums(columns)
            metrics |= series.metrics(sums, columns)
            self._sums[name] += sums
            if self.lifetime_auc and isinstance(series, BinarySeries):
                self._closed[name].append(**columns)
        return [WindowResult(window, metrics)]

    def lifetime(self) -> Metrics:
        """Return the metrics over all closed windows (on rank 0; elsewhere of nothing)."""
        metrics: Metrics = {}
        for name, series in self._series.items():
            columns = self._closed[name].columns() if self.lifetime_auc else None
            metrics |= series.metrics(self._sums[name], columns)
        return metrics

    def send(self) -> None:
        """Let a GPU move predictions to the host, which `state_dict` then need not ask it for."""
        for records in (*self._open.values(), *self._closed.values()):
            records.send()

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's state; every rank's is needed to go on in the middle of a window.

        The tensors grow with the predictions. Nothing is exchanged between ranks.
        """
        state = {"window": torch.tensor([] if self._window is None else [self._window]).long()}
        for name in self._series:
            state[f"sums/{name}"] = torch.from_numpy(self._sums[name].copy())
            for kind, records in (("open", self._open), ("closed", self._closed)):
                for column, values in records[name].columns().items():
                    state[f"{kind}/{name}/{column}"] = values
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state by that of a rank.

        Raises:
            ValueError: if the state is of other tasks or cut-offs.
        """
        self._window = None
        for name in self._series:
            self._sums[name][:] = 0
            self._open[name].clear()
            self._closed[name].clear()
        self.merge_state_dict(state)

    def merge_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Add the state of another rank, to go on with fewer ranks.

        Raises:
            ValueError: if the state is of other tasks or cut-offs, or stands in another window.
        """
        expected = {name: value.shape[1:] for name, value in self.state_dict().items()}
        found = {name: value.shape[1:] for name, value in state.items()}
        sizes_differ = any(
            state[f"sums/{name}"].shape != self._sums[name].shape
            for name in self._series
            if f"sums/{name}" in state
        )
        if expected != found or sizes_differ:
            raise ValueError(
                "the state of the metrics is of other tasks or cut-offs (data.tasks, eval.ks): "
                f"expected {sorted(expected)}, found {sorted(found)}"
            )
        if state["window"].numel():
            window = int(state["window"])
            if self._window not in (None, window):
                raise ValueError(f"cannot merge window {window} into window {self._window}")
            self._window = window
        for name, series in self._series.items():
            self._sums[name] += state[f"sums/{name}"].numpy()
            for kind, records in (("open", self._open), ("closed", self._closed)):
                records[name].keep({c: state[f"{kind}/{name}/{c}"] for c in series.columns})

    def _require_window(self) -> None:
        if self._window is None:
            raise ValueError("no window is open: call roll(window) before updates")


class _Records:
    """Columns of predictions: on their device for some updates, then on the host."""

    def __init__(self, dtypes: Mapping[str, torch.dtype]) -> None:
        self._dtypes = dtypes
        self.clear()

    def clear(self) -> None:
        self._new: list[Columns] = []
        self._sent: list[TensorsOnTheWay] = []
        self._kept: list[Columns] = []

    def append(self, **columns: Tensor) -> None:
        if len({len(x) for x in columns.values()}) != 1:
            shapes = {name: tuple(x.shape) for name, x in columns.items()}
            raise ValueError(f"expected columns of one length, got {shapes}")
        if len(self._new) >= COMPACT_EVERY:
            self._receive()  # what was sent so many updates ago: there is nothing to wait for
            self.send()  # before, so that the newest can be taken back
        self._new.append({c: x.detach().to(self._dtypes[c]) for c, x in columns.items()})

    def take_back(self) -> None:
        if self._new:
            self._new.pop()

    def keep(self, columns: Columns) -> None:
        """Add what `columns` returned."""
        self._kept.append({c: x.to(self._dtypes[c]) for c, x in columns.items()})

    def columns(self) -> Columns:
        self.send()
        self._receive()
        if len(self._kept) > 1:
            self._kept = [_concatenate(self._kept, self._dtypes)]
        return self._kept[0] if self._kept else _concatenate([], self._dtypes)

    def send(self) -> None:
        if self._new:
            self._sent.append(TensorsOnTheWay(_concatenate(self._new, self._dtypes)))
            self._new = []

    def _receive(self) -> None:
        for sent in self._sent:
            columns = sent.tensors()
            counts = columns["weight"] != 0
            self._kept.append({c: x[counts] for c, x in columns.items()})
        self._sent = []


def _concatenate(parts: list[Columns], dtypes: Mapping[str, torch.dtype]) -> Columns:
    return {
        c: torch.cat([part[c] for part in parts]) if parts else torch.empty(0, dtype=dtype)
        for c, dtype in dtypes.items()
    }


def _gather_on_rank_0(mine: dict[str, Columns]) -> list[dict[str, Columns]] | None:
    """Return what each rank holds, on rank 0; None on the others."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    is_main = dist.get_rank() == 0
    ranks: list[dict[str, Columns]] = [{} for _ in range(dist.get_world_size())]
    dist.gather_object(mine, ranks if is_main else None, dst=0)
    return ranks if is_main else None
