"""Ablation of runs that a sweep left."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib import image

import gr.bench_ablation
from gr.ablation import ablation, main, mean_inference_flops
from gr.bench_ablation import main as bench_main
from gr.bench_ablation import measure_steps
from gr.config import TrainConfig
from gr.config_io import load_config
from gr.flops import training_flops
from gr.runlog import read_lines
from gr.sequence import sequence_info
from gr.trainer import Trainer
from launch.config import SweepConfig
from launch.sweep import expand
from pipelines.config import StochasticLengthConfig
from pipelines.stream import SessionStream
from tests.e2e.toy import run, write_config, write_log

# The sweep is made once, by one worker of pytest-xdist.
pytestmark = pytest.mark.xdist_group("ablation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A sweep of two variants and two seeds, in this process."""
    folder = tmp_path_factory.mktemp("ablation")
    config = write_config(folder, write_log(folder, users=6, days=2))
    runs = {
        "plain": {"overrides": ["data.stochastic_length={selection: weighted, max_length: 12}"]},
        "short": {"overrides": ["data.max_history_tokens=8"]},
    }
    overrides = ["log_every=100", "checkpoint.every_steps=0"]
    sweep = {"base": str(config), "output": str(folder / "out"), "runs": runs, "seeds": [0, 1]}
    (folder / "sweep.yaml").write_text(json.dumps(sweep | {"overrides": overrides}))
    loaded, _ = load_config(SweepConfig, folder / "sweep.yaml")
    for member in expand(loaded):
        run(config, *member.overrides, f"run_dir={member.run_dir}")
    return folder / "out"


def days(run_dir: Path) -> list[dict]:
    return [row for row in read_lines(run_dir / "eval.jsonl") if row["window"] != "all"]


def test_variants_against_the_first_seed_by_seed(folder, tmp_path, capsys):
    first, second = ablation(folder, "plain", ["ne-click"])
    rows = {path.name[:8]: read_lines(path / "eval.jsonl")[-1] for path in folder.glob("*_s*_*")}
    values = {name: row["ne-click"] for name, row in rows.items()}
    differences = [values[f"short_s{s}"] - values[f"plain_s{s}"] for s in (0, 1)]
    assert second["ne-click"]["difference"] == pytest.approx(sum(differences) / 2)
    assert (first["variant"], first["seeds"], second["seeds"]) == ("plain", [0, 1], [0, 1])
    (last,) = {row["window"] for path in folder.glob("*_s*_*") for row in days(path)[-1:]}
    by_day = {path.name[:8]: days(path)[-1]["ne-click"] for path in folder.glob("*_s*_*")}
    for window in ("last", last):
        of_window = ablation(folder, "plain", ["ne-click"], window)[1]["ne-click"]["difference"]
        differences = [by_day[f"short_s{s}"] - by_day[f"plain_s{s}"] for s in (0, 1)]
        assert of_window == pytest.approx(sum(differences) / 2)
    # Stochastic length is for training only.
    assert first["train_flops"] < 3 * first["inference_flops"]
    assert second["train_flops"] == pytest.approx(3 * second["inference_flops"])
    files = ["--output", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    main([str(folder), "plain", "--metrics", "ne-click", *files])
    assert image.imread(tmp_path / "a.png").std() > 0
    assert json.loads((tmp_path / "a.json").read_text()) == [first, second]
    assert f"{second['inference_flops'] / first['inference_flops']:.3f}" in capsys.readouterr().out


def test_flops_of_inference_are_a_third_of_training_on_whole_sequences(folder):
    path = next(folder.glob("short_s0_*"))
    config, _ = load_config(TrainConfig, path / "config.yaml")
    batches = list(SessionStream(config.data, seed=0))
    total = sum(training_flops(config.model, sequence_info(batch)) for batch in batches)
    sequences = sum(batch.num_sequences for batch in batches)
    assert mean_inference_flops(path) == pytest.approx(total / 3 / sequences)


def test_one_seed_has_no_interval(folder, tmp_path, capsys):
    for name in ("plain", "short"):
        path = next(folder.glob(f"{name}_s1_*"))
        (tmp_path / path.name).symlink_to(path)
    main([str(tmp_path), "plain", "--metrics", "ne-click", "--output", str(tmp_path / "a.json")])
    _, second = json.loads((tmp_path / "a.json").read_text())
    assert second["ne-click"]["difference_95"] is None
    shown = capsys.readouterr().out
    assert f"| {second['ne-click']['difference']:+.4f} " in shown
    assert "+/-" not in shown


def test_what_a_step_takes_is_measured_on_batches_of_the_log(folder, tmp_path, capsys, monkeypatch):
    config, _ = load_config(TrainConfig, next(folder.glob("plain_s0_*")) / "config.yaml")
    with pytest.raises(ValueError, match="fewer than 1002 batches"):
        measure_steps(config, skip=1000, steps=2)
    tokens = []
    stack = gr.bench_ablation.Stack
    monkeypatch.setattr(
        gr.bench_ablation,
        "Stack",
        lambda model, info, shape: (
            tokens.append(int(info.offsets[-1])) or stack(model, info, shape)
        ),
    )
    score_step, scored = Trainer.score_step, []
    monkeypatch.setattr(
        Trainer, "score_step", lambda self, b: scored.append(b.num_tokens) or score_step(self, b)
    )
    records = tmp_path / "records.jsonl"
    bench_main([str(folder), "plain", "--skip", "1", "--steps", "2", "--records", str(records)])

    rows = [json.loads(line) for line in records.read_text().splitlines()]
    assert [row["what"] for row in rows] == ["plain", "short"]
    assert all(
        figure > 0 for row in rows for name, figure in row["figures"].items() if "ms" in name
    )
    share = rows[1]["figures"]["step_ms"] / rows[0]["figures"]["step_ms"]
    assert f"({share:.2f})" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match="failed: measure_steps of plain, measure_encoder of plain"
    ):
        bench_main([str(folder), "plain", "--skip", "1000", "--steps", "2"])
    # Trained on as they are shortened, scored whole.
    whole = replace(config.data, stochastic_length=StochasticLengthConfig())
    cut, full = (
        [batch.num_tokens for batch in SessionStream(data, seed=config.seed)][1:3]
        for data in (config.data, whole)
    )
    assert tokens[:4] == cut + full
    assert scored[:2] == full  # once, before they are timed
    assert sorted(scored[2:6]) == sorted(2 * full)
    assert sum(cut) < sum(full)


def test_what_cannot_be_compared_is_refused(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"no finished run is of 'huge', but of \['plain', 'short'\]"
    ):
        ablation(folder, "huge", ["ne-click"])
    with pytest.raises(ValueError, match="has no 'ne-like'"):
        ablation(folder, "plain", ["ne-like"])
    with pytest.raises(ValueError, match=r"has no window '2020-01-01', but \['20"):
        ablation(folder, "plain", ["ne-click"], "2020-01-01")
    with pytest.raises(ValueError, match="no finished run of a sweep"):
        ablation(tmp_path, "plain", [])
