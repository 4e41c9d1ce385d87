"""One training step: what it scores, what it changes, what it repeats after a checkpoint."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from gr import cli, layer_graphs
from gr.checkpoint import CheckpointManager
from gr.checkpoint_state import split_state
from gr.config import EncodingConfig, HSTUConfig, LossConfig, OptimConfig, TransformerConfig
from gr.parallel import World
from gr.scoring import seen_items
from gr.sequence import sequence_index
from gr.train import short_pauses
from gr.trainer import EVALUATION, Trainer
from pipelines.batch import TokenKind
from tests.e2e.toy import write_config, write_log
from tests.gr.batches import batches, data_config, look_up, make_tables, random_log, train_config
from tests.pipelines.logs import MODES, take_apart

WORLD = World(0, 1, torch.device("cpu"))
MODE = ("interleaved", "event", "session", "none")
DROPPED = {
    "hstu": HSTUConfig(num_heads=2, qk_dim=4, v_dim=4, dropout=0.4),
    "encoding": EncodingConfig(position_buckets=32, dropout=0.3),
}
WHOLE = {
    "hstu": HSTUConfig(num_heads=2, qk_dim=4, v_dim=4),
    "encoding": EncodingConfig(position_buckets=32),
}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return random_log(tmp_path_factory.mktemp("log") / "log")


def make_trainer(config) -> Trainer:
    trainer = Trainer(config, WORLD, utc_offset=0, sequences_per_step=8 * 2)
    trainer.evaluation.roll(0)
    return trainer


def flat(trainer) -> dict:
    tensors, values = split_state(trainer.state())
    # The tensors are live.
    return {k: v.clone() for k, v in tensors.items()} | values


def differing(a: dict, b: dict) -> set[str]:
    assert a.keys() == b.keys()

    def same(x, y):
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return {key for key in a if not same(a[key], b[key])}


@pytest.mark.parametrize("where", ["item row", "dense weight", "label"])
def test_a_loss_that_is_not_finite_changes_nothing(log, where):
    loss = LossConfig(retrieval="in_batch", logq_correction=True)
    trainer = make_trainer(train_config(data_config(log, MODE), loss=loss))
    steps = batches(trainer.config.data)
    trainer.train_step(steps[0])
    batch = steps[1]
    if where == "item row":
        used = batch.ids["item_id"].values()[0] + 1
        with torch.no_grad():
            trainer.tables.weights["item"][used] = float("nan")
    elif where == "dense weight":
        with torch.no_grad():
            trainer.model.tokens.action.weight.fill_(float("inf"))
    else:
        batch.labels["watch"][0] = float("inf")
    before = flat(trainer)
    # NaN is not equal to itself.
    before = {k: v.nan_to_num(7.0) if isinstance(v, torch.Tensor) else v for k, v in before.items()}
    with pytest.raises(
        FloatingPointError, match=r"the loss of \[.*'watch'.*at step 1\. This batch"
    ):
        trainer.train_step(batch)
    after = flat(trainer)
    after = {k: v.nan_to_num(7.0) if isinstance(v, torch.Tensor) else v for k, v in after.items()}
    assert differing(before, after) == set()


def poison(monkeypatch, trainer, where: str) -> None:
    """Make a gradient infinite on its way back, in every step."""
    if where == "dense":
        weight = next(trainer.model.parameters())
        weight.register_hook(lambda grad: grad * float("inf"))
        return
    objective = trainer.objective.forward

    def with_hook(batch, predictions, *args):
        predictions.rows["item_id"].register_hook(
            lambda grad: grad.index_fill(0, torch.tensor([1]), torch.inf)
        )
        return objective(batch, predictions, *args)

    monkeypatch.setattr(trainer.objective, "forward", with_hook)


def test_steps_that_are_not_finite_are_skipped_up_to_a_limit(log):
    optim = OptimConfig(max_nonfinite_steps=2)
    trainer = make_trainer(train_config(data_config(log, MODE), optim=optim))
    healthy = make_trainer(train_config(data_config(log, MODE), optim=optim))
    steps = batches(trainer.config.data)
    for batch, is_bad in zip(steps[:3], (True, False, True), strict=True):
        before = flat(trainer)
        label = batch.labels["watch"][0].clone()
        if is_bad:
            batch.labels["watch"][0] = float("inf")
        trainer.train_step(batch)
        batch.labels["watch"][0] = label
        changed = {key for key in differing(before, flat(trainer)) if "progress" not in key}
        assert bool(changed) != is_bad
    assert trainer.progress.step == 3
    assert trainer.progress.position == steps[2].position
    assert trainer.skipped_by_name()["train/nonfinite_steps"] == 2
    healthy.progress.step = 1
    flat(healthy)  # torch gives AdamW a step of zeros when its state is first asked for
    healthy.train_step(steps[1])
    same = ("dense", "tables", "optimizer")
    assert not {k for k in differing(flat(trainer), flat(healthy)) if k.startswith(same)}
    steps[0].labels["watch"][0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"at step 3\. This batch updated nothing\. It is"):
        trainer.train_step(steps[0])


@pytest.mark.parametrize("asks", ["next step", "checkpoint", "end"])
def test_with_batches_ahead_a_step_is_counted_once_the_next_is_under_way(
    log, tmp_path, monkeypatch, asks
):
    trainer = make_trainer(train_config(data_config(log, MODE)))
    read = batches(trainer.config.data)
    sizes = [batch.num_sequences for batch in read]
    ahead = trainer.ahead(read)
    staged = iter(ahead)
    trainer.train_step(next(staged), ahead)
    assert (trainer.progress.step, trainer.progress.examples) == (1, 0)
    trainer.settle()
    assert trainer.progress.examples == sizes[0]
    poison(monkeypatch, trainer, "dense")
    trainer.train_step(next(staged), ahead)
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    ask = {
        "next step": lambda: trainer.train_step(next(staged), ahead),
        "checkpoint": lambda: CheckpointManager(tmp_path).save(2, trainer.state()),
        "end": trainer.finish_updates,
    }[asks]
    with pytest.raises(FloatingPointError, match="at step 1: they updated nothing"):
        ask()
    for name, x in trainer.model.state_dict().items():
        assert torch.equal(x, before[name])
    assert CheckpointManager(tmp_path).steps() == []


@pytest.mark.parametrize("where", ["dense", "rows"])
def test_gradients_that_are_not_finite_are_left_out(log, monkeypatch, where):
    optim = OptimConfig(max_nonfinite_steps=1)
    trainer = make_trainer(train_config(data_config(log, MODE), optim=optim))
    poison(monkeypatch, trainer, where)
    steps = batches(trainer.config.data)
    before = flat(trainer)
    trainer.train_step(steps[0])
    moved = differing(before, flat(trainer))
    assert any(key.startswith("dense.") for key in moved) == (where == "rows")
    assert "tables.tables.item.weight" in moved
    for name, value in flat(trainer).items():
        assert not isinstance(value, torch.Tensor) or value.isfinite().all(), name
    skipped = trainer.skipped_by_name()
    assert skipped.get("train/nonfinite_rows", 0) == (where == "rows")
    assert skipped["train/nonfinite_steps"] == 1
    found = "norm inf|norm nan" if where == "dense" else r"^1 gradient row\(s\)"
    with pytest.raises(FloatingPointError, match=found):
        trainer.train_step(steps[1])


def test_accumulated_batches_make_one_dense_update(log):
    optim = OptimConfig(accumulate=2)
    trainer = make_trainer(train_config(data_config(log, MODE), optim=optim))
    steps = batches(trainer.config.data)
    states = [flat(trainer)]
    for batch in steps[:3]:
        trainer.train_step(batch)
        states.append(flat(trainer))
    dense = [k for k in states[0] if k.startswith("dense.")]
    tables = "tables.tables.item.weight"
    for i, is_update in enumerate((False, True, False)):
        changed = differing(states[i], states[i + 1])
        assert bool(changed & set(dense)) == is_update
        assert tables in changed
    trainer.finish_updates()
    assert differing(states[3], flat(trainer)) & set(dense)


def test_a_bad_batch_leaves_what_was_accumulated_before(log):
    optim = OptimConfig(accumulate=2, max_nonfinite_steps=1)
    trainer = make_trainer(train_config(data_config(log, MODE), optim=optim))
    healthy = make_trainer(train_config(data_config(log, MODE), optim=optim))
    first, second, *_ = batches(trainer.config.data)
    healthy.train_step(first)
    healthy.finish_updates()
    trainer.train_step(first)
    second.labels["watch"][0] = float("inf")
    trainer.train_step(second)
    same = ("dense", "tables", "optimizer")
    assert not {k for k in differing(flat(trainer), flat(healthy)) if k.startswith(same)}


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_layers_that_are_replayed_train_like_those_called(log, monkeypatch, accumulate):
    """On a CPU a replay is the call itself; what differs is the rounded number of tokens."""
    monkeypatch.setattr(layer_graphs, "_is_capturable", lambda x_LD: True)
    optim = OptimConfig(accumulate=accumulate)
    found = []
    for graph_tokens in (0, 16):
        hstu = replace(WHOLE["hstu"], bias="position_time", graph_tokens=graph_tokens)
        config = train_config(data_config(log, MODE), **{**WHOLE, "hstu": hstu}, optim=optim)
        trainer = make_trainer(config)
        for batch in batches(trainer.config.data)[:4]:
            trainer.train_step(batch)
        trainer.finish_updates()
        found.append((trainer.take_losses(), dict(trainer.model.named_parameters())))
    assert trainer.model.encoder.graphs.captured
    (losses, weights), (replayed_losses, replayed_weights) = found
    assert replayed_losses == pytest.approx(losses, rel=1e-5)
    for name, weight in weights.items():
        # AdamW makes a step of full size of a gradient that is noise.
        torch.testing.assert_close(replayed_weights[name], weight, rtol=1e-4, atol=2e-4)


def test_a_step_changes_all_that_learns(log):
    loss = LossConfig(retrieval="in_batch", logq_correction=True)
    trainer = make_trainer(train_config(data_config(log, MODE), loss=loss))
    before = flat(trainer)
    trainer.train_step(batches(trainer.config.data)[0])
    unchanged = before.keys() - differing(before, flat(trainer))
    # The context is not looked up in this layout; retrieval's sums wait for the window's end.
    expected = {
        k for k in before if k.startswith(("tables.tables.context", "evaluation.rank_0.closed"))
    }
    expected |= {k for k in before if k.startswith("evaluation.rank_0.sums")}
    expected |= {"evaluation.rank_0.window"}
    moving = {k for k in unchanged - expected if k.startswith(("dense.", "tables.", "objective."))}
    assert moving == set()


def test_a_run_that_blows_up_is_one_message(tmp_path, capsys):
    config = str(write_config(tmp_path, write_log(tmp_path, users=8, days=1)))
    argv = ["train", config, "embeddings.optimizer.lr=1e30", "optim.lr=1e30"]
    assert cli.main(argv) == 1
    err = capsys.readouterr().err
    assert "gr train: error: the loss of [" in err
    assert "Lower optim.lr or embeddings.optimizer.lr" in err
    assert "Traceback" not in err
    with pytest.raises(FloatingPointError):
        cli.main([*argv, "--traceback", f"run_dir={tmp_path}/again"])


def records(trainer):
    state = trainer.evaluation.state_dict()
    return {k: v for k, v in state.items() if k.startswith("open/")}


def test_scores_are_those_of_the_model_without_dropout(log):
    batch = batches(data_config(log, MODE))[1]
    dropped = make_trainer(train_config(data_config(log, MODE), **DROPPED))
    whole = make_trainer(train_config(data_config(log, MODE), **WHOLE))
    losses = []
    for trainer in (dropped, whole):
        trainer.train_step(batch)
        losses.append(trainer.take_losses()["train/loss"])
    assert losses[0] != losses[1]
    assert len(records(whole)["open/click/output"]) > 5
    assert differing(records(dropped), records(whole)) == set()
    assert dropped.model.training


def test_scoring_without_learning(log):
    batch = batches(data_config(log, MODE))[1]
    trainer = make_trainer(train_config(data_config(log, MODE), **DROPPED))
    learner = make_trainer(train_config(data_config(log, MODE), **DROPPED))
    before = flat(trainer)
    trainer.score_step(batch)
    after = flat(trainer)
    assert {key.split(".")[0] for key in differing(before, after)} == {EVALUATION}
    learner.train_step(batch)
    assert differing(records(trainer), records(learner)) == set()


def test_the_batch_that_was_given_stays_as_it_was(log):
    batch = batches(data_config(log, MODE))[0]
    ids = batch.ids.values().clone()
    trainer = make_trainer(train_config(data_config(log, MODE)))
    trainer.train_step(batch)
    assert torch.equal(batch.ids.values(), ids)


@pytest.mark.parametrize("encoder", ["hstu", "sasrec"])
def test_a_restored_trainer_repeats_every_bit(log, tmp_path, encoder):
    loss = LossConfig(retrieval="in_batch", logq_correction=True)
    data = data_config(log, MODE, sessions_per_partition=2)
    config = train_config(
        data,
        loss=loss,
        encoder=encoder,
        transformer=TransformerConfig(num_heads=2, dropout=0.3),
        **DROPPED,
    )
    config = replace(
        config,
        seed=4,
        optim=OptimConfig(lr=0.01, warmup_steps=2, schedule="cosine", decay_steps=9),
        eval=replace(config.eval, ks=(2, 5), filter_seen=True),
    )
    steps = batches(data)
    assert len(steps) >= 7
    checkpoints = CheckpointManager(tmp_path, apart=(EVALUATION,))
    trainer = make_trainer(config)
    for batch in steps[:3]:
        trainer.train_step(batch)
    checkpoints.save(3, trainer.state())
    torch.manual_seed(99)  # what the process drew in between must not matter
    restored = Trainer(config, WORLD, utc_offset=0, sequences_per_step=8 * 2)
    restored.load(checkpoints, 3)
    assert differing(flat(trainer), flat(restored)) == set()
    assert restored.progress == trainer.progress
    for batch in steps[3:]:
        values = [(t.train_step(batch), t.dense.grad_norm) for t in (trainer, restored)]
        assert values[0] == values[1]
        losses = [t.take_losses() for t in (trainer, restored)]
        assert losses[0] == losses[1]
        assert losses[0]["train/loss"] > 0
        assert differing(flat(trainer), flat(restored)) == set()
    ends = [t.evaluation.finish()[0].metrics for t in (trainer, restored)]
    assert ends[0] == ends[1]


def test_what_was_learnt_comes_alone(log, tmp_path):
    config = train_config(data_config(log, MODE))
    trainer = make_trainer(config)
    trainer.train_step(batches(config.data)[0])
    checkpoints = CheckpointManager(tmp_path, apart=(EVALUATION,))
    checkpoints.save(1, trainer.state())
    restored = Trainer(config, WORLD, utc_offset=0, sequences_per_step=8 * 2)
    restored.load_learnt(checkpoints, 1)
    left = {key.split(".")[0] for key in differing(flat(trainer), flat(restored))}
    assert left == {EVALUATION, "progress"}
    assert restored.progress.step == 0


def test_losses_are_means_since_the_last_time(log):
    loss = LossConfig(task_weights={"watch": 0.25}, retrieval_weight=3.0, retrieval="in_batch")
    config = replace(train_config(data_config(log, MODE), loss=loss), optim=OptimConfig(lr=0.0))
    embeddings = replace(config.embeddings, optimizer=replace(config.embeddings.optimizer, lr=0.0))
    trainer = make_trainer(replace(config, embeddings=embeddings))
    singles = []
    for batch in batches(config.data)[:2]:
        trainer.train_step(batch)
        weights = trainer.objective.weights(batch).tolist()
        singles.append((trainer.take_losses(), weights))
    for batch in batches(config.data)[:2]:
        trainer.train_step(batch)
    both = trainer.take_losses()
    for i, name in enumerate(trainer.objective.names):
        key = f"train/loss/{name}"
        total = sum(losses[key] * weights[i] for losses, weights in singles)
        assert both[key] == pytest.approx(total / sum(w[i] for _, w in singles), rel=1e-6)
    parts = [both[f"train/loss/{name}"] for name in ("click", "watch", "retrieval")]
    expected = parts[0] + 0.25 * parts[1] + 3.0 * parts[2]
    assert both["train/loss"] == pytest.approx(expected, rel=1e-12)
    empty = trainer.take_losses()
    assert empty["train/loss"] == 0
    assert empty["train/loss/click"] != empty["train/loss/click"]


@pytest.mark.parametrize("layout", ["interleaved", "merged"])
@pytest.mark.parametrize("filter_seen", [False, True])
def test_events_of_history_train_again_but_are_not_scored_again(log, layout, filter_seen):
    """By the same weights, supervise=all scores what supervise=session does."""
    found = {}
    for supervise in ("session", "all"):
        config = train_config(data_config(log, (layout, "event", supervise, "none")))
        encoding = EncodingConfig(position="from_start", position_buckets=32)
        model = replace(config.model, encoding=encoding)
        rules = replace(config.eval, filter_seen=filter_seen)
        trainer = make_trainer(replace(config, model=model, eval=rules))
        for batch in batches(config.data):
            trainer.score_step(batch)
        found[supervise] = trainer.evaluation.finish()[0].metrics
        assert found[supervise]["num_examples-retrieval"] > 0
    assert set(found["all"]) == set(found["session"])
    for name, value in found["session"].items():
        assert found["all"][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_seen_items_are_those_before_the_position(log, mode):
    config = train_config(data_config(log, mode))
    tables = make_tables(config)
    found_any = False
    for batch in batches(config.data):
        expected = []
        for sequence in take_apart(batch, config.data):
            carries = [
                k in (TokenKind.ITEM, TokenKind.EVENT, TokenKind.CANDIDATE)
                for k in sequence["kind"]
            ]
            for position, _ in sequence["retrieval"]:
                items = sequence["item_id"][: sum(carries[: position + 1])]
                expected.append([item + 1 for item in items])
        look_up(config, tables, batch)
        index_S, row_S = seen_items(batch, sequence_index(batch.offsets, batch.num_tokens))
        found = [row_S[index_S == r].tolist() for r in range(len(batch.retrieval_positions))]
        assert found == expected
        index_S, row_S = seen_items(
            batch, sequence_index(batch.offsets, batch.num_tokens), newest=2
        )
        found = [row_S[index_S == r].tolist() for r in range(len(batch.retrieval_positions))]
        assert found == [items[-2:] for items in expected]
        found_any |= any(len(items) > 2 for items in expected)
    assert found_any


@pytest.mark.parametrize("newest", [None, 0, 2])
def test_ranks_are_those_among_what_the_rules_leave(log, newest):
    config = train_config(data_config(log, MODE))
    rules = replace(config.eval, filter_seen=newest is not None, filter_newest=newest or 0)
    trainer = make_trainer(replace(config, eval=rules))
    num_left_out = 0
    for batch in batches(config.data)[:3]:
        scored = trainer.predict_step(batch)
        ((first, rows_ED),) = trainer.tables.all_rows("item")
        vectors_ED = trainer.model.retrieval.item_vectors(rows_ED).detach().double()
        expected = []
        for sequence in take_apart(batch, config.data):
            items = [k == TokenKind.ITEM for k in sequence["kind"]]
            for position, target in sequence["retrieval"]:
                before = sequence["item_id"][: sum(items[: position + 1])]
                before = [] if newest is None else before[-newest:]
                left_out = {item + 1 for item in before} - {target + 1} | {0}
                num_left_out += len(left_out) - 1
                user_D = scored.predictions.user_vectors[len(expected)].detach().double()
                scores = (vectors_ED @ user_D).tolist()
                better = [e for e, x in enumerate(scores) if x > scores[target + 1]]
                expected.append(1 + len(set(better) - left_out))
        assert first == 0
        assert scored.ranks.tolist() == expected
    assert (num_left_out > 10) == (newest is not None)


def test_pauses_are_short_while_a_run_lasts():
    class Cycle:
        pass

    def cycle():
        made = Cycle()
        made.itself = made
        return weakref.ref(made)

    gc.disable()  # but where it is asked for
    gc.unfreeze()  # what tests/conftest.py froze, unless a test before has trained
    try:
        before = cycle()
        with short_pauses():
            assert gc.get_freeze_count() > 0
            inside = cycle()
            gc.collect()
            assert inside() is None
            assert before() is not None
        assert gc.get_freeze_count() == 0
        gc.collect()
        assert before() is None
    finally:
        gc.enable()
