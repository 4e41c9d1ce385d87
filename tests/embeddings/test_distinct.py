"""Each id once, against looking every one of them up."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import EmbeddingsConfig, TableConfig
from embeddings.distinct import (
    SEQUENCES,
    put_back_repeats,
    spread_evenly,
    take_out_repeats,
)

CONFIG = EmbeddingsConfig(
    tables={
        "item": TableConfig(num_embeddings=40, dim=8, features=("item_id", "target")),
        "tag": TableConfig(num_embeddings=5, dim=4, features=("tag",)),
    }
)
FEATURES = {"item_id": 40, "target": 40, "tag": 5}


@st.composite
def bags(draw):
    """Return feature -> ids of each of its sequences."""
    num_sequences = draw(st.integers(1, 4))
    return {
        name: [draw(st.lists(st.integers(0, rows - 1), max_size=6)) for _ in range(num_sequences)]
        for name, rows in FEATURES.items()
    }


@settings(deadline=None, max_examples=60)
@given(bags(), st.integers(0, 2**31), st.booleans())
def test_rows_and_gradients_are_those_of_every_id(bags, seed, is_bad):
    generator = torch.Generator().manual_seed(seed)
    weight = {
        name: torch.randn(t.num_embeddings, t.dim, generator=generator)
        for name, t in CONFIG.tables.items()
    }
    table_of = {f: name for name, t in CONFIG.tables.items() for f in t.features}
    ids = {name: torch.tensor([x for bag in of for x in bag]).long() for name, of in bags.items()}
    rows = KeyedJaggedTensor(
        keys=list(bags),
        values=torch.cat(list(ids.values())),
        lengths=torch.tensor([len(bag) for of in bags.values() for bag in of]),
        stride=len(bags["tag"]),
    )
    few, repeats = take_out_repeats(rows, CONFIG)
    values, bounds = few.values(), few.offset_per_key()
    asked = {f: values[bounds[i] : bounds[i + 1]] for i, f in enumerate(few.keys())}
    for table in CONFIG.tables.values():
        first, *others = table.features
        every = torch.cat([ids[feature] for feature in table.features])
        assert asked[first].tolist() == sorted(set(every.tolist()))
        assert all(asked[feature].numel() == 0 for feature in others)
    assert int(few.lengths().sum()) == values.numel()
    assert len(few.lengths()) == few.stride() * len(FEATURES)

    found = {f: weight[table_of[f]][rows].requires_grad_() for f, rows in asked.items()}
    counted = []
    got = put_back_repeats(found, repeats, lambda bad: counted.append(int(bad.sum())))
    grads, expected = {}, {name: torch.zeros_like(w) for name, w in weight.items()}
    for feature, of in ids.items():
        assert torch.equal(got[feature], weight[table_of[feature]][of])
        grad = torch.randn(len(of), got[feature].shape[1], generator=generator)
        if is_bad and len(of):
            grad[-1, -1] = float("nan")
        grads[feature] = grad
        for i, row in enumerate(of.tolist()):
            if grad[i].isfinite().all():
                expected[table_of[feature]][row] += grad[i]
    torch.autograd.backward(list(got.values()), list(grads.values()))
    assert sum(counted) == sum(is_bad and len(of) > 0 for of in ids.values())
    for name, table in CONFIG.tables.items():
        first = table.features[0]
        torch.testing.assert_close(found[first].grad, expected[name][asked[first]])


def test_many_ids_are_spread_over_sequences():
    rows = torch.arange(40).repeat(100)
    few, _ = take_out_repeats(
        KeyedJaggedTensor(
            keys=["item_id", "target", "tag"],
            values=rows,
            lengths=torch.tensor([len(rows), 0, 0]),
            stride=1,
        ),
        CONFIG,
    )
    assert few.values().tolist() == list(range(40))
    assert few.stride() == SEQUENCES
    assert sorted(set(few.lengths()[:SEQUENCES].tolist())) == [0, 1]


@given(bags())
def test_evenly_spread_ids_stay_in_their_order(bags):
    long = {name: [ids * 500 for ids in of] for name, of in bags.items()}
    rows = KeyedJaggedTensor(
        keys=list(long),
        values=torch.tensor([x for of in long.values() for ids in of for x in ids]).long(),
        lengths=torch.tensor([len(ids) for of in long.values() for ids in of]),
        stride=len(long["tag"]),
    )
    even = spread_evenly(rows)
    assert even.keys() == rows.keys()
    for name, of in long.items():
        got = even[name]
        assert got.values().tolist() == [x for ids in of for x in ids]
        lengths = got.lengths()
        assert int(lengths.max() - lengths.min()) <= 1
        assert int(lengths.sum()) == got.values().numel()
    assert even.stride() == SEQUENCES
