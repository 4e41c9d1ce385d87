"""Plots of a scaling study: PNG files that can go into a paper."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from gr.scaling.analysis import LOG_LAW, POWER_LAW, Analysis, Curve
from gr.scaling.config import ScalingConfig

_STYLES = {LOG_LAW: "--", POWER_LAW: "-"}
_BAND = POWER_LAW


def draw(study: ScalingConfig, analysis: Analysis, folder: Path) -> list[Path]:
    """Draw the curves, their residuals, and at fixed compute each budget over the sizes.

    Args:
        study: names the metric.
        analysis: of the study.
        folder: where the PNG files go.

    Returns:
        The files.
    """
    paths = [
        _draw_curves(study, analysis, folder / "scaling.png"),
        _draw_residuals(study, analysis, folder / "scaling_residuals.png"),
    ]
    if study.mode == "fixed_compute":
        paths.append(_draw_budgets(study, analysis, folder / "scaling_budgets.png"))
    return paths


def _draw_curves(study: ScalingConfig, analysis: Analysis, path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for number, curve in enumerate(analysis.curves):
        _draw_curve(axes, curve, f"C{number % 10}")
    axes.set_xscale("log")
    axes.set_xlabel("training compute, FLOPs of the encoder")
    better = "higher" if study.higher_is_better else "lower"
    where = f"on {study.log}" if study.log else f"window: {study.window}"
    axes.set_ylabel(f"{study.metric} ({better} is better; {where})")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _draw_curve(axes: Any, curve: Curve, colour: str) -> None:
    everything = (*curve.fitted, *curve.others, *curve.held_out)
    compute = np.geomspace(min(m.flops for m in everything), max(m.flops for m in everything), 100)
    for means, face, label in (
        (curve.fitted, colour, curve.family),
        (curve.held_out, "white", f"{curve.family}, held out"),
    ):
        for index, mean in enumerate(means):
            axes.plot(
                [p.flops for p in mean.points],
                [p.quality for p in mean.points],
                linestyle="",
                marker=".",
                markersize=3,
                color=colour,
                alpha=0.5,
            )
            axes.plot(
                mean.flops,
                mean.quality,
                linestyle="",
                marker="o",
                color=colour,
                markerfacecolor=face,
                label=label if index == 0 else None,
            )
    axes.plot(
        [m.flops for m in curve.others],
        [m.quality for m in curve.others],
        linestyle="",
        marker="x",
        color=colour,
        alpha=0.4,
    )
    for law, fit in curve.fits.items():
        axes.plot(
            compute,
            fit.law(compute),
            _STYLES[law],
            color=colour,
            linewidth=1.2,
            label=f"{curve.family}: {law}",
        )
    low, high = curve.fits[_BAND].band(compute)
    if np.isfinite(low).all():
        # Far outside of the points a band of few sizes has no bounds that a plot could show.
        values = np.array([m.quality for m in everything])
        margin = 0.5 * (values.max() - values.min())
        bounds = values.min() - margin, values.max() + margin
        axes.fill_between(
            compute, np.clip(low, *bounds), np.clip(high, *bounds), color=colour, alpha=0.12
        )


def _draw_residuals(study: ScalingConfig, analysis: Analysis, path: Path) -> Path:
    laws = (LOG_LAW, POWER_LAW)
    figure, panels = plt.subplots(
        1, len(laws), figsize=(4.6 * len(laws), 3.2), sharey=True, layout="constrained"
    )
    for panel, law in zip(panels, laws, strict=True):
        for number, curve in enumerate(analysis.curves):
            panel.errorbar(
                [m.flops for m in curve.fitted],
                curve.fits[law].residuals,
                yerr=[0.0 if np.isnan(m.spread) else m.spread for m in curve.fitted],
                linestyle="",
                marker="o",
                capsize=2,
                color=f"C{number % 10}",
                label=curve.family,
            )
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_xscale("log")
        panel.set_title(law)
        panel.set_xlabel("training compute, FLOPs of the encoder")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"{study.metric}: measured less fitted\n(bars: spread of seeds)")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _draw_budgets(study: ScalingConfig, analysis: Analysis, path: Path) -> Path:
    count = len(analysis.curves)
    figure, panels = plt.subplots(
        1, count, figsize=(6.4 * count, 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, curve in zip(panels[0], analysis.curves, strict=True):
        best = (*curve.fitted, *curve.held_out)
        everything = (*best, *curve.others)
        for number, budget in enumerate(sorted({m.budget for m in everything})):
            colour = plt.get_cmap("viridis")(number / max(1, len(best) - 1) * 0.9)
            line = sorted(
                (m for m in everything if m.budget == budget), key=lambda m: m.points[0].parameters
            )
            panel.plot(
                [m.points[0].parameters for m in line],
                [m.quality for m in line],
                marker=".",
                linestyle="--" if line[0].held_out else "-",
                color=colour,
                label=f"{budget:.3g} FLOPs" + (", held out" if line[0].held_out else ""),
            )
        panel.plot(
            [m.points[0].parameters for m in best],
            [m.quality for m in best],
            linestyle="",
            marker="o",
            markerfacecolor="none",
            color="black",
            label="best at its compute",
        )
        panel.set_xscale("log")
        panel.set_title(curve.family)
        panel.set_xlabel("dense parameters")
        panel.grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel(study.metric)
    handles = panels[0][-1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
