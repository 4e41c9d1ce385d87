"""Retrieval against brute force, with filters, and against FAISS."""

import builtins

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.inference.catalogue import ItemCatalogue
from gr.inference.retrieval import ExactIndex, FaissIndex


def catalogue(num_items, dim, seed, top=2):
    """Items with ids in no order, and vectors of small whole numbers: scores are often equal."""
    random = np.random.default_rng(seed)
    ids = random.choice(np.arange(-50, 5 * num_items), num_items, replace=False)
    vectors = random.integers(-top, top + 1, (num_items, dim))
    return ids, torch.from_numpy(vectors).float()


def brute_force(ids, vectors, users, k, exclude, allow):
    """Return [(id, score), ...] of each user."""
    found = []
    for user, out, only in zip(users, exclude, allow, strict=True):
        scores = [float((x.double() * user.double()).sum()) for x in vectors]
        pairs = [
            (int(i), s)
            for i, s in zip(ids, scores, strict=True)
            if i not in out and (only is None or i in only)
        ]
        found.append(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:k])
    return found


def pairs_of(found):
    return [
        [(int(i), float(s)) for i, s in zip(ids, scores, strict=True) if i != -1 or s != -np.inf]
        for ids, scores in zip(found.ids, found.scores, strict=True)
    ]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_equals_brute_force(data):
    num_items, dim = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 4))
    num_users, k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 70))
    ids, vectors = catalogue(num_items, dim, data.draw(st.integers(0, 99)))
    users = torch.from_numpy(
        np.random.default_rng(data.draw(st.integers(0, 99))).integers(-2, 3, (num_users, dim))
    ).float()
    some = st.lists(st.sampled_from(ids.tolist()), max_size=num_items)
    # Ids that the catalogue does not know may be excluded.
    exclude = [
        np.array(data.draw(some) + data.draw(st.sampled_from([[], [10**9]])), np.int64)
        for _ in range(num_users)
    ]
    allow = [
        None if x is None else np.array(x, np.int64)
        for x in data.draw(
            st.lists(st.one_of(st.none(), some), min_size=num_users, max_size=num_users)
        )
    ]
    wanted = brute_force(ids, vectors, users, k, exclude, allow)
    index = ExactIndex(ItemCatalogue(ids, vectors))
    found = index.search(users, k, exclude=exclude, allow=allow)
    assert pairs_of(found) == wanted
    assert found.ids.shape == found.scores.shape == (num_users, k)


def test_without_filters_every_item_may_be_found():
    ids, vectors = catalogue(30, 3, 0)
    users = torch.eye(3)
    found = ExactIndex(ItemCatalogue(ids, vectors)).search(users, 5)
    nothing = [np.empty(0, np.int64)] * 3
    assert pairs_of(found) == brute_force(ids, vectors, users, 5, nothing, [None] * 3)


def test_half_precision_ranks_what_it_holds():
    ids, vectors = catalogue(500, 16, 0, top=1)
    users = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 16))).float()
    found = ExactIndex(ItemCatalogue(ids, vectors.half())).search(users, 20)
    rounded = users.half()
    nothing = [np.empty(0, np.int64)] * 3
    wanted = brute_force(ids, vectors, rounded, 20, nothing, [None] * 3)
    for mine, theirs in zip(pairs_of(found), wanted, strict=True):
        np.testing.assert_allclose([s for _, s in mine], [s for _, s in theirs], rtol=1e-5)


def test_faiss_flat_finds_the_same_and_an_inverted_file_most():
    pytest.importorskip("faiss")
    random = np.random.default_rng(0)
    vectors = torch.from_numpy(random.normal(size=(2000, 16))).float()
    items = ItemCatalogue(np.arange(2000), vectors)
    users = torch.from_numpy(random.normal(size=(8, 16))).float()
    exclude = [np.arange(100 * b) for b in range(8)]
    exact = ExactIndex(items).search(users, 20, exclude=exclude)
    flat = FaissIndex(items, "Flat").search(users, 20, exclude=exclude)
    assert flat.ids.tolist() == exact.ids.tolist()
    np.testing.assert_allclose(flat.scores, exact.scores, rtol=1e-5)
    inverted = FaissIndex(items, "IVF16,Flat", probes=8).search(users, 20)
    wanted = ExactIndex(items).search(users, 20).ids
    hits = [len(set(a) & set(b)) for a, b in zip(inverted.ids, wanted, strict=True)]
    assert np.mean(hits) > 15
    allowed = [np.array([3, 5, 7])] * 8
    found = FaissIndex(items, "IVF16,Flat").search(users, 2, allow=allowed)
    assert found.ids.tolist() == ExactIndex(items).search(users, 2, allow=allowed).ids.tolist()
    with pytest.raises(ValueError, match="FAISS does not know the index 'Flut'"):
        FaissIndex(items, "Flut")


def test_without_faiss_there_is_a_message(monkeypatch):
    real = builtins.__import__

    def no_faiss(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_faiss)
    ids, vectors = catalogue(4, 2, 0)
    with pytest.raises(ValueError, match="needs the package faiss-cpu"):
        FaissIndex(ItemCatalogue(ids, vectors), "Flat")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"users_BD": torch.full((1, 2), torch.nan)}, "user vectors must be finite"),
        ({"exclude": []}, "of each of 1 users, got 0 and 1"),
        ({"allow": [np.array([4, 999])]}, "item 999 is not in the catalogue of 3 items"),
    ],
)
def test_wrong_searches(arguments, message):
    index = ExactIndex(ItemCatalogue([4, 2, 9], torch.ones(3, 2)))
    with pytest.raises(ValueError, match=message):
        index.search(**({"users_BD": torch.ones(1, 2), "k": 1} | arguments))


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        ([1, 2], torch.ones(3, 2), "expected ids .E,. and vectors"),
        ([1, 2, 1], torch.ones(3, 2), "item 1 stands twice"),
        ([1, 2, 3], torch.full((3, 2), torch.inf), "must be finite"),
    ],
)
def test_wrong_catalogues(ids, vectors, message):
    with pytest.raises(ValueError, match=message):
        ItemCatalogue(ids, vectors)
