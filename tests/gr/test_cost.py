"""What a run will cost, against what a run counted."""

import pytest

from gr import cli
from gr.config import TrainConfig
from gr.config_io import load_config
from gr.cost import cost_of
from gr.memory import run_bytes
from gr.runlog import read_lines
from gr.sequence import sequence_info
from pipelines.stream import SessionStream
from tests.e2e.toy import run, write_config, write_log

SHORT = "data.stochastic_length={selection: weighted, max_length: 12}"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    return write_config(folder, write_log(folder, users=6, days=2))


def test_a_run_costs_what_was_counted_before(config, tmp_path):
    out = run(config, f"run_dir={tmp_path / 'run'}", SHORT, "checkpoint.every_steps=0")
    last = read_lines(out / "metrics.jsonl")[-1]
    loaded, _ = load_config(TrainConfig, config, [SHORT])
    cost = cost_of(loaded, on_gpu=False)
    counted = (cost.batches, cost.sequences, cost.tokens, cost.training_flops)
    assert counted == tuple(last[name] for name in ("step", "examples", "tokens", "flops"))
    whole, _ = load_config(TrainConfig, config)
    assert cost.inference_flops == cost_of(whole).training_flops / 3 > cost.training_flops / 3
    two = cost_of(loaded, num_batches=2)
    assert (two.batches, two.training_flops < cost.training_flops) == (2, True)


def test_bytes_are_those_of_the_batch_that_keeps_the_most(config):
    loaded, _ = load_config(TrainConfig, config)
    cost = cost_of(loaded, on_gpu=False)
    each = [
        run_bytes(loaded, sequence_info(batch), num_parameters=cost.parameters, on_gpu=False)
        for batch in SessionStream(loaded.data, seed=0)
    ]
    assert cost.bytes == max(each, key=lambda found: found.activations)
    assert len({found.activations for found in each}) > 1


def test_the_command_prints_it(config, capsys):
    assert cli.main(["cost", str(config), "--batches", "1", "model.encoder=sasrec"]) == 0
    printed = capsys.readouterr().out
    assert "dense parameters" in printed
    assert "kept by the encoder" not in printed
    assert cli.main(["cost", str(config), "--batches", "1"]) == 0
    assert "kept by the encoder for its backward pass, at most" in capsys.readouterr().out


def test_many_epochs_are_refused():
    config, _ = load_config(TrainConfig, "configs/published/ml1m_hstu.yaml")
    with pytest.raises(ValueError, match=r"data\.window=epoch"):
        cost_of(config)
