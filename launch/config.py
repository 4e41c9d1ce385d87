"""Configuration of jobs and sweeps. Free of torch."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """What a job asks of a node, and what it does when something fails (configs/clusters/).

    Where to submit (partition, queue, time limit) is the scheduler's business: .torchxconfig.
    """

    gpus_per_process: int = -1
    """-1 means one if the run has device=cuda, else none."""
    cpus_per_process: int = 0
    """0 means 8 beside a GPU, else 2: the step and the reader that runs ahead of it."""
    memory_gb_per_node: float = 0.0
    """GB (1e9 bytes) of host memory; 0 means an estimate from the tables (launch/job.py)."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of every process."""
    restarts: int = 3
    """How often torchrun starts all processes again after one has died, inside the same job."""
    retries: int = 0
    """How often the scheduler starts the job again after it has failed as a whole (a node lost)."""
    join_timeout_s: int = 600
    """How long a node waits for the others."""
    image: str = ""
    """Container image, with the repository as its working folder; schedulers without containers
    do not read it."""
    mounts: tuple[str, ...] = ()
    """Volumes of the container, each as TorchX writes them: type=volume,src=CLAIM,dst=/mnt/x."""
    python: str = ""
    """Interpreter on the nodes; empty means `python` in a container, else the one that submits."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("gpus_per_process", self.gpus_per_process, -1),
            ("cpus_per_process", self.cpus_per_process, 0),
            ("memory_gb_per_node", self.memory_gb_per_node, 0),
            ("restarts", self.restarts, 0),
            ("retries", self.retries, 0),
            ("join_timeout_s", self.join_timeout_s, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for mount in self.mounts:
            keys = [part.partition("=")[0] for part in mount.split(",")]
            if "type" not in keys or "dst" not in keys:
                raise ValueError(
                    f"mounts: expected type=volume,src=CLAIM,dst=/mnt/x, found {mount!r}"
                )


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
    j: str = "1x1"
    """NODESxPROCESSES of each run."""
    scheduler: str = ""
    """TorchX scheduler that every run is submitted to as a job; empty means processes of this
    machine, which share its GPUs out among the runs at once."""
    scheduler_args: dict[str, Any] = field(default_factory=dict)
    """As after -cfg of `torchx run`: partition, time, queue, ...; over those of .torchxconfig."""
    cluster: str = ""
    """File of ClusterConfig for the jobs; empty means its defaults."""

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
        if not self.scheduler and (self.scheduler_args or self.cluster):
            raise ValueError(
                "scheduler_args and cluster are for jobs, but scheduler is empty: name one (slurm, "
                "kubernetes, local_cwd), or leave them out"
            )
