"""The tables of docs/scaling.md and docs/ultra_hstu.md are what their records say."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
STUDIES = sorted(path.parent.name for path in DOCS.glob("scaling/*/scaling.json"))
ABLATIONS = sorted(path.stem for path in DOCS.glob("ultra_hstu/ablation_*.json"))


@pytest.mark.parametrize("study", STUDIES)
def test_predictions_and_means_of_a_study(study):
    page = (DOCS / "scaling.md").read_text()
    record = json.loads((DOCS / "scaling" / study / "scaling.json").read_text())
    for p in record["predictions"]:
        low, high = p["interval"]
        where = "inside" if low <= p["measured"] <= high else "OUTSIDE"
        width = (high - low) / abs(p["predicted"])
        row = f"| {p['law']} | "
        values = (
            f"| {p['predicted']:.4f} | {low:.4f} to {high:.4f} | {p['measured']:.4f} "
            f"| {where}, {width:.1%} wide |".replace("%", " %")
        )
        assert [line for line in page.splitlines() if row in line and line.endswith(values)], values
    seeds = defaultdict(list)
    for p in record["points"]:
        seeds[p["family"], p["size"], p["budget"]].append(p["quality"])
    for key, values in seeds.items():
        mean = statistics.fmean(values)
        shown = [f"{mean:.4f}", f"{mean:.3f}"]
        if len(values) > 1:
            shown = [f"{mean:.4f} ± {statistics.stdev(values):.4f}"]
        lines = page.splitlines()  # a grid, and sizes told in plain words, have no row of their own
        rows = [line for line in lines if line.startswith(f"| {key[1]} ")] or lines
        assert any(text in row for text in shown for row in rows), (key, shown)


@pytest.mark.parametrize("name", ABLATIONS)
def test_differences_of_an_ablation(name):
    page = (DOCS / "ultra_hstu.md").read_text()
    for record in json.loads((DOCS / "ultra_hstu" / f"{name}.json").read_text()):
        for metric, of in record.items():
            if not isinstance(of, dict):
                continue
            is_first = "difference" not in of
            half_width = of["half_width_95" if is_first else "difference_95"]
            shown = f"{of['mean']:.4f}" if is_first else f"{of['difference']:+.4f}"
            shown += "" if half_width is None else f" ± {half_width:.4f}"
            assert shown in page, (record["variant"], metric, shown)
