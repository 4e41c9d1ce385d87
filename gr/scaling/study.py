"""`gr scaling FILE`: make the runs of a ladder, fit, predict, draw."""

import csv
import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gr.atomic import write_atomically
from gr.config_io import load_config
from gr.evaluate import EVALUATE
from gr.report import markdown_table
from gr.runlog import read_lines
from gr.runs import ALL
from gr.scaling.analysis import LEVEL, Analysis, Prediction, analyse
from gr.scaling.config import ScalingConfig
from gr.scaling.fits import Fit
from gr.scaling.members import Member, expand, write_sweeps
from gr.scaling.plots import draw
from gr.scaling.points import read_points, run_folder
from pipelines.synthetic.config import SyntheticConfig


def scaling(study: ScalingConfig, *, only_fit: bool = False) -> str:
    """Make what is not finished of a study's runs, then fit them.

    Args:
        study: its configuration.
        only_fit: train nothing; all runs must be there.

    Returns:
        The tables, in Markdown, which are also in scaling.md.

    Raises:
        ValueError: if the configuration cannot be used, or a run is missing or failed.
    """
    members = expand(study)
    if not only_fit:
        _prepare(study)
        for path in write_sweeps(study, members):
            _run([sys.executable, "-m", "launch", "sweep", str(path)], f"the sweep {path}")
        if study.log:
            _score(study, members)
    analysis = analyse(study, read_points(study, members))
    folder = Path(study.output)
    text = _tables(study, analysis)
    plots = draw(study, analysis, folder)
    images = "".join(f"\n![{path.stem}]({path.name})\n" for path in plots)
    write_atomically(folder / "scaling.md", f"# Scaling study\n\n{text}\n{images}")
    write_atomically(folder / "scaling.json", json.dumps(_record(study, analysis), indent=1) + "\n")
    _write_points(analysis, folder / "scaling.csv")
    names = ", ".join(["scaling.md", "scaling.json", "scaling.csv", *(p.name for p in plots)])
    return f"{text}\n\nWritten to {folder}: {names}"


def _prepare(study: ScalingConfig) -> None:
    for path in study.prepare:
        config, _ = load_config(SyntheticConfig, path)
        if not Path(config.output).exists():
            _run([sys.executable, "-m", "gr", "synthesize", path], f"gr synthesize {path}")


def _score(study: ScalingConfig, members: list[Member]) -> None:
    for member in members:
        path = run_folder(study, member)
        rows = read_lines(path / EVALUATE)
        if rows and rows[-1]["window"] == ALL and rows[-1]["log"] == study.log:
            continue
        command = [sys.executable, "-m", "gr", "evaluate", str(path), f"data.log={study.log}"]
        _run(command, f"gr evaluate {path}")


def _run(command: list[str], name: str) -> None:
    status = subprocess.run(command).returncode
    if status:
        raise ValueError(f"{name} failed (exit status {status}); what it said stands above")


def _tables(study: ScalingConfig, analysis: Analysis) -> str:
    sections = [_points_table(study, analysis), _laws_table(analysis)]
    if any(curve.predictions for curve in analysis.curves):
        sections.append(_predictions_table(analysis))
    for e in analysis.efficiencies:
        sections.append(
            f"Scaling efficiency, slope of {e.family} over slope of {e.against}: {e.ratio:.2f} "
            f"(95 %: {e.low:.2f} to {e.high:.2f})."
        )
    for family, fit in analysis.joint.items():
        sign = "minus " if study.higher_is_better else ""
        sections.append(
            f"Joint law of {family}, {sign}{study.metric} = E + sum of A (x / x0)^-alpha: "
            f"{_coefficients(fit)}; error of a point {fit.sigma:.2g}."
        )
    return "\n\n".join(sections)


def _points_table(study: ScalingConfig, analysis: Analysis) -> str:
    head = ["family", "size", "compute, FLOPs", "dense parameters", "rows", "tokens", "seeds"]
    rows = []
    for curve in analysis.curves:
        for means, mark in (
            (curve.fitted, ""),
            (curve.others, " (not the best at its compute)"),
            (curve.held_out, " (held out)"),
        ):
            for m in means:
                p = m.points[0]
                spread = "" if len(m.points) == 1 else f" +/- {m.spread:.4f}"
                rows.append(
                    [
                        curve.family,
                        f"{m.size}{mark}",
                        f"{m.flops:.3g}",
                        f"{p.parameters:,}",
                        f"{p.rows:,}",
                        f"{p.tokens:,}",
                        str(len(m.points)),
                        f"{m.quality:.4f}{spread}",
                    ]
                )
    table = markdown_table([*head, f"{study.metric} (+/- deviation of seeds)"], rows)
    return f"## Runs\n\n{table}"


def _laws_table(analysis: Analysis) -> str:
    rows = [
        [
            curve.family,
            law,
            _coefficients(fit),
            f"{fit.sigma:.2g}",
            f"{curve.left_out[law]:.2g}" if law in curve.left_out else "",
            f"{curve.weights.get(law, 0.0):.2f}",
        ]
        for curve in analysis.curves
        for law, fit in curve.fits.items()
    ]
    head = ["family", "law", "coefficients (95 % intervals)", "error of a point", "left out"]
    head.append("weight")
    return f"## Laws\n\n{markdown_table(head, rows)}"


def _predictions_table(analysis: Analysis) -> str:
    rows = [
        [
            curve.family,
            p.mean.size,
            f"{p.factor:.1f}",
            p.law,
            f"{p.predicted:.4f}",
            f"{p.low:.4f} to {p.high:.4f}",
            f"{p.mean.quality:.4f}",
            _verdict(p),
        ]
        for curve in analysis.curves
        for p in curve.predictions
    ]
    head = ["family", "size", "times the compute", "law", "predicted", f"{LEVEL:.0%} interval"]
    return f"## Held out\n\n{markdown_table([*head, 'measured', ''], rows)}"


def _verdict(prediction: Prediction) -> str:
    if math.isnan(prediction.low):
        return "no interval"
    where = "inside" if prediction.is_inside else "OUTSIDE"
    return f"{where}, {prediction.width:.1%} wide"


def _coefficients(fit: Fit) -> str:
    parts = []
    for name, value in fit.law.coefficients.items():
        low, high = fit.interval(name)
        bounds = "" if low == high or low != low else f" ({low:.3g} to {high:.3g})"
        parts.append(f"{name} = {value:.4g}{bounds}")
    return ", ".join(parts)


def _record(study: ScalingConfig, analysis: Analysis) -> dict[str, Any]:
    """Return what a later reader needs to draw the plots again."""
    return {
        "metric": study.metric,
        "window": study.window,
        "log": study.log,
        "mode": study.mode,
        "points": [
            {
                **asdict(p.member),
                "flops": p.flops,
                "parameters": p.parameters,
                "rows": p.rows,
                "tokens": p.tokens,
                "length": p.length,
                "seconds": p.seconds,
                "quality": p.quality,
                "commit": _commit(p.path),
            }
            for p in analysis.points
        ],
        "laws": {
            curve.family: {
                law: {
                    "coefficients": fit.law.coefficients,
                    "intervals_95": {n: fit.interval(n) for n in fit.law.coefficients},
                    "sigma": fit.sigma,
                    "left_out": curve.left_out.get(law),
                    "weight": curve.weights.get(law, 0.0),
                }
                for law, fit in curve.fits.items()
            }
            for curve in analysis.curves
        },
        "predictions": [
            {
                "family": curve.family,
                "size": p.mean.size,
                "factor": p.factor,
                "law": p.law,
                "predicted": p.predicted,
                "interval": [p.low, p.high],
                "measured": p.mean.quality,
            }
            for curve in analysis.curves
            for p in curve.predictions
        ],
        "efficiencies": [asdict(e) for e in analysis.efficiencies],
        "joint": {
            family: {
                "coefficients": fit.law.coefficients,
                "intervals_95": {n: fit.interval(n) for n in fit.law.coefficients},
                "sigma": fit.sigma,
            }
            for family, fit in analysis.joint.items()
        },
    }


def _commit(path: Path) -> str:
    file = path / "commit.txt"
    return file.read_text(encoding="utf-8").split("\n", 1)[0] if file.exists() else "unknown"


def _write_points(analysis: Analysis, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        head = (
            "family size budget seed held_out flops parameters rows tokens length seconds quality"
        )
        writer.writerow(head.split())
        for p in analysis.points:
            m = p.member
            row = [m.family, m.size, m.budget, m.seed, m.held_out, p.flops, p.parameters, p.rows]
            writer.writerow([*row, p.tokens, f"{p.length:.3f}", f"{p.seconds:.1f}", p.quality])
