"""What runs achieved, side by side: tables, CSV and plots from their run directories."""

import csv
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gr.atomic import write_atomically
from gr.plots import draw_all
from gr.runs import ALL, Group, Run, group_runs, metric_name, read_run, table_metrics, windows_of

MOST_WINDOWS = 60
"""Of a table."""


def report(runs: Sequence[str | Path], output: str | Path | None = None) -> str:
    """Compare runs and write report.md, report.csv, summary.csv and plots.

    Args:
        runs: run directories, or LABEL=DIRECTORY to name the group that a run belongs to.
        output: folder of the files; None means the first run's.

    Returns:
        The tables, in Markdown.

    Raises:
        ValueError: if a directory is no run, or runs of one label differ in more than the seed.
    """
    read = [read_run(run) for run in runs]
    groups = group_runs(read)
    folder = Path(output) if output is not None else read[0].path
    folder.mkdir(parents=True, exist_ok=True)
    runs_text = "\n".join(_describe(group) for group in groups)
    overall, by_window = _overall(groups), "\n\n".join(_by_window(groups))
    plots = draw_all(groups, folder)
    images = "".join(f"\n![{path.stem}]({path.name})\n" for path in plots)
    write_atomically(
        folder / "report.md", f"# Report\n\n{runs_text}\n\n{overall}\n\n{by_window}\n{images}"
    )
    _write_csv(
        folder / "report.csv",
        ["label", "run", "seed", "window", "metric", "value"],
        _rows(read, groups),
    )
    _write_csv(
        folder / "summary.csv",
        ["label", "window", "metric", "mean", "half_width_95", "runs"],
        _summary_rows(groups),
    )
    files = ["report.md", "report.csv", "summary.csv", *(path.name for path in plots)]
    # On a screen, what is read first stands last.
    return f"{by_window}\n\n{overall}\n\n{runs_text}\n\nWritten to {folder}: {', '.join(files)}"


def _overall(groups: Sequence[Group]) -> str:
    titles = [f"{g.label} ({len(g.runs)} seeds)" if len(g.runs) > 1 else g.label for g in groups]
    rows = [
        [name, metric_name(metric), *(_cell(g.interval(ALL, metric)) for g in groups)]
        for name, metrics in table_metrics(groups).items()
        for metric in metrics
    ]
    return "## Overall\n\n" + markdown_table(["task", "metric", *titles], rows)


def _by_window(groups: Sequence[Group]) -> Iterable[str]:
    windows = windows_of(groups)
    if len(windows) > MOST_WINDOWS:
        windows = []  # many epochs: the plots show them, report.csv holds them
    for name, metrics in table_metrics(groups).items() if windows else ():
        head = [f"{metric_name(m)} {g.label}" for m in metrics for g in groups]
        rows = [
            [w, *(_cell(g.interval(w, m), short=True) for m in metrics for g in groups)]
            for w in windows
        ]
        yield f"## {name} by window\n\n" + markdown_table(["window", *head], rows)


def _describe(group: Group) -> str:
    parts = []
    for run in group.runs:
        commit = run.path / "commit.txt"
        revision = commit.read_text().split("\n", 1)[0] if commit.exists() else "unknown"
        revision = revision[:12] if " " not in revision else "unknown"  # "none: why"
        last = run.steps[-1] if run.steps else {}
        speeds = [s["perf/examples_per_s"] for s in run.steps if s.get("perf/examples_per_s")]
        speed = f", {statistics.median(speeds):,.0f} examples/s (median)" if speeds else ""
        state = "" if ALL in run.windows else ", NOT FINISHED: no overall row"
        parts.append(
            f"{run.path} (seed {run.config.get('seed')}, commit {revision}, "
            f"{last.get('step', 0):,} steps{speed}{state})"
        )
    return f"- {group.label}: " + "; ".join(parts)


def _cell(found: tuple[float, float, int] | None, *, short: bool = False) -> str:
    if found is None:
        return "-"
    mean, half_width, n = found
    return f"{mean:.4f}" if n == 1 or short else f"{mean:.4f} +/- {half_width:.4f}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned in plain text too."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def _rows(runs: Sequence[Run], groups: Sequence[Group]) -> Iterable[list[Any]]:
    label_of = {run.path: group.label for group in groups for run in group.runs}
    for run in runs:
        for window, row in run.windows.items():
            for metric, value in row.items():
                if metric not in ("window", "step"):
                    seed = run.config.get("seed")
                    yield [label_of[run.path], str(run.path), seed, window, metric, value]


def _summary_rows(groups: Sequence[Group]) -> Iterable[list[Any]]:
    for group in groups:
        for window in (*windows_of([group]), ALL):
            metrics = {m: None for run in group.runs for m in run.windows.get(window, {})}
            for metric in metrics:
                if metric in ("window", "step"):
                    continue
                found = group.interval(window, metric)
                if found is not None:
                    mean, half_width, n = found
                    yield [group.label, window, metric, mean, "" if n == 1 else half_width, n]


def _write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)
