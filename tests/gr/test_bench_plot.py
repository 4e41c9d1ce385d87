import json

import pytest

from gr import bench, bench_plot


def row(**changes):
    base = {
        "op": "linear",
        "mode": "forward",
        "case": "d=8",
        "ms_p50": 2.0,
        "tflops": 100.0,
        "gb_per_s": 10.0,
        "baseline_ms": {"torch": 4.0, bench_plot.COPY: 1.0},
        "gpu": "card",
        "torch": "2",
        "triton": "3",
        "date": "2026-01-01",
        "commit": "abc",
    }
    return {**base, **changes}


@pytest.fixture
def records(tmp_path):
    def write(*rows):
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return path

    return write


def heights(monkeypatch, path, op, to):
    """Bars by panel and name, as they were drawn."""
    drawn = []
    monkeypatch.setattr(bench_plot.plt, "close", drawn.append)
    bench_plot.draw_records(path, op, to)
    (figure,) = drawn
    return [
        {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
        for axes in figure.axes
    ]


def test_speeds_are_inverse_to_times_and_the_newest_record_counts(records, tmp_path, monkeypatch):
    path = records(
        row(ms_p50=5.0, tflops=40.0),
        row(),
        row(case="d=16", baseline_ms={"other": 1.0, bench_plot.COPY: 1.0}),
        row(mode="backward", tflops=0.0),
        row(gpu="another card", op="quantize"),
    )
    forward, backward = heights(monkeypatch, path, "linear", tmp_path / "out.png")
    assert forward == {"ours": [1.0, 1.0], "torch": [0.5], "other": [2.0]}
    assert backward == {"ours": [1.0], "torch": [0.5]}
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_other_cards_are_left_out(records, tmp_path, monkeypatch):
    path = records(row(gpu="old card"), row(case="d=16"))
    (panel,) = heights(monkeypatch, path, "linear", tmp_path / "out.png")
    assert panel == {"ours": [1.0], "torch": [0.5]}


def test_nothing_to_draw_is_said(records, tmp_path):
    path = records(row(), row(op="jagged", baseline_ms={bench_plot.COPY: 1.0}))
    arguments = ["jagged", "--records", str(path), "--plot", str(tmp_path / "out.png")]
    with pytest.raises(ValueError, match="expected records of jagged beside rivals, found none"):
        bench.main(arguments)
    bench.main(["linear", *arguments[1:]])
    assert (tmp_path / "out.png").exists()
