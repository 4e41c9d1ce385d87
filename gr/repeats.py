"""Rows of results that were run again: does a fresh clone give what is recorded?"""

from collections.abc import Sequence

from gr.report import markdown_table
from gr.results import METRICS, PageConfig, Record, StudyConfig
from gr.runs import mean_interval, metric_name
from gr.studies import TRAINING, StudyRecord, metric_title

AGAIN = "again"
"""Folder of the records of repeated runs, beside those that they are held against."""
_SHOWN = 3


def repeat_section(
    page: PageConfig,
    recorded: Sequence[Record | StudyRecord],
    again: Sequence[Record | StudyRecord],
) -> list[str]:
    """Return the part of the page on repeated runs, in Markdown; empty if there are none.

    A repeated run agrees if it differs from the recorded one of its seed by no more than half of
    the 95 % interval over the seeds of its row.

    Args:
        page: what stands where.
        recorded: of any rows.
        again: of rows and seeds that are recorded.

    Raises:
        ValueError: if a repeated run has no recorded one of its row and seed, or its row has fewer
            than two seeds.
    """
    part_of = {row: part for part in page.parts.values() for row in part.rows}
    lines = []
    for repeat in again:
        rows = {r.seed: r for r in recorded if r.row == repeat.row}
        if repeat.seed not in rows or len(rows) < 2:
            raise ValueError(
                f"{repeat.row}, seed {repeat.seed}, was run again, but records of this row are of "
                f"seeds {sorted(rows)}: one of the same seed and a second seed are needed"
            )
        part = part_of[repeat.row]
        metrics = (
            [m for m in part.metrics if m not in TRAINING]
            if isinstance(part, StudyConfig)
            else ["ndcg@10", *(m for m in METRICS if m != "ndcg@10")]
        )
        values = {seed: _values(record, part) for seed, record in rows.items()}
        new = _values(repeat, part)
        for metric in [m for m in metrics if new.get(m) is not None][:_SHOWN]:
            seeds = [x for v in values.values() if (x := v.get(metric)) is not None]
            then = values[repeat.seed].get(metric)
            interval = mean_interval(seeds)
            if then is None or interval is None or interval[2] < 2:
                continue
            value = new[metric]
            assert value is not None
            name = metric_title(metric) if isinstance(part, StudyConfig) else metric_name(metric)
            lines.append(
                [
                    part.rows[repeat.row].title,
                    str(repeat.seed),
                    f"{rows[repeat.seed].commit[:12]}, {repeat.commit[:12]}{repeat.commit[40:]}",
                    name,
                    f"{then:.6f}",
                    f"{value:.6f}",
                    f"{interval[1]:.4f}",
                    "agrees" if abs(value - then) <= interval[1] else "DIFFERS",
                ]
            )
    if not lines:
        return []
    head = ["row", "seed", "commits", "", "recorded", "again", "half interval of the row", ""]
    return [
        "## Run again on a fresh clone\n",
        "The command that this page gives for the row, in a fresh copy of a later commit, beside "
        "the recorded run of the same seed. It agrees if it is no farther off than half of the "
        "95 % interval over the seeds of its row.\n",
        markdown_table(head, lines) + "\n",
    ]


def _values(record: Record | StudyRecord, part: object) -> dict[str, float | None]:
    if isinstance(record, StudyRecord):
        assert isinstance(part, StudyConfig)
        return record.metrics(part.window)
    return dict(record.test)
