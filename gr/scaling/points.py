"""What the runs of a study came to: compute, size and quality of each, from their own records."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gr.config import TrainConfig
from gr.config_io import load_config
from gr.evaluate import EVALUATE
from gr.model import dense_model, feature_dims
from gr.runlog import CONFIG, read_lines
from gr.runs import ALL, read_run, window_named
from gr.scaling.config import ScalingConfig
from gr.scaling.members import Member


@dataclass(frozen=True)
class Point:
    """One run."""

    member: Member
    path: Path
    flops: float
    """Of training: the encoder's forward and backward passes (gr/flops.py)."""
    parameters: int
    """Of the dense part."""
    rows: int
    """Of all tables."""
    tokens: int
    """Trained on."""
    length: float
    """Tokens of an example, in the mean."""
    seconds: float
    """Of training."""
    quality: float
    """The study's metric."""

    @property
    def examples(self) -> float:
        """Trained on: sessions with their histories.

        What is new to a run grows with these, not with its tokens, most of which are histories,
        read again by every later example of their user.
        """
        return self.tokens / max(self.length, 1.0)


@dataclass(frozen=True)
class Mean:
    """The runs of one size (and budget) that differ in their seed."""

    family: str
    size: str
    budget: float
    """0 with mode=fixed_data."""
    held_out: bool
    points: tuple[Point, ...]

    @property
    def quality(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(point.quality for point in self.points)

    @property
    def flops(self) -> float:
        """Mean over seeds: negatives and sampling do not change it, stochastic length does."""
        return statistics.fmean(point.flops for point in self.points)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; NaN for one."""
        values = [point.quality for point in self.points]
        return statistics.stdev(values) if len(values) > 1 else float("nan")


def read_points(study: ScalingConfig, members: Sequence[Member]) -> list[Point]:
    """Read every run of a study.

    Raises:
        ValueError: if a run is missing, not finished, or has no such window or metric.
    """
    return [_read(study, member) for member in members]


def run_folder(study: ScalingConfig, member: Member) -> Path:
    """Return where the sweep put a run.

    Raises:
        ValueError: if there is none, or several (of other configurations of the same name).
    """
    found = sorted(Path(study.output).glob(f"{member.name}_s{member.seed}_*"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(
            f"{study.output}: no run of {member.name}, seed {member.seed}: run the study first "
            "(gr scaling FILE, without --fit)"
        )
    raise ValueError(
        f"{study.output} holds {len(found)} runs of {member.name}, seed {member.seed}: "
        f"{', '.join(path.name for path in found)}. The file has changed since: remove those that "
        "are not its own, or give another output"
    )


def means_of(points: Sequence[Point]) -> list[Mean]:
    """Average over seeds; in the order of the runs."""
    groups: dict[tuple[str, str, float], list[Point]] = defaultdict(list)
    for point in points:
        m = point.member
        groups[m.family, m.size, m.budget].append(point)
    return [
        Mean(family, size, budget, found[0].member.held_out, tuple(found))
        for (family, size, budget), found in groups.items()
    ]


def frontier(means: Sequence[Mean], *, higher_is_better: bool) -> list[Mean]:
    """Return the best size at each budget of each family."""
    best: dict[tuple[str, float], Mean] = {}
    sign = -1.0 if higher_is_better else 1.0
    for mean in means:
        key = mean.family, mean.budget
        if key not in best or sign * mean.quality < sign * best[key].quality:
            best[key] = mean
    return list(best.values())


def _read(study: ScalingConfig, member: Member) -> Point:
    path = run_folder(study, member)
    run = read_run(path)
    if ALL not in run.windows:
        raise ValueError(f"{path} is not finished: gr scaling FILE goes on with it")
    if study.log:
        rows = {row["window"]: row for row in read_lines(path / EVALUATE)}
        where = f"{path / EVALUATE}"
    else:
        rows, where = run.windows, f"{path}/eval.jsonl"
    name = window_named(rows, study.window)
    if name not in rows:
        raise ValueError(f"{where} has no window {name!r}, but {sorted(rows)}: see window")
    quality = rows[name].get(study.metric)
    if quality is None:
        numbers = sorted(k for k, v in rows[name].items() if isinstance(v, int | float))
        raise ValueError(f"{where}: window {name!r} has no {study.metric!r}, but {numbers}")
    last = run.steps[-1]
    config, _ = load_config(TrainConfig, path / CONFIG)
    model = dense_model(config, feature_dims(config), utc_offset=0)
    return Point(
        member=member,
        path=path,
        flops=float(last["flops"]),
        parameters=sum(p.numel() for p in model.parameters()),
        rows=sum(table.num_embeddings for table in config.embeddings.tables.values()),
        tokens=int(last["tokens"]),
        length=last["tokens"] / max(1, last["examples"]),
        seconds=sum(float(row.get("perf/seconds", 0.0)) for row in run.steps),
        quality=float(quality),
    )
