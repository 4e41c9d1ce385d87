"""The bench of rounded tables: its exact rows give the evaluation's NE, its rounded ones less."""

import re
import sys

import pytest
import torch

from gr.evaluate import EVALUATE, evaluate, run_config
from gr.inference import bench_tables
from gr.runlog import read_lines

pytestmark = pytest.mark.xdist_group("serve")


def test_its_numbers_are_those_of_evaluation(served_run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_tables", str(served_run)])
    bench_tables.main()
    out = capsys.readouterr().out
    rows = {line.split(" ")[1]: line for line in out.splitlines() if line.startswith("| ")}
    evaluate(run_config(served_run), served_run)
    wanted = read_lines(served_run / EVALUATE)[-1]["ne-click"]
    ne = {form: float(re.findall(r"([\d.]+) \(", rows[form])[0]) for form in bench_tables.FORMATS}
    assert ne["fp32"] == pytest.approx(wanted, abs=2e-5)
    assert abs(ne["fp16"] - ne["fp32"]) < 1e-3
    # 25 rows of 16 and 5 of 8: 2 bytes a number against half a byte and 4 bytes a row.
    assert f"{2 * (25 * 16 + 5 * 8) / (25 * 12 + 5 * 8):.2f}x" in rows["int4"]
    assert "100.00%" in rows["fp16"]


def test_overlap_counts_what_both_hold():
    a = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    b = torch.tensor([[4, 3, 9, 0], [5, 6, 7, 8]])
    assert bench_tables.overlap(a, b) == 0.75
