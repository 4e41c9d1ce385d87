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
    if record["mode"] == "fixed_compute":
        assert_cells_of_a_grid(page, seeds)
        return
    for key, values in seeds.items():
        mean = statistics.fmean(values)
        shown = [f"{mean:.4f}"]
        if len(values) > 1:
            shown = [f"{mean:.4f} ± {statistics.stdev(values):.4f}"]
        lines = page.splitlines()  # sizes told in plain words have no row of their own
        rows = [line for line in lines if line.startswith(f"| {key[1]} ")] or lines
        assert any(text in row for text in shown for row in rows), (key, shown)


def assert_cells_of_a_grid(page, seeds):
    """Means of a study at fixed compute stand in a grid, a row a size and a column a budget."""
    budgets = sorted({budget for _, _, budget in seeds})
    columns = [f"{budget:.3g}" for budget in budgets]
    lines = page.splitlines()
    headers = [i for i, line in enumerate(lines) if line.startswith("| size | ")]
    (start,) = [
        i for i in headers if [cell.split()[0] for cell in lines[i].split(" | ")[1:]] == columns
    ]
    for size in {size for _, size, _ in seeds}:
        (row,) = [line for line in lines[start : start + 12] if line.startswith(f"| {size} | ")]
        cells = [cell.strip(" *|") for cell in row.split("|")[2:-1]]
        of = {b: statistics.fmean(v) for (_, s, b), v in seeds.items() if s == size}
        assert cells == [f"{of[b]:.3f}" if b in of else "" for b in budgets], size


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
