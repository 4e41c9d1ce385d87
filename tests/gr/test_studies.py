"""Studies of one pass: records and their part of the page, from run directories made by hand."""

import json
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from omegaconf import OmegaConf
from scipy import stats

from gr.results import results
from gr.runs import mean_interval

PAGE = """
title: Results
tables: {}
studies:
  clock:
    title: Does the clock help?
    conclusion: It does.
    sweep: sweeps/clock.yaml
    metrics: [ne-click, hr@10/new_items, train/tokens]
    baselines: [none]
    rows:
      none: {title: no time, config: base.yaml}
      hour: {title: hour, config: base.yaml hour=true}
      noise: {title: noise, config: base.yaml noise=true}
      later: {title: later, config: base.yaml later=true}
"""
NE = {"none": [0.90, 0.91, 0.92], "hour": [0.80, 0.812, 0.821], "noise": [0.91, 0.90, 0.921]}


def write_run(folder: Path, row: str, seed: int, ne: float, *, is_cut: bool = False) -> Path:
    path = folder / f"{row}_s{seed}_00ff"
    path.mkdir(parents=True)
    config = {
        "run_dir": str(path),
        "seed": seed,
        "model": {"dim": 4},
        "log_every": 7,
        "device": "auto",
    }
    (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    early = {"window": "2022-05-01", "step": 3, "ne-click": 9.0, "hr@10/new_items": 0.1}
    late = early | {"window": "2022-05-02", "step": 9, "ne-click": ne / 2}
    whole = late | {"window": "all", "ne-click": ne, "hr@10/new_items": 0.5, "auc": None}
    rows = [early, late] if is_cut else [early, late, whole]
    (path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [{"step": i, "tokens": 1e6 * i, "flops": 1e15 * i, "perf/seconds": 2} for i in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in steps))
    (path / "commit.txt").write_text("c0ffee" * 6 + "beef\n")
    (path / "facts.json").write_text(json.dumps({"device": "CPU", "log": "a log"}))
    return path


@pytest.fixture(autouse=True)
def plots_where_they_are_the_subject(request, monkeypatch):
    """Draw nothing elsewhere: it is most of a test's time."""
    if "plot" not in request.node.name:
        monkeypatch.setattr("gr.results_page.draw_study", lambda *_: False)


@pytest.fixture
def page(tmp_path):
    (tmp_path / "page.yaml").write_text(PAGE)
    return tmp_path / "page.yaml"


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / "runs", row, seed, ne)
        for row, values in NE.items()
        for seed, ne in enumerate(values)
    ]


def test_the_section_says_what_the_runs_say(tmp_path, page, runs):
    output = tmp_path / "results.md"
    assert "9 records added, 9 in all" in results(page, runs, output)
    text = output.read_text()
    assert "## Does the clock help?\n\nIt does.\n" in text
    assert "| no time | 0.9100 ± 0.0248 | 0.5000 ± 0.0000 " in text
    test = stats.ttest_rel(NE["hour"], NE["none"])
    low, high = test.confidence_interval(0.95)
    # Two rows are tested: the smaller of the two p-values counts twice.
    assert 2 * test.pvalue < 0.05
    assert f"| {(low + high) / 2:+.4f} ± {(high - low) / 2:.4f} * |" in text
    assert "By NE click, against no time: better: hour; no difference seen: noise." in text
    assert "HR@10, new items" in text
    assert "Not run yet: later." in text
    assert "- hour: `gr train base.yaml hour=true seed=SEED run_dir=RUN`" in text
    assert "4 to 4 s a run" in text
    record = json.loads((tmp_path / "results/studies/hour_seed1.json").read_text())
    assert record["all"]["train/flops"] == 2e15
    assert record["config"] == {"model.dim": 4}
    results(page, [], output)
    assert output.read_text() == text


def test_sums_over_the_training_are_compared_in_percent_at_the_seeds_of_both(tmp_path, page, runs):
    for run in runs:
        row, tokens = run.name.split("_")[0], 1e6 * (1 + int(run.name.split("_s")[1][0]))
        tokens *= {"none": 1, "hour": 0.25, "noise": 2}[row]
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens": tokens}) + "\n")
    fewer = [run for run in runs if run.name != "hour_s2_00ff"]
    results(page, fewer, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text().split("Difference from")[1]
    cells = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in text.splitlines()
             if line.startswith("| ")}  # fmt: skip
    assert cells == {"": "tokens, M", "hour": "-75.0%", "noise": "+100.0%"}


def test_the_last_window_alone(tmp_path, page, runs):
    page.write_text(PAGE.replace("baselines: [none]", "baselines: [none]\n    window: last"))
    results(page, runs, tmp_path / "results.md")
    assert "| no time | 0.4550 ± 0.0124 | 0.1000 ± 0.0000 " in (tmp_path / "results.md").read_text()


def test_the_plot_shows_rows_with_intervals_alone(tmp_path, page, runs, monkeypatch):
    drawn = []
    draw = Axes.errorbar

    def keep(axes, x, y, **kwargs):
        drawn.append((axes.get_title(), x, y, kwargs["xerr"], kwargs["fillstyle"]))
        return draw(axes, x, y, **kwargs)

    monkeypatch.setattr(Axes, "errorbar", keep)
    later = write_run(tmp_path / "runs", "later", 0, 0.7)  # one seed: no interval
    results(page, [*runs, later], tmp_path / "results.md")
    assert "![Does the clock help?: differences" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results" / "clock.png").stat().st_size > 1_000
    expected = [stats.ttest_rel(NE[name], NE["none"]) for name in ("hour", "noise")]
    for (_, x, y, half, style), test, place in zip(drawn, expected, (0, 1), strict=True):
        low, high = test.confidence_interval(0.95)
        assert (x, half) == pytest.approx(((low + high) / 2, (high - low) / 2), abs=2e-5)
        assert (y, style) == (place, "full" if place == 0 else "none")
    # New items' HR@10 is the same in all runs: no panel. With one row there is nothing to see.
    fewer = [run for run in runs if "noise" not in run.name]
    results(page, fewer, tmp_path / "few.md")
    assert not (tmp_path / "few" / "clock.png").exists()


def test_the_last_window_beside_the_pass(tmp_path, page, runs):
    page.write_text(PAGE.replace("[ne-click, ", "[ne-click, ne-click:last, "))
    results(page, runs, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert "| NE click        | NE click, last window |" in text
    assert "| no time | 0.9100 ± 0.0248 | 0.4550 ± 0.0124       |" in text


def test_what_is_known_from_elsewhere_stands_there_before_the_runs(tmp_path, page, runs):
    later = "  later_one:\n    title: Later\n    sweep: x.yaml\n    metrics: [auc]\n    rows: {}\n"
    page.write_text(PAGE + later)
    results(page, runs, tmp_path / "results.md")
    assert "## Not run yet\n\nLater.\n" in (tmp_path / "results.md").read_text()
    page.write_text(PAGE + later + "    conclusion: Nobody knows.\n")
    results(page, runs, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert "## Later\n\nNobody knows.\n\nNot run yet: `python -m launch sweep x.yaml`." in text


def test_a_row_may_be_held_against_several(tmp_path, page, runs):
    page.write_text(PAGE.replace("baselines: [none]", "baselines: [none, hour]"))
    results(page, runs, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert "against no time: better: hour" in text
    assert "against hour: worse: no time, noise." in text
    page.write_text(PAGE.replace("baselines: [none]", "baselines: [nobody]"))
    with pytest.raises(ValueError, match="clock: baseline=nobody is no row of it"):
        results(page, [], tmp_path / "results.md")


def test_a_row_run_again_is_held_against_the_recorded_run_of_its_seed(tmp_path, page, runs):
    output = tmp_path / "results.md"
    results(page, runs, output)
    _, half, _ = mean_interval(NE["hour"])
    for by, verdict in ((0.9 * half, "agrees"), (1.1 * half, "DIFFERS"), (-1.1 * half, "DIFFERS")):
        name = f"again{by}"
        repeat = write_run(tmp_path / name, "hour", 1, NE["hour"][1] + by)
        results(page, [], output, again=[repeat])
        section = output.read_text().split("## Run again on a fresh clone")[1]
        (line,) = [line for line in section.splitlines() if "NE click" in line]
        cells = [x.strip() for x in line.split("|")[1:-1]]
        assert cells[:2] + cells[3:] == [
            *("hour", "1", "NE click", f"{NE['hour'][1]:.6f}", f"{NE['hour'][1] + by:.6f}"),
            *(f"{half:.4f}", verdict),
        ]
    # The page of the records alone has it too, and the recorded runs are as they were.
    text = output.read_text()
    results(page, [], output)
    assert output.read_text() == text
    assert f"{NE['hour'][1]}" in (tmp_path / "results/studies/hour_seed1.json").read_text()
    stranger = write_run(tmp_path / "other", "hour", 7, 0.8)
    with pytest.raises(ValueError, match="hour, seed 7, was run again, but"):
        results(page, [], output, again=[stranger])
    results(page, [], output)
    assert output.read_text() == text


def test_lower_is_better_only_where_it_is(tmp_path, page, runs):
    page.write_text(PAGE.replace("metrics: [ne-click,", "metrics: [auc,"))
    for path in runs:
        text = (path / "eval.jsonl").read_text().replace('"auc": null', '"auc": 0')
        (path / "eval.jsonl").write_text(
            text.replace('"auc": 0', '"x": 0').replace("ne-click", "auc")
        )
    results(page, runs, tmp_path / "results.md")
    assert "against no time: worse: hour; no" in (tmp_path / "results.md").read_text()


def test_what_is_no_record_is_refused(tmp_path, page, runs):
    cut = write_run(tmp_path / "cut", "hour", 3, 0.8, is_cut=True)
    with pytest.raises(ValueError, match="is not finished"):
        results(page, [cut], tmp_path / "results.md")
    twin = write_run(tmp_path / "twin", "hour", 0, 0.8)
    with pytest.raises(ValueError, match="second run of hour, seed 0"):
        results(page, [*runs, twin], tmp_path / "results.md")
    folder = tmp_path / "results" / "studies"
    folder.mkdir(parents=True)
    (folder / "x_seed0.json").write_text('{"row": "hour"}')
    with pytest.raises(ValueError, match="is no record of a study"):
        results(page, runs, tmp_path / "results.md")
