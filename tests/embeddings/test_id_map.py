"""The map against dictionaries: the same ids, the same rows, the same counts."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.config import DynamicIdsConfig, TableConfig
from embeddings.id_map import IdMap
from embeddings.initial import rows_of_ids
from embeddings.sorted_ids import SortedIds
from tests.embeddings.id_oracle import IdOracle

ANY = st.integers(-(2**63), 2**63 - 1)
DAY = 86_400


def table(rows: int = 9, **dynamic) -> TableConfig:
    return TableConfig(
        num_embeddings=rows,
        dim=4,
        ids="dynamic",
        features=("item_id",),
        dynamic=DynamicIdsConfig(**dynamic),
    )


def observe(id_map: IdMap, looked_up: list[int], events: list[int], step: int, time: int):
    rows = id_map.rows_of(torch.tensor(looked_up).long())
    new = torch.tensor([x for x in events if x != -1]).long()
    new = new[id_map.rows_of(new) == 0]
    ids, counts = torch.unique(new, return_counts=True)
    return id_map.observe(rows, ids, counts, step=step, time=time, sync=lambda _: None)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(ANY, max_size=6), max_size=6), st.lists(ANY, max_size=6))
def test_sorted_ids_equal_a_dictionary(lots, asked):
    found = SortedIds({"x": torch.int32}, torch.device("cpu"))
    expected: dict[int, int] = {}
    for i, lot in enumerate(lots):
        new = sorted(set(lot) - set(expected))
        found.insert(torch.tensor(new).long(), {"x": torch.full((len(new),), i)})
        expected |= dict.fromkeys(new, i)
        if i == 2:
            found.keep(found.ids % 2 == 0)
            expected = {x: value for x, value in expected.items() if x % 2 == 0}
    assert found.ids.tolist() == sorted(expected)
    assert found.columns["x"].tolist() == [expected[x] for x in sorted(expected)]
    asked = [*asked, *list(expected)[:3]]
    places = found.find(torch.tensor(asked).long()).tolist()
    assert places == [sorted(expected).index(x) if x in expected else -1 for x in asked]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_map_equals_dictionaries(data):
    num_rows = data.draw(st.sampled_from([2, 9, 200]))
    admit_after = data.draw(st.sampled_from([1, 1, 2, 3]))
    max_waiting = data.draw(st.sampled_from([0, 5, 24])) if admit_after > 1 else 0
    ttl_days = data.draw(st.sampled_from([0.0, 1.0]))
    evicts = data.draw(st.booleans())
    id_map = IdMap(
        table(
            num_rows,
            admit_after=admit_after,
            max_waiting=max_waiting,
            ttl_days=ttl_days,
            when_full="evict" if evicts else "refuse",
        ),
        torch.device("cpu"),
    )
    oracle = IdOracle(num_rows, admit_after, max_waiting, round(ttl_days * DAY), evicts)
    ids = st.sampled_from([-(2**63), -2, -1, 0, 2**63 - 1, *range(7, 200, 7)])
    if num_rows == 200:
        ids = st.integers(-1, 400)
    time = 0
    for step in range(data.draw(st.integers(1, 12))):
        history = data.draw(st.lists(ids, max_size=5))
        events = data.draw(st.lists(ids, max_size=300 if num_rows == 200 else 12))
        time += data.draw(st.sampled_from([-3, 0, 60, DAY // 3]))
        changes = observe(id_map, [*events, *history], events, step, time)
        admitted, freed = oracle.observe([*events, *history], events, step, time)
        assert changes.ids.tolist() == admitted
        assert changes.rows.tolist() == [oracle.row[x] for x in admitted]
        assert sorted(changes.freed.tolist()) == sorted(freed)
        known = sorted(oracle.row)
        assert id_map.index.ids.tolist() == known
        assert id_map.rows_of(id_map.index.ids).tolist() == [oracle.row[x] for x in known]
        assert id_map.waiting.ids.tolist() == sorted(oracle.waiting)
        assert id_map.waiting.columns["count"].tolist() == [
            oracle.waiting[x][0] for x in sorted(oracle.waiting)
        ]
        for counter in ("admitted", "evicted", "expired", "refused", "forgotten"):
            assert getattr(id_map, counter) == getattr(oracle, counter), counter
        used = sorted(oracle.row.values())
        assert id_map.is_used().nonzero()[:, 0].tolist() == used
        assert id_map.num_used == len(used)
        numbers = torch.tensor([0, 5, 2**62])
        drawn = [oracle.row[known[int(x) % len(known)]] if known else 0 for x in numbers]
        assert id_map.draw(numbers).tolist() == drawn
        if data.draw(st.booleans()):
            other = IdMap(id_map_config(id_map, num_rows), torch.device("cpu"))
            other.load_state({name: x.clone() for name, x in id_map.state().items()})
            assert {n: x.shape for n, x in other.state().items()} == {
                n: x.shape for n, x in IdMap(id_map_config(other, num_rows), "cpu").state().items()
            }
            id_map = other


def id_map_config(id_map: IdMap, num_rows: int) -> TableConfig:
    return TableConfig(
        num_embeddings=num_rows,
        dim=4,
        ids="dynamic",
        features=("item_id",),
        dynamic=id_map.config,
    )


def test_rows_of_ids_are_a_truncated_normal_of_the_id_alone():
    config = TableConfig(
        num_embeddings=9, dim=8, ids="dynamic", features=("item_id",), init_std=0.5
    )
    ids = torch.arange(20_000) * 2**40
    rows = rows_of_ids(config, ids, table="item", seed=3)
    assert torch.equal(rows_of_ids(config, ids[[5, 3]], table="item", seed=3), rows[[5, 3]])
    assert not torch.equal(rows_of_ids(config, ids, table="user", seed=3), rows)
    assert not torch.equal(rows_of_ids(config, ids, table="item", seed=4), rows)
    rows = rows.double()
    assert rows.abs().max() <= 1.0
    # See test_replicated: standard deviation 0.8796 of the uncut one; 5 standard errors.
    assert abs(rows.mean()) < 5 * 0.44 / 400
    assert abs(rows.std() / 0.5 - 0.8796) < 0.01
    for a, b in ((0, 1), (0, 7)):
        correlation = torch.corrcoef(rows[:, [a, b]].T)[0, 1]
        assert abs(correlation) < 5 / 20_000**0.5
    assert abs(torch.corrcoef(torch.stack([rows[:-1, 0], rows[1:, 0]]))[0, 1]) < 5 / 20_000**0.5
    counts = Counter((rows[:, 0] / 0.1).floor().int().tolist())
    assert min(counts[i] for i in range(-10, 10)) > 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"admit_after": 0}, "admit_after must be at least 1"),
        ({"max_waiting": 5}, "admit_after=1"),
        ({"ttl_days": -1.0}, "ttl_days must be finite"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DynamicIdsConfig(**changes)


def test_tables_refuse_what_dynamic_ids_cannot_have():
    dynamic = {"num_embeddings": 9, "dim": 4, "features": ("item_id",)}
    with pytest.raises(ValueError, match="ids=hashed: set ids=dynamic"):
        TableConfig(**dynamic, ids="hashed", dynamic=DynamicIdsConfig(admit_after=2))
    with pytest.raises(ValueError, match=r"hbm_gb must be 0, got 0\.5"):
        TableConfig(**dynamic, ids="dynamic", hbm_gb=0.5)
    with pytest.raises(ValueError, match="31 bits"):
        TableConfig(**{**dynamic, "num_embeddings": 2**31}, ids="dynamic")
