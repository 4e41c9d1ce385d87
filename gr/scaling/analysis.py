"""Points to laws: a curve a family, predictions of what was held out, slopes compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from gr.scaling.config import ScalingConfig
from gr.scaling.fits import (
    Array,
    Fit,
    Law,
    LogLaw,
    central,
    fit_joint_law,
    fit_log_law,
    fit_power_law,
    fit_with_intervals,
    grow_apart,
    leave_one_out,
    predict_together,
    weights_of,
)
from gr.scaling.points import Mean, Point, frontier, means_of

LOG_LAW, POWER_LAW, BOTH = "a + b ln C", "E + A C^-alpha", "both, by weight"
LEVEL = 0.9
"""Of the interval that a held-out run should lie in."""
_AXES = ("parameters", "examples", "length", "rows")


@dataclass(frozen=True)
class Prediction:
    """A held-out mean against what a law said."""

    mean: Mean
    law: str
    factor: float
    """Its compute over the largest that was fitted."""
    predicted: float
    low: float
    high: float

    @property
    def is_inside(self) -> bool:
        """Whether the mean lies in the interval."""
        return self.low <= self.mean.quality <= self.high

    @property
    def width(self) -> float:
        """Of the interval, as a share of what was predicted."""
        return (self.high - self.low) / abs(self.predicted)


@dataclass(frozen=True)
class Curve:
    """A family: what was fitted, the laws, and the predictions."""

    family: str
    fitted: tuple[Mean, ...]
    """In order of compute."""
    others: tuple[Mean, ...]
    """mode=fixed_compute: sizes that are not the best at their budget."""
    held_out: tuple[Mean, ...]
    fits: dict[str, Fit]
    left_out: dict[str, float]
    """Law -> error of a fitted point as the others predict it (leave one out); of the laws that
    leave a degree of freedom to judge an interval by."""
    predictions: tuple[Prediction, ...]

    @property
    def weights(self) -> dict[str, float]:
        """Law -> its share in the prediction of both: from `left_out`, not what was held out."""
        return weights_of(self.left_out, len(self.fitted))


@dataclass(frozen=True)
class Efficiency:
    """Slope of a family's a + b ln C over that of the first family."""

    family: str
    against: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Analysis:
    """All that a study says."""

    points: tuple[Point, ...]
    curves: tuple[Curve, ...]
    efficiencies: tuple[Efficiency, ...]
    joint: dict[str, Fit]
    """Family -> law in the axes that the study varies; none where they are fewer than two, or grow
    together."""


def analyse(study: ScalingConfig, points: Sequence[Point]) -> Analysis:
    """Fit every family, predict what was held out, compare slopes.

    Args:
        study: its configuration.
        points: all runs.

    Raises:
        ValueError: if a family has too few sizes for a law.
    """
    means = means_of(points)
    # One for all families: draws that two of them shared would make their slopes look related.
    generator = np.random.default_rng(0)
    curves = tuple(
        _curve(study, family, [mean for mean in means if mean.family == family], generator)
        for family in study.families
    )
    first, *rest = curves
    joint = {c.family: fit for c in curves if (fit := _joint(study, c)) is not None}
    return Analysis(
        points=tuple(points),
        curves=curves,
        efficiencies=tuple(_efficiency(curve, first) for curve in rest),
        joint=joint,
    )


def _curve(
    study: ScalingConfig, family: str, means: Sequence[Mean], generator: np.random.Generator
) -> Curve:
    on_curve = list(means)
    if study.mode == "fixed_compute":
        on_curve = frontier(means, higher_is_better=study.higher_is_better)
    fitted = sorted((m for m in on_curve if not m.held_out), key=lambda m: m.flops)
    held_out = sorted((m for m in on_curve if m.held_out), key=lambda m: m.flops)
    others = [m for m in means if m not in fitted and m not in held_out]
    compute = np.array([m.flops for m in fitted])
    quality = np.array([m.quality for m in fitted])
    fit = partial(
        fit_with_intervals,
        x=compute,
        quality_P=quality,
        generator=generator,
        resamples=study.bootstrap,
    )
    laws: dict[str, tuple[Callable[[Array, Array], Law], int]]
    laws = {LOG_LAW: (fit_log_law, 2), POWER_LAW: (fit_power_law, 3)}
    fits = {law: fit(find, num_coefficients=number) for law, (find, number) in laws.items()}
    left_out = {
        law: leave_one_out(find, compute, quality)
        for law, (find, number) in laws.items()
        if len(fitted) > number
    }
    weights = weights_of(left_out, len(fitted))
    predictions = []
    for mean in held_out:
        at, factor = np.array([mean.flops]), mean.flops / float(compute.max())
        found = {law: of.predict(at, generator, LEVEL) for law, of in fits.items()}
        found[BOTH] = predict_together(fits, weights, at, generator, LEVEL)
        predictions += [Prediction(mean, law, factor, *value) for law, value in found.items()]
    return Curve(
        family,
        tuple(fitted),
        tuple(others),
        tuple(held_out),
        fits,
        left_out,
        tuple(predictions),
    )


def _efficiency(curve: Curve, first: Curve) -> Efficiency:
    ours, theirs = curve.fits[LOG_LAW], first.fits[LOG_LAW]
    slopes = [[law.b for law in fit.resampled if isinstance(law, LogLaw)] for fit in (ours, theirs)]
    ratios = np.array(slopes[0]) / np.array(slopes[1])
    low, high = central(ratios, 0.95)
    ratio = ours.law.coefficients["b"] / theirs.law.coefficients["b"]
    return Efficiency(curve.family, first.family, ratio, low, high)


def _joint(study: ScalingConfig, curve: Curve) -> Fit | None:
    """Fit E + sum of A_i x_i^-alpha_i to all runs of a family, in the axes that vary."""
    means = [m for m in (*curve.fitted, *curve.others) if not m.held_out]
    table = np.array([[float(getattr(m.points[0], axis)) for axis in _AXES] for m in means])
    # Tokens of an example differ a little from run to run: an axis varies by a factor, or not.
    varied = [i for i in range(len(_AXES)) if table[:, i].max() > 1.2 * table[:, i].min()]
    if len(varied) < 2 or len(means) < 2 * len(varied) + 2 or not grow_apart(table[:, varied]):
        return None
    names = [_AXES[i] for i in varied]
    sign = -1.0 if study.higher_is_better else 1.0
    quality = sign * np.array([m.quality for m in means])
    return fit_with_intervals(
        partial(fit_joint_law, names, has_floor=bool(quality.min() > 0)),
        table[:, varied],
        quality,
        num_coefficients=2 * len(varied) + 1,
        resamples=min(study.bootstrap, 200),
        generator=np.random.default_rng(0),
    )
