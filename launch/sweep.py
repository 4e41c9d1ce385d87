"""Sweeps: expand a file to runs, start what is not finished, compare the results. Free of torch."""

import hashlib
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gr.config import TrainConfig
from gr.config_io import load_config
from launch.config import SweepConfig, VariantConfig
from launch.layout import Layout

# Set by the sweep itself.
RESERVED = ("run_dir", "resume", "seed")


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    label: str
    """Variant and the values of its axes; the same for all seeds."""
    seed: int
    base: str
    overrides: tuple[str, ...]
    """All of them but run_dir and resume."""
    id: str
    """Hash of the resolved configuration."""
    run_dir: Path
    log: Path
    """What the run prints."""
    processes: int = 1
    """On this machine, where it is no job of its own."""

    def is_finished(self) -> bool:
        """Return whether the run has written its overall evaluation."""
        path = self.run_dir / "eval.jsonl"
        if not path.exists():
            return False
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # complete lines
        return bool(lines) and json.loads(lines[-1])["window"] == "all"

    def arguments(self) -> list[str]:
        """Return all overrides: what starts the run, or goes on with it if it was cut short."""
        resume = self.run_dir.exists() and any(self.run_dir.iterdir())
        return [
            *self.overrides,
            f"run_dir={json.dumps(str(self.run_dir))}",
            *(["resume=true"] if resume else []),
        ]

    def command(self) -> list[str]:
        """Return what runs the member on this machine."""
        python = [sys.executable, "-m"]
        if self.processes > 1:
            torchrun = (
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={self.processes}",
            )
            python += [*torchrun, "-m"]
        return [*python, "gr", "train", self.base, *self.arguments()]


def expand(sweep: SweepConfig) -> list[Member]:
    """Return the runs of a sweep, checked: variants x grid x zip x seeds, seeds fastest.

    Raises:
        ValueError: if there are more than `limit`, two are the same, a key is set by the sweep
            itself, a configuration is not valid, or there are nodes but no scheduler.
    """
    layout = Layout.parse(sweep.j)
    if layout.nodes > 1 and not sweep.scheduler:
        raise ValueError(
            f"j={sweep.j} asks for {layout.nodes} nodes, but scheduler is empty, so all runs stay "
            "on this machine: name a scheduler (slurm, kubernetes), or give j=1xPROCESSES"
        )
    variants = sweep.runs or {"": VariantConfig()}
    _refuse_reserved(sweep, variants)
    axes = [[(key, value) for value in values] for key, values in sweep.grid.items()]
    rows = [
        tuple(zip(sweep.zip, row, strict=True)) for row in zip(*sweep.zip.values(), strict=True)
    ]
    count = len(variants) * len(rows or [()]) * len(sweep.seeds)
    for axis in axes:
        count *= len(axis)
    if count > sweep.limit:
        raise ValueError(
            f"the sweep has {count} runs, limit is {sweep.limit}: shrink it or raise limit"
        )
    members = [
        _member(sweep, name, variant, (*point, *row), seed)
        for name, variant in variants.items()
        for point in itertools.product(*axes)
        for row in rows or [()]
        for seed in sweep.seeds
    ]
    by_id: dict[str, Member] = {}
    for member in members:
        twin = by_id.setdefault(member.id, member)
        if twin is not member:
            raise ValueError(
                f"{member.label!r} and {twin.label!r}, seed {member.seed}, are the same "
                "configuration: leave one out"
            )
    return members


def run_sweep(
    sweep: SweepConfig,
    members: Sequence[Member],
    *,
    say: Callable[[str], None],
    submit: Callable[[Member], int] | None = None,
    cancel: Callable[[], None] = lambda: None,
) -> bool:
    """Run what is not finished, `sweep.jobs` at once, then write the report.

    Args:
        sweep: its output folder gets report.md, report.csv, summary.csv and plots.
        members: of `expand`.
        say: prints a line.
        submit: runs a member to its end and returns its exit status; None means LocalRuns.
        cancel: ends what `submit` has started, after ctrl-C.

    Returns:
        Whether every run is finished.
    """
    run = submit or LocalRuns(sweep.jobs, Layout.parse(sweep.j).processes)
    waiting = [member for member in members if not member.is_finished()]
    say(f"{len(members)} runs, {len(members) - len(waiting)} finished before")
    started = time.monotonic()
    failed = 0
    with ThreadPoolExecutor(sweep.jobs) as pool:
        futures = {pool.submit(run, member): member for member in waiting}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                member, status = futures[future], future.result()
                ok = status == 0 and member.is_finished()
                failed += not ok
                state = "finished" if ok else f"FAILED (exit status {status}, see {member.log})"
                passed = time.monotonic() - started
                name = f"{member.label} seed {member.seed}"
                say(f"[{done}/{len(waiting)}, {passed:.0f} s] {name}: {state}")
        except KeyboardInterrupt:
            cancel()
            pool.shutdown(cancel_futures=True)
            raise
    finished = [member for member in members if member.is_finished()]
    if finished:
        _report(sweep, finished)
    if failed:
        say(f"{failed} of {len(members)} runs failed; the same command tries them again")
    return failed == 0


class LocalRuns:
    """Runs members as processes of this machine and shares out its GPUs and cores.

    OMP_NUM_THREADS is set to a process's share of the cores unless it is set already: threads that
    wait for each other by spinning, more of them than cores, make a run many times slower.
    """

    def __init__(self, jobs: int, processes: int, gpus: Sequence[str] | None = None) -> None:
        """Share out the GPUs.

        Args:
            jobs: members at once.
            processes: of each, one GPU a process.
            gpus: ids for CUDA_VISIBLE_DEVICES; None means those that this process sees.

        Raises:
            ValueError: if a member has more processes than there are GPUs (none at all is fine).
        """
        gpus = visible_gpus() if gpus is None else gpus
        if gpus and processes > len(gpus):
            raise ValueError(
                f"j=1x{processes} asks for {processes} GPUs a run, but this machine has {len(gpus)}"
            )
        self._threads = str(max(1, _visible_cores() // (jobs * processes)))
        self._shares: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        for job in range(jobs):
            first = job * processes
            self._shares.put(
                [gpus[(first + i) % len(gpus)] for i in range(processes if gpus else 0)]
            )

    def __call__(self, member: Member) -> int:
        """Run a member to its end and return its exit status."""
        member.log.parent.mkdir(parents=True, exist_ok=True)
        share = self._shares.get()
        environment = {"OMP_NUM_THREADS": self._threads, **os.environ}
        if share:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(share)
        try:
            with member.log.open("a", encoding="utf-8") as log:
                return subprocess.run(
                    member.command(), stdout=log, stderr=subprocess.STDOUT, env=environment
                ).returncode
        finally:
            self._shares.put(share)


def visible_gpus() -> list[str]:
    """Return the ids of the GPUs that processes of this machine may use."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    return [str(i) for i in range(len(found))]


def _visible_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe(members: Sequence[Member]) -> str:
    """Return a line a run: state, id, seed, label and overrides."""
    lines = []
    for member in members:
        state = "finished" if member.is_finished() else "to run"
        start = f"{state:8}  {member.id}  seed {member.seed}  {member.label}"
        lines.append(f"{start}: {member.base} {' '.join(member.overrides)}")
    return "\n".join(lines)


def config_hash(resolved: DictConfig) -> str:
    """Return the id of a configuration: all of it but where it is written."""
    plain = OmegaConf.to_container(resolved)
    assert isinstance(plain, dict)
    kept = {key: value for key, value in plain.items() if key not in ("run_dir", "resume")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:10]


def _member(
    sweep: SweepConfig,
    name: str,
    variant: VariantConfig,
    point: Sequence[tuple[str, Any]],
    seed: int,
) -> Member:
    base = variant.base or sweep.base
    axes = [f"{key}={json.dumps(value)}" for key, value in point]
    overrides = (*sweep.overrides, *variant.overrides, *axes, f"seed={seed}")
    short = ", ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in point)
    label = " ".join(part for part in (name, short) if part) or Path(base).stem
    try:
        _, resolved = load_config(TrainConfig, base, [*overrides, "run_dir=unused"])
    except ValueError as error:
        raise ValueError(f"run {label!r}, seed {seed}: {error}") from error
    run_id = config_hash(resolved)
    folder = f"{name or Path(base).stem}_s{seed}_{run_id}"
    output = Path(sweep.output)
    return Member(
        label=label,
        seed=seed,
        base=base,
        overrides=overrides,
        id=run_id,
        run_dir=output / folder,
        log=output / "logs" / f"{folder}.log",
        processes=Layout.parse(sweep.j).processes,
    )


def _refuse_reserved(sweep: SweepConfig, variants: dict[str, VariantConfig]) -> None:
    overrides = [*sweep.overrides, *(text for v in variants.values() for text in v.overrides)]
    for key in (*sweep.grid, *sweep.zip, *(text.partition("=")[0] for text in overrides)):
        if key in RESERVED:
            raise ValueError(f"{key} is set by the sweep (seeds, output): leave it out")
    for name in variants:
        if name and not all(c.isalnum() or c in "._+-" for c in name):
            raise ValueError(f"runs.{name}: a name may hold letters, digits and . _ + - only")


def _report(sweep: SweepConfig, finished: Sequence[Member]) -> None:
    # A process of its own: launch stays free of what a report needs.
    runs = [f"{member.label}={member.run_dir}" for member in finished]
    command = [sys.executable, "-m", "gr", "report", *runs, "--output", sweep.output]
    subprocess.run(command, check=True)
