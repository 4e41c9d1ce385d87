"""Run directories read back: grouped by configuration, averaged over seeds. Free of torch."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gr.runlog import (
    CONFIG,
    EVAL,
    FREE_ON_RESUME,
    FREE_ON_RESUME_UNDER,
    METRICS,
    flatten,
    read_lines,
)

ALL = "all"
# In tables and plots, in this order; report.csv holds every metric.
BINARY = ("ne", "auc", "gauc")
REGRESSION = ("mae", "rmse")
RETRIEVAL = ("hr@10", "hr@50", "ndcg@10", "mrr")
_SAME_CONFIG = {"seed", *FREE_ON_RESUME} - {"max_steps", "max_flops"}
# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788,
    2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639,
    2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run directory, read."""

    path: Path
    label: str
    """Given by the user; "" if not."""
    config: dict[str, Any]
    """Dotted key -> value."""
    windows: dict[str, dict[str, Any]]
    """Window -> row of eval.jsonl."""
    steps: list[dict[str, Any]]
    """Rows of metrics.jsonl."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only."""

    label: str
    runs: tuple[Run, ...]

    def interval(self, window: str, metric: str) -> tuple[float, float, int] | None:
        """Return mean, half width of the 95 % interval and number of runs; None without values."""
        values = [run.windows.get(window, {}).get(metric) for run in self.runs]
        return mean_interval([float(v) for v in values if v is not None])


LAST = "last"


def window_named(windows: Mapping[str, object], name: str) -> str:
    """Return the name of a window of a run: `last` is the latest of its pass.

    Args:
        windows: of the run, by name.
        name: of one, `all` for the whole pass, or `last`.
    """
    if name != LAST:
        return name
    return max((window for window in windows if window != ALL), default=ALL)


def read_run(argument: str | Path) -> Run:
    """Read a run directory.

    Args:
        argument: the directory, or LABEL=DIRECTORY.

    Raises:
        ValueError: if it is no run directory, or a file in it is damaged.
    """
    label, path = _split_label(str(argument))
    if not (path / CONFIG).is_file():
        found = "no such directory" if not path.exists() else f"no {CONFIG} in it"
        raise ValueError(f"{path} is not a run directory: {found}. Name what `gr train` wrote.")
    windows: dict[str, dict[str, Any]] = {}
    for row in read_lines(path / EVAL):
        if row["window"] in windows:
            raise ValueError(f"{path / EVAL}: window {row['window']!r} stands there twice")
        windows[row["window"]] = row
    config = flatten(OmegaConf.to_container(OmegaConf.load(path / CONFIG)))
    return Run(path, label, config, windows, read_lines(path / METRICS))


def _split_label(argument: str) -> tuple[str, Path]:
    """Return label and directory; both may hold "=", so the first split that exists counts."""
    parts = argument.split("=")
    for i in range(len(parts)):
        path = Path("=".join(parts[i:]))
        if path.is_dir() and str(path) != ".":
            return "=".join(parts[:i]), path
    return "", Path(argument)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs together that differ in their seed only, and name the groups.

    Raises:
        ValueError: if runs that the user gave one label differ in more, or one run is given twice.
    """
    paths = [run.path.resolve() for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is given twice: a run counts once")
    by_config: dict[str, list[Run]] = {}
    for run in runs:
        by_config.setdefault(json.dumps([run.label, _identity(run)], sort_keys=True), []).append(
            run
        )
    groups = list(by_config.values())
    labels = [members[0].label or _label(members[0], [g[0] for g in groups]) for members in groups]
    for members, label in zip(groups, labels, strict=True):
        if labels.count(label) > 1:
            twins = [g[0] for g, other in zip(groups, labels, strict=True) if other == label]
            keys = _differing(twins)
            raise ValueError(
                f"runs labelled {label!r} differ in {', '.join(keys[:5])}, but a group may differ "
                f"in its seed only. Label {members[0].path} otherwise: LABEL={members[0].path}."
            )
    return [Group(label, tuple(g)) for g, label in zip(groups, labels, strict=True)]


def mean_interval(values: Sequence[float]) -> tuple[float, float, int] | None:
    """Return mean, half width of the 95 % t-interval (NaN for one value) and number of values."""
    if not values:
        return None
    n = len(values)
    if n == 1:
        return values[0], math.nan, 1
    # Beyond the table: the quantile's expansion about the normal one, within 1e-6 of it.
    nu = n - 1
    beyond = 1.959964 + 2.372271 / nu + 2.822499 / nu**2 + 2.555850 / nu**3
    quantile = _T_QUANTILES[nu - 1] if nu <= len(_T_QUANTILES) else beyond
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(n), n


def table_metrics(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Return section -> metrics of it: one section a task, then retrieval."""
    present = {m for g in groups for run in g.runs for row in run.windows.values() for m in row}
    sections: dict[str, list[str]] = {}
    for task in task_names(groups):
        kinds = [m for m in (*BINARY, *REGRESSION) if f"{m}-{task}" in present]
        sections[task] = [f"{m}-{task}" for m in kinds]
    sections["retrieval"] = [m for m in RETRIEVAL if m in present]
    return {name: metrics for name, metrics in sections.items() if metrics}


def task_names(groups: Sequence[Group]) -> list[str]:
    """Return the tasks of all groups in the order of their configurations."""
    keys = (key.split(".") for g in groups for key in g.runs[0].config)
    return list(dict.fromkeys(k[2] for k in keys if k[:2] == ["data", "tasks"] and len(k) > 2))


def windows_of(groups: Sequence[Group]) -> list[str]:
    """Return all windows but the overall one, in order."""
    found = {w for g in groups for run in g.runs for w in run.windows}
    return sorted(found - {ALL})


def metric_name(metric: str) -> str:
    """Return a metric as a reader expects it: ne-click -> NE."""
    return metric.split("-", 1)[0].upper()


def _identity(run: Run) -> dict[str, Any]:
    return {
        key: value
        for key, value in run.config.items()
        if key not in _SAME_CONFIG and not key.startswith(FREE_ON_RESUME_UNDER)
    }


def _differing(runs: Sequence[Run]) -> list[str]:
    identities = [_identity(run) for run in runs]
    keys = sorted({key for identity in identities for key in identity})
    return [k for k in keys if any(i.get(k) != identities[0].get(k) for i in identities)]


def _label(run: Run, all_runs: Sequence[Run]) -> str:
    """Return the encoder, and what sets the run apart from others of the same encoder."""
    encoder = run.config.get("model.encoder", run.path.name)
    same = [other for other in all_runs if other.config.get("model.encoder") == encoder]
    keys = _differing(same)
    if not keys:
        return str(encoder)
    if len(keys) > 3:
        return f"{encoder} {run.path.name}"
    return f"{encoder} " + ", ".join(f"{k.rsplit('.', 1)[-1]}={run.config.get(k)}" for k in keys)
