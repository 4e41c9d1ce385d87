"""Fits against the laws that made the data, exact t intervals, and simulated studies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gr.scaling.fits import (
    JointLaw,
    LogLaw,
    PowerLaw,
    fit_joint_law,
    fit_log_law,
    fit_power_law,
    fit_with_intervals,
    grow_apart,
    leave_one_out,
    predict_together,
    weights_of,
)

COMPUTE = np.geomspace(1e12, 1e15, 6)


def fitted(fit, y, seed=0, *, p=2, resamples=400, x=COMPUTE):
    generator = np.random.default_rng(seed)
    return fit_with_intervals(
        fit, x, y, num_coefficients=p, resamples=resamples, generator=generator
    )


@given(st.floats(-5, 5), st.floats(-0.5, 0.5))
def test_a_line_is_found(a, b):
    law = fit_log_law(COMPUTE, LogLaw(a, b)(COMPUTE))
    assert law.a == pytest.approx(a, abs=1e-9)
    assert law.b == pytest.approx(b, abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.floats(0.2, 2), st.floats(0.02, 1), st.floats(0.02, 0.99))
def test_a_power_law_is_found(E, A, alpha):
    unit = float(np.exp(np.log(COMPUTE).mean()))
    law = fit_power_law(COMPUTE, PowerLaw(E, A, alpha, unit)(COMPUTE))
    # Small exponents trade E against A; the curve is what is determined.
    np.testing.assert_allclose(law(COMPUTE), PowerLaw(E, A, alpha, unit)(COMPUTE), rtol=1e-5)
    if alpha > 0.1:
        assert law.alpha == pytest.approx(alpha, rel=1e-3)
        assert pytest.approx(E, rel=0.02, abs=1e-3) == law.E


def test_a_rising_power_law_is_found():
    """Of a metric where more is better: A is negative."""
    truth = PowerLaw(0.8, -0.2, 0.3, float(np.exp(np.log(COMPUTE).mean())))
    law = fit_power_law(COMPUTE, truth(COMPUTE))
    assert pytest.approx(-0.2, rel=1e-3) == law.A
    assert law.alpha == pytest.approx(0.3, rel=1e-3)


def test_points_that_hardly_bend_do_not_make_the_power_law_explode():
    """Of a line in ln C the free fit has E below -1000 and A as large; predictions stay between."""
    x = np.geomspace(7e11, 7e13, 5)
    y = 0.52 - 0.026 * np.log(x / x[0]) + 0.002 * np.array([1, -1, 0.5, -1, 1])
    found = fitted(fit_power_law, y, p=3, x=x, resamples=200)
    assert 0 <= found.law.E < 1
    assert all(0 <= law.E <= y.max() and law.alpha <= 1 for law in found.resampled)
    _, low, high = found.predict(np.array([5 * x[-1]]), np.random.default_rng(0))
    assert 0.3 < low < high < y[-1] + 0.02


def test_a_bounded_fit_is_the_best_of_those_allowed():
    """Against a brute search over E >= 0, A and alpha."""
    x = np.geomspace(1e12, 1e15, 7)
    for y in (1.2 - 0.03 * np.log(x / x[0]) ** 1.2, 0.4 + 0.3 * (x / x[0]) ** -0.3):
        law = fit_power_law(x, y)
        best = min(
            float((((y - E) @ c / (c @ c) * c + E - y) ** 2).sum())
            for alpha in np.geomspace(1e-3, 1, 100)
            for c in [(x / law.C0) ** -alpha]
            for E in np.linspace(0, y.min(), 60)
        )
        assert float(((law(x) - y) ** 2).sum()) <= best + 1e-12


def test_leaving_one_out_is_the_error_of_predictions_and_finds_the_form():
    random = np.random.default_rng(3)
    x = np.geomspace(1e11, 1e15, 8)
    y = 1.0 - 0.02 * np.log(x) + 0.003 * random.standard_normal(8)
    # For least squares the error of a point left out is its residual over 1 - leverage.
    design = np.stack([np.ones(8), np.log(x)], axis=1)
    hat = design @ np.linalg.inv(design.T @ design) @ design.T
    press = ((y - hat @ y) / (1 - np.diag(hat))) ** 2
    assert leave_one_out(fit_log_law, x, y) == pytest.approx(np.sqrt(press.mean()))
    bent = 0.8 + 0.3 * (x / 1e11) ** -0.4 + 0.002 * random.standard_normal(8)
    assert leave_one_out(fit_power_law, x, bent) < leave_one_out(fit_log_law, x, bent)


def test_a_joint_law_is_found():
    axes = np.array([(n, d, k) for n in (1e5, 4e5, 2e6) for d in (1e7, 1e8) for k in (64.0, 256.0)])
    unit = tuple(np.exp(np.log(axes).mean(axis=0)).tolist())
    truth = JointLaw(("n", "d", "k"), 0.7, (0.05, 0.1, 0.02), (0.4, 0.3, 0.5), unit)
    law = fit_joint_law(("n", "d", "k"), axes, truth(axes))
    np.testing.assert_allclose(law(axes), truth(axes), atol=1e-6)
    beyond = np.array([(8e6, 4e8, 512.0)])
    assert law(beyond)[0] == pytest.approx(truth(beyond)[0], abs=0.02)


def test_axes_of_a_ladder_grow_together_and_those_of_a_grid_do_not():
    grid = np.array([(n, d, k) for n in (1e5, 4e5, 2e6) for d in (1e7, 1e8) for k in (64.0, 256.0)])
    assert grow_apart(grid)
    ladder = np.array([(2e4, 8.0), (4e4, 16.0), (1e5, 24.0), (3e5, 64.0), (6e5, 128.0)])
    assert not grow_apart(ladder)
    assert not grow_apart(1 / ladder[:, ::-1] * np.array([1.0, 3.0]))


def test_the_floor_of_a_joint_law_is_not_below_zero():
    x = np.array([(n, d) for n in (1e5, 4e5, 2e6) for d in (1e7, 1e8, 1e9)])
    y = 1.5 - 0.04 * np.log(x[:, 0]) - 0.02 * np.log(x[:, 1])
    assert fit_joint_law(("n", "d"), x, y).E >= 0
    assert fit_joint_law(("n", "d"), x, y - 2).E < 0  # as of a metric where more is better
    assert fit_joint_law(("n", "d"), x, y - 2, has_floor=True).E >= 0  # a resample of the first


def test_intervals_of_a_line_are_the_t_intervals():
    noise = np.array([0.011, -0.004, -0.013, 0.008, 0.002, -0.006])
    y = LogLaw(2.0, -0.05)(COMPUTE) + noise
    fit = fitted(fit_log_law, y, resamples=10_000)
    exact = stats.linregress(np.log(COMPUTE), y)
    t = stats.t.ppf(0.975, len(COMPUTE) - 2)
    low, high = fit.interval("b")
    assert low == pytest.approx(exact.slope - t * exact.stderr, abs=0.03 * exact.stderr * t)
    assert high == pytest.approx(exact.slope + t * exact.stderr, abs=0.03 * exact.stderr * t)
    new = np.array([4e15])
    x = np.log(COMPUTE)
    leverage = 1 + 1 / len(x) + (np.log(4e15) - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    half = stats.t.ppf(0.95, len(x) - 2) * fit.sigma * np.sqrt(leverage)
    middle, low, high = fit.predict(new, np.random.default_rng(1))
    assert middle == pytest.approx(exact.intercept + exact.slope * np.log(4e15))
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=0.04 * half)


@pytest.mark.parametrize(
    ("fit", "p", "truth", "studies"),
    [
        (fit_log_law, 2, LogLaw(2.0, -0.04), 150),
        (fit_power_law, 3, PowerLaw(0.7, 0.15, 0.25, 1e13), 40),
        # The bound E >= 0 is active in most resamples of the last.
        pytest.param(fit_power_law, 3, PowerLaw(0.02, 0.9, 0.05, 1e13), 40, marks=pytest.mark.slow),
    ],
    ids=["line", "power", "power_at_its_bound"],
)
def test_a_held_out_point_is_inside_as_often_as_said(fit, p, truth, studies):
    random = np.random.default_rng(7)
    x = np.geomspace(1e12, 1e15, 5)
    inside = 0
    for study in range(studies):
        y = truth(x) + 0.004 * random.standard_normal(len(x))
        found = fitted(fit, y, study, p=p, resamples=100, x=x)
        _, low, high = found.predict(np.array([4e15]), np.random.default_rng(study))
        inside += low <= truth(np.array([4e15]))[0] + 0.004 * random.standard_normal() <= high
    # The chance of fewer, or of more, if the interval holds 90 % of new points.
    assert stats.binom.cdf(inside, studies, 0.9) > 1e-3
    assert inside / studies < 0.99 or stats.binom.sf(inside - 1, studies, 0.9) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "truth",
    [LogLaw(1.22, -0.0257), PowerLaw(0.86, 0.011, 0.23, 1e13)],
    ids=["line", "power"],
)
def test_both_laws_together_hold_a_point_whichever_is_true(truth):
    """The law that is not true holds it less than half as often as it says."""
    random = np.random.default_rng(11)
    x, new = np.geomspace(7e11, 7e13, 7), np.array([3.5e14])
    noise = 0.0025 if isinstance(truth, LogLaw) else 0.0004
    inside, studies = {"both": 0, "wrong": 0}, 60
    for study in range(studies):
        y = truth(x) + noise * random.standard_normal(len(x))
        found = {
            "line": fitted(fit_log_law, y, study, p=2, resamples=150, x=x),
            "power": fitted(fit_power_law, y, study, p=3, resamples=150, x=x),
        }
        errors = {"line": fit_log_law, "power": fit_power_law}
        weights = weights_of({k: leave_one_out(f, x, y) for k, f in errors.items()}, len(x))
        point = truth(new)[0] + noise * random.standard_normal()
        generator = np.random.default_rng(study)
        _, low, high = predict_together(found, weights, new, generator)
        inside["both"] += low <= point <= high
        wrong = found["power" if isinstance(truth, LogLaw) else "line"]
        _, low, high = wrong.predict(new, generator)
        inside["wrong"] += low <= point <= high
    assert inside["both"] >= 0.75 * studies
    assert inside["wrong"] < 0.6 * studies


def test_weights_are_likelihoods_of_the_points_left_out():
    assert weights_of({"a": 0.2, "b": 0.2}, 9) == {"a": 0.5, "b": 0.5}
    errors = {"a": 0.3, "b": 0.1}
    likelihood = {
        law: np.prod(stats.norm.pdf([error, -error] * 4, scale=error))
        for law, error in errors.items()
    }
    weights = weights_of(errors, 8)
    assert weights["b"] / weights["a"] == pytest.approx(likelihood["b"] / likelihood["a"])
    assert weights_of({"a": 0.0, "b": 0.1}, 5)["b"] < 1e-12


def test_a_law_of_no_weight_changes_no_prediction():
    y = 0.7 + 0.1 * (COMPUTE / 1e12) ** -0.3 + 0.001 * np.array([1, -1, 1, -1, 1, -1])
    found = {"line": fitted(fit_log_law, y), "power": fitted(fit_power_law, y, p=3)}
    new = np.array([4e15])
    alone = found["power"].predict(new, np.random.default_rng(2))
    together = predict_together(found, {"power": 1.0}, new, np.random.default_rng(2))
    assert together == alone
    middle = predict_together(found, {"line": 0.5, "power": 0.5}, new, np.random.default_rng(2))[0]
    assert middle == pytest.approx((found["line"].law(new)[0] + found["power"].law(new)[0]) / 2)


def test_without_degrees_of_freedom_no_interval_is_claimed():
    x = COMPUTE[:3]
    found = fitted(fit_power_law, np.array([0.9, 0.85, 0.83]), p=3, x=x)
    assert np.isnan(found.predict(np.array([1e16]), np.random.default_rng(0))[1])
    assert np.isnan(found.interval("E")[0])
    assert np.isnan(found.band(x)[0]).all()


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="at least 2 different points, found 1"):
        fit_log_law(np.array([1e12, 1e12]), np.array([0.9, 0.8]))
    with pytest.raises(ValueError, match="at least 3 different points, found 2"):
        fit_power_law(np.array([1e12, 1e13]), np.array([0.9, 0.8]))
    axes = np.array([(1.0, 2.0), (2.0, 2.0), (3.0, 2.0)])
    with pytest.raises(ValueError, match="exponent of tokens needs at least 2"):
        fit_joint_law(("parameters", "tokens"), axes, np.array([0.9, 0.8, 0.7]))
