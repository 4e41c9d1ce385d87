"""Laws of quality against compute, fitted by least squares, with bootstrap intervals.

Letters: P points, B resamples.

Source of the forms: HSTU (arXiv 2402.17152, figure 7) for quality linear in ln C; the power law
with an irreducible part and its joint form are those of Hoffmann et al. (arXiv 2203.15556), here
with the length of sequences as a third term.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

Array = NDArray[np.float64]
ALPHAS = (1e-3, 1.0)
"""Exponents that a power law may have; a few points that bend once allow anything above."""

APART = 0.95
"""Largest correlation between the logarithms of two axes that a joint law is fitted to."""


@dataclass(frozen=True)
class LogLaw:
    """Quality = a + b ln C."""

    a: float
    b: float

    @property
    def coefficients(self) -> dict[str, float]:
        """Name -> value."""
        return {"a": self.a, "b": self.b}

    def __call__(self, compute_P: Array) -> Array:
        """Return the quality at so many FLOPs."""
        return self.a + self.b * np.log(compute_P)


@dataclass(frozen=True)
class PowerLaw:
    """Quality = E + A (C / C0)^-alpha; C0, the geometric mean of what was fitted, is a unit."""

    E: float
    A: float
    alpha: float
    C0: float

    @property
    def coefficients(self) -> dict[str, float]:
        """Name -> value."""
        return {"E": self.E, "A": self.A, "alpha": self.alpha, "C0": self.C0}

    def __call__(self, compute_P: Array) -> Array:
        """Return the quality at so many FLOPs."""
        value: Array = self.E + self.A * (compute_P / self.C0) ** -self.alpha
        return value


@dataclass(frozen=True)
class JointLaw:
    """Quality = E + sum over axes of A_i (x_i / x0_i)^-alpha_i."""

    names: tuple[str, ...]
    E: float
    A: tuple[float, ...]
    alpha: tuple[float, ...]
    x0: tuple[float, ...]

    @property
    def coefficients(self) -> dict[str, float]:
        """Name -> value; A and alpha by axis."""
        parts = {
            f"{letter}_{name}": value
            for letter, values in (("A", self.A), ("alpha", self.alpha), ("x0", self.x0))
            for name, value in zip(self.names, values, strict=True)
        }
        return {"E": self.E, **parts}

    def __call__(self, x_PX: Array) -> Array:
        """Return the quality at points with one column an axis."""
        ratios_PX = x_PX / np.array(self.x0)
        value: Array = self.E + (np.array(self.A) * ratios_PX ** -np.array(self.alpha)).sum(axis=1)
        return value


Law = LogLaw | PowerLaw | JointLaw


def fit_log_law(compute_P: Array, quality_P: Array) -> LogLaw:
    """Return the line through quality against ln C, by ordinary least squares.

    Raises:
        ValueError: with fewer than two different compute values.
    """
    _need(len(np.unique(compute_P)), 2, "a line in ln C")
    design = np.stack([np.ones_like(compute_P), np.log(compute_P)], axis=1)
    (a, b), *_ = np.linalg.lstsq(design, quality_P, rcond=None)
    return LogLaw(float(a), float(b))


def fit_power_law(compute_P: Array, quality_P: Array) -> PowerLaw:
    """Return the power law with the least squared error, E at least 0.

    E and A follow from alpha by linear least squares, so that the search is along one number.
    Without a bound on E, points that hardly bend are fitted as well by any small alpha, whose E and
    A are huge and cancel: a loss or a share is never below 0, and saying so costs nothing.

    Raises:
        ValueError: with fewer than three different compute values.
    """
    _need(len(np.unique(compute_P)), 3, "a power law")
    unit = float(np.exp(np.log(compute_P).mean()))
    log_x_P = np.log(compute_P / unit)

    def solve(log_alpha_G: Array) -> tuple[Array, Array, Array]:
        """Return E, A and the squared error for each alpha."""
        column_GP = np.exp(-np.exp(log_alpha_G)[:, None] * log_x_P)
        mean_G = column_GP.mean(axis=1)
        centred_GP = column_GP - mean_G[:, None]
        A_G = centred_GP @ quality_P / (centred_GP**2).sum(axis=1)
        E_G = quality_P.mean() - A_G * mean_G
        alone_G = column_GP @ quality_P / (column_GP**2).sum(axis=1)
        A_G, E_G = np.where(E_G < 0, alone_G, A_G), np.maximum(E_G, 0.0)
        fitted_GP = E_G[:, None] + A_G[:, None] * column_GP
        return E_G, A_G, ((quality_P - fitted_GP) ** 2).sum(axis=1)

    low, high = np.log(ALPHAS).tolist()
    for _ in range(5):
        # Each grid spans two cells of the one before: 5 of them reach 1e-5 of ln alpha.
        grid = np.linspace(low, high, 40)
        best = int(np.argmin(solve(grid)[2]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    log_alpha = grid[best]
    E, A, _ = (float(values[0]) for values in solve(np.array([log_alpha])))
    return PowerLaw(E, A, float(np.exp(log_alpha)), unit)


def fit_joint_law(
    names: Sequence[str], x_PX: Array, quality_P: Array, *, has_floor: bool | None = None
) -> JointLaw:
    """Return the joint law with the least squared error, all A at least 0.

    Args:
        names: of the axes.
        x_PX: positive, one column an axis.
        quality_P: lower is better.
        has_floor: whether E is at least 0 too, as in `fit_power_law`. None: where no quality is
            below 0. A resample, whose noise may be, is told what holds for the study.

    Raises:
        ValueError: if an axis has fewer than two different values, or there are fewer points than
            coefficients.
    """
    points, axes = x_PX.shape
    for name, column in zip(names, x_PX.T, strict=True):
        _need(len(np.unique(column)), 2, f"an exponent of {name}")
    _need(points, 2 * axes + 1, f"a joint law in {', '.join(names)}")
    unit = np.exp(np.log(x_PX).mean(axis=0))
    log_x = np.log(x_PX / unit)
    spread = max(float(quality_P.std()), 1e-12)

    def residuals(theta: Array) -> Array:
        E, A, alpha = theta[0], np.exp(theta[1 : 1 + axes]), np.exp(theta[1 + axes :])
        value: Array = (E + (A * np.exp(-alpha * log_x)).sum(axis=1) - quality_P) / spread
        return value

    low, high = np.log(ALPHAS)
    if has_floor is None:
        has_floor = bool(quality_P.min() > 0)
    bounds = (
        [0.0 if has_floor else -np.inf, *[-np.inf] * axes, *[low] * axes],
        [np.inf, *[np.inf] * axes, *[high] * axes],
    )
    starts = [np.log(alpha) for alpha in (0.05, 0.3, 1.0)]
    solutions = [
        least_squares(
            residuals,
            [
                max(float(quality_P.min()), 0.0 if has_floor else -np.inf),
                *[np.log(spread)] * axes,
                *[start] * axes,
            ],
            bounds=bounds,
        )
        for start in starts
    ]
    best = min(solutions, key=lambda found: float(found.cost)).x
    return JointLaw(
        tuple(names),
        float(best[0]),
        tuple(np.exp(best[1 : 1 + axes]).tolist()),
        tuple(np.exp(best[1 + axes :]).tolist()),
        tuple(unit.tolist()),
    )


def grow_apart(x_PX: Array) -> bool:
    """Return whether the axes of points vary enough by themselves for exponents of their own.

    In a ladder width, depth and length grow together: then which of them it was is not in the data,
    whatever a fit returns.

    Args:
        x_PX: positive, one column an axis, each with different values.
    """
    correlation_XX = np.corrcoef(np.log(x_PX), rowvar=False)
    return bool(np.abs(correlation_XX - np.eye(len(correlation_XX))).max() < APART)


@dataclass(frozen=True)
class Fit:
    """A law, and what resampling says of it."""

    law: Law
    residuals: Array
    """(P,) of the points that were fitted."""
    sigma: float
    """Standard error of a point about the curve; NaN if no degree of freedom is left."""
    resampled: tuple[Law, ...]
    sigmas: Array
    """(B,) standard error behind each resample."""

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Return the interval of a coefficient; NaN without degrees of freedom."""
        return central([law.coefficients[name] for law in self.resampled], level)

    def band(self, x: Array, level: float = 0.95) -> tuple[Array, Array]:
        """Return the interval of the curve itself at each x."""
        if not self.resampled:
            return np.full(len(x), np.nan), np.full(len(x), np.nan)
        values_BP = np.stack([law(x) for law in self.resampled])
        low, high = np.quantile(values_BP, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high

    def draws(self, x: Array, generator: np.random.Generator) -> Array:
        """Return (B,) values that one new point may have; none without degrees of freedom.

        They have both the uncertainty of the curve and a point's deviation from it.

        Args:
            x: one compute value, or one row of axes.
            generator: of the deviations.
        """
        curve_B = np.array([float(law(x)[0]) for law in self.resampled])
        values: Array = curve_B + self.sigmas * generator.standard_normal(len(curve_B))
        return values

    def predict(
        self, x: Array, generator: np.random.Generator, level: float = 0.9
    ) -> tuple[float, float, float]:
        """Return the expected quality of one new point, and the interval it should lie in.

        Args:
            x: one compute value, or one row of axes.
            generator: of the deviations.
            level: how often a new point should be inside.
        """
        return float(self.law(x)[0]), *central(self.draws(x, generator), level)


def fit_with_intervals(
    fit: Callable[[Array, Array], Law],
    x: Array,
    quality_P: Array,
    *,
    num_coefficients: int,
    resamples: int,
    generator: np.random.Generator,
) -> Fit:
    """Fit a law, then fit it again to its own curve with drawn deviations (parametric bootstrap).

    A study has few sizes, and few points pass close to any curve with two or three coefficients.
    So each resample draws its standard error too, from what the residuals allow it to be:
    sigma_b^2 = RSS / chi2 with P - p degrees of freedom. For a law that is linear in its
    coefficients this gives the exact t intervals; for the others it is an approximation that the
    tests hold against simulated studies.

    Args:
        fit: takes (x, quality) and returns a law.
        x: as `fit` takes it, P points.
        quality_P: one value a point, such as the mean over seeds.
        num_coefficients: of the law, p. With no more points than that, intervals are NaN.
        resamples: B.
        generator: of the draws.
    """
    law = fit(x, quality_P)
    fitted_P = law(x)
    residuals = quality_P - fitted_P
    freedom = len(quality_P) - num_coefficients
    if freedom < 1:
        return Fit(law, residuals, float("nan"), (), np.empty(0))
    rss = float((residuals**2).sum())
    sigmas = np.sqrt(rss / generator.chisquare(freedom, resamples))
    noise_BP = sigmas[:, None] * generator.standard_normal((resamples, len(quality_P)))
    laws = tuple(fit(x, fitted_P + noise_P) for noise_P in noise_BP)
    return Fit(law, residuals, float(np.sqrt(rss / freedom)), laws, sigmas)


def leave_one_out(fit: Callable[[Array, Array], Law], x: Array, quality_P: Array) -> float:
    """Return the root mean square error of each point as the law of the others predicts it.

    Laws of different numbers of coefficients are compared by it: a coefficient that follows the
    noise of one point makes the prediction of another worse.

    Args:
        fit: takes (x, quality) and returns a law.
        x: as `fit` takes it, P points.
        quality_P: one value a point.

    Raises:
        ValueError: as `fit`, with one point fewer.
    """
    rows = np.arange(len(quality_P))
    errors = [
        float(fit(x[rows != row], quality_P[rows != row])(x[row : row + 1])[0] - quality_P[row])
        for row in rows
    ]
    return float(np.sqrt(np.mean(np.square(errors))))


def weights_of(left_out: Mapping[str, float], num_points: int) -> dict[str, float]:
    """Return a weight of each law, by how well it predicts points that were left out.

    weight ~ error^-P, with P points: the likelihood of the points left out, each law with normal
    errors of its own size (pseudo-BMA). Where two laws are level both count; where one is off by
    half as much again at 8 points, it counts for 4 %.

    Args:
        left_out: law -> its `leave_one_out`.
        num_points: P.

    Source: Yao et al., "Using stacking to average Bayesian predictive distributions" (2018),
    section 3.4.
    """
    least = min(left_out.values())
    ratio = {law: least / error if error > 0 else 1.0 for law, error in left_out.items()}
    shares = {law: value**num_points for law, value in ratio.items()}
    return {law: share / sum(shares.values()) for law, share in shares.items()}


def predict_together(
    fits: Mapping[str, Fit],
    weights: Mapping[str, float],
    x: Array,
    generator: np.random.Generator,
    level: float = 0.9,
) -> tuple[float, float, float]:
    """Return the prediction of several laws, each counting by its weight, as `Fit.predict` does.

    Args:
        fits: name -> law with as many resamples each.
        weights: name -> share, of those with resamples; they add up to 1.
        x: one compute value.
        generator: of the deviations.
        level: how often a new point should be inside.
    """
    parts = {law: fits[law].draws(x, generator) for law in weights}
    # Draws are independent, so that the first of them are as good as any.
    shares = [draws[: round(weights[law] * len(draws))] for law, draws in parts.items()]
    expected = sum(share * float(fits[law].law(x)[0]) for law, share in weights.items())
    return expected, *central(np.concatenate(shares), level)


def central(values: Sequence[float] | Array, level: float) -> tuple[float, float]:
    """Return the interval that holds the middle `level` of the values; NaN if there are none."""
    if len(values) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(np.asarray(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _need(found: int, least: int, what: str) -> None:
    if found < least:
        raise ValueError(f"{what} needs at least {least} different points, found {found}")
