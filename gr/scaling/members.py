"""The runs that a study consists of, and the sweep that makes them. Free of torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gr.atomic import write_atomically
from gr.scaling.config import ScalingConfig

SWEEP = "sweep_{}.yaml"


@dataclass(frozen=True)
class Member:
    """One run."""

    family: str
    size: str
    budget: float
    """Training FLOPs after which it stops; 0 means the end of the log."""
    seed: int
    held_out: bool

    @property
    def name(self) -> str:
        """Name of the sweep's variant."""
        budget = f"-{self.budget:.3g}".replace("+", "") if self.budget else ""
        return f"{self.family}-{self.size}{budget}"


def expand(study: ScalingConfig) -> list[Member]:
    """Return all runs: families x sizes (x budgets) x seeds.

    Raises:
        ValueError: if there are more than `limit`.
    """
    budgets = [0.0] if study.mode == "fixed_data" else list(study.budgets)
    if study.held_out_budget:
        budgets.append(study.held_out_budget)
    members = [
        Member(
            family,
            name,
            budget,
            seed,
            size.held_out or (budget > 0 and budget == study.held_out_budget),
        )
        for family in study.families
        for name, size in study.sizes.items()
        for budget in budgets
        if not size.budgets or budget in size.budgets
        for seed in size.seeds or study.seeds
    ]
    if len(members) > study.limit:
        raise ValueError(
            f"the study has {len(members)} runs, limit is {study.limit}: shrink it or raise limit"
        )
    return members


def write_sweeps(study: ScalingConfig, members: list[Member]) -> list[Path]:
    """Write the sweep files that make the runs: one for each set of seeds.

    Returns:
        The files, in the study's folder.
    """
    folder = Path(study.output)
    folder.mkdir(parents=True, exist_ok=True)
    by_seeds: dict[tuple[int, ...], dict[str, Any]] = {}
    for name in dict.fromkeys(member.name for member in members):
        same = [member for member in members if member.name == name]
        first = same[0]
        family, size = study.families[first.family], study.sizes[first.size]
        overrides = [*family.overrides, *size.overrides, *size.of.get(first.family, ())]
        if first.budget:
            overrides.append(f"max_flops={first.budget!r}")
        seeds = tuple(member.seed for member in same)
        by_seeds.setdefault(seeds, {})[name] = {"base": family.base, "overrides": overrides}
    files = []
    for number, (seeds, runs) in enumerate(by_seeds.items()):
        content = {
            "base": study.base,
            "output": study.output,
            "overrides": list(study.overrides),
            "runs": runs,
            "seeds": list(seeds),
            "limit": study.limit,
            "jobs": study.jobs,
            **study.sweep,
        }
        path = folder / SWEEP.format(number)
        write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(content)))
        files.append(path)
    return files
