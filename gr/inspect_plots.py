"""Plots of `gr inspect`."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

from pipelines.inspection import SECONDS_PER_DAY, LogStatistics, gap_edges
from pipelines.manifest import Manifest

_TIMES = {
    **{"1 s": 1, "10 s": 10, "1 min": 60, "10 min": 600, "1 h": 3600, "6 h": 21_600},
    **{"1 d": 86_400, "7 d": 604_800, "30 d": 2_592_000, "1 y": 31_536_000},
}


def draw_log(
    found: LogStatistics,
    tokens: Mapping[float, tuple[Any, Any]],
    manifest: Manifest,
    folder: Path,
) -> list[Path]:
    """Draw lengths, times and action rates.

    Args:
        found: statistics of the log.
        tokens: alpha of stochastic length (0: without) -> (expected tokens, sessions with them).
        manifest: of the log.
        folder: where the PNG files go.

    Returns:
        The files.
    """
    plots = [_lengths(found, tokens, folder / "lengths.png")]
    plots.append(_times(found, manifest, folder / "times.png"))
    if found.actions and any(a.known for a in found.actions.values()):
        plots.append(_actions(found, folder / "actions.png"))
    return plots


def _lengths(found: LogStatistics, tokens: Mapping[float, tuple[Any, Any]], path: Path) -> Path:
    figure, panels = plt.subplots(1, 3, figsize=(13.5, 3.6), layout="constrained")
    for panel, name, counts in (
        (panels[0], "session", found.session_lengths),
        (panels[1], "user, history included", found.user_lengths),
    ):
        _histogram(panel, np.array(list(counts)), np.array(list(counts.values())))
        panel.set_xlabel(f"events of a {name}")
        panel.set_ylabel("sessions" if name == "session" else "users")
    for colour, (alpha, (values, weights)) in enumerate(tokens.items()):
        order = np.argsort(values)
        share = 1 - np.cumsum(weights[order]) / max(weights.sum(), 1)
        label = f"alpha {alpha}" if alpha else "whole"
        panels[2].step(values[order], share, where="post", color=f"C{colour}", label=label)
    panels[2].set_xscale("log")
    panels[2].set_xlabel("tokens of an example (expected)")
    panels[2].set_ylabel("share of examples longer than that")
    panels[2].legend(title="stochastic length", frameon=False)
    return _save(figure, panels, path)


def _times(found: LogStatistics, manifest: Manifest, path: Path) -> Path:
    figure, panels = plt.subplots(1, 3, figsize=(13.5, 3.6), layout="constrained")
    edges = gap_edges()
    for panel, name, counts in (
        (panels[0], "between events of a session", found.event_gaps),
        (panels[1], "between sessions of a user", found.session_gaps),
    ):
        # Bin 0, less than a second, stands one bin to the left of the others.
        left = np.concatenate([[edges[1] ** 0 / 2**0.5], edges[1:]])
        right = np.append(left[1:], left[-1] * 2**0.5)
        panel.bar(left, counts, width=right - left, align="edge", color="C0")
        panel.set_xscale("log")
        used = np.flatnonzero(counts)
        low, high = (used[0], used[-1]) if len(used) else (0, 1)
        panel.set_xlim(left[low] * 0.9, right[high] * 1.1)
        ticks = {k: v for k, v in _TIMES.items() if left[low] <= v <= right[high]}
        panel.set_xticks(list(ticks.values()), list(ticks))
        panel.minorticks_off()
        panel.set_xlabel(f"gap {name} (first bar: below 1 s)" if counts[0] else f"gap {name}")
        panel.set_ylabel("gaps")
    days = sorted(found.events_by_day)
    dates = [datetime.fromtimestamp(day * SECONDS_PER_DAY, UTC) for day in days]
    panels[2].bar(dates, [found.events_by_day[day] for day in days], color="C0")
    locator = AutoDateLocator(maxticks=7)
    panels[2].xaxis.set_major_locator(locator)
    panels[2].xaxis.set_major_formatter(ConciseDateFormatter(locator))
    panels[2].set_xlabel(f"day ({manifest.timezone})")
    panels[2].set_ylabel("events")
    return _save(figure, panels, path)


def _actions(found: LogStatistics, path: Path) -> Path:
    known = {name: a for name, a in found.actions.items() if a.known}
    height = 1.2 + 0.32 * len(known)
    figure, panel = plt.subplots(figsize=(6.5, height), layout="constrained")
    rates = [a.positive / a.known for a in known.values()]
    bars = panel.barh(list(known), rates, color="C0")
    panel.bar_label(bars, [f"{rate:.2%}" for rate in rates], padding=3)
    panel.invert_yaxis()
    panel.set_xlim(0, max(1e-9, max(rates)) * 1.18)
    panel.set_xlabel("share of the events that know it, above 0")
    return _save(figure, [panel], path)


def _histogram(panel: Any, values: Any, weights: Any) -> None:
    """Draw counts of whole numbers: a bar each if few, else bins of equal ratio."""
    if not len(values):
        return
    most = int(values.max())
    if most <= 60:
        panel.bar(values, weights, width=0.9, color="C0")
    else:
        edges = np.unique(np.geomspace(max(1, values.min()), most + 1, 41).astype(np.int64))
        counts, _ = np.histogram(values, edges, weights=weights)
        panel.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color="C0")
        panel.set_xscale("log")
    if weights.max() > 100 * max(1, weights.min()):
        panel.set_yscale("log")


def _save(figure: Any, panels: Any, path: Path) -> Path:
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
