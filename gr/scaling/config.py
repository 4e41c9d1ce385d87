"""Configuration of a scaling study. Free of torch."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyConfig:
    """A kind of model whose sizes lie on one curve."""

    base: str = ""
    """Configuration file of its runs; empty means that of the study."""
    overrides: tuple[str, ...] = ()
    """key=value, as on the command line of `gr train`, before those of a size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeConfig:
    """One step of the ladder: width, depth, length, rows of tables, whatever grows."""

    overrides: tuple[str, ...] = ()
    """key=value for every family."""
    of: dict[str, list[str]] = field(default_factory=dict)
    """Family -> key=value for it alone, after `overrides`: what families call by other names, or
    what only one of them has."""
    seeds: tuple[int, ...] = ()
    """Other seeds than those of the study: large sizes may have fewer."""
    budgets: tuple[float, ...] = ()
    """mode=fixed_compute: those of the study's at which it is trained, the held-out one among them;
    empty means all. A small model would need a longer log for a large budget, a large one would
    make too few steps of a small budget."""
    held_out: bool = False
    """Not fitted: its runs are predicted from the others, then compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingConfig:
    """Families x sizes (x budgets) x seeds, trained by a sweep, then fitted.

    Paths start at the working folder.
    """

    base: str = MISSING
    """Configuration file that every run starts from."""
    output: str = MISSING
    """Folder of the runs, the fits and the plots."""
    prepare: tuple[str, ...] = ()
    """Configuration files of `gr synthesize`: a log that is not there yet is made."""
    overrides: tuple[str, ...] = ()
    """key=value for every run."""
    families: dict[str, FamilyConfig] = field(default_factory=dict)
    """Name -> family. The first is the one that the others' slopes are compared with."""
    sizes: dict[str, SizeConfig] = field(default_factory=dict)
    """Name -> size."""
    seeds: tuple[int, ...] = (0,)
    """Every size is trained with each."""
    mode: Literal["fixed_data", "fixed_compute"] = "fixed_data"
    """fixed_data: every run reads the whole log, and a larger model spends more. fixed_compute:
    every size is stopped at each of `budgets`, and the best size at a budget is on the curve."""
    budgets: tuple[float, ...] = ()
    """fixed_compute: training FLOPs."""
    held_out_budget: float = 0.0
    """fixed_compute: a further budget, not fitted but predicted; 0 means none."""
    metric: str = "ne-click"
    """Column of eval.jsonl, or of evaluate.jsonl with `log`."""
    higher_is_better: bool = False
    """Of the metric."""
    window: str = "all"
    """Whose row is read: all, last (the latest window of the pass), or a window by name."""
    log: str = ""
    """A session-end log that no run trains on: each finished run is scored on it by
    `gr evaluate`. Empty means the run's own progressive evaluation."""
    jobs: int = 1
    """Runs at once."""
    limit: int = 64
    """More runs than this are refused."""
    bootstrap: int = 2000
    """Resamples behind each interval."""
    sweep: dict[str, Any] = field(default_factory=dict)
    """Further keys of the sweep (launch/config.py): j, scheduler, scheduler_args, cluster."""

    def __post_init__(self) -> None:
        if not self.families or not self.sizes:
            raise ValueError("families and sizes must each name at least one")
        fitted = sum(not size.held_out for size in self.sizes.values())
        if self.mode == "fixed_data":
            if fitted < 3:
                raise ValueError(
                    f"a line through {fitted} size(s) has nothing to be judged by: give at least 3 "
                    "sizes that are not held_out"
                )
            if self.budgets or self.held_out_budget:
                raise ValueError(
                    "budgets and held_out_budget are for mode=fixed_compute: leave them out, or "
                    "set the mode"
                )
        else:
            if len(self.budgets) < 3 or min(self.budgets) <= 0:
                raise ValueError(
                    "mode=fixed_compute needs at least 3 budgets, all positive, got "
                    f"{list(self.budgets)}"
                )
            trained = {b for size in self.sizes.values() for b in size.budgets or self.budgets}
            none = ", ".join(f"{b:.3g}" for b in sorted({*self.budgets} - trained))
            if none:
                raise ValueError(f"no size is trained at budgets {none}: see sizes.NAME.budgets")
            if any(size.held_out for size in self.sizes.values()):
                raise ValueError(
                    "mode=fixed_compute holds out a budget, not a size: use held_out_budget"
                )
            if not 0 <= self.held_out_budget < math.inf:
                raise ValueError(
                    "held_out_budget must be finite and at least 0 (0: none), got "
                    f"{self.held_out_budget}"
                )
        budgets = {*self.budgets, *filter(None, [self.held_out_budget])}
        for name, size in self.sizes.items():
            others = sorted(set(size.budgets) - budgets)
            if others:
                raise ValueError(
                    f"sizes.{name}.budgets has {others}, but the study's are {sorted(budgets)}"
                )
            unknown = sorted(set(size.of) - set(self.families))
            if unknown:
                raise ValueError(
                    f"sizes.{name}.of names {unknown}, but the families are {list(self.families)}"
                )
        for name in (*self.families, *self.sizes):
            if not name or not all(c.isalnum() or c in "._" for c in name):
                raise ValueError(
                    f"{name!r}: the name of a family or size may hold letters, digits, . and _ only"
                )
        if self.bootstrap < 100:
            raise ValueError(f"bootstrap must be at least 100, got {self.bootstrap}")
        reserved = {"base", "output", "overrides", "runs", "grid", "zip", "seeds", "limit", "jobs"}
        taken = sorted(reserved & set(self.sweep))
        if taken:
            raise ValueError(f"sweep.{taken[0]} is set by the study: leave it out")
