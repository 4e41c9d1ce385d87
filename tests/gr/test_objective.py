"""Losses of a batch against loops over positions and negatives, in float64."""

import math
from dataclasses import replace

import pytest
import torch

from gr.config import LossConfig
from gr.heads import RetrievalHead
from gr.model import Predictions
from gr.objective import Objective
from gr.retrieval_metrics import RETRIEVAL
from tests.gr.batches import (
    DIM,
    NUM_ITEMS,
    batches,
    data_config,
    look_up,
    make_tables,
    random_log,
    train_config,
)

MODE = ("interleaved", "event", "session", "none")
LOSSES = [
    (retrieval, scope)
    for retrieval in ("sampled_softmax", "in_batch")
    for scope in ("sequence", "partition", "batch")
] + [("full_softmax", "partition")]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return random_log(tmp_path_factory.mktemp("log") / "log")


def make(log, mode=MODE, **loss):
    config = train_config(data_config(log, mode), loss=LossConfig(temperature=0.5, **loss))
    return config, Objective(config, "item"), make_tables(config)


def user_vectors(batch):
    """A function of user, session and place, so that any share of a batch gets the same."""
    owner = owners(batch)
    place = batch.retrieval_positions - batch.offsets[owner]
    keys = batch.user_id[owner] * 1_009 + batch.session_id[owner] * 31 + place
    generators = [torch.Generator().manual_seed(int(key)) for key in keys]
    rows = [torch.randn(DIM, generator=g, dtype=torch.float64) for g in generators]
    return torch.stack(rows) if rows else torch.zeros(0, DIM, dtype=torch.float64)


def owners(batch):
    return torch.tensor(
        [
            next(b for b in range(batch.num_sequences) if position < batch.offsets[b + 1])
            for position in batch.retrieval_positions.tolist()
        ],
        dtype=torch.int64,
    )


@torch.no_grad()
def run(config, objective, tables, batch, head):
    rows = look_up(config, tables, batch)
    generator = torch.Generator().manual_seed(5)
    ranking = {
        task: torch.randn(len(batch.ranking_positions), generator=generator).double()
        for task in config.data.tasks
    }
    predictions = Predictions(ranking, user_vectors(batch) if head else None, rows)
    return objective(batch, predictions, head, tables), ranking


def retrieval_by_hand(config, tables, batch, log_q=None):
    """Return sum over positions of weight * -log softmax, from the definition."""
    kind, scope = config.loss.retrieval, config.loss.negatives_scope
    table = tables.weights["item"].detach().double()
    users, owner = user_vectors(batch), owners(batch).tolist()
    targets = batch.ids["target_item_id"].values().tolist()
    negatives = batch.ids["negative_item_id"].to_dense()
    total = 0.0
    for r, target in enumerate(targets):

        def shares(b, mine=owner[r]):
            same_partition = batch.partition[b] == batch.partition[mine]
            return {"sequence": b == mine, "partition": same_partition, "batch": True}[scope]

        if kind == "full_softmax":
            others = [row for row in range(1, NUM_ITEMS + 1) if row != target]
        elif kind == "in_batch":
            others = [t for q, t in enumerate(targets) if shares(owner[q]) and t != target]
        else:
            drawn = [negatives[b].tolist() for b in range(batch.num_sequences) if shares(b)]
            others = [row for rows in drawn for row in rows if row != target]

        def logit(row, user=users[r]):
            vector = table[row] / table[row].norm()
            correction = log_q(row) if log_q else 0.0
            return float(user @ vector) / config.loss.temperature - correction

        odds = sum(math.exp(logit(row) - logit(target)) for row in others)
        total += float(batch.retrieval_weights[r]) * math.log1p(odds)
    return total


@pytest.mark.parametrize(("retrieval", "scope"), LOSSES)
@pytest.mark.parametrize("mode", [MODE, ("merged", "session", "session", "none")], ids="-".join)
def test_retrieval_is_the_softmax_over_who_shares(log, mode, retrieval, scope):
    config, objective, tables = make(log, mode, retrieval=retrieval, negatives_scope=scope)
    head = RetrievalHead(DIM, DIM)
    for batch in batches(config.data):
        num = len(batch.retrieval_positions)
        batch.retrieval_weights = torch.linspace(0, 2, num)
        sums, _ = run(config, objective, tables, batch, head)
        loss = sums[RETRIEVAL]
        expected = retrieval_by_hand(config, tables, batch)
        assert float(loss.total) == pytest.approx(expected, rel=1e-6 if num else 0)
        assert float(loss.weight) == pytest.approx(num, rel=1e-6)


def test_the_correction_counts_targets_of_earlier_batches_only(log):
    config, objective, tables = make(
        log, retrieval="in_batch", negatives_scope="batch", logq_correction=True
    )
    head = RetrievalHead(DIM, DIM)
    seen = []
    for batch in batches(config.data):
        sums, _ = run(config, objective, tables, batch, head)

        def log_q(row, seen=tuple(seen)):
            return math.log((seen.count(row) + 1) / (len(seen) + NUM_ITEMS + 1))

        expected = retrieval_by_hand(config, tables, batch, log_q)
        assert float(sums[RETRIEVAL].total) == pytest.approx(expected, rel=1e-5)
        objective.count_targets(batch)
        seen += batch.ids["target_item_id"].values().tolist()
    assert len(seen) > 10
    assert objective.state_dict()["frequency.total"] == len(seen)


def test_without_the_correction_nothing_is_counted(log):
    config, objective, _ = make(log, retrieval="in_batch")
    objective.count_targets(batches(config.data)[0])
    assert objective.state_dict() == {}


@pytest.mark.parametrize("retrieval", ["sampled_softmax", "in_batch"])
@pytest.mark.parametrize("scope", ["sequence", "partition", "batch"])
def test_two_half_batches_make_the_whole(log, retrieval, scope):
    config, objective, tables = make(log, retrieval=retrieval, negatives_scope=scope)
    head = RetrievalHead(DIM, DIM)

    def total(**share):
        step = batches(config.data, **share)[1]
        return run(config, objective, tables, step, head)[0][RETRIEVAL]

    whole, halves = total(), [total(rank=rank, world_size=2) for rank in (0, 1)]
    assert min(float(half.weight) for half in halves) > 0
    assert float(whole.weight) == sum(float(half.weight) for half in halves)
    same = sum(float(h.total) for h in halves) == pytest.approx(float(whole.total), rel=1e-9)
    assert same == (scope != "batch")


def test_ranking_is_weighted_cross_entropy_and_square_error(log):
    config, objective, tables = make(log)
    batch = batches(config.data)[0]
    generator = torch.Generator().manual_seed(1)
    for name, weights in batch.weights.items():
        batch.weights[name] = weights * torch.rand(len(weights), generator=generator)
    sums, ranking = run(config, objective, tables, batch, None)
    assert set(sums) == {"click", "watch"}
    for name, loss in sums.items():
        total = weight = 0.0
        columns = (ranking[name], batch.labels[name], batch.weights[name])
        for z, y, w in zip(*(x.tolist() for x in columns), strict=True):
            p = 1 / (1 + math.exp(-z))
            entropy = -math.log(p if y else 1 - p)
            total += w * (entropy if name == "click" else (z - y) ** 2)
            weight += w
        assert 0 < weight < len(columns[0])
        assert float(loss.total) == pytest.approx(total, rel=1e-9)
        assert float(loss.weight) == pytest.approx(weight, rel=1e-6)


def test_names_factors_and_weights(log):
    config, objective, _ = make(log, task_weights={"watch": 0.25}, retrieval_weight=3.0)
    assert objective.names == ("click", "watch", RETRIEVAL)
    assert objective.factors == [1.0, 0.25, 3.0]
    batch = batches(config.data)[0]
    batch.retrieval_weights = batch.retrieval_weights * 0.5
    known = [sum(batch.weights[task].tolist()) for task in ("click", "watch")]
    expected = [*known, 0.5 * len(batch.retrieval_positions)]
    weights = objective.weights(batch)
    assert weights.dtype == torch.float64
    assert weights.tolist() == expected
    assert known[0] < len(batch.ranking_positions)  # an unknown label is masked

    alone = replace(
        config, model=replace(config.model, head=replace(config.model.head, retrieval=False))
    )
    assert Objective(alone, "item").names == ("click", "watch")
    assert Objective(alone, "item").weights(batch).tolist() == expected[:2]
