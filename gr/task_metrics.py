"""Metrics of one task, from all predictions of a window.

Letters: N predictions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.config import TaskConfig

Array = npt.NDArray[np.float64]
Columns = dict[str, Tensor]
Metrics = dict[str, float | int | None]


def auc(output: npt.ArrayLike, label: npt.ArrayLike, weight: npt.ArrayLike) -> float | None:
    """Return the area under the ROC curve, ties half; None if one class has no weight.

    Args:
        output: (N,) scores.
        label: (N,) 0 or 1.
        weight: (N,) non-negative.
    """
    output = np.asarray(output)
    return gauc(output, label, weight, np.zeros(len(output), np.int64))


def gauc(
    output: npt.ArrayLike, label: npt.ArrayLike, weight: npt.ArrayLike, group: npt.ArrayLike
) -> float | None:
    """Return the mean AUC of the groups that have both labels, each by its sum of weights.

    Args:
        output: (N,) scores.
        label: (N,) 0 or 1.
        weight: (N,) non-negative.
        group: (N,) int64, for instance users.
    """
    output, label, group = np.asarray(output), np.asarray(label), np.asarray(group)
    weight = np.asarray(weight, np.float64)
    if len(output) == 0:
        return None
    # The order within a tie changes nothing: sums of fp32 weights are exact in fp64.
    order = np.lexsort((output, group))
    output, label, group, weight = output[order], label[order], group[order], weight[order]
    positive = np.where(label > 0.5, weight, 0.0)
    is_start = np.ones(len(output), bool)
    is_start[1:] = (output[1:] != output[:-1]) | (group[1:] != group[:-1])
    ties = np.flatnonzero(is_start)
    positive_t = np.add.reduceat(positive, ties)
    negative_t = np.add.reduceat(weight - positive, ties)
    group_t = group[ties]
    groups = np.flatnonzero(np.concatenate([[True], group_t[1:] != group_t[:-1]]))
    below_t = np.cumsum(negative_t) - negative_t
    below_t -= np.repeat(below_t[groups], np.diff(np.append(groups, len(ties))))
    wins_g = np.add.reduceat(positive_t * (below_t + 0.5 * negative_t), groups)
    positive_g = np.add.reduceat(positive_t, groups)
    negative_g = np.add.reduceat(negative_t, groups)
    both = (positive_g > 0) & (negative_g > 0)
    if not both.any():
        return None
    auc_g = wins_g[both] / (positive_g[both] * negative_g[both])
    weight_g = (positive_g + negative_g)[both]
    return math.fsum(auc_g * weight_g) / math.fsum(weight_g)


class Series(ABC):
    """What one task, or retrieval, keeps of each prediction and reports of a window.

    Args:
        name: ends the names of the metrics.
    """

    columns: Mapping[str, torch.dtype] = {
        "output": torch.float32,
        "label": torch.float32,
        "weight": torch.float32,
        "user": torch.int64,
    }
    num_sums: int

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, columns: Columns) -> None:
        """Refuse predictions that would make nonsense of the metrics."""
        for column, values in columns.items():
            self.refuse(~values.isfinite(), values, f"{column} must be finite")
        self.refuse(columns["weight"] < 0, columns["weight"], "weight must not be negative")

    @abstractmethod
    def sums(self, columns: Columns) -> Array:
        """Return (num_sums,) fp64, additive over windows; first the number of predictions."""

    @abstractmethod
    def metrics(self, sums: Array, columns: Columns | None) -> Metrics:
        """Return the metrics; `columns` are None where predictions were not kept."""

    def refuse(self, is_bad: Tensor, values: Tensor, rule: str) -> None:
        """Raise a ValueError that says how many of `values` break the rule, if any does."""
        if is_bad.any():
            raise ValueError(
                f"metrics of {self.name}: {rule}, but {int(is_bad.sum())} of {len(values)} "
                f"predictions of the window are not so, the first is {values[is_bad][0].item()}"
            )


class BinarySeries(Series):
    """A binary task: logit, label 0 or 1, weight, user. Formulae: gr.metrics.EvalAccumulator."""

    num_sums = 5

    def check(self, columns: Columns) -> None:
        """Refuse also labels other than 0 and 1."""
        super().check(columns)
        label = columns["label"]
        self.refuse((label != 0) & (label != 1), label, "a binary label must be 0 or 1")

    def sums(self, columns: Columns) -> Array:
        """Return number, weight, logloss, predicted and labelled positives."""
        z, y, w = float64_columns(columns, "output", "label", "weight")
        # exp(-|z|) never overflows, and keeps small losses exact.
        small = np.exp(-np.abs(z))
        logloss = np.log1p(small) + np.maximum(z, 0) - z * y
        probability = np.where(z >= 0, 1.0, small) / (1 + small)
        return weighted_sums(w, w * logloss, w * probability, w * y)

    def metrics(self, sums: Array, columns: Columns | None) -> Metrics:
        """Return ne, logloss, calibration, auc, gauc."""
        num, weight, logloss, predicted, labelled = sums.tolist()
        mean = divide(logloss, weight)
        rate = divide(labelled, weight)
        entropy = 0.0
        if rate is not None and 0 < rate < 1:
            entropy = -rate * math.log(rate) - (1 - rate) * math.log1p(-rate)
        values: Metrics = {
            "ne": None if mean is None else divide(mean, entropy),
            "logloss": mean,
            "calibration": divide(predicted, labelled),
            "auc": None,
            "gauc": None,
        }
        if columns is not None:
            z, y, w = float64_columns(columns, "output", "label", "weight")
            values["auc"] = auc(z, y, w)
            values["gauc"] = gauc(z, y, w, columns["user"].numpy())
        return named(values, self.name, num)


class RegressionSeries(Series):
    """A regression: transformed prediction and label, weight. Errors in the unit of the task."""

    num_sums = 4

    def __init__(self, name: str, task: TaskConfig) -> None:
        super().__init__(name)
        self.task = task

    def sums(self, columns: Columns) -> Array:
        """Return number, weight, squared and absolute errors."""
        output, label, w = float64_columns(columns, "output", "label", "weight")
        error = self._value(output) - self._value(label)
        return weighted_sums(w, w * error**2, w * np.abs(error))

    def metrics(self, sums: Array, columns: Columns | None) -> Metrics:
        """Return mse, mae, rmse."""
        num, weight, squared, absolute = sums.tolist()
        mse = divide(squared, weight)
        values: Metrics = {
            "mse": mse,
            "mae": divide(absolute, weight),
            "rmse": None if mse is None else math.sqrt(mse),
        }
        return named(values, self.name, num)

    def _value(self, transformed: Array) -> Array:
        # An untrained output may be too large for exp: beyond e^100 it does not matter how wrong.
        value = np.expm1(np.minimum(transformed, 100)) if self.task.log1p else transformed
        return np.minimum(value, self.task.maximum) if self.task.maximum > 0 else value


def named(values: Metrics, name: str, num: float) -> Metrics:
    """Return metric-name: value, and the number of predictions."""
    return {f"{metric}-{name}": v for metric, v in values.items()} | {
        f"num_examples-{name}": int(num)
    }


def float64_columns(columns: Columns, *names: str) -> list[Array]:
    """Return the named columns in fp64."""
    return [columns[name].numpy().astype(np.float64) for name in names]


def weighted_sums(weight: Array, *weighted: Array) -> Array:
    """Return the number of rows, the sum of weights, and the other sums, correctly rounded."""
    return np.array([len(weight), *(math.fsum(x) for x in (weight, *weighted))])


def divide(a: float, b: float) -> float | None:
    """Return a / b, None where b is 0."""
    return a / b if b > 0 else None
