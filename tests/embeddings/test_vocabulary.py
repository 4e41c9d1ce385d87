import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import EmbeddingsConfig, TableConfig
from embeddings.hashing import hash_ids
from embeddings.vocabulary import Vocabulary

CONFIG = EmbeddingsConfig(
    tables={
        "item": TableConfig(num_embeddings=11, dim=4, features=("item_id", "target_item_id")),
        "user": TableConfig(num_embeddings=7, dim=4, ids="hashed", features=("user_id",)),
    }
)
MAX = 2**63 - 1


def jagged(ids: dict[str, list[list[int]]]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=list(ids),
        values=torch.tensor([x for bags in ids.values() for bag in bags for x in bag]).long(),
        lengths=torch.tensor([len(bag) for bags in ids.values() for bag in bags]).long(),
    )


def python_hash(x: int) -> int:
    """SplitMix64 on Python integers: what hash_ids must equal."""
    mask = 2**64 - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) & MAX


bag_lists = st.lists(st.lists(st.integers(-1, 9), max_size=4), min_size=3, max_size=3)
user_lists = st.lists(st.lists(st.integers(-MAX - 1, MAX), max_size=3), min_size=3, max_size=3)


@settings(max_examples=50, deadline=None)
@given(bag_lists, user_lists, bag_lists)
def test_rows_equal_a_loop_over_the_ids(items, users, targets):
    ids = {"item_id": items, "user_id": users, "target_item_id": targets}
    rows = Vocabulary(CONFIG).rows(jagged(ids), torch.zeros(3))
    expected = [
        0 if x == -1 else (1 + python_hash(x) % 6 if name == "user_id" else x + 1)
        for name, bags in ids.items()
        for bag in bags
        for x in bag
    ]
    assert rows.values().tolist() == expected
    assert rows.keys() == list(ids)
    assert rows.lengths().tolist() == [len(bag) for bags in ids.values() for bag in bags]
    assert rows.offset_per_key() == jagged(ids).offset_per_key()
    assert rows.stride() == 3


@settings(max_examples=30, deadline=None)
@given(st.integers(-MAX - 1, MAX))
def test_hash_equals_splitmix64(x: int):
    assert hash_ids(torch.tensor([x])).item() == python_hash(x)


def test_hash_vectors():
    # First outputs of SplitMix64 from the states 0 and 1234567 (published), top bit dropped.
    got = hash_ids(torch.tensor([0, 1234567])).tolist()
    assert got == [0xE220A8397B1DCDAF & MAX, 6457827717110365317]


def test_hash_spreads_ids_evenly():
    # Consecutive ids and multiples of a power of two: the patterns that weak hashes keep.
    for ids in (torch.arange(100_000), torch.arange(100_000) * 2**20, -torch.arange(100_000) - 2):
        counts = torch.bincount(hash_ids(ids) % 1000, minlength=1000).double()
        chi_square = ((counts - 100).square() / 100).sum().item()
        # 999 degrees of freedom: mean 999, standard deviation 44.7; 1200 is 4.5 of them above.
        assert 800 < chi_square < 1200


def test_an_empty_batch_has_no_rows():
    empty = KeyedJaggedTensor(
        keys=["item_id", "user_id"],
        values=torch.zeros(0, dtype=torch.int64),
        lengths=torch.zeros(0, dtype=torch.int64),
        stride=0,
    )
    rows = Vocabulary(CONFIG).rows(empty, torch.zeros(0, dtype=torch.int64))
    assert rows.values().numel() == 0
    assert rows.keys() == ["item_id", "user_id"]
    assert rows.offset_per_key() == [0, 0, 0]


@pytest.mark.parametrize("bad", [10, -2, MAX])
def test_an_id_out_of_range_is_named(bad: int):
    ids = jagged({"item_id": [[1, 2], []], "target_item_id": [[], [3, bad, bad]]})
    with pytest.raises(ValueError, match="outside") as error:
        Vocabulary(CONFIG).rows(ids, torch.tensor([4, 17]))
    message = str(error.value)
    for part in ("'item'", "'target_item_id'", f"got {bad}", "partition 17", "2 id(s)", "0 .. 9"):
        assert part in message


def test_a_feature_without_a_table_is_named():
    with pytest.raises(ValueError, match="'tag'"):
        Vocabulary(CONFIG).rows(jagged({"tag": [[1]]}), None)


def test_rows_and_ids_of_a_static_table():
    vocabulary = Vocabulary(CONFIG)
    ids = torch.tensor([-1, 0, 9])
    rows = vocabulary.row_of("item", ids)
    assert rows.tolist() == [0, 1, 10]
    assert torch.equal(vocabulary.id_of("item", rows), ids)
    assert vocabulary.catalogue_size("item") == 10
    assert vocabulary.row_of("user", ids).tolist() == [0, *(1 + python_hash(x) % 6 for x in (0, 9))]
    with pytest.raises(ValueError, match=r"given ids.*got 10"):
        vocabulary.row_of("item", torch.tensor([10]))
    with pytest.raises(ValueError, match="ids=static"):
        vocabulary.catalogue_size("user")
    with pytest.raises(ValueError, match="'usr'"):
        vocabulary.row_of("usr", ids)
