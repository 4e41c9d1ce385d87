"""Questions that runs of one pass answer: small records, their tables, and what surely differs."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from embeddings.config import EmbeddingsConfig, TableConfig
from gr.config import TrainConfig
from gr.paired import Difference, compare
from gr.report import markdown_table
from gr.results import FREE, PageConfig, RowConfig, StudyConfig, by_row, run_commit, run_facts
from gr.runlog import flatten
from gr.runs import ALL, Run, mean_interval
from pipelines.config import ActionConfig, DataConfig, FeatureConfig, TaskConfig

STUDIES = "studies"
"""Folder of their records, beside those of the tables."""
DIFFERENCES = (
    "mean and 95 % interval (paired t); * where p < 0.05 after Holm's correction for the rows"
)
LOWER_IS_BETTER = ("ne", "logloss", "mae", "rmse", "mse", "log_pplx")
LAST = ":last"
"""After the name of a metric: of the latest window, whatever window the study is about."""
TRAINING = {"train/tokens": "tokens", "train/flops": "flops"}
"""Metrics of a study that are sums over the training -> their name in metrics.jsonl."""
_SCHEMAS = {
    "": TrainConfig,
    "data.": DataConfig,
    "data.actions.*.": ActionConfig,
    "data.context_features.*.": FeatureConfig,
    "data.item_features.*.": FeatureConfig,
    "data.tasks.*.": TaskConfig,
    "embeddings.": EmbeddingsConfig,
    "embeddings.tables.*.": TableConfig,
}
_NAMES = {"train/tokens": "tokens, M", "train/flops": "encoder, PFLOP"}
_SCALES = {"train/tokens": 1e-6, "train/flops": 1e-15}


@dataclass(frozen=True, slots=True)
class StudyRecord:
    """A row of a study at one seed."""

    row: str
    seed: int
    all: dict[str, float | None]
    """The study's metrics of the whole pass, and sums over the training."""
    last: dict[str, float | None]
    """The same of the latest window."""
    config: dict[str, Any]
    """What the run did not leave at its default: dotted key -> value."""
    log: str
    """Start of the SHA-256 of its fingerprint."""
    commit: str
    device: str
    seconds: float
    """Wall time of training and scoring."""

    def metrics(self, window: str) -> dict[str, float | None]:
        """Return those of a window, all or last, and NAME:last of the latest in any case."""
        latest = {f"{name}{LAST}": value for name, value in self.last.items()}
        return (self.last if window == "last" else self.all) | latest

    @property
    def file_name(self) -> str:
        """Name of the record's file."""
        return f"{self.row}_seed{self.seed}.json"


def make_study_records(page: PageConfig, runs: Sequence[str | Path]) -> list[StudyRecord]:
    """Return the records of those run directories that belong to a row of a study.

    Raises:
        ValueError: if a directory is no finished run of a row of the page, or two are of one row
            and seed.
    """
    study_of = {name: study for study in page.studies.values() for name in study.rows}
    found: dict[tuple[str, int], StudyRecord] = {}
    for row, run in by_row(page, runs):
        if row not in study_of:
            continue
        record = _record(row, run, study_of[row].metrics)
        if (row, record.seed) in found:
            raise ValueError(f"{run.path} is the second run of {row}, seed {record.seed}: name one")
        found[row, record.seed] = record
    return [record for _, record in sorted(found.items())]


def _record(row: str, run: Run, metrics: Sequence[str]) -> StudyRecord:
    if ALL not in run.windows:
        raise ValueError(
            f"{run.path} is not finished: go on with it (resume=true), or leave it out"
        )
    metrics = [metric.removesuffix(LAST) for metric in metrics]
    sums = {k: run.steps[-1].get(c) if run.steps else None for k, c in TRAINING.items()}
    windows = sorted(set(run.windows) - {ALL}) or [ALL]
    facts = run_facts(run)
    return StudyRecord(
        row=row,
        seed=int(run.config["seed"]),
        all=_numbers(run, ALL, metrics) | sums,
        last=_numbers(run, windows[-1], metrics) | sums,
        config=_changed(run.config),
        log=hashlib.sha256(facts["log"].encode()).hexdigest()[:16],
        commit=run_commit(run),
        device=facts["device"],
        seconds=round(sum(s.get("perf/seconds", 0.0) for s in run.steps), 1),
    )


def _numbers(run: Run, window: str, metrics: Sequence[str]) -> dict[str, float | None]:
    """Return the metrics of a study, and how many predictions they are of."""
    return {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in run.windows[window].items()
        if name in metrics or name.startswith("num_examples-")
    }


def _changed(config: dict[str, Any]) -> dict[str, Any]:
    """Return what is not at its default, of a flat configuration; lists of named parts by part."""
    defaults: dict[str, Any] = {}
    for prefix, schema in _SCHEMAS.items():
        content = OmegaConf.to_container(OmegaConf.structured(schema))
        defaults |= {f"{prefix}{k}": _plain(v) for k, v in flatten(content).items()}

    def default(key: str) -> Any:
        parts = key.split(".")
        of_any = ".".join([*parts[:2], "*", *parts[3:]])
        return defaults.get(key, defaults.get(of_any, MISSING))

    free = (*FREE, "seed")
    return {k: v for k, v in config.items() if k not in free and _plain(v) != default(k)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def read_study_records(folder: Path) -> list[StudyRecord]:
    """Return the records of a folder, by row and seed; none if there is no such folder.

    Raises:
        ValueError: if one is no record.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(StudyRecord(**json.loads(path.read_text(encoding="utf-8"))))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no record of a study: {error}") from error
    return records


def study_section(
    study: StudyConfig, records: Sequence[StudyRecord], command: str, plot: str = ""
) -> list[str]:
    """Return the part of the page, in Markdown; empty without records and without a conclusion.

    Args:
        study: its rows, in order.
        records: of any rows.
        command: what adds RUNS to the page.
        plot: of the differences, seen from the page; empty if there is none.
    """
    groups = {
        name: found for name in study.rows if (found := [r for r in records if r.row == name])
    }
    if not groups and not study.conclusion:
        return []
    parts = [f"## {study.title}\n"]
    parts += [f"{text.strip()}\n" for text in (study.conclusion, study.note) if text]
    if not groups:
        return [*parts, f"Not run yet: `python -m launch sweep {study.sweep}`.\n"]
    names = [metric_title(metric) for metric in study.metrics]
    lines = [
        [
            study.rows[name].title,
            *(_cell([r.metrics(study.window) for r in found], metric) for metric in study.metrics),
            str(len(found)),
        ]
        for name, found in groups.items()
    ]
    parts.append(markdown_table(["", *names, "seeds"], lines) + "\n")
    for baseline in study.baselines:
        parts += _comparison(study, groups, baseline)
    parts += [f"![{study.title}: differences and their intervals]({plot})\n"] if plot else []
    lacking = [row.title for name, row in study.rows.items() if name not in groups]
    if lacking:
        parts.append(f"Not run yet: {', '.join(lacking)}.\n")
    return [*parts, _origins(study, groups, command)]


def _comparison(
    study: StudyConfig, groups: dict[str, list[StudyRecord]], baseline: str
) -> list[str]:
    metrics = [metric for metric in study.metrics if metric not in TRAINING]
    columns = {
        metric: compare(metric_values(study, groups, metric), baseline) for metric in metrics
    }
    compared = [name for name in groups if any(name in column for column in columns.values())]
    if not compared:
        return []
    sums = [metric for metric in study.metrics if metric in TRAINING]
    lines = [
        [
            study.rows[name].title,
            *(difference_cell(*c[name]) if name in c else "-" for c in columns.values()),
            *(_relative(study, groups, metric, name, baseline) for metric in sums),
        ]
        for name in compared
    ]
    title = study.rows[baseline].title
    first = metrics[0]
    verdict = sure_rows(study.rows, columns[first], first)
    return [
        f"Difference from {title} at the same seed, {DIFFERENCES}:\n",
        markdown_table(["", *map(metric_title, [*metrics, *sums])], lines) + "\n",
        f"By {metric_title(first)}, against {title}: {verdict}.\n",
    ]


def _relative(
    study: StudyConfig,
    groups: dict[str, list[StudyRecord]],
    metric: str,
    name: str,
    baseline: str,
) -> str:
    """Return by how much a sum over the training differs, in percent, at the seeds of both."""
    values = metric_values(study, groups, metric)
    both = values[name].keys() & values[baseline].keys()
    base = sum(values[baseline][seed] for seed in both)
    return f"{sum(values[name][seed] for seed in both) / base - 1:+.1%}" if base else "-"


def sure_rows(
    rows: Mapping[str, RowConfig], column: dict[str, tuple[Difference, float]], metric: str
) -> str:
    """Return which rows are surely better or worse than a baseline, in words.

    Args:
        rows: of the table or study.
        column: row -> difference in the metric and p, adjusted.
        metric: says which sign is better.
    """
    sign = -1 if lower_is_better(metric) else 1
    sets: dict[str, list[str]] = {"better": [], "worse": [], "no difference seen": []}
    for name, (difference, p) in column.items():
        kind = "better" if sign * difference.mean > 0 else "worse"
        sets[kind if p < 0.05 else "no difference seen"].append(rows[name].title)
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in sets.items() if names)


def lower_is_better(metric: str) -> bool:
    """Return whether less of a metric is better: of NE and errors it is."""
    return metric.split("-")[0].removesuffix(LAST) in LOWER_IS_BETTER


def metric_values(
    study: StudyConfig, groups: Mapping[str, Sequence[StudyRecord]], metric: str
) -> dict[str, dict[int, float]]:
    """Return row -> seed -> value of a metric, where it has one.

    Args:
        study: its window counts.
        groups: row -> its records.
        metric: one of the study's.
    """
    return {
        name: {r.seed: v for r in found if (v := r.metrics(study.window).get(metric)) is not None}
        for name, found in groups.items()
    }


def _cell(rows: Sequence[dict[str, float | None]], metric: str) -> str:
    values = [v for row in rows if (v := row.get(metric)) is not None]
    if not values:
        return "-"
    if metric in TRAINING:
        return f"{_SCALES[metric] * sum(values) / len(values):.4g}"
    return interval_cell(values)


def interval_cell(values: Sequence[float]) -> str:
    """Return mean ± half width of the 95 % interval, the latter from two values on."""
    found = mean_interval(values)
    assert found is not None
    mean, half, num = found
    return f"{mean:.4f}" if num == 1 else f"{mean:.4f} ± {half:.4f}"


def difference_cell(difference: Difference, p: float) -> str:
    """Return a difference with its interval, starred if p, adjusted, is below 0.05."""
    star = " *" if p < 0.05 else ""
    half = "" if math.isnan(difference.half) else f" ± {difference.half:.4f}"
    return f"{difference.mean:+.4f}{half}{star}"


def metric_title(metric: str) -> str:
    """Return a metric as a reader expects it: hr@10/new_items -> HR@10, new items."""
    if metric in _NAMES:
        return _NAMES[metric]
    is_last, metric = metric.endswith(LAST), metric.removesuffix(LAST)
    name, _, cohort = metric.partition("/")
    kind, _, task = name.partition("-")
    words = [f"{kind.upper()} {task.replace('_', ' ')}".strip()]
    words += [cohort.replace("_", " ")] if cohort else []
    return ", ".join([*words, *(["last window"] if is_last else [])])


def _origins(study: StudyConfig, groups: dict[str, list[StudyRecord]], command: str) -> str:
    records = [r for found in groups.values() for r in found]
    seeds = sorted({r.seed for r in records})
    seconds = [r.seconds for r in records]
    lines = [
        f"All rows: `python -m launch sweep {study.sweep}`, then `{command}` with its run "
        f"directories. Seeds {', '.join(map(str, seeds))}; {_all(r.device for r in records)}, "
        f"{min(seconds):.0f} to {max(seconds):.0f} s a run beside whatever else ran; commit "
        f"{_all(r.commit[:12] + r.commit[40:] for r in records)}; log "
        f"{_all(r.log for r in records)}. One row:\n"
    ]
    for name in groups:
        row = study.rows[name]
        lines.append(f"- {row.title}: `gr train {row.config} seed=SEED run_dir=RUN`")
    return "\n".join(lines) + "\n"


def _all(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))
