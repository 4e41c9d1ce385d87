"""Plots of a report: PNG files that can go into a paper."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, MaxNLocator

from gr.runs import Group, Run, metric_name, table_metrics, windows_of

_MARKERS = "os^Dv<>Ph*"
_POINTS = 60
"""Points of a smoothed curve."""


def draw_all(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Draw every plot that the runs have numbers for.

    Args:
        groups: what to compare, a line each.
        folder: where the PNG files go.

    Returns:
        The files.
    """
    metrics = [m for section in table_metrics(groups).values() for m in section]
    losses = _keys(groups, "train/loss")
    speeds = _keys(groups, "perf/examples_per_s") + _keys(groups, "perf/tokens_per_s")
    drawn = [
        _by_window(groups, [m for m in metrics if m.startswith("ne-")], folder / "ne_by_day.png"),
        _by_window(groups, [m for m in metrics if "-" not in m], folder / "retrieval_by_day.png"),
        _by_step(groups, losses, folder / "loss.png"),
        _by_step(groups, speeds, folder / "throughput.png", from_zero=True),
    ]
    return [path for path in drawn if path is not None]


def _keys(groups: Sequence[Group], prefix: str) -> list[str]:
    rows = (row for g in groups for run in g.runs for row in run.steps[-1:])
    found = {k: None for row in rows for k in row if k == prefix or k.startswith(f"{prefix}/")}
    return list(found)


def _step_label(groups: Sequence[Group], key: str) -> str:
    """Return what a column of metrics.jsonl is, with its unit."""
    if key.startswith("perf/"):
        return "examples / s" if "examples" in key else "tokens / s"
    name = key.removeprefix("train/loss").strip("/")
    if not name:
        return "training loss, weighted sum"
    kinds = {g.runs[0].config.get(f"data.tasks.{name}.type") for g in groups}
    unit = "squared error" if "regression" in kinds else "nats"
    return f"training loss, {name} ({unit})"


def _panels(count: int) -> tuple[Any, list[Any]]:
    columns = count if count <= 3 else 2 if count == 4 else 3
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.4 * rows), squeeze=False, layout="constrained"
    )
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.set_visible(False)
    return figure, flat[:count]


def _finish(figure: Any, panels: list[Any], path: Path) -> Path:
    lines: dict[str, Any] = {}
    for panel in panels:
        panel.grid(alpha=0.3)
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, handle)
    figure.legend(
        lines.values(),
        lines.keys(),
        loc="outside lower center",
        ncols=min(4, len(lines)),
        frameon=False,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _by_window(groups: Sequence[Group], metrics: Sequence[str], path: Path) -> Path | None:
    """Draw one panel a metric, its value in each window, with 95 % intervals over seeds."""
    windows = windows_of(groups)
    if not metrics or not windows:
        return None
    figure, panels = _panels(len(metrics))
    for panel, metric in zip(panels, metrics, strict=True):
        has_bars = False
        for index, group in enumerate(groups):
            found = [group.interval(window, metric) for window in windows]
            y = [math.nan if f is None else f[0] for f in found]
            if all(math.isnan(value) for value in y):
                continue
            width = [0.0 if f is None or math.isnan(f[1]) else f[1] for f in found]
            has_bars = has_bars or any(width)
            # Side by side, so that bars do not hide each other.
            spread = 0.5 if any(len(g.runs) > 1 for g in groups) else 0.0
            shift = spread * (index - (len(groups) - 1) / 2) / len(groups)
            panel.errorbar(
                [position + shift for position in range(len(windows))],
                y,
                yerr=width if any(width) else None,
                label=group.label,
                color=f"C{index % 10}",
                marker=_MARKERS[index % 10],
                markersize=4,
                linewidth=1.2,
                elinewidth=0.8,
                capsize=2,
            )
        every = math.ceil(len(windows) / 8)
        shown = range(0, len(windows), every)
        panel.set_xticks(shown, [_short_window(windows[i]) for i in shown])
        bars = " (bars: 95 % over seeds)" if has_bars else ""
        panel.set_xlabel(f"{windows[0]} to {windows[-1]}{bars}")
        _, _, task = metric.partition("-")
        better = "lower is better" if metric.startswith("ne") else "higher is better"
        panel.set_ylabel(f"{metric_name(metric)} ({better})")
        panel.set_title(task or "retrieval, full catalogue")
    return _finish(figure, panels, path)


def _short_window(window: str) -> str:
    """Return 04-25 for 2022-04-25: the year is in the label of the axis."""
    return window[5:] if len(window) >= 10 and window[4] == "-" else window


def _by_step(
    groups: Sequence[Group], keys: Sequence[str], path: Path, *, from_zero: bool = False
) -> Path | None:
    """Draw one panel a key of metrics.jsonl over the examples trained on: means over seeds.

    Faint lines are what was logged.
    """
    if not keys:
        return None
    figure, panels = _panels(len(keys))
    for panel, key in zip(panels, keys, strict=True):
        for index, group in enumerate(groups):
            series = [found for run in group.runs if (found := _series(run, key))[0]]
            if not series:
                continue
            colour = f"C{index % 10}"
            for x, y in series:
                panel.plot(x, y, color=colour, alpha=0.15, linewidth=0.5)
            x, y = _mean_curve([_smoothed(*each) for each in series])
            marker = "." if len(x) < 3 else ""  # a line of one point is not seen
            panel.plot(x, y, color=colour, linewidth=1.4, marker=marker, label=group.label)
        panel.set_xlabel("examples trained on")
        panel.set_ylabel(_step_label(groups, key))
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        if from_zero:
            panel.set_ylim(bottom=0)
    return _finish(figure, panels, path)


def _mean_curve(
    curves: Sequence[tuple[list[float], list[float]]],
) -> tuple[list[float], list[float]]:
    """Return the mean over seeds, as far as all of them have come."""
    length = min(len(x) for x, _ in curves)
    xs, ys = ([curve[part][:length] for curve in curves] for part in (0, 1))
    return [statistics.fmean(p) for p in zip(*xs, strict=True)], [
        statistics.fmean(p) for p in zip(*ys, strict=True)
    ]


def _series(run: Run, key: str) -> tuple[list[float], list[float]]:
    rows = [row for row in run.steps if row.get(key) is not None]
    return [float(row.get("examples", row["step"])) for row in rows], [float(r[key]) for r in rows]


def _smoothed(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """Return means over stretches of equally many rows."""
    size = max(1, len(x) // _POINTS)
    parts = [slice(i, i + size) for i in range(0, len(x), size)]
    return [statistics.fmean(x[p]) for p in parts], [statistics.fmean(y[p]) for p in parts]
