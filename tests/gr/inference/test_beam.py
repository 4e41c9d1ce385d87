"""Beam search against all sequences of a small catalogue, one prefix at a time."""

from itertools import product

import numpy as np
import pytest
import torch

from gr.inference.beam import PREDICTED, SequenceQuestion, beam_search
from gr.inference.engine import before

# What the tests share takes long to make: one worker of pytest-xdist makes it.
pytestmark = pytest.mark.xdist_group("serve")
TIME, USER = 1_700_600_000, 7
FEW = [2, 5, 9, 11]
ASSUMED = {"click": 1.0, "watch_ms": 6000.0}


@pytest.fixture(scope="module")
def recommender(served):
    return served


def question(recommender, **options):
    history = before(recommender.store.history(USER), TIME, recommender.max_events)
    asked = {"user_id": USER, "time": TIME, "history": history, "steps": 3, "width": 64}
    return SequenceQuestion(**(asked | {"allow": np.array(FEW), "actions": ASSUMED} | options))


class Oracle:
    """Log probabilities of next items and predicted actions, one prefix of columns at a time."""

    def __init__(self, recommender, seconds, actions):
        self.recommender, self.seconds, self.actions = recommender, seconds, actions
        stored = before(recommender.store.history(USER), TIME, recommender.max_events)
        codes = stored.codes
        values = {0: None, 1: 500, 2: 3000, 3: 9000}
        self.columns = {
            "item_id": stored.ints[:, 0].tolist(),
            "timestamp": stored.ints[:, 1].tolist(),
            "click": [float(c == 2) for c in codes[:, 0]],
            "watch_ms": [values[c] for c in codes[:, 1]],
            "price": [float(i % 3) for i in stored.ints[:, 0]],
        }
        self.done = {}

    def events(self, items):
        columns = {name: list(values) for name, values in self.columns.items()}
        for n, item in enumerate(items):
            action = self.action(items[:n], item)
            new = {"item_id": item, "timestamp": TIME + n * self.seconds, "price": float(item % 3)}
            for name, value in (new | action).items():
                columns[name].append(value)
        return columns

    def encoded(self, items):
        if items not in self.done:
            columns = self.events(items)
            time = TIME + len(items) * self.seconds
            encoder = self.recommender.encoder
            requests = encoder.requests([USER], [time], columns, [len(columns["item_id"])])
            self.done[items] = requests, self.recommender.scorer.encode_history(requests)
        return self.done[items]

    def action(self, items, item):
        if self.actions != PREDICTED:
            return self.actions
        requests, encoded = self.encoded(items)
        columns = {"item_id": [item], "price": [float(item % 3)]}
        candidates = self.recommender.encoder.candidates(requests, columns, [1])
        ranking = self.recommender.scorer.score(encoded, candidates).ranking
        watch = 1000 * min(np.expm1(float(ranking["watch"])), 60)
        return {"click": float(ranking["click"] >= 0), "watch_ms": watch}

    def log_prob(self, items):
        total = 0.0
        catalogue = self.recommender.catalogue
        for n, item in enumerate(items):
            vector = self.encoded(items[:n])[1].user_vectors[0].double()
            logits = catalogue.vectors_ED.double() @ vector
            logits = logits / self.recommender.scorer.config.loss.temperature
            row = catalogue.ids.tolist().index(item)
            total += float(torch.log_softmax(logits, 0)[row])
        return total


@pytest.mark.parametrize("actions", [ASSUMED, {}, PREDICTED], ids=["assumed", "unknown", PREDICTED])
@pytest.mark.parametrize("repeats", [True, False])
def test_wide_enough_it_finds_the_best_of_all_sequences(recommender, repeats, actions):
    unknown = {"click": None, "watch_ms": None}
    given = actions if actions == PREDICTED else unknown | actions
    oracle = Oracle(recommender, 60, given)
    wanted = [
        (items, oracle.log_prob(items))
        for items in product(FEW, repeat=3)
        if repeats or len(set(items)) == 3
    ]
    wanted.sort(key=lambda pair: (-pair[1], pair[0]))
    options = {"repeats": repeats, "actions": actions, "seconds": 60, "results": 10}
    found = beam_search(recommender, question(recommender, **options))
    assert len(found) == 10
    for mine, (items, log_prob) in zip(found, wanted, strict=False):
        assert mine.log_prob == pytest.approx(log_prob, abs=1e-4)
        assert mine.score == pytest.approx(log_prob / 3, abs=1e-4)
        assert mine.item_ids == items
    assert wanted[0][1] - wanted[9][1] > 1e-2


@pytest.mark.parametrize("power", [0.0, 0.7, 1.0, 2.0])
def test_sequences_of_several_lengths_compete_by_their_normalised_score(recommender, power):
    oracle = Oracle(recommender, 1, ASSUMED)
    wanted = [
        (-oracle.log_prob(items) / len(items) ** power, items)
        for length in (1, 2, 3)
        for items in product(FEW, repeat=length)
        if len(set(items)) == length
    ]
    options = {"min_steps": 1, "length_power": power, "results": 12}
    found = beam_search(recommender, question(recommender, **options))
    assert [x.item_ids for x in found] == [items for _, items in sorted(wanted)[:12]]
    if power == 0:  # a longer sequence is never likelier than what it begins with
        assert len(found[0].item_ids) == 1


def test_a_narrow_beam_follows_the_best_prefixes(recommender):
    oracle = Oracle(recommender, 1, ASSUMED)
    beams = [()]
    for _ in range(3):
        grown = [(*items, item) for items in beams for item in FEW if item not in items]
        beams = sorted(grown, key=lambda items: (-oracle.log_prob(items), items))[:2]
    found = beam_search(recommender, question(recommender, width=2))
    assert [x.item_ids for x in found] == beams


def test_without_filters_and_with(recommender):
    found = beam_search(recommender, question(recommender, allow=None, steps=2, width=24))
    assert len(found) == 8
    first = found[0].item_ids
    other = question(recommender, allow=None, steps=2, width=24, exclude=np.array(first))
    assert not set(first) & {i for x in beam_search(recommender, other) for i in x.item_ids}


def test_it_ends_where_nothing_is_left(recommender):
    few = question(recommender, allow=np.array([3, 4]), steps=3, min_steps=1)
    assert {x.item_ids for x in beam_search(recommender, few)} == {(3,), (4,), (3, 4), (4, 3)}
    assert beam_search(recommender, question(recommender, allow=np.array([3, 4]))) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"width": 0}, "width must be at least 1"),
        ({"min_steps": 4}, "min_steps must be within 0 and steps=3"),
        ({"length_power": -1.0}, "length_power must be at least 0"),
        ({"time": 5}, "the history is empty before the time"),
        ({"actions": {"like": 1.0}}, "actions names ..like.."),
        ({"actions": "guessed"}, "actions must be 'predicted' or values"),
        ({"allow": np.array([99])}, "item 99 is not in the catalogue"),
    ],
)
def test_wrong_questions(recommender, options, message):
    with pytest.raises(ValueError, match=message):
        beam_search(recommender, question(recommender, **options))
