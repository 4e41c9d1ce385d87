"""Metrics against scikit-learn and brute force."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from gr.metrics import COMPACT_EVERY, EvalAccumulator
from gr.retrieval_metrics import catalogue_ranks
from gr.task_metrics import auc, gauc
from pipelines.config import TaskConfig
from tests.dist import run_distributed

TASKS = {
    "click": TaskConfig(action="is_click"),
    "watch_time": TaskConfig(
        action="play_ms", type="regression", scale=1000.0, maximum=60.0, log1p=True
    ),
}
SECONDS = TaskConfig(action="play_ms", type="regression", scale=1000.0)


def predictions(seed, num=200, num_users=9):
    """Outputs with many ties, labels, weights (some 0) and users."""
    g = np.random.default_rng(seed)
    seconds = g.exponential(20.0, num).clip(max=60.0)
    columns = {
        "click": (g.normal(size=num).round(1), g.random(num) < 0.3),
        "watch_time": (np.log1p(seconds) + g.normal(size=num), np.log1p(seconds)),
    }
    outputs, labels = ({n: torch.tensor(c[i]).float() for n, c in columns.items()} for i in (0, 1))
    weights = {name: torch.tensor(g.choice([0.0, 0.3, 1.0, 1.7], num)).float() for name in TASKS}
    return outputs, labels, weights, torch.tensor(g.integers(0, num_users, num))


def ranks(seed, num=60):
    g = np.random.default_rng(seed)
    return (
        torch.tensor(g.integers(1, 80, num)),
        torch.tensor(-g.exponential(3.0, num)).float(),
        torch.tensor(g.choice([0.0, 1.0, 2.0], num)).float(),
    )


def split(arguments, parts):
    """Cut every tensor of update_ranking's arguments at the same places."""
    *mappings, users = arguments
    indices = torch.arange(len(users)).tensor_split(parts)
    return [
        (*({k: x[index] for k, x in m.items()} for m in mappings), users[index])
        for index in indices
    ]


def arrays(arguments, task):
    outputs, labels, weights, users = arguments
    keep = weights[task] > 0
    return [x[keep].double().numpy() for x in (outputs[task], labels[task], weights[task], users)]


def expected_ranking(arguments):
    """The metrics by scikit-learn, from the formulae of the docstring."""
    z, y, w, users = arrays(arguments, "click")
    p = 1 / (1 + np.exp(-z))
    rate = np.average(y, weights=w)
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    logloss = sk.log_loss(y, p, sample_weight=w)
    total = wins = 0.0
    for user in np.unique(users):
        mine = users == user
        if len(np.unique(y[mine])) == 2:
            wins += w[mine].sum() * sk.roc_auc_score(y[mine], z[mine], sample_weight=w[mine])
            total += w[mine].sum()
    log_seconds, log_label, v, _ = arrays(arguments, "watch_time")
    seconds, label = np.minimum(np.expm1(log_seconds), 60), np.expm1(log_label)
    return {
        "ne-click": logloss / entropy,
        "logloss-click": logloss,
        "calibration-click": (w * p).sum() / (w * y).sum(),
        "auc-click": sk.roc_auc_score(y, z, sample_weight=w),
        "gauc-click": wins / total,
        "num_examples-click": len(z),
        "mse-watch_time": sk.mean_squared_error(label, seconds, sample_weight=v),
        "mae-watch_time": sk.mean_absolute_error(label, seconds, sample_weight=v),
        "rmse-watch_time": sk.mean_squared_error(label, seconds, sample_weight=v) ** 0.5,
        "num_examples-watch_time": len(seconds),
    }


def expected_retrieval(arguments, ks=(10, 50)):
    rank, log_prob, weight = (x.tolist() for x in arguments)
    total = sum(weight)
    found = {f"{m}@{k}": 0.0 for m in ("hr", "ndcg") for k in ks} | {"mrr": 0.0, "log_pplx": 0.0}
    for r, lp, w in zip(rank, log_prob, weight, strict=True):
        for k in ks:
            if r <= k:
                found[f"hr@{k}"] += w / total
                found[f"ndcg@{k}"] += w / total / math.log2(r + 1)
        found["mrr"] += w / total / r
        found["log_pplx"] -= w / total * lp
    return found | {"num_examples-retrieval": sum(w > 0 for w in weight)}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**16), parts=st.integers(1, 7))
def test_a_window_equals_scikit_learn_however_it_was_cut(seed, parts):
    arguments, rank_arguments = predictions(seed), ranks(seed)
    accumulator = EvalAccumulator(TASKS)
    assert accumulator.roll(3) == []
    for part in split(arguments, parts):
        assert accumulator.roll(3) == []
        accumulator.update_ranking(*part)
    for part in zip(*(x.tensor_split(parts) for x in rank_arguments), strict=True):
        accumulator.update_retrieval(*part)
    (result,) = accumulator.finish()
    assert result.window == 3
    expected = expected_ranking(arguments) | expected_retrieval(rank_arguments)
    assert set(result.metrics) == set(expected)
    for name, value in expected.items():
        assert result.metrics[name] == pytest.approx(value, rel=2e-6, abs=1e-9), name
    assert accumulator.finish() == []
    assert accumulator.lifetime() == result.metrics


def test_windows_are_apart_and_the_lifetime_holds_all():
    parts = split(predictions(1, num=900), 6)
    windows = [10, 10, 11, 11, 11, 13]
    accumulator = EvalAccumulator(TASKS, retrieval=False)
    results = []
    for window, part in zip(windows, parts, strict=True):
        results += accumulator.roll(window)
        accumulator.update_ranking(*part)
    results += accumulator.finish()
    assert [r.window for r in results] == [10, 11, 13]
    for result in results:
        mine = [
            part for window, part in zip(windows, parts, strict=True) if window == result.window
        ]
        joined = concatenate(mine)
        for name, value in expected_ranking(joined).items():
            assert result.metrics[name] == pytest.approx(value, rel=2e-6), (result.window, name)
    for name, value in expected_ranking(concatenate(parts)).items():
        assert accumulator.lifetime()[name] == pytest.approx(value, rel=2e-6), name
    assert not any("retrieval" in name or "@" in name for name in results[0].metrics)


def concatenate(parts):
    *mappings, users = zip(*parts, strict=True)
    joined = [{k: torch.cat([m[k] for m in ms]) for k in ms[0]} for ms in mappings]
    return (*joined, torch.cat(users))


def test_more_updates_than_stay_on_the_device_are_all_counted():
    arguments = predictions(4, num=400)
    accumulator = EvalAccumulator(TASKS, retrieval=False)
    accumulator.roll(0)
    for part in split(arguments, 150):
        accumulator.update_ranking(*part)
    # Page-locked memory holds the last that were sent, not all of them.
    assert [len(records._sent) for records in accumulator._open.values()] == [1] * len(TASKS)
    (result,) = accumulator.finish()
    for name, value in expected_ranking(arguments).items():
        assert result.metrics[name] == pytest.approx(value, rel=2e-6), name


def test_later_changes_of_the_batch_do_not_change_the_state():
    arguments = predictions(4)
    accumulator = EvalAccumulator(TASKS, retrieval=False)
    accumulator.roll(0)
    accumulator.update_ranking(*arguments)
    before = {name: x.clone() for name, x in accumulator.state_dict().items()}
    accumulator.update_ranking(*predictions(5))
    state = accumulator.state_dict()
    assert all(torch.equal(state[name][: len(x)], x) for name, x in before.items())


@pytest.mark.parametrize("before", [1, COMPACT_EVERY, COMPACT_EVERY + 1])
def test_the_newest_predictions_can_be_taken_back(before):
    with_it, without = EvalAccumulator(TASKS), EvalAccumulator(TASKS)
    for accumulator in (with_it, without):
        accumulator.roll(0)
        for seed in range(before):
            accumulator.update_ranking(*predictions(seed))
            accumulator.update_retrieval(*ranks(seed))
    with_it.update_ranking(*predictions(before))
    with_it.update_retrieval(*ranks(before))
    with_it.take_back()
    assert with_it.finish() == without.finish()


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on_within_a_window():
    """What was stored is on the host, what comes after it is not."""

    def add(accumulator, seed):
        *mappings, users = predictions(seed)
        on_gpu = [{name: x.cuda() for name, x in m.items()} for m in mappings]
        accumulator.update_ranking(*on_gpu, users.cuda())
        accumulator.update_retrieval(*(x.cuda() for x in ranks(seed)))

    whole, stored = EvalAccumulator(TASKS), EvalAccumulator(TASKS)
    for accumulator in (whole, stored):
        accumulator.roll(0)
        add(accumulator, 1)
    resumed = EvalAccumulator(TASKS)
    resumed.load_state_dict(stored.state_dict())
    add(whole, 2)
    add(resumed, 2)
    assert resumed.finish() == whole.finish()
    assert resumed.lifetime() == whole.lifetime()


@pytest.mark.gpu
def test_predictions_leave_a_busy_gpu_without_a_wait():
    accumulator, on_cpu = EvalAccumulator(TASKS), EvalAccumulator(TASKS)
    accumulator.roll(0)
    on_cpu.roll(0)
    batches = []
    for seed in range(3 * COMPACT_EVERY + 1):
        *mappings, users = predictions(seed)
        on_gpu = [{name: x.cuda() for name, x in m.items()} for m in mappings]
        batches.append((*on_gpu, users.cuda()))
        on_cpu.update_ranking(*mappings, users)
    for batch in batches[: 2 * COMPACT_EVERY + 1]:  # two are sent, one of them is received
        accumulator.update_ranking(*batch)
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # half a second
    done = torch.cuda.Event()
    done.record()
    for batch in batches[2 * COMPACT_EVERY + 1 :]:  # the second is received, a third is sent
        accumulator.update_ranking(*batch)
    accumulator.send()
    assert not done.query()
    assert accumulator.finish() == on_cpu.finish()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16))
def test_results_do_not_depend_on_the_order_by_a_single_bit(seed):
    *mappings, users = predictions(seed)
    order = torch.randperm(len(users), generator=torch.Generator().manual_seed(seed))
    shuffled = (*({k: x[order] for k, x in m.items()} for m in mappings), users[order])
    results = []
    for arguments in ((*mappings, users), shuffled):
        accumulator = EvalAccumulator(TASKS)
        accumulator.roll(0)
        accumulator.update_ranking(*arguments)
        results.append(json.dumps(accumulator.finish()[0].metrics))
    assert results[0] == results[1]


def run_through(stops):
    """Feed windows 0, 0, 1, 1, 2 and restart from the state at each of `stops`."""
    parts = split(predictions(7, num=500), 5)
    accumulator, results = EvalAccumulator(TASKS), []
    for step, (window, part) in enumerate(zip([0, 0, 1, 1, 2], parts, strict=True)):
        if step in stops:
            state = {name: x.clone() for name, x in accumulator.state_dict().items()}
            accumulator = EvalAccumulator(TASKS)
            for other in (98, 99):
                accumulator.roll(other)
                accumulator.update_ranking(*parts[0])
            accumulator.load_state_dict(state)
        results += accumulator.roll(window)
        accumulator.update_ranking(*part)
        accumulator.update_retrieval(*ranks(step))
    results += accumulator.finish()
    return json.dumps([[r.window, r.metrics] for r in results] + [accumulator.lifetime()])


def test_a_resumed_run_reports_what_an_unbroken_one_does():
    unbroken = run_through(())
    for stops in ((0,), (1,), (2,), (1, 3, 4)):
        assert run_through(stops) == unbroken


def feed_two_ranks(rank_parts, rank_ranks):
    import torch.distributed as dist

    rank = dist.get_rank()
    accumulator, rows = EvalAccumulator(TASKS), []
    for window, parts in enumerate(rank_parts):
        rows += accumulator.roll(window)
        accumulator.update_ranking(*parts[rank])
        accumulator.update_retrieval(*rank_ranks[rank])
    state = accumulator.state_dict()
    rows += accumulator.finish()
    return [(r.window, r.metrics) for r in rows], accumulator.lifetime(), state


def count_items_on_two_ranks():
    import torch.distributed as dist

    from gr.losses import ItemFrequency

    frequency = ItemFrequency(4)
    frequency.update(torch.tensor([[1, 1, 3], []][dist.get_rank()]).long())
    frequency.update(torch.tensor([[1], [2, 2]][dist.get_rank()]))
    return frequency.count_E, frequency.total


def feed_and_count(rank_parts, rank_ranks):
    return feed_two_ranks(rank_parts, rank_ranks), count_items_on_two_ranks()


def test_two_ranks_report_what_one_does_and_can_be_merged_into_one():
    windows = [predictions(20), predictions(21)]
    # Rank 1 has no prediction in the second window.
    rank_parts = [split(windows[0], 2), split(windows[1], [200])]
    rank_ranks = [ranks(0), ranks(1)]
    one, rows = EvalAccumulator(TASKS), []
    for window, arguments in enumerate(windows):
        rows += one.roll(window)
        one.update_ranking(*arguments)
        for arguments in rank_ranks:
            one.update_retrieval(*arguments)
    rows += one.finish()
    expected = json.dumps([(r.window, r.metrics) for r in rows])
    ((main, other), counts) = zip(
        *run_distributed(feed_and_count, 2, rank_parts, rank_ranks), strict=True
    )
    assert json.dumps(main[0]) == expected
    assert json.dumps(main[1]) == json.dumps(one.lifetime())
    assert other[0] == []
    merged = EvalAccumulator(TASKS)
    merged.load_state_dict(main[2])
    merged.merge_state_dict(other[2])
    (result,) = merged.finish()
    assert json.dumps(result.metrics) == json.dumps(rows[1].metrics)
    assert json.dumps(merged.lifetime()) == json.dumps(one.lifetime())
    for count, total in counts:
        assert count.tolist() == [0, 3, 2, 1]
        assert total == 6


def test_undefined_metrics_are_null():
    accumulator = EvalAccumulator(TASKS)
    accumulator.roll(0)
    (empty,) = accumulator.roll(1)
    assert {value for value in empty.metrics.values() if value is not None} == {0}
    outputs, labels, weights, users = predictions(0)
    labels["click"] = torch.zeros(200)
    accumulator.update_ranking(outputs, labels, weights, users)
    (result,) = accumulator.finish()
    undefined = {"ne-click", "calibration-click", "auc-click", "gauc-click"}
    assert {k for k in result.metrics if k.endswith("click") and result.metrics[k] is None} == (
        undefined
    )
    assert result.metrics["logloss-click"] > 0
    # Users with one label each have an AUC together, but none of their own.
    assert gauc([0.1, 0.9], [0, 1], [1, 1], [5, 6]) is None
    assert auc([0.1, 0.9], [0, 1], [1, 1]) == 1.0


def test_predictions_need_not_be_kept_for_the_lifetime():
    accumulator = EvalAccumulator(TASKS, lifetime_auc=False)
    for window in range(2):
        accumulator.roll(window)
        accumulator.update_ranking(*predictions(window))
    (last,) = accumulator.finish()
    lifetime = accumulator.lifetime()
    assert last.metrics["auc-click"] is not None
    assert (lifetime["auc-click"], lifetime["gauc-click"]) == (None, None)
    expected = expected_ranking(concatenate([predictions(0), predictions(1)]))
    assert lifetime["ne-click"] == pytest.approx(expected["ne-click"], rel=2e-6)
    assert sum(x.numel() for x in accumulator.state_dict().values()) < 20


def test_certain_and_absurd_outputs_give_finite_numbers():
    accumulator = EvalAccumulator(TASKS | {"seconds": SECONDS}, retrieval=False)
    accumulator.roll(0)
    outputs = {
        "click": [1e4, -1e4, 1e4],
        "watch_time": [1e9, -1e9, 0.0],
        "seconds": [1.0, 2.0, 7.0],
    }
    labels = {"click": [1.0, 0.0, 0.0], "watch_time": [0.0] * 3, "seconds": [1.0, 0.0, 3.0]}
    to_tensors = [{k: torch.tensor(x) for k, x in m.items()} for m in (outputs, labels)]
    weights = {name: torch.ones(3) for name in outputs}
    accumulator.update_ranking(*to_tensors, weights, torch.arange(3))
    (result,) = accumulator.finish()
    assert result.metrics["logloss-click"] == pytest.approx(1e4 / 3)
    # 1e9 is cut at 60 s; expm1(-1e9) is -1 s.
    assert result.metrics["mae-watch_time"] == pytest.approx((60 + 1 + 0) / 3)
    assert result.metrics["mae-seconds"] == pytest.approx((0 + 2 + 4) / 3)
    assert result.metrics["mse-seconds"] == pytest.approx((0 + 4 + 16) / 3)


def test_nonsense_is_refused():
    def close_with(change):
        accumulator = EvalAccumulator(TASKS)
        accumulator.roll(0)
        arguments = predictions(0)
        weights = {name: torch.ones(200) for name in TASKS}
        change(arguments[0], arguments[1], weights)
        accumulator.update_ranking(arguments[0], arguments[1], weights, arguments[3])
        accumulator.finish()

    def put(mapping, name, value):
        mapping[name][3] = value

    with pytest.raises(ValueError, match="click: output must be finite, but 1 of 200"):
        close_with(lambda outputs, labels, weights: put(outputs, "click", math.nan))
    with pytest.raises(ValueError, match="watch_time: output must be finite"):
        close_with(lambda outputs, labels, weights: put(outputs, "watch_time", math.inf))
    with pytest.raises(ValueError, match=r"must be 0 or 1, but 1 of 200 .* first is 0\.5"):
        close_with(lambda outputs, labels, weights: put(labels, "click", 0.5))
    with pytest.raises(ValueError, match="weight must not be negative"):
        close_with(lambda outputs, labels, weights: put(weights, "click", -1.0))
    with pytest.raises(ValueError, match="one length"):
        close_with(lambda outputs, labels, weights: outputs.update(click=torch.zeros(3)))
    accumulator = EvalAccumulator(TASKS)
    with pytest.raises(ValueError, match="call roll"):
        accumulator.update_ranking(*predictions(0))
    with pytest.raises(ValueError, match="call roll"):
        accumulator.update_retrieval(*ranks(0))
    accumulator.roll(0)
    accumulator.update_retrieval(torch.tensor([4, 0]), torch.zeros(2))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        accumulator.finish()
    with pytest.raises(ValueError, match="'retrieval'"):
        EvalAccumulator({"retrieval": TASKS["click"]})
    with pytest.raises(ValueError, match=r"eval\.ks"):
        EvalAccumulator(TASKS, ks=(0, 10))


def test_states_of_other_tasks_or_windows_are_refused():
    accumulator = EvalAccumulator(TASKS)
    accumulator.roll(1)
    with pytest.raises(ValueError, match="other tasks or cut-offs"):
        accumulator.load_state_dict(EvalAccumulator({"like": TASKS["click"]}).state_dict())
    with pytest.raises(ValueError, match="other tasks or cut-offs"):
        accumulator.load_state_dict(EvalAccumulator(TASKS, ks=(1,)).state_dict())
    accumulator.roll(1)
    other = EvalAccumulator(TASKS)
    other.roll(2)
    with pytest.raises(ValueError, match="window 2 into window 1"):
        accumulator.merge_state_dict(other.state_dict())


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([-1.5, 0.0, 0.25, 3.0]),
            st.booleans(),
            st.sampled_from([0.5, 1.0, 3.0]),
            st.integers(0, 3),
        ),
        min_size=2,
        max_size=40,
    )
)
def test_auc_and_gauc_count_pairs(rows):
    def pairs(group):
        won = total = 0.0
        for zi, yi, wi, _ in group:
            for zj, yj, wj, _ in group:
                if yi and not yj:
                    total += wi * wj
                    won += wi * wj * (1.0 if zi > zj else 0.5 if zi == zj else 0.0)
        return won / total if total else None

    z, y, w, users = (list(x) for x in zip(*rows, strict=True))
    assert auc(z, y, w) == pytest.approx(pairs(rows))
    weight = sum_ = 0.0
    for user in set(users):
        mine = [row for row in rows if row[3] == user]
        if pairs(mine) is not None:
            weight += sum(row[2] for row in mine)
            sum_ += pairs(mine) * sum(row[2] for row in mine)
    assume(weight > 0)
    assert gauc(z, y, w, users) == pytest.approx(sum_ / weight)


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(2, 40),
    num_positions=st.integers(0, 9),
    chunk=st.integers(1, 45),
    with_seen=st.booleans(),
    is_dynamic=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_ranks_equal_a_sort_of_the_catalogue(
    num_rows, num_positions, chunk, with_seen, is_dynamic, seed
):
    g = torch.Generator().manual_seed(seed)
    # Small integers: products are exact, so that ties are real.
    items = torch.randint(-1, 2, (num_rows, 3), generator=g).double()
    users = torch.randint(-2, 3, (num_positions, 3), generator=g).double()
    targets = torch.randint(0 if is_dynamic else 1, num_rows, (num_positions,), generator=g)
    # Rows that stand for no item are in the table all the same.
    is_item = torch.ones(num_rows, dtype=torch.bool)
    if is_dynamic:
        is_item = torch.randint(0, 2, (num_rows,), generator=g) > 0
        is_item[targets] = True
        is_item[0] = False
    num_pairs = 30 if with_seen and num_positions else 0
    seen = (
        torch.randint(0, max(1, num_positions), (num_pairs,), generator=g),
        torch.randint(0, num_rows, (num_pairs,), generator=g),
    )
    chunks = [(start, items[start : start + chunk]) for start in range(0, num_rows, chunk)]
    rank, log_prob = catalogue_ranks(
        users,
        items[targets],
        targets,
        chunks,
        temperature=0.5,
        seen=seen if with_seen else None,
        is_item_E=is_item if is_dynamic else None,
    )
    pairs = set(zip(seen[0].tolist(), seen[1].tolist(), strict=True))
    for r, target in enumerate(targets.tolist()):
        if target == 0:
            assert rank[r] > 10**9
            assert log_prob[r].item() == pytest.approx(math.log(1 / num_rows))
            continue
        in_table = [e for e in range(1, num_rows) if is_item[e]]
        score = {e: (users[r] * items[e]).sum().item() / 0.5 for e in in_table}
        kept = [e for e in score if e == target or (r, e) not in pairs]
        order = sorted(kept, key=lambda e: (-score[e], e))
        assert rank[r] == 1 + order.index(target)
        normalizer = math.log(sum(math.exp(s) for s in score.values()))
        assert log_prob[r].item() == pytest.approx(score[target] - normalizer)


def test_ranks_of_many_positions_in_one_call(monkeypatch):
    torch.manual_seed(0)
    users, items = torch.randn(50, 8), torch.randn(30, 8)
    targets = torch.randint(1, 30, (50,))
    whole = catalogue_ranks(users, items[targets], targets, [(0, items)])
    monkeypatch.setattr("gr.retrieval_metrics.BLOCK_ROWS", 7)
    blocks = catalogue_ranks(users, items[targets], targets, [(0, items)])
    better = (users @ items[1:].T > (users * items[targets]).sum(1, keepdim=True) + 1e-5).sum(1)
    assert torch.equal(whole[0], better + 1)
    assert torch.equal(whole[0], blocks[0])
    torch.testing.assert_close(whole[1], blocks[1])
    expected = torch.log_softmax(users @ items[1:].T, 1).gather(1, targets[:, None] - 1)[:, 0]
    torch.testing.assert_close(whole[1], expected)


def test_targets_outside_the_catalogue_have_no_rank():
    items, users = torch.randn(5, 4), torch.randn(3, 4)
    targets = torch.tensor([0, 7, 2])
    rank, _ = catalogue_ranks(users, torch.zeros(3, 4), targets, [(0, items)])
    assert (rank > 0).tolist() == [False, False, True]
