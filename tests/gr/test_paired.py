"""Paired tests against SciPy, and Holm's rule against its definition."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gr.paired import compare, holm, paired_difference

values = st.floats(-1, 1).map(lambda x: round(x, 6))


@given(st.lists(st.tuples(values, values), min_size=2, max_size=12))
def test_the_p_value_is_that_of_scipy(pairs):
    first, second = zip(*pairs, strict=True)
    differences = [a - b for a, b in pairs]
    found = paired_difference(differences)
    if max(differences) - min(differences) < 1e-9:
        return
    expected = stats.ttest_rel(first, second)
    low, high = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert found.mean == pytest.approx((low + high) / 2, abs=1e-9)
    assert found.half == pytest.approx((high - low) / 2, rel=1e-4)


def test_differences_without_spread():
    assert paired_difference([0.5, 0.5]).p == 0.0
    assert paired_difference([0.0, 0.0, 0.0]).p == 1.0
    assert paired_difference([0.5]) is None
    assert paired_difference([]) is None


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_rejects_what_its_steps_reject(p_values):
    adjusted = holm(p_values)
    rejected = set()
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[i] * (len(p_values) - rank) > 0.05:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(adjusted) if p <= 0.05} == rejected


def test_pairs_share_a_seed():
    rows = {
        "base": {0: 1.0, 1: 2.0, 2: 4.0},
        "more": {1: 2.5, 2: 4.7, 9: 100.0},
        "lonely": {0: 7.0},
    }
    found = compare(rows, "base")
    assert set(found) == {"more"}
    difference, p = found["more"]
    assert difference.mean == pytest.approx(0.6)
    assert difference.num == 2
    assert p == difference.p
    assert compare(rows, "nobody") == {}
    assert not math.isnan(difference.half)
