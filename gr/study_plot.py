"""The differences between the rows of a study, with their intervals, as a plot."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from gr.paired import compare
from gr.results import StudyConfig
from gr.studies import TRAINING, StudyRecord, lower_is_better, metric_title, metric_values

_PANELS = 3


def draw_study(study: StudyConfig, records: Sequence[StudyRecord], path: Path) -> bool:
    """Draw each row's difference from the last baseline, a panel a metric; return whether it did.

    Rows that share fewer than two seeds with the baseline have no interval and are left out;
    without two of them there is nothing to see. A metric that is the same in all runs gets no
    panel.

    Args:
        study: its rows, in order; the first metrics are drawn.
        records: of any rows.
        path: PNG file.
    """
    if not study.baselines:
        return False
    baseline = study.baselines[-1]
    groups = {name: [r for r in records if r.row == name] for name in study.rows}
    columns = {
        metric: compare(metric_values(study, groups, metric), baseline)
        for metric in study.metrics
        if metric not in TRAINING
    }
    columns = {m: c for m, c in columns.items() if any(d.half > 0 for d, _ in c.values())}
    columns = dict(list(columns.items())[:_PANELS])
    rows = [name for name in study.rows if any(name in column for column in columns.values())]
    if len(rows) < 2:
        return False
    figure, panels = plt.subplots(
        1,
        len(columns),
        figsize=(3.2 + 2.6 * len(columns), 1.3 + 0.27 * len(rows)),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, (metric, column) in zip(panels[0], columns.items(), strict=True):
        for place, name in enumerate(rows):
            if name not in column:
                continue
            difference, p = column[name]
            half = 0.0 if math.isnan(difference.half) else difference.half
            filled = "full" if p < 0.05 else "none"
            axes.errorbar(
                difference.mean, place, xerr=half, fmt="o", fillstyle=filled, color="C0", capsize=2
            )
        axes.axvline(0, color="0.5", linewidth=0.8)
        better = "left" if lower_is_better(metric) else "right"
        axes.set_title(f"{metric_title(metric)}\n(better: {better})", fontsize="medium")
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.tick_params(axis="x", labelsize="small", rotation=30)
        axes.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(range(len(rows)), [study.rows[name].title for name in rows])
    panels[0][0].set_ylim(len(rows) - 0.5, -0.5)
    title = study.rows[baseline].title
    figure.supxlabel(
        f"difference from {title}, 95 % interval; filled: p < 0.05 after Holm", fontsize="medium"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
