"""Layers in fp8 that overflow: found, turned to bf16, and kept so by a checkpoint."""

import math
from dataclasses import replace

import pytest
import torch

from gr import parallel
from gr.checkpoint import CheckpointManager
from gr.config import EncodingConfig, HSTUConfig
from gr.hstu import HSTULayer
from gr.parallel import World
from gr.trainer import EVALUATION, Trainer
from tests.dist import run_distributed
from tests.gr.batches import batches, data_config, random_log, train_config

WORLD = World(0, 1, torch.device("cpu"))
MODE = ("merged", "session", "session", "none")
BF16 = ("uvqk",)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return random_log(tmp_path_factory.mktemp("log") / "log")


def make_trainer(log, world=WORLD, accumulate=1) -> Trainer:
    hstu = HSTUConfig(num_heads=2, qk_dim=8, v_dim=8, precision="fp8")
    config = train_config(
        data_config(log, MODE), num_layers=3, encoding=EncodingConfig(position_buckets=32)
    )
    config = replace(
        config,
        precision="bf16",
        model=replace(config.model, hstu=hstu),
        optim=replace(config.optim, accumulate=accumulate),
    )
    trainer = Trainer(config, world, utc_offset=0, sequences_per_step=16)
    trainer.evaluation.roll(0)
    return trainer


def break_scales(monkeypatch, trainer, number, part):
    """Let the scales of one layer's weight be beyond what float32 holds: of rows or of columns."""
    broken = trainer.model.encoder.layers[number]
    honest = HSTULayer.fp8_weights

    def fp8_weights(layer, weights, impl):
        made = honest(layer, weights, impl)
        if layer is not broken or made is None:
            return made
        of_part = getattr(made.uvqk, part)
        scaled = of_part._replace(scale=torch.full_like(of_part.scale, math.inf))
        return replace(made, uvqk=made.uvqk._replace(**{part: scaled}))

    monkeypatch.setattr(HSTULayer, "fp8_weights", fp8_weights)


def in_fp8(trainer):
    return [layer.fp8_products for layer in trainer.model.encoder.layers]


def test_a_forward_pass_that_overflows_is_made_again_in_bf16(log, monkeypatch, capsys, tmp_path):
    trainer, sound = make_trainer(log), make_trainer(log)
    first, second, *_ = batches(trainer.config.data)
    sound.train_step(first)
    break_scales(monkeypatch, trainer, 1, "rows")
    trainer.train_step(first)
    # What the pass that overflowed had scored is taken back.
    scored = [t.evaluation.state_dict()["open/click/output"] for t in (trainer, sound)]
    assert len(scored[0]) == len(scored[1]) > 5
    assert scored[0].isfinite().all()
    # The batch is not lost, and the layers beside it stay as they are.
    assert in_fp8(trainer) == [BF16, (), BF16]
    assert trainer.progress.nonfinite_steps == 0
    assert math.isfinite(trainer.take_losses()["train/loss"])
    assert trainer.progress.step == 1
    assert (
        "fp8 overflowed in encoder.layers.1 (its result was not finite" in capsys.readouterr().err
    )
    assert trainer.train_step(second)["train/bf16_layers"] == 1
    assert capsys.readouterr().err == ""

    checkpoints = CheckpointManager(tmp_path, apart=(EVALUATION,))
    checkpoints.save(2, trainer.state())
    resumed = make_trainer(log)
    resumed.load(checkpoints, 2)
    assert in_fp8(resumed) == [BF16, (), BF16]


def test_gradients_that_overflow_turn_the_layer_to_bf16(log, monkeypatch, capsys):
    trainer = make_trainer(log)
    first, second, *_ = batches(trainer.config.data)
    break_scales(monkeypatch, trainer, 2, "columns")
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train_step(first)
    assert in_fp8(trainer) == [BF16, BF16, ()]
    assert "encoder.layers.2 (a gradient was not finite" in capsys.readouterr().err
    # It changes no weight, and is not one of those that end the run.
    assert trainer.progress.nonfinite_steps == 0
    assert all(map(torch.equal, before, trainer.model.parameters()))
    trainer.train_step(second)
    assert not all(map(torch.equal, before, trainer.model.parameters()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_pass_under_way_when_its_layer_is_turned_to_bf16_is_made_again(
    log, monkeypatch, accumulate
):
    """With a batch ahead, a step hears of the one before only after its own backward pass."""
    found = []
    for looks_ahead in (True, False):
        trainer = make_trainer(log, accumulate=accumulate)
        with monkeypatch.context() as patch:
            ahead = trainer.ahead(batches(trainer.config.data))
            for number, staged in enumerate(ahead):
                if number == accumulate - 1:
                    break_scales(patch, trainer, 2, "columns")
                trainer.train_step(staged, ahead if looks_ahead else None)
                if number == accumulate - 1:
                    assert in_fp8(trainer) == [BF16, BF16, BF16 if looks_ahead else ()]
        trainer.finish_updates()
        assert in_fp8(trainer) == [BF16, BF16, ()]
        assert trainer.progress.nonfinite_steps == 0
        tables = trainer.tables.checkpoint_state()["tables"]["item"].values()
        found.append([*trainer.model.state_dict().values(), *tables])
    assert all(x.isfinite().all() for x in found[0])
    assert all(map(torch.equal, *found))


def test_what_bf16_does_not_mend_is_not_blamed_on_fp8(log):
    trainer = make_trainer(log)
    first, *_ = batches(trainer.config.data)
    with torch.no_grad():
        trainer.model.encoder.layers[1].uvqk_weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        trainer.train_step(first)
    assert in_fp8(trainer) == [BF16] * 3


def on_one_of_two_ranks(folder):
    """Overflow on rank 1 alone, in the forward pass and in the backward pass of another layer."""
    world = parallel.start("cpu", needs_group=False, timeout_minutes=1)
    trainer = make_trainer(folder, world)
    first, *_ = batches(trainer.config.data, rank=world.rank, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            break_scales(patch, trainer, 0, "rows")
        trainer.train_step(first)
    return in_fp8(trainer), trainer.progress.nonfinite_steps, trainer.dense.grad_norm


@pytest.mark.slow
def test_ranks_decide_together(log):
    of_rank_0, of_rank_1 = run_distributed(on_one_of_two_ranks, 2, log)
    assert of_rank_0 == of_rank_1
    assert of_rank_0[:2] == ([(), BF16, BF16], 0)
    assert math.isfinite(of_rank_0[2])


def test_layers_that_were_turned_to_bf16_are_no_matter_where_all_are(log):
    """A run in fp8 may be evaluated, served and exported in bf16."""
    trainer = make_trainer(log)
    trainer.guard.load_state(["encoder.layers.1"])
    assert trainer.guard.state() == ["encoder.layers.1"]
    hstu = replace(trainer.config.model.hstu, precision="bf16")
    config = replace(trainer.config, model=replace(trainer.config.model, hstu=hstu))
    plain = Trainer(config, WORLD, utc_offset=0, sequences_per_step=16)
    plain.guard.load_state(["encoder.layers.1"])
    assert in_fp8(plain) == [(), (), ()]
