"""Records and the page of results, from run directories written by hand."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from gr.cli import main
from gr.config_io import load_config
from gr.results import HOLD_OUT, METRICS, PageConfig, make_records, read_records, results
from launch.config import SweepConfig
from launch.sweep import expand

PAGE = """
title: Results
text: How it was done.
tables:
  toy:
    title: Toy
    note: Not real.
    source: nowhere
    baselines: [base]
    rows:
      base: {title: Base, config: configs/base.yaml}
      better:
        title: Better
        config: configs/better.yaml
        published: {hr@10: 0.5, ndcg@10: 0.25}
        within: 0.02
"""
# row, seed -> ndcg@10 after each epoch, of the validation events and of the test events
CURVES = {
    ("base", 0): ([0.10, 0.30, 0.20], [0.11, 0.21, 0.31]),
    ("base", 1): ([0.10, 0.20, 0.20], [0.12, 0.22, 0.10]),
    ("better", 0): ([0.40, 0.20, 0.10], [0.26, 0.50, 0.10]),
    ("better", 1): ([0.10, 0.20, 0.30], [0.10, 0.20, 0.24]),
}


def write_run(folder: Path, row, seed, held_out, curve, **changes) -> Path:
    path = folder / f"{row}_s{seed}_{abs(hash((row, seed, held_out))) % 16**10:010x}"
    path.mkdir(parents=True)
    config = {
        "run_dir": str(path),
        "seed": seed,
        "model": {"dim": 4},
        "data": {"leave_one_out": {"hold_out": held_out}},
    }
    (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config | changes)))
    rows = [
        {"window": f"epoch {i:04d}", "step": i, **dict.fromkeys(METRICS, value), "hr@10": 2 * value}
        for i, value in enumerate(curve, 1)
    ]
    rows.append(rows[-1] | {"window": "all"})
    (path / "eval.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    lines = [{"step": i, "perf/seconds": 1.5} for i in range(4)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (path / "commit.txt").write_text("c0ffee" * 6 + "beef\n")
    (path / "facts.json").write_text(json.dumps({"device": "GPU", "log": "f" * 64}))
    return path


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "page.yaml").write_text(PAGE)
    return [
        write_run(tmp_path / "runs", row, seed, held_out, curve)
        for (row, seed), curves in CURVES.items()
        for held_out, curve in zip(("validation", "test"), curves, strict=True)
    ]


def test_the_validation_run_alone_chooses_the_epoch(tmp_path, runs):
    page, _ = load_config(PageConfig, tmp_path / "page.yaml")
    found = {(r.row, r.seed): r for r in make_records(page, runs)}
    # The earliest of equals; the test events have no say.
    assert {key: r.epoch for key, r in found.items()} == {
        ("base", 0): 2,
        ("base", 1): 2,
        ("better", 0): 1,
        ("better", 1): 3,
    }
    assert {key: r.test["ndcg@10"] for key, r in found.items()} == {
        ("base", 0): 0.21,
        ("base", 1): 0.22,
        ("better", 0): 0.26,
        ("better", 1): 0.24,
    }
    assert [found["better", 0].best_test_epoch, found["better", 0].best_test["ndcg@10"]] == [2, 0.5]
    assert found["base", 0].seconds == {"validation": 6.0, "test": 6.0}
    assert found["base", 0].config == {"model.dim": 4}


def test_the_page_says_what_the_records_say(tmp_path, runs):
    output = tmp_path / "docs" / "results.md"
    said = results(tmp_path / "page.yaml", runs, output)
    assert "4 records added, 4 in all" in said
    text = output.read_text()
    # Two seeds: the half width is t(1) = 12.7062 times the standard error.
    half = 12.7062 * 0.01 / math.sqrt(2) * math.sqrt(2)
    assert f"| 0.2500 ± {half:.4f} " in text  # better: 0.26 and 0.24
    assert "- Better, published" in text
    assert "| Better | +0.00%" in text
    assert "at most 2% below | met" in text
    differences = (0.26 - 0.21, 0.24 - 0.22)
    mean = sum(differences) / 2
    half = 12.7062 * abs(differences[0] - differences[1]) / 2
    assert f"{mean:+.4f} ± {half:.4f}" in text
    assert "gr train configs/better.yaml seed=SEED" in text
    assert (tmp_path / "docs" / "results" / "toy.png").stat().st_size > 1_000
    # Of the records alone, without the runs, the same page.
    results(tmp_path / "page.yaml", [], output)
    assert output.read_text() == text
    assert len(read_records(tmp_path / "docs" / "results")) == 4


def test_what_was_not_run_is_named(tmp_path, runs):
    rows = "      more: {title: More, config: configs/more.yaml}\n"
    more = f"  other:\n    title: Other\n    rows:\n{rows}"
    (tmp_path / "page.yaml").write_text(PAGE + more)
    results(tmp_path / "page.yaml", [x for x in runs if "better" in x.name], tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text()
    assert "\nNot run yet: Base.\n" in text
    assert "## Not run yet\n\nOther.\n" in text
    assert "Difference from" not in text


def test_models_of_several_tables_stand_side_by_side(tmp_path, runs):
    """Stars are those of each table's own comparison; a model that ran in one has no column."""
    rows = "".join(
        f"      {name}: {{title: {title}, config: {name}.yaml}}\n"
        for name, title in (
            *(("base_2", "Base"), ("better_2", "Better"), ("once", "Once")),
            *(("half_2", "Half"), ("never_2", "Never")),
        )
    )
    unlike = "".join(
        f"      {name}: {{title: {title}, config: {name}.yaml}}\n"
        for name, title in (("half", "Half"), ("never", "Never"))
    )
    (tmp_path / "page.yaml").write_text(
        PAGE + unlike + f"  other:\n    title: Other\n    baselines: [base_2]\n    rows:\n{rows}"
    )
    more = [
        write_run(tmp_path / "more", row, seed, held_out, [value])
        for row, values in {
            "base_2": (0.1, 0.2),
            "better_2": (0.30, 0.401),
            "half_2": (0.2, 0.3),
        }.items()
        for seed, value in enumerate(values)
        for held_out in ("validation", "test")
    ]
    results(tmp_path / "page.yaml", [*runs, *more], tmp_path / "r.md")
    section = (tmp_path / "r.md").read_text().split("## NDCG@10 of all tables")[1].split("\n## ")[0]
    cells = [
        [x.strip() for x in line.split("|")[1:-1]] for line in section.splitlines() if "|" in line
    ]
    # t(1) is 12.7062, and 12.7062 / 2 times the distance of two values their half width.
    expected = [("Toy", (0.21, 0.22), (0.26, 0.24), ""), ("Other", (0.1, 0.2), (0.3, 0.401), " *")]
    assert [cells[0], *cells[2:]] == [
        ["data", "Base", "Better"],
        *(
            [
                name,
                f"{np.mean(base):.4f} ± {12.7062 / 2 * (base[1] - base[0]):.4f}",
                f"{np.mean(better):.4f} ± {12.7062 / 2 * abs(better[1] - better[0]):.4f}{star}",
            ]
            for name, base, better, star in expected
        ),
    ]


def test_a_missed_target_is_called_missed(tmp_path, runs):
    (tmp_path / "page.yaml").write_text(PAGE.replace("ndcg@10: 0.25", "ndcg@10: 0.26"))
    results(tmp_path / "page.yaml", runs, tmp_path / "results.md")
    assert "| MISSED |" in (tmp_path / "results.md").read_text()


def test_an_aim_is_met_by_the_mean_or_missed(tmp_path, runs):
    for aim, verdict in ((0.25, "met"), (0.2501, "MISSED")):
        aims = f"within: 0.02\n        aims: {{hr@10: 0.5, ndcg@10: {aim}}}"
        (tmp_path / "page.yaml").write_text(PAGE.replace("within: 0.02", aims))
        results(tmp_path / "page.yaml", runs, tmp_path / "results.md")
        text = (tmp_path / "results.md").read_text()
        wanted = f"HR@10 0.500, NDCG@10 {aim:.3f}"
        (line,) = [line for line in text.splitlines() if wanted in line]
        assert [x.strip() for x in line.split("|")[1:-1]] == [
            *("Better", "0.5000", "0.2500", wanted, verdict)
        ]


def test_runs_of_a_pair_may_differ_in_how_layers_are_run(tmp_path, runs):
    graphs = {"dim": 4, "hstu": {"graph_tokens": 256, "recompute": []}}
    other = write_run(tmp_path / "more", "base", 0, "test", CURVES["base", 0][1], model=graphs)
    results(tmp_path / "page.yaml", [runs[0], other], tmp_path / "results.md")
    (record,) = read_records(tmp_path / "results")
    assert record.config["model.dim"] == 4
    assert not [key for key in record.config if key.startswith("model.hstu")]


def test_what_is_no_pair_is_refused(tmp_path, runs, capsys):
    def fails(*given, page="page.yaml"):
        output = tmp_path / "results.md"
        argv = ["results", str(tmp_path / page), *map(str, given), "--output", str(output)]
        assert main(argv) == 2
        assert not output.exists()
        return capsys.readouterr().err

    assert "there is no test run beside" in fails(runs[0])
    other = write_run(tmp_path / "more", "base", 0, "test", [0.1] * 3, model={"dim": 8})
    assert "differ in model.dim, not only" in fails(runs[0], other)
    assert "are both the test run of base" in fails(*runs[:2], other)
    short = write_run(tmp_path / "short", "base", 0, "test", [0.1] * 2)
    assert "differ in the epochs that were scored" in fails(runs[0], short)
    stranger = write_run(tmp_path / "strange", "stranger", 0, "test", [0.1])
    assert "stranger is no row of the page; there are" in fails(stranger)
    lines = (runs[1] / "eval.jsonl").read_text().splitlines(keepends=True)
    (runs[1] / "eval.jsonl").write_text("".join(lines[:-1]))
    assert "is not finished" in fails(*runs[:2])
    assert "holds no records" in fails()
    (tmp_path / "twice.yaml").write_text(PAGE.replace("baselines: [base]", "baselines: [nobody]"))
    assert "baseline=nobody is no row" in fails(page="twice.yaml")


SWEEPS = ["published", "published_small", "published_amazon"]


def rows_of_sweep(path: str) -> dict[str, str]:
    """Return run -> what `gr train` takes for it, as launch/sweep.py puts it together."""
    sweep, _ = load_config(SweepConfig, path, ["seeds=[0]"])
    return {
        name: " ".join([run.base or sweep.base, *sweep.overrides, *run.overrides])
        for name, run in sweep.runs.items()
    }


def test_the_sweeps_make_the_rows_of_the_page():
    """The command that the page gives for a row is what the sweep runs."""
    page, _ = load_config(PageConfig, "configs/published/results.yaml")
    given = {name: row.config for table in page.tables.values() for name, row in table.rows.items()}
    made = {}
    for name in SWEEPS:
        made |= rows_of_sweep(f"configs/sweeps/{name}.yaml")
    assert made == given
    for study in page.studies.values():
        made = rows_of_sweep(study.sweep)
        assert {name: row.config for name, row in study.rows.items()}.items() <= made.items()


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted(Path("configs/sweeps").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_run_of_every_sweep_has_a_valid_configuration(path):
    sweep, _ = load_config(SweepConfig, path, ["seeds=[0]"])
    members = expand(sweep)
    assert len(members) >= len(sweep.runs)
    whole, _ = load_config(SweepConfig, path)
    assert len(members) * len(whole.seeds) <= whole.limit
    if path.stem in SWEEPS:
        hold_outs = [o for m in members for o in m.overrides if o.startswith(HOLD_OUT)]
        assert set(hold_outs) == {f'{HOLD_OUT}="test"', f'{HOLD_OUT}="validation"'}


def test_the_page_in_docs_is_that_of_its_records(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # the text is the subject
    shutil.copytree("docs/results", tmp_path / "results")
    page, command = "configs/published/results.yaml", "--output docs/results.md"
    results(page, [], tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    text = text.replace(f"--output {tmp_path / 'results.md'}", command)
    assert text == Path("docs/results.md").read_text()


INTERVAL = re.compile(r"[0-9]\.[0-9]{4} ± [0-9]\.[0-9]{4}")


def test_intervals_in_plain_words_are_those_of_the_tables():
    """A conclusion that is older than the runs below it names figures that no table has."""
    page, _ = load_config(PageConfig, "configs/published/results.yaml")
    text = Path("docs/results.md").read_text()
    sections = {x.partition("\n")[0]: x for x in text.split("\n## ")}
    found = 0
    for part in page.parts.values():
        lines = sections.get(part.title, "").splitlines()
        tables = "\n".join(line for line in lines if line.startswith("|"))
        words = part.note + getattr(part, "conclusion", "")
        for page_named in re.findall(r"docs/quickstart\.md", words):
            tables += Path(page_named).read_text()
        intervals = INTERVAL.findall(words)
        assert [x for x in intervals if x not in tables] == [], part.title
        found += len(intervals)
    assert found > 50
    in_short = INTERVAL.findall(page.text)
    assert [x for x in in_short if x not in text.split("\n## ", 1)[1]] == []
    assert len(in_short) > 10


def test_the_readme_has_the_figures_of_the_page():
    page = Path("docs/results.md").read_text().splitlines()
    table = Path("README.md").read_text().split("| MovieLens-1M |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert rows
    for model, hr, published_hr, ndcg, published_ndcg in rows:
        first = next(line for line in page if line.startswith(f"| {model} "))
        published = [line for line in page if line.startswith(f"| - {model}, published ")]
        cells = [[x.strip() for x in line.split("|")] for line in (first, *published)]
        assert [hr, ndcg] == [cells[0][2], cells[0][5]]
        expected = [cells[1][2], cells[1][5]] if published else ["-", "-"]
        assert [published_hr, published_ndcg] == expected
