"""Studies over run directories that a known law wrote, and a miniature that trains."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from omegaconf import OmegaConf

from gr.cli import main
from gr.config import TrainConfig
from gr.config_io import load_config
from gr.scaling.analysis import BOTH, LOG_LAW, POWER_LAW, analyse
from gr.scaling.config import FamilyConfig, ScalingConfig, SizeConfig
from gr.scaling.members import Member, expand, write_sweeps
from gr.scaling.plots import draw
from gr.scaling.points import Point, read_points
from gr.scaling.study import scaling
from launch.config import SweepConfig
from launch.sweep import expand as expand_sweep

RUN = """
run_dir: unused
data: {log: unused, layout: merged, num_items: 20, num_negatives: 4, max_history_tokens: 0}
embeddings:
  tables:
    item: {num_embeddings: 21, dim: 8, features: [item_id, target_item_id, negative_item_id]}
model: {dim: 8, encoding: {position: from_start}}
"""
FLOPS = {"a": 1e10, "b": 4e10, "c": 2e11, "d": 6e11, "big": 5e12}
SLOPES = {"hstu": -0.05, "other": -0.02}


@pytest.fixture
def study(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    return ScalingConfig(
        base=str(tmp_path / "run.yaml"),
        output=str(tmp_path / "study"),
        metric="log_pplx",
        families={"hstu": FamilyConfig(), "other": FamilyConfig(overrides=("optim.lr=0.5",))},
        sizes={
            name: SizeConfig(overrides=(f"model.num_layers={i + 1}",), held_out=name == "big")
            for i, name in enumerate(FLOPS)
        },
        seeds=(0, 1),
        bootstrap=100,
    )


def one_family(study):
    return replace(study, families={"hstu": FamilyConfig()})


def at_fixed_compute(study, sizes):
    return replace(
        one_family(study),
        window="2022-01-02",
        seeds=(0,),
        mode="fixed_compute",
        budgets=(1e10, 1e11, 1e12),
        held_out_budget=2e13,
        sizes=sizes,
    )


def pretend(study, *, offset=0.0):
    """Write what the sweep's runs would leave, with a quality that is linear in ln C."""
    random = np.random.default_rng(5)
    for path in write_sweeps(study, expand(study)):
        sweep, _ = load_config(SweepConfig, path)
        for member in expand_sweep(sweep):
            family, size, *budget = member.label.split("-")
            flops = float(budget[0]) if budget else FLOPS[size]
            member.run_dir.mkdir(parents=True)
            _, resolved = load_config(TrainConfig, member.base, member.overrides)
            OmegaConf.save(resolved, member.run_dir / "config.yaml")
            quality = 3.0 + SLOPES[family] * np.log(flops) + 0.002 * random.standard_normal()
            quality += offset * (budget != [] and size != "b")
            rows = [
                {"window": "2022-01-01", "step": 5, "log_pplx": 9.0},
                {"window": "2022-01-02", "step": 9, "log_pplx": quality},
                {"window": "all", "step": 9, "log_pplx": 8.0},
            ]
            write_lines(member.run_dir / "eval.jsonl", rows)
            steps = [
                {"step": s, "examples": 10 * s, "tokens": 500 * s, "flops": flops * s / 9}
                | {"perf/seconds": 2.0}
                for s in (4, 9)
            ]
            write_lines(member.run_dir / "metrics.jsonl", steps)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_laws_prediction_and_efficiency_of_a_known_study(study):
    study = replace(study, window="last")
    pretend(study)
    text = scaling(study, only_fit=True)
    record = json.loads((Path(study.output) / "scaling.json").read_text())
    for family, slope in SLOPES.items():
        law = record["laws"][family][LOG_LAW]
        low, high = law["intervals_95"]["b"]
        assert low < slope < high
        assert high - low < 0.01
    (efficiency,) = record["efficiencies"]
    # Neither slope's uncertainty cancels in the ratio.
    ratio_width = (efficiency["high"] - efficiency["low"]) / efficiency["ratio"]
    for family in SLOPES:
        law = record["laws"][family][LOG_LAW]
        low, high = law["intervals_95"]["b"]
        assert ratio_width > 0.9 * abs((high - low) / law["coefficients"]["b"])
    assert efficiency["low"] < 0.4 < efficiency["high"]
    for p in record["predictions"]:
        assert p["factor"] == pytest.approx(5e12 / 6e11)
        assert p["interval"][0] <= p["measured"] <= p["interval"][1], p
    assert {p["law"] for p in record["predictions"]} == {LOG_LAW, POWER_LAW, BOTH}
    for laws in record["laws"].values():
        ratio = laws[LOG_LAW]["left_out"] / laws[POWER_LAW]["left_out"]
        assert laws[POWER_LAW]["weight"] / laws[LOG_LAW]["weight"] == pytest.approx(ratio**4)
        assert laws[POWER_LAW]["weight"] + laws[LOG_LAW]["weight"] == pytest.approx(1.0)
    assert len([line for line in text.splitlines() if BOTH in line and "% wide" in line]) == 2
    assert "| hstu   | big (held out)" in text
    assert len(record["points"]) == 20
    point = record["points"][0]
    assert (point["tokens"], point["length"], point["seconds"]) == (4500, 50.0, 4.0)
    assert point["parameters"] < record["points"][2]["parameters"]
    assert len((Path(study.output) / "scaling.csv").read_text().splitlines()) == 21
    for name in ("scaling.png", "scaling_residuals.png"):
        assert image.imread(Path(study.output) / name).std() > 0.01


def test_at_fixed_compute_the_best_size_is_on_the_curve(study):
    sizes = {name: SizeConfig(overrides=size.overrides) for name, size in study.sizes.items()}
    sizes = {name: sizes[name] for name in ("a", "b", "c")}
    study = at_fixed_compute(study, sizes)
    pretend(study, offset=0.1)
    assert {m.budget for m in expand(study)} == {1e10, 1e11, 1e12, 2e13}
    analysis = analyse(study, read_points(study, expand(study)))
    for curve in analysis.curves:
        assert [m.size for m in curve.fitted] == ["b"] * 3
        assert {m.size for m in curve.others} == {"a", "c"}
        assert [m.flops for m in curve.held_out] == [2e13]
        assert curve.fits[LOG_LAW].law.coefficients["b"] == pytest.approx(
            SLOPES[curve.family], abs=0.006
        )
    names = [path.name for path in draw(study, analysis, Path(study.output))]
    assert names == ["scaling.png", "scaling_residuals.png", "scaling_budgets.png"]
    assert image.imread(Path(study.output) / names[-1]).std() > 0.01


def test_a_size_may_have_budgets_of_its_own(study):
    sizes = {
        "a": SizeConfig(overrides=study.sizes["a"].overrides, budgets=(1e10, 1e11)),
        "b": SizeConfig(overrides=study.sizes["b"].overrides),
        "c": SizeConfig(overrides=study.sizes["c"].overrides, budgets=(1e12, 2e13)),
    }
    study = at_fixed_compute(study, sizes)
    pretend(study, offset=0.1)
    runs = {(m.size, m.budget) for m in expand(study)}
    assert runs == {
        *(("a", b) for b in (1e10, 1e11)),
        *(("b", b) for b in (1e10, 1e11, 1e12, 2e13)),
        *(("c", b) for b in (1e12, 2e13)),
    }
    (curve,) = analyse(study, read_points(study, expand(study))).curves
    assert [m.size for m in (*curve.fitted, *curve.held_out)] == ["b"] * 4
    with pytest.raises(ValueError, match=r"sizes\.a\.budgets has \[5\.0\], but the study's are"):
        replace(study, sizes={**sizes, "a": SizeConfig(budgets=(5.0,))})
    with pytest.raises(ValueError, match=r"no size is trained at budgets 1e\+10, 1e\+12"):
        replace(study, sizes={"a": SizeConfig(budgets=(1e11,))})


def test_mistakes_are_messages(study, tmp_path):
    study = replace(one_family(study), seeds=(0,))
    with pytest.raises(ValueError, match="no run of hstu-a, seed 0"):
        scaling(study, only_fit=True)
    pretend(study)
    with pytest.raises(ValueError, match=r"window 'all' has no 'ne-click', but \['log_pplx'"):
        scaling(replace(study, metric="ne-click"), only_fit=True)
    with pytest.raises(ValueError, match="has no window '2020-01-01'"):
        scaling(replace(study, window="2020-01-01"), only_fit=True)
    run = next(Path(study.output).glob("hstu-a_s0_*"))
    run.with_name("hstu-a_s0_0123456789").mkdir()
    with pytest.raises(ValueError, match="holds 2 runs of hstu-a, seed 0"):
        scaling(study, only_fit=True)
    with pytest.raises(ValueError, match="5 runs, limit is 3"):
        expand(replace(study, limit=3))
    with pytest.raises(ValueError, match="at least 3 sizes"):
        replace(study, sizes={"a": SizeConfig(), "b": SizeConfig()})
    with pytest.raises(ValueError, match=r"sweep\.seeds is set by the study"):
        replace(study, sweep={"seeds": [1]})
    with pytest.raises(ValueError, match="at least 3 budgets"):
        replace(study, mode="fixed_compute", budgets=(1e9,))
    with pytest.raises(ValueError, match="letters, digits"):
        replace(study, families={"a-b": FamilyConfig()})


@pytest.mark.slow
def test_the_miniature_trains(tmp_path, monkeypatch):
    """The configuration of the README, with a tenth of its records and fewer runs."""
    log = tmp_path / "log.yaml"
    text = Path("configs/scaling/miniature_log.yaml").read_text()
    text = text.replace("num_records: 2000", "num_records: 160").replace(
        "data/scaling_miniature", str(tmp_path / "log")
    )
    log.write_text(text)
    arguments = [f"output={tmp_path / 'study'}", f"prepare=[{log}]", "seeds=[0]"]
    arguments += [f"overrides=[data.log={tmp_path / 'log'},device=cpu]", "bootstrap=100"]
    for _ in range(2):  # the second time nothing is left to train
        assert main(["scaling", "configs/scaling/miniature.yaml", *arguments]) == 0
    record = json.loads((tmp_path / "study" / "scaling.json").read_text())
    assert len(record["points"]) == 12
    flops = [p["flops"] for p in record["points"] if p["family"] == "hstu"]
    assert flops == sorted(flops)
    assert flops[-1] > 4 * flops[-2]


def test_a_run_stops_at_its_compute(tmp_path):
    from gr.runlog import read_lines
    from tests.e2e.toy import run, write_config, write_log

    config = write_config(tmp_path, write_log(tmp_path, users=24, days=2))
    whole = read_lines(run(config, "log_every=1") / "metrics.jsonl")
    assert len(whole) > 3
    limit = whole[1]["flops"] + 1
    stopped = tmp_path / "stopped"
    rows = read_lines(run(config, f"run_dir={stopped}", f"max_flops={limit}") / "metrics.jsonl")
    assert rows[-1]["step"] == 3
    assert rows[-1]["flops"] >= limit
    resumed = run(config, f"run_dir={stopped}", "resume=true", "log_every=1")
    assert read_lines(resumed / "metrics.jsonl")[-1]["flops"] == whole[-1]["flops"]


def test_a_size_may_be_another_thing_in_another_family(study, tmp_path):
    (tmp_path / "study.yaml").write_text(
        f"base: {study.base}\n"
        f"output: {study.output}\n"
        "families: {hstu: {}, ultra: {overrides: [optim.lr=0.5]}}\n"
        "sizes:\n"
        "  a: {overrides: [model.num_layers=1, model.dim=16], of: {ultra: [model.num_layers=3]}}\n"
        "  b: {overrides: [model.num_layers=2, model.dim=16]}\n"
        "  c: {overrides: [model.num_layers=4, model.dim=16]}\n"
    )
    loaded, _ = load_config(ScalingConfig, tmp_path / "study.yaml")
    (path,) = write_sweeps(loaded, expand(loaded))
    sweep, _ = load_config(SweepConfig, path)
    layers = {
        m.label: load_config(TrainConfig, m.base, m.overrides)[0].model.num_layers
        for m in expand_sweep(sweep)
    }
    one_two_four = {
        f"{f}-{s}": n for f in ("hstu", "ultra") for s, n in zip("abc", (1, 2, 4), strict=True)
    }
    assert layers == one_two_four | {"ultra-a": 3}
    with pytest.raises(ValueError, match=r"sizes.a.of names \['huge'\]"):
        replace(study, sizes=study.sizes | {"a": SizeConfig(of={"huge": []})})


def test_a_joint_law_of_a_grid_and_none_of_a_ladder(study):
    def points(axes):
        return [
            Point(
                member=Member("hstu", f"s{i}", 0.0, 0, held_out=False),
                path=Path(),
                flops=n * length,
                parameters=n,
                rows=100,
                tokens=int(1000 * length),
                length=length,
                seconds=1.0,
                quality=0.5 + 0.2 * (n / 1e5) ** -0.4 + 0.1 * (length / 64) ** -0.5,
            )
            for i, (n, length) in enumerate(axes)
        ]

    study = replace(study, families={"hstu": FamilyConfig()})
    sizes = 20_000, 100_000, 500_000
    grid = analyse(study, points([(n, k) for n in sizes for k in (16.0, 64.0, 256.0)]))
    law = grid.joint["hstu"].law
    assert law.coefficients["alpha_parameters"] == pytest.approx(0.4, rel=0.02)
    assert law.coefficients["alpha_length"] == pytest.approx(0.5, rel=0.02)
    ladder = [(20_000 * 4**i, 16.0 * 2**i) for i in range(7)]
    assert analyse(study, points(ladder)).joint == {}


def test_a_law_without_a_degree_of_freedom_left_gives_no_verdict(study):
    sizes = {name: study.sizes[name] for name in ("a", "b", "c", "big")}
    study = replace(one_family(study), window="last", sizes=sizes)
    pretend(study)
    rows = [line for line in scaling(study, only_fit=True).splitlines() if "nan to nan" in line]
    assert len(rows) == 1  # the power law
    assert "no interval" in rows[0]


def test_the_studies_that_are_here_can_be_made(tmp_path):
    studies = 0
    for path in sorted(Path("configs/scaling").glob("*.yaml")):
        if "\nfamilies:" not in path.read_text(encoding="utf-8"):
            continue
        study, _ = load_config(ScalingConfig, str(path), [f"output={tmp_path / path.stem}"])
        for sweep in write_sweeps(study, expand(study)):
            assert load_config(SweepConfig, str(sweep))[0].runs
        studies += 1
    assert studies >= 6
