"""What the settings of a run come to in a step: rates, dropout, rows that change their id."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from embeddings.config import DynamicIdsConfig
from embeddings.initial import rows_of_ids
from gr import parallel
from gr.config import EncodingConfig, HSTUConfig, LossConfig, OptimConfig
from gr.parallel import World
from gr.trainer import Trainer
from tests.dist import run_distributed
from tests.gr.batches import batches, data_config, random_log, train_config

MODE = ("interleaved", "event", "session", "none")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return random_log(tmp_path_factory.mktemp("log") / "log")


def make_trainer(config, rank=0) -> Trainer:
    world = World(rank, 1, torch.device("cpu"))
    trainer = Trainer(config, world, utc_offset=0, sequences_per_step=8 * 2)
    trainer.evaluation.roll(0)
    return trainer


def learnt(trainer) -> dict[str, torch.Tensor]:
    ((_, rows),) = trainer.tables.all_rows("item")
    found = {"item": rows, **dict(trainer.model.named_parameters())}
    return {name: x.detach().clone() for name, x in found.items()}


def test_the_schedule_reaches_the_tables_and_the_dense_part(log):
    """The first of four steps of warm-up makes an update at a quarter of both rates."""
    config = train_config(data_config(log, MODE))
    tables = config.embeddings.optimizer
    warm = replace(config, optim=OptimConfig(lr=0.02, warmup_steps=4))
    low = replace(
        config,
        optim=OptimConfig(lr=0.005),
        embeddings=replace(config.embeddings, optimizer=replace(tables, lr=tables.lr / 4)),
    )
    batch = batches(config.data)[0]
    start, ends = learnt(make_trainer(warm)), []
    for each in (warm, low):
        trainer = make_trainer(each)
        assert trainer.train_step(batch) == {"lr/dense": 0.005, "lr/embeddings": tables.lr / 4}
        ends.append(learnt(trainer))
    for name, x in ends[0].items():
        torch.testing.assert_close(x, ends[1][name], rtol=0, atol=1e-7, msg=name)
    assert not torch.equal(start["item"], ends[0]["item"])


def test_what_is_dropped_is_of_seed_step_and_rank(log):
    dropped = {
        "hstu": HSTUConfig(num_heads=2, qk_dim=4, v_dim=4, dropout=0.4),
        "encoding": EncodingConfig(position_buckets=32, dropout=0.3),
    }
    config = train_config(data_config(log, MODE), **dropped)
    still = OptimConfig(lr=0.0)
    tables = replace(config.embeddings, optimizer=replace(config.embeddings.optimizer, lr=0.0))
    config = replace(config, optim=still, embeddings=tables)
    batch = batches(config.data)[0]

    def losses(trainer):
        # The initial weights go by the seed: those of all are the first one's.
        trainer.model.load_state_dict(first.model.state_dict())
        found = []
        for _ in range(2):
            trainer.train_step(batch)
            found.append(trainer.take_losses()["train/loss"])
        return found

    first = make_trainer(config)
    of = {
        "first": losses(first),
        "again": losses(make_trainer(config)),
        "rank": losses(make_trainer(config, rank=1)),
    }
    assert of["first"] == of["again"]
    assert len({*of["first"], *of["rank"]}) == 4


def dynamic_config(log, **of_ids):
    data = data_config(log, MODE, sessions_per_partition=1)
    config = train_config(data, loss=LossConfig(retrieval="in_batch"))
    item = config.embeddings.tables["item"]
    item = replace(item, num_embeddings=5, ids="dynamic", dynamic=DynamicIdsConfig(**of_ids))
    tables = config.embeddings.tables | {"item": item}
    embeddings = replace(config.embeddings, tables=tables)
    return replace(config, data=replace(data, num_items=0), embeddings=embeddings)


def test_a_row_that_changes_its_id_starts_anew(log):
    config = dynamic_config(log)
    trainer = make_trainer(config)
    held, num_new, num_trained = trainer.id_rows.dynamic.ids("item").clone(), 0, 0
    for batch in batches(config.data):
        trainer.train_step(batch)
        ids = trainer.id_rows.dynamic.ids("item").clone()
        ((_, rows),) = trainer.tables.all_rows("item")
        initial = rows_of_ids(config.embeddings.tables["item"], ids, table="item", seed=config.seed)
        is_new, is_used = ids != held, trainer.id_rows.dynamic.is_used("item")
        assert torch.equal(rows[is_new & is_used], initial[is_new & is_used])
        assert not rows[is_new & ~is_used].any()
        kept = is_used & ~is_new
        num_trained += int((rows[kept] != initial[kept]).any(1).sum())
        num_new += int((is_new & is_used).sum())
        held = ids
    assert num_new > 5
    assert num_trained > 5


def test_ids_lose_their_rows_by_the_time_of_the_log(log):
    config = dynamic_config(log, ttl_days=500 / 86_400)
    trainer = make_trainer(config)
    for batch in batches(config.data):
        trainer.train_step(batch)
    ids = trainer.id_rows.dynamic.maps["item"]
    assert ids.now == max(int(batch.timestamp.max()) for batch in batches(config.data))
    assert ids.expired > 0


def accumulated(folder):
    """Three batches of two ranks, two an update; a loss of the second is finite, or is not."""
    world = parallel.start("cpu", needs_group=False, timeout_minutes=1)
    config = train_config(data_config(folder, MODE))
    config = replace(config, optim=OptimConfig(accumulate=2, max_nonfinite_steps=1))
    found = {}
    for factor in (1.0, float("nan")):
        trainer = Trainer(config, world, utc_offset=0, sequences_per_step=16)
        trainer.evaluation.roll(0)
        states = [learnt(trainer)]
        for number, batch in enumerate(batches(config.data, rank=world.rank, world_size=2)[:3]):
            if number == 1:
                batch = replace(batch, labels={k: v * factor for k, v in batch.labels.items()})
            trainer.train_step(batch)
            states.append(learnt(trainer))
        trainer.finish_updates()
        found[str(factor)] = [*states, learnt(trainer)]
    return found


@pytest.mark.slow
def test_ranks_stay_alike_where_no_backward_pass_sums_for_them(log):
    of_rank_0, of_rank_1 = run_distributed(accumulated, 2, log)
    for factor in ("1.0", "nan"):
        one, other = of_rank_0[factor], of_rank_1[factor]
        dense = set(one[0]) - {"item"}
        for a, b in zip(one, other, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in dense)
        changed = [any(not torch.equal(a[n], b[n]) for n in dense) for a, b in pairwise(one)]
        assert changed == [False, True, False, True]
