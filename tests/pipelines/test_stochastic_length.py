"""Frequencies against the formulas of HSTU's stochastic length; contents are in test_stream.py."""

from dataclasses import replace

import numpy as np
import pytest

from pipelines.config import DataConfig, StochasticLengthConfig
from pipelines.gather import Gathered
from pipelines.history import (
    ANCHOR,
    FIRST_CONTEXT,
    NUM_EVENTS,
    NUM_HISTORY,
    SESSION,
    USER,
)
from pipelines.stochastic_length import draw_lengths, length_rules, shorten, threshold

N = 4096


def make_rules(selection="greedy", *, alpha=1.6, layout="merged", seed=0, max_length=N):
    return length_rules(
        DataConfig(
            log="none",
            layout=layout,
            num_items=1,
            max_history_tokens=max_length,
            stochastic_length=StochasticLengthConfig(selection=selection, alpha=alpha),
        ),
        seed,
    )


def make_sequences(num_history, num_events):
    """Return sequences of different users, without events."""
    rows = np.zeros((len(num_history), FIRST_CONTEXT), np.int64)
    rows[:, USER] = np.arange(len(rows)) * 7
    rows[:, SESSION] = np.arange(len(rows)) % 5
    rows[:, NUM_HISTORY], rows[:, NUM_EVENTS] = num_history, num_events
    return rows


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (1.6, [256, 445, 776, 1351, 2352]),
        (1.7, [362, 652, 1176, 2120, 3821]),
        (1.8, [512, 955, 1782, 3326, 6208]),
        (2.0, [1024, 2048, 4096, 8192, 16384]),
    ],
)
def test_thresholds_are_those_of_the_paper(alpha, expected):
    assert [threshold(1024 << i, alpha) for i in range(5)] == expected


@pytest.mark.parametrize("layout", ["merged", "interleaved"])
@pytest.mark.parametrize("alpha", [1.3, 1.6, 1.9])
def test_whole_sequences_are_as_frequent_as_the_formula_says(layout, alpha):
    rules = make_rules(alpha=alpha, layout=layout)
    per_event = 2 if layout == "interleaved" else 1
    trials = 4000
    limit = rules.threshold
    for n in (limit - 1, limit + per_event, 2 * limit, N):
        history = np.full(trials, n // per_event - 3)
        kept = draw_lengths(make_sequences(history, 3), rules)
        whole = (kept == history).sum()
        tokens = int(history[0] + 3) * per_event
        if tokens <= limit:
            assert whole == trials
            continue
        p = N**alpha / tokens**2
        assert abs(whole - p * trials) < 4 * np.sqrt(p * (1 - p) * trials) + 1
        cut = kept[kept < history]
        assert ((cut + 3) * per_event <= limit).all()
        assert ((cut + 4) * per_event > limit).all()


def test_choices_differ_by_seed_and_do_not_depend_on_batch_mates():
    rows = make_sequences(np.full(3000, 2000), 1)
    kept = draw_lengths(rows, make_rules())
    assert (kept[500:] == draw_lengths(rows[500:], make_rules())).all()
    other = draw_lengths(rows, make_rules(seed=1))
    p = N**1.6 / 2001**2
    assert abs((kept == other).mean() - (p**2 + (1 - p) ** 2)) < 0.04


def test_tokens_and_squares_of_long_tailed_lengths_are_those_of_the_formula():
    """Lengths with the median 400 of a log-normal, cut at 4096, as the history is."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(np.log(400), 1.3, 200_000), N).astype(np.int64) + 2
    rules = make_rules()
    found = draw_lengths(make_sequences(lengths - 1, 1), rules) + 1
    limit, weight = 776, N**1.6
    p = np.where(lengths <= limit, 1.0, weight / lengths.astype(float) ** 2)
    short = np.minimum(lengths, limit)
    for power in (1, 2):
        expected = p * lengths**power + (1 - p) * short**power
        spread = np.sqrt((p * (1 - p) * (lengths**power - short**power) ** 2).sum())
        assert abs((found**power).sum() - expected.sum()) < 4 * spread
        assert (expected <= 2 * weight).all() or power == 1
    reduction = 1 - found.sum() / lengths.sum()
    assert 0.3 < reduction < 0.5  # 0.40: the test is not about lengths that are hardly cut


def gathered(ages, repeats):
    """Return `repeats` sequences, each of one event a value of `ages`, then one of the session."""
    n = len(ages)
    rows = make_sequences(np.full(repeats, n), 1)
    rows[:, ANCHOR] = 10_000_000
    place = np.tile(np.arange(n + 1), repeats)
    times = np.tile(np.append(10_000_000 - np.array(ages), 10_000_000), repeats)
    return Gathered(
        sequences=rows,
        ints=np.stack([place, times], axis=1),
        codes=(place % 251).astype(np.uint8)[:, None],
        floats=np.arange(repeats, dtype=np.float32)[:, None],
        num_clipped=0,
    )


AGES = [9_000, 7_000, 500, 400, 300, 200, 100, 50, 20, 10, 5, 1]


@pytest.mark.parametrize("selection", ["greedy", "random", "weighted"])
@pytest.mark.parametrize("k", [0, 1, 3, 9, 11])
def test_each_event_stays_as_often_as_its_weight_says(selection, k):
    repeats, n = 6_000, len(AGES)
    rules = make_rules(selection, max_length=16)
    short = shorten(gathered(AGES, repeats), np.full(repeats, k), rules)
    places = short.ints[:, 0].reshape(repeats, k + 1)
    assert (np.diff(places, axis=1) > 0).all()
    assert (places[:, -1] == n).all()  # the session stays
    assert (short.codes[:, 0] == short.ints[:, 0] % 251).all()
    assert (short.floats[:, 0] == np.arange(repeats)).all()
    assert (short.sequences[:, NUM_HISTORY] == k).all()
    stays = np.bincount(places[:, :-1].reshape(-1), minlength=n) / repeats
    if selection == "greedy":
        assert stays.tolist() == [0.0] * (n - k) + [1.0] * k
        return
    rng = np.random.default_rng(k)
    weights = np.ones(n) if selection == "random" else 1 - np.array(AGES) / sum(AGES)
    drawn = [
        rng.choice(n, k, replace=False, p=weights / weights.sum())
        for _ in range(repeats if k else 0)
    ]
    expected = np.bincount(np.array(drawn, int).reshape(-1), minlength=n) / repeats
    assert np.abs(stays - expected).max() < 4.5 * np.sqrt(0.5 / repeats)
    if 0 < k < 11:
        assert stays.std() < 0.02 or selection == "weighted"


def test_pairs_of_events_stay_together_as_often_as_chance_says():
    repeats, n, k = 40_000, 12, 5
    short = shorten(gathered(AGES, repeats), np.full(repeats, k), make_rules("random"))
    member = np.zeros((repeats, n))
    np.put_along_axis(member, short.ints[:, 0].reshape(repeats, k + 1)[:, :-1], 1.0, axis=1)
    together = member.T @ member / repeats
    expected = k * (k - 1) / (n * (n - 1))
    off_diagonal = together[~np.eye(n, dtype=bool)]
    assert np.abs(off_diagonal - expected).max() < 5 * np.sqrt(expected / repeats)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.0, "selection": "greedy"}, "alpha must be above 1 and at most 2, got 1.0"),
        ({"alpha": 2.1, "selection": "greedy"}, "alpha must be above 1"),
        ({"max_length": -1, "selection": "greedy"}, "max_length must be 0"),
        ({"alpha": 1.7}, "selection=none cuts nothing"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        StochasticLengthConfig(**changes)


def test_a_history_of_no_tokens_cannot_be_cut():
    config = DataConfig(
        log="none", num_items=1, stochastic_length=StochasticLengthConfig(selection="greedy")
    )
    with pytest.raises(ValueError, match="max_history_tokens=0"):
        replace(config, max_history_tokens=0)
