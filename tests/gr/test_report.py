import csv
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image
from omegaconf import OmegaConf
from scipy import stats

from gr.report import markdown_table, report
from gr.runs import group_runs, mean_interval, read_run

DAYS = ("2022-04-25", "2022-04-26", "2022-04-27")
TASKS = {"click": "binary", "watch_time": "regression"}


@pytest.fixture
def make_run(tmp_path):
    def make_run(name, seed=0, encoder="hstu", ne=0.9, finished=True, **changes):
        path = tmp_path / name
        path.mkdir()
        config = {
            "run_dir": str(path),
            "seed": seed,
            "model": {"encoder": encoder, "dim": 8},
            "data": {"tasks": {task: {"type": kind} for task, kind in TASKS.items()}},
        }
        for key, value in changes.items():
            config["model"][key] = value
        OmegaConf.save(OmegaConf.create(config), path / "config.yaml")
        (path / "commit.txt").write_text("0123456789abcdef\n")
        windows = [*DAYS, *(["all"] if finished else [])]
        rows = [
            {"window": w, "step": 30, "ne-click": ne + i / 8, "auc-click": 0.5, "gauc-click": None}
            | {"mae-watch_time": 9.5, "rmse-watch_time": 20.25, "hr@10": 0.125, "mrr": 0.0625}
            for i, w in enumerate(windows)
        ]
        (path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        steps = [
            {"step": s, "examples": 8 * s, "train/loss": 1 / s, "train/loss/click": 0.5 / s}
            | {"perf/examples_per_s": 100.0 + s, "perf/tokens_per_s": 900.0}
            for s in range(1, 31)
        ]
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
        return path

    return make_run


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("n", [2, 3, 30, 31, 32, 33, 40, 200])
def test_quantiles_agree_with_scipy(n):
    values = [0.0] * (n - 1) + [1.0]
    half_width = mean_interval(values)[1]
    assert half_width == pytest.approx(stats.t.ppf(0.975, n - 1) * stats.sem(values), rel=2e-5)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40))
def test_interval_agrees_with_scipy(values):
    mean, half_width, n = mean_interval(values)
    assert n == len(values)
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    expected = stats.t.ppf(0.975, n - 1) * stats.sem(values)
    assert half_width == pytest.approx(expected, rel=5e-5, abs=1e-9)


def test_interval_of_one_and_of_none():
    mean, half_width, n = mean_interval([2.0])
    assert (mean, n) == (2.0, 1)
    assert math.isnan(half_width)
    assert mean_interval([]) is None


def test_seeds_are_averaged_and_models_stand_side_by_side(make_run, tmp_path):
    values = {0: 0.5, 1: 0.75, 2: 0.875}
    seeds = [make_run(f"h{s}", seed=s, ne=v) for s, v in values.items()]
    other = make_run("sasrec", encoder="sasrec", ne=0.25)
    text = report([*seeds, other], tmp_path / "out")
    overall = [v + 3 / 8 for v in values.values()]
    half_width = stats.t.ppf(0.975, 2) * stats.sem(overall)
    (line,) = [row for row in text.splitlines() if row.startswith("| click") and "NE" in row]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["click", "NE", f"{np.mean(overall):.4f} +/- {half_width:.4f}", "0.6250"]
    assert "hstu (3 seeds)" in text
    assert text.rindex("## Overall") > text.rindex("by window")  # read first, so last on a screen
    day = next(row for row in text.splitlines() if row.startswith(f"| {DAYS[1]}"))
    assert day.split("|")[2].strip() == f"{np.mean(list(values.values())) + 1 / 8:.4f}"

    summary = read_csv(tmp_path / "out" / "summary.csv")
    (row,) = [
        r for r in summary if (r["label"], r["window"], r["metric"]) == ("hstu", "all", "ne-click")
    ]
    assert float(row["mean"]) == pytest.approx(np.mean(overall))
    assert float(row["half_width_95"]) == pytest.approx(half_width, rel=1e-4)
    assert row["runs"] == "3"
    rows = read_csv(tmp_path / "out" / "report.csv")
    assert len(rows) == 4 * 4 * 7  # runs, windows, metrics
    found = {(r["run"], r["window"]): r["value"] for r in rows if r["metric"] == "ne-click"}
    assert float(found[str(seeds[1]), DAYS[2]]) == 0.75 + 2 / 8


def test_files_go_into_the_first_run_and_plots_are_images(make_run):
    first, second = make_run("a"), make_run("b", encoder="sasrec")
    (second / "commit.txt").write_text("none: git is not installed\n")
    report([first, second])
    text = (first / "report.md").read_text()
    assert "commit unknown" in text
    for name in ("ne_by_day", "retrieval_by_day", "loss", "throughput"):
        pixels = image.imread(first / f"{name}.png")
        assert pixels.shape[0] > 300
        assert pixels[..., :3].std() > 0.01  # something is drawn
        assert f"({name}.png)" in text
    assert not (second / "report.md").exists()
    assert "commit 0123456789ab" in text
    assert "116 examples/s (median)" in text  # of 101 .. 130 is 115.5


def test_labels_name_what_differs(make_run):
    runs = [make_run("a"), make_run("b", dim=16), make_run("c", encoder="dlrm")]
    assert [g.label for g in group_runs([read_run(r) for r in runs])] == [
        "hstu dim=8",
        "hstu dim=16",
        "dlrm",
    ]


def test_given_labels_may_hold_an_equals_sign(make_run):
    a, b = make_run("a"), make_run("b=1", seed=1)
    runs = [read_run(f"lr=0.1={a}"), read_run(f"lr=0.1={b}"), read_run(b)]
    assert [(run.label, run.path) for run in runs] == [("lr=0.1", a), ("lr=0.1", b), ("", b)]
    (group,) = group_runs(runs[:2])
    assert group.label == "lr=0.1"


def test_an_unfinished_run_is_named(make_run):
    text = report([make_run("a", finished=False)])
    assert "NOT FINISHED" in text
    assert (
        next(r for r in text.splitlines() if r.startswith("| click")).split("|")[3].strip() == "-"
    )


def test_a_run_without_numbers_yet_is_reported(make_run):
    path = make_run("a")
    (path / "eval.jsonl").unlink()
    (path / "metrics.jsonl").write_text("")
    assert "NOT FINISHED" in report([path])
    assert not list(path.glob("*.png"))


def test_bad_input(make_run, tmp_path):
    a, b = make_run("a"), make_run("b", dim=16)
    with pytest.raises(ValueError, match="nowhere is not a run directory: no such directory"):
        report([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"no config\.yaml in it"):
        report([tmp_path])
    with pytest.raises(ValueError, match="given twice"):
        report([a, a])
    with pytest.raises(ValueError, match=r"labelled 'x' differ in model\.dim"):
        report([f"x={a}", f"x={b}"])
    with (a / "eval.jsonl").open("a") as file:
        file.write(json.dumps({"window": "all", "step": 31}) + "\n")
    with pytest.raises(ValueError, match="window 'all' stands there twice"):
        report([a])
    (b / "metrics.jsonl").write_text('{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        report([b])


def test_tables_are_markdown():
    assert markdown_table(["a", "b"], [["1", "long"], ["22", "-"]]) == (
        "| a  | b    |\n|----|------|\n| 1  | long |\n| 22 | -    |"
    )
