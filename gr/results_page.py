"""The page of published comparisons: tables and plots, made of records alone."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from gr.atomic import write_atomically
from gr.paired import compare
from gr.repeats import repeat_section
from gr.report import markdown_table
from gr.results import METRICS, PageConfig, Record, RowConfig, TableConfig
from gr.runs import metric_name
from gr.studies import (
    DIFFERENCES,
    StudyRecord,
    difference_cell,
    interval_cell,
    study_section,
    sure_rows,
)
from gr.study_plot import draw_study

TARGETS = ("hr@10", "ndcg@10")
"""Metrics that a target is about."""


def write_page(
    page: PageConfig,
    records: Sequence[Record],
    output: Path,
    *,
    command: str,
    studies: Sequence[StudyRecord] = (),
    repeats: "Sequence[Record | StudyRecord]" = (),
) -> list[Path]:
    """Write the page and its plots.

    Args:
        page: what stands where.
        records: of any rows of it; a row without one is left out.
        output: Markdown file; plots go into the folder of its name without suffix.
        command: what adds RUNS to the page, to be told to its readers.
        studies: records of its studies.
        repeats: records of rows that were run again.

    Returns:
        The files.

    Raises:
        ValueError: if a record belongs to no row of the page, or a repeated run has none to be held
            against.
    """
    rows = {name for part in page.parts.values() for name in part.rows}
    everything: list[Record | StudyRecord] = [*records, *studies, *repeats]
    unknown = sorted({record.file_name for record in everything if record.row not in rows})
    if unknown:
        raise ValueError(
            f"record(s) {unknown} belong to no row of the page, which has {sorted(rows)}: remove "
            "them, or add the row"
        )
    folder, files = output.with_suffix(""), [output]
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# {page.title}\n", f"This page is made by `{command}`, of the records beside it.\n"]
    parts += [f"{page.text.strip()}\n"] if page.text else []
    empty: list[str] = []
    by_table = {name: _groups(table, records) for name, table in page.tables.items()}
    parts += _at_a_glance(page, by_table)
    for name, table in page.tables.items():
        groups = by_table[name]
        if not groups:
            empty.append(table.title)
            continue
        plot = folder / f"{name}.png"
        _draw(page, table, groups, plot)
        files.append(plot)
        parts += _section(page, table, groups, f"{folder.name}/{plot.name}", command)
    for name, study in page.studies.items():
        plot = folder / f"{name}.png"
        drawn = draw_study(study, studies, plot)
        files += [plot] if drawn else []
        seen = f"{folder.name}/{plot.name}" if drawn else ""
        section = study_section(study, studies, command, seen)
        parts += section
        if not section:
            empty.append(study.title)
    parts += repeat_section(page, [*records, *studies], repeats)
    if empty:
        parts.append(f"## Not run yet\n\n{'; '.join(empty)}.\n")
    write_atomically(output, "\n".join(parts))
    return files


def _groups(table: TableConfig, records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return row -> its records, in the order of the table."""
    return {row: found for row in table.rows if (found := [r for r in records if r.row == row])}


def _at_a_glance(page: PageConfig, by_table: dict[str, dict[str, list[Record]]]) -> list[str]:
    """Return one metric of all tables, models as columns: those that stand in several tables."""
    tables = {name: page.tables[name] for name, groups in by_table.items() if groups}
    everywhere = [tables[n].rows[row].title for n in tables for row in by_table[n]]
    models = [title for title in dict.fromkeys(everywhere) if everywhere.count(title) > 1]
    if len(tables) < 2 or not models:
        return []
    lines = []
    for name, table in tables.items():
        cells = dict.fromkeys(models, "-")
        values = {
            row: {r.seed: r.test[page.choose_by] for r in found}
            for row, found in by_table[name].items()
        }
        compared = compare(values, table.baselines[0]) if table.baselines else {}
        for row, found in values.items():
            star = " *" if row in compared and compared[row][1] < 0.05 else ""
            cells[table.rows[row].title] = interval_cell([*found.values()]) + star
        lines.append([table.title, *(cells[model] for model in models)])
    by = metric_name(page.choose_by)
    return [
        f"## {by} of all tables\n",
        "Mean and 95 % interval over seeds; * where the difference from the first model, seed by "
        "seed, has p < 0.05 after Holm's correction for the rows of its table.\n",
        markdown_table(["data", *models], lines) + "\n",
    ]


def _section(
    page: PageConfig,
    table: TableConfig,
    groups: dict[str, list[Record]],
    plot: str,
    command: str,
) -> list[str]:
    by = metric_name(page.choose_by)
    parts = [f"## {table.title}\n"]
    parts += [f"{table.note.strip()}\n"] if table.note else []
    # Not where an epoch has passed unscored at first.
    one_epoch = any(r.epochs[0] == 1 for records in groups.values() for r in records)
    head = ["model", *(metric_name(m) for m in METRICS)]
    head += [f"{by} after one epoch"] if one_epoch else []
    lines = []
    for row, records in groups.items():
        epochs = ", ".join(str(r.epoch) for r in records)
        cells = [interval_cell([r.test[m] for r in records]) for m in METRICS]
        if one_epoch:
            once = [r.test_curve[0] for r in records if r.epochs[0] == 1]
            cells.append(interval_cell(once) if once else "-")
        lines.append([table.rows[row].title, *cells, epochs, str(len(records))])
        lines += _published(table.rows[row], len(cells))
    parts.append(
        f"Epoch chosen by {by} of the validation events, which the model then learns too, in a run "
        "of its own: its score on the test events after that epoch, mean and 95 % interval over "
        f"seeds.{f' Published figures: {table.source}.' if table.source else ''}\n"
    )
    parts.append(markdown_table([*head, "epochs", "seeds"], lines) + "\n")
    lacking = [row.title for name, row in table.rows.items() if name not in groups]
    if lacking:
        parts.append(f"Not run yet: {', '.join(lacking)}.\n")
    parts += _targets(table, groups)
    for baseline in table.baselines:
        parts += _comparison(page, table, groups, baseline)
    head = ["model", *(metric_name(m) for m in METRICS), "epochs"]
    lines = []
    for row, records in groups.items():
        cells = [interval_cell([r.best_test[m] for r in records]) for m in METRICS]
        epochs = ", ".join(str(r.best_test_epoch) for r in records)
        lines.append([table.rows[row].title, *cells, epochs])
    parts.append(
        f"For comparison with tables that report the epoch that is best on the test events (by "
        f"{by}), which looks at them {len(next(iter(groups.values()))[0].epochs)} times:\n"
    )
    parts.append(markdown_table(head, lines) + "\n")
    parts.append(f"![{table.title}: {by} after each epoch]({plot})\n")
    parts.append(_origins(table, groups, command))
    return parts


def _published(row: RowConfig, num_cells: int) -> list[list[str]]:
    if not row.published:
        return []
    cells = [f"{row.published[m]:.4f}" if m in row.published else "-" for m in METRICS]
    cells += ["-"] * (num_cells - len(cells))
    return [[f"- {row.title}, published", *cells, "", "1"]]


def _targets(table: TableConfig, groups: dict[str, list[Record]]) -> list[str]:
    lines = []
    for name, records in groups.items():
        row = table.rows[name]
        means = {metric: float(np.mean([r.test[metric] for r in records])) for metric in TARGETS}
        if row.within:
            changes = [means[metric] / row.published[metric] - 1 for metric in TARGETS]
            verdict = "met" if min(changes) >= -row.within else "MISSED"
            cells = [f"{change:+.2%}" for change in changes]
            lines.append([row.title, *cells, f"at most {row.within:.0%} below", verdict])
        if row.aims:
            verdict = "met" if all(means[m] >= aim for m, aim in row.aims.items()) else "MISSED"
            cells = [f"{means[m]:.4f}" for m in TARGETS]
            wanted = ", ".join(f"{metric_name(m)} {aim:.3f}" for m, aim in row.aims.items())
            lines.append([row.title, *cells, wanted, verdict])
    if not lines:
        return []
    head = ["model", *(f"{metric_name(m)} against published" for m in TARGETS), "target", ""]
    return [markdown_table(head, lines) + "\n"]


def _comparison(
    page: PageConfig, table: TableConfig, groups: dict[str, list[Record]], baseline: str
) -> list[str]:
    """Return the paired differences from a baseline; a seed is a pair."""
    columns = {}
    for metric in METRICS:
        values = {name: {r.seed: r.test[metric] for r in rs} for name, rs in groups.items()}
        columns[metric] = compare(values, baseline)
    first = columns[page.choose_by]
    if not first:
        return []
    lines = [
        [table.rows[name].title, *(difference_cell(*c[name]) for c in columns.values())]
        for name in first
    ]
    title = table.rows[baseline].title
    verdict = sure_rows(table.rows, first, page.choose_by)
    return [
        f"Difference from {title} at the same seed, {DIFFERENCES}:\n",
        markdown_table(["model", *(metric_name(m) for m in METRICS)], lines) + "\n",
        f"By {metric_name(page.choose_by)}, against {title}: {verdict}.\n",
    ]


def _origins(table: TableConfig, groups: dict[str, list[Record]], command: str) -> str:
    """Return where each row comes from, and the command that repeats it."""
    lines = []
    for name, records in groups.items():
        seconds = [s for r in records for s in r.seconds.values()]
        lines.append(
            f"- {table.rows[name].title}: `gr train {table.rows[name].config} seed=SEED "
            "data.leave_one_out.hold_out=test run_dir=RUN` and the same with `=validation` into "
            f"another RUN, then `{command.replace('RUNS', f'{name}=RUN {name}=RUN')}`; seeds "
            f"{', '.join(str(r.seed) for r in records)}; {_all(r.device for r in records)}, "
            f"{min(seconds):.0f} to {max(seconds):.0f} s a run beside whatever else ran; commit "
            f"{_all(r.commit[:12] + r.commit[40:] for r in records)}; sequences "
            f"{_all(r.log[:16] for r in records)}"
        )
    return "\n".join(lines) + "\n"


def _all(values) -> str:  # type: ignore[no-untyped-def]
    return ", ".join(dict.fromkeys(values))


def _draw(
    page: PageConfig, table: TableConfig, groups: dict[str, list[Record]], path: Path
) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, records in groups.items():
        epochs = records[0].epochs
        # Runs of one row may have been scored at other epochs: those that all have are averaged.
        shared = sorted(set(epochs).intersection(*(r.epochs for r in records)))
        for held_out, style in (("test", "-"), ("validation", ":")):
            curves = [
                [getattr(r, f"{held_out}_curve")[r.epochs.index(e)] for e in shared]
                for r in records
            ]
            label = table.rows[name].title if held_out == "test" else None
            color = None if label else axes.lines[-1].get_color()
            axes.plot(shared, np.mean(curves, 0), style, label=label, color=color)
    axes.set_xlabel("epochs")
    axes.set_ylabel(f"{metric_name(page.choose_by)}, mean over seeds")
    axes.set_title(
        f"{table.title}\nline: test events, dotted: validation events", fontsize="medium"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
