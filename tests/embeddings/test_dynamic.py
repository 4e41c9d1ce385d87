"""Tables whose ids come and go, against an oracle that keeps one id and one row at a time."""

import pytest
import torch

from embeddings.memory import map_bytes
from tests.dist import MANY_GPUS, run_distributed
from tests.embeddings.dynamic_scenario import TABLES, DynamicCase, expected, run, train_steps

STEPS = 24
ADAMW = DynamicCase()
CHAIN = ((4, "row_wise", 9), (2, "table_wise", 14), (1, "row_wise", 19), (4, "row_wise", STEPS))
"""Ranks, plan, and the step at which they stop."""


def check(result, rule: str) -> None:
    _, found, metrics = result
    vectors, maps = expected(rule, STEPS)
    for name in TABLES:
        assert found[name].keys() == vectors[name].keys()
        for x, vector in found[name].items():
            torch.testing.assert_close(vector, vectors[name][x], rtol=0, atol=1e-6)
    for name, oracle in maps.items():
        for counter in ("admitted", "evicted", "expired", "refused", "forgotten"):
            assert metrics[f"vocabulary/{name}/{counter}"] == getattr(oracle, counter), counter
        assert metrics[f"vocabulary/{name}/waiting"] == len(oracle.waiting)
        assert metrics[f"vocabulary/{name}/occupancy"] == len(oracle.row) / (oracle.num_rows - 1)


def test_the_run_has_all_that_can_happen():
    _, maps = expected("adamw", STEPS)
    item, user = maps["item"], maps["user"]
    assert min(item.admitted, item.evicted, item.expired, item.forgotten, user.evicted) > 3
    assert len(item.row) > 15


def test_one_process_equals_the_oracle_and_a_resumed_one_to_the_bit(tmp_path):
    whole = run(ADAMW, 0, STEPS)
    check(whole, "adamw")
    saved = run(ADAMW, 0, 11, save_to=str(tmp_path))
    before, after, metrics = run(ADAMW, 11, STEPS, load_from=str(tmp_path))
    for one, other in ((saved[1], before), (whole[1], after)):
        for name in TABLES:
            assert one[name].keys() == other[name].keys()
            assert all(torch.equal(vector, other[name][x]) for x, vector in one[name].items())
    # The share of unknown ids is that since the last line of metrics.
    assert {**metrics, "vocabulary/item/unknown": 0, "vocabulary/user/unknown": 0} == {
        **whole[2],
        "vocabulary/item/unknown": 0,
        "vocabulary/user/unknown": 0,
    }


@pytest.mark.slow
def test_ids_keep_their_vectors_when_ranks_come_and_go(tmp_path):
    last, first = None, 0
    for i, (ranks, plan, stop) in enumerate(CHAIN):
        case = DynamicCase("sharded", "adagrad", (plan,))
        load_from = str(tmp_path / str(i - 1)) if i else ""
        results = run_distributed(run, ranks, case, first, stop, load_from, str(tmp_path / str(i)))
        for result in results:
            before, after, _ = result
            for name in TABLES:
                for x, vector in (last or before)[name].items():
                    assert torch.equal(vector, before[name][x]), (name, x)
                for x, vector in results[0][1][name].items():
                    assert torch.equal(vector, after[name][x]), (name, x)
        last, first = results[0][1], stop
    check(results[0], "adagrad")


def test_two_ranks_equal_one_and_one_goes_on_where_they_stopped(tmp_path):
    ranks = run_distributed(run, 2, ADAMW, 0, 13, "", str(tmp_path))
    before, *rest = run(ADAMW, 13, STEPS, load_from=str(tmp_path))
    for _, after, _ in ranks:
        for name in TABLES:
            assert after[name].keys() == before[name].keys()
            assert all(torch.equal(vector, before[name][x]) for x, vector in after[name].items())
    check((before, *rest), "adamw")


@pytest.mark.gpu
@pytest.mark.parametrize("momentum", ["hbm", "host"])
def test_a_gpu_equals_the_oracle_and_resumes(tmp_path, momentum):
    case = DynamicCase("sharded", "adamw", ("row_wise",), "cuda", momentum)
    run_distributed(run, 1, case, 0, 11, "", str(tmp_path), backend="nccl")
    (result,) = run_distributed(run, 1, case, 11, STEPS, str(tmp_path), backend="nccl")
    check(result, "adamw")


@pytest.mark.parametrize("ranks", MANY_GPUS)
def test_many_gpus_equal_the_oracle_and_one_goes_on(tmp_path, ranks):
    case = DynamicCase("sharded", "adamw", ("row_wise",), "cuda")
    run_distributed(run, ranks, case, 0, 11, "", str(tmp_path), backend="nccl")
    (result,) = run_distributed(run, 1, case, 11, STEPS, str(tmp_path), backend="nccl")
    check(result, "adamw")
    for each in run_distributed(run, ranks, case, 11, STEPS, str(tmp_path), backend="nccl"):
        check(each, "adamw")


def test_the_map_takes_the_bytes_that_are_counted():
    tables, vocabulary = ADAMW.build()
    train_steps(tables, vocabulary, 0, STEPS)
    for name, id_map in vocabulary.maps.items():
        table = TABLES[name]
        full_index = id_map.num_rows * (8 + 4)
        held = (id_map.id_E, id_map.last_step_E, id_map.last_time_E)
        size = full_index + sum(x.numel() * x.element_size() for x in held)
        size += id_map.max_waiting * 3 * 8
        assert map_bytes(table) == size
        assert f"map of {size:,} bytes" in vocabulary.summary()
    assert map_bytes(TABLES["tag"]) == 0
