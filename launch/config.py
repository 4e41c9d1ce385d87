"""Configuration of sweeps. Free of torch."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantConfig:
    """A named member of a sweep."""

    base: str = ""
    """Configuration file of its runs; empty means that of the sweep."""
    overrides: tuple[str, ...] = ()
    """key=value, as on the command line of `gr train`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """Which runs to make: variants x grid x zip x seeds. Paths start at the working folder."""

    base: str = MISSING
    """Configuration file that every run starts from."""
    output: str = MISSING
    """Folder of the run directories, their logs and the report."""
    overrides: tuple[str, ...] = ()
    """key=value for every run."""
    runs: dict[str, VariantConfig] = field(default_factory=dict)
    """Name -> variant; empty means one, the base itself."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> list of values; all combinations are run."""
    zip: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> list of values, all of one length; the lists move together."""
    seeds: tuple[int, ...] = (0,)
    """Every combination is run with each."""
    limit: int = 16
    """More runs than this are refused."""
    jobs: int = 1
    """Runs at once."""

    def __post_init__(self) -> None:
        for name, axes in (("grid", self.grid), ("zip", self.zip)):
            for key, values in axes.items():
                if not isinstance(values, list | tuple) or not values:
                    raise ValueError(f"{name}.{key}: expected a list of values, found {values!r}")
        lengths = {key: len(values) for key, values in self.zip.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"zip: expected lists of one length, found {lengths}")
        both = sorted(set(self.grid) & set(self.zip))
        if both:
            raise ValueError(f"{', '.join(both)} is in grid and in zip: leave it in one")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError(f"seeds: expected at least one, none twice, found {self.seeds}")
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}")
