"""The run directory and what is written into it while a run goes on.

config.yaml      resolved configuration       metrics.jsonl   a line a logged step
overrides.txt    overrides, one a line        eval.jsonl      a line a window, and one overall
commit.txt       commit and uncommitted diff  checkpoints/    gr/checkpoint.py
facts.json       devices, torch, log          events.out.*    TensorBoard, the same numbers
job.txt          id of the job that writes
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from gr.atomic import write_atomically

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
EVAL = "eval.jsonl"
JOB = "job.txt"
COMMIT = "commit.txt"
FACTS = "facts.json"
# What may change when a run is resumed: it leaves model, data and optimisation as they were.
FREE_ON_RESUME = (
    *(
        "run_dir",
        "resume",
        "max_steps",
        "max_flops",
        "log_every",
        "device",
        "timeout_minutes",
        "data.prefetch",
    ),
    *("data.follow", "data.follow_idle_seconds", "data.max_reject_fraction"),
    *("data.history_memory_gb", "data.spill_folder"),
    *("overlap", "optim.max_nonfinite_steps"),
    # Where the tables are, which another number of ranks or another GPU may need otherwise.
    *("embeddings.form", "embeddings.momentum", "embeddings.sharding"),
    *("embeddings.reserved_hbm", "embeddings.index_dedup"),
)
FREE_ON_RESUME_UNDER = ("checkpoint.",)

Value = float | int | str | bool | None


class RunDir:
    """Paths of a run directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def rejects(self) -> Path:
        """Folder of the records that were skipped."""
        return self.path / "rejects"


def open_run_dir(
    path: str | Path,
    *,
    resume: bool,
    resolved: DictConfig,
    overrides: Sequence[str] = (),
    facts: Mapping[str, Value] | None = None,
    job: str = "",
) -> RunDir:
    """Make a run directory, or take up an old one. Called on one rank.

    Args:
        path: the directory. With `resume`, one that is absent or empty starts a new run.
        resume: whether to go on with the run that is there.
        resolved: the configuration, as load_config returns it.
        overrides: of the command line, for the record.
        facts: what the run has to do with that no configuration says, for the record.
        job: id of the job that this process belongs to. A run that the same job began is resumed
            without `resume`: that is how a restarted job goes on.

    Raises:
        ValueError: if something is there and `resume` is false, if what is there is no run, or if
            its configuration differs in more than FREE_ON_RESUME.
    """
    run = RunDir(path)
    if run.path.exists() and not run.path.is_dir():
        raise ValueError(f"run_dir={path} is a file. Name a directory that is empty or not there.")
    found = [p.name for p in run.path.iterdir()] if run.path.exists() else []
    found = [name for name in found if not (name.startswith(".") and name.endswith(".tmp"))]
    if found == [JOB]:
        found = []  # Killed before it began.
    if job and found and not resume:
        begun = run.path / JOB
        resume = begun.is_file() and begun.read_text(encoding="utf-8").strip() == job
    if found and not resume:
        raise ValueError(
            f"run_dir={path} is not empty ({', '.join(sorted(found)[:4])}). Give resume=true to go "
            "on with that run, or another run_dir, or remove it."
        )
    if found and CONFIG not in found:
        raise ValueError(
            f"resume=true, but run_dir={path} has no {CONFIG}, so it is not a run directory "
            f"(found {', '.join(sorted(found)[:4])}). Name the directory of a run."
        )
    lines = "".join(f"{text}\n" for text in overrides)
    commit = describe_commit(Path(__file__).resolve().parent.parent)
    if found:
        _refuse_changes(run.path / CONFIG, resolved)
        lines = _appended(run.path / "overrides.txt", lines)
        commit = _appended(run.path / COMMIT, commit)
    run.path.mkdir(parents=True, exist_ok=True)
    if job:
        # First, so that a kill in between leaves nothing that a retry would refuse.
        write_atomically(run.path / JOB, f"{job}\n")
    write_atomically(run.path / CONFIG, OmegaConf.to_yaml(resolved))
    write_atomically(run.path / "overrides.txt", lines)
    write_atomically(run.path / COMMIT, commit)
    write_atomically(run.path / FACTS, json_line(facts or {}))
    return run


def _appended(path: Path, text: str) -> str:
    return (path.read_text() if path.exists() else "") + "# resumed\n" + text


def _refuse_changes(stored: Path, resolved: DictConfig) -> None:
    old = flatten(OmegaConf.to_container(OmegaConf.load(stored)))
    new = flatten(OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(resolved))))
    changed = [
        f"{key}: {old.get(key, 'not set')} then, {new.get(key, 'not set')} now"
        for key in sorted({*old, *new})
        if old.get(key, old) != new.get(key, new)
        and key not in FREE_ON_RESUME
        and not key.startswith(FREE_ON_RESUME_UNDER)
    ]
    if changed:
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ValueError(
            f"cannot resume: the configuration differs from {stored}: "
            f"{'; '.join(changed[:5])}{more}. Set these back, or start a new run_dir. "
            f"Free to change: {', '.join(FREE_ON_RESUME)}, checkpoint.*."
        )


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return {"a.b": leaf} of nested mappings; an empty mapping is a leaf."""
    if not isinstance(config, Mapping) or (not config and prefix):
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def describe_commit(folder: Path) -> str:
    """Return the commit of the code in `folder`, untracked files and the uncommitted diff.

    A copy without .git, in a container or on a cluster, may say its commit in a file COMMIT.
    """
    if not (folder / ".git").exists():
        stated = folder / "COMMIT"
        if stated.is_file():
            return stated.read_text(encoding="utf-8")
        return "none: the code is not in a git checkout, and there is no file COMMIT\n"
    answers = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain"], ["diff", "HEAD"]):
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *command],
                capture_output=True,
                text=True,
                errors="replace",
            )
        except FileNotFoundError:
            return "none: git is not installed\n"
        if done.returncode:
            return f"none: git {command[0]} failed: {done.stderr.strip()}\n"
        answers.append(done.stdout)
    return "\n".join(answers).rstrip("\n") + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a .jsonl file; a last line that a kill cut short is left out.

    Raises:
        ValueError: naming the line that is no JSON object.
    """
    rows = []
    complete = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(complete, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {line[:60]!r}")
        rows.append(row)
    return rows


def cut_after(run: RunDir, step: int) -> None:
    """Drop from metrics.jsonl and eval.jsonl what came after a step, and a line cut short.

    Args:
        run: the run that is resumed.
        step: the restored step; rows of this step stay. 0 drops all.
    """
    for name in (METRICS, EVAL):
        path = run.path / name
        if not path.exists():
            continue
        kept = [row for row in read_lines(path) if step > 0 and row["step"] <= step]
        write_atomically(path, "".join(json_line(row) for row in kept))


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as JSON; floats as repr, so that equal numbers are equal bytes; NaN is null."""
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(clean, allow_nan=False) + "\n"


class RunLog:
    """Numbers and messages of a run: files, TensorBoard, console. Silent on ranks without a run."""

    def __init__(
        self,
        run: RunDir | None,
        *,
        restored_step: int = 0,
        total: int = 0,
        unit: str = "step",
        console: IO[str] | None = None,
    ) -> None:
        """Open the files for appending.

        Args:
            run: where to write; None (ranks other than 0) makes every method do nothing.
            restored_step: step that the run goes on from; what the files hold after it is dropped.
            total: what `advance` will count up to; 0 if that is not known.
            unit: what `advance` counts.
            console: where messages go; None means stderr. A progress bar only if it is a terminal.
        """
        self._run = run
        if run is None:
            return
        # Brings torch, which readers of a run directory do without.
        from torch.utils.tensorboard import SummaryWriter

        cut_after(run, restored_step)
        self._metrics = (run.path / METRICS).open("a", encoding="utf-8")
        self._eval = (run.path / EVAL).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run.path), purge_step=restored_step + 1)
        self._console = console or sys.stderr
        self._bar = tqdm(
            total=total or None,
            unit=unit,
            file=self._console,
            disable=not self._console.isatty(),
            dynamic_ncols=True,
        )

    def advance(self, count: int = 1) -> None:
        """Move the progress bar by `count` units."""
        if self._run is not None:
            self._bar.update(count)

    def metrics(self, step: int, values: Mapping[str, Value]) -> None:
        """Write a row of metrics.jsonl.

        Args:
            step: updates made so far.
            values: flat, as in train/loss, lr/dense, perf/examples_per_s; timings under perf/ only.
        """
        if self._run is None:
            return
        self._write(self._metrics, {"step": step, **values})
        self._to_board(step, values, "")
        if self._bar.disable:
            self.message(f"step {step}  {readable(values)}")
        else:
            loss = values.get("train/loss", "")
            self._bar.set_postfix_str(f"step {step}  loss {_short(loss)}" if loss != "" else "")

    def evaluation(self, step: int, window: str, values: Mapping[str, Value]) -> None:
        """Write a row of eval.jsonl.

        Args:
            step: updates made when the row is written: a row written after the checkpoint of step s
                must have a larger step, or a resumed run would keep it and write it again.
            window: the day or hour, or "all".
            values: flat, as in ne-click, auc-click, hr@10; None is not defined.
        """
        if self._run is None:
            return
        self._write(self._eval, {"window": window, "step": step, **values})
        self._to_board(step, values, "lifetime/" if window == "all" else "window/")
        self.message(f"eval {window}  {readable(values)}")

    def message(self, text: str) -> None:
        """Print a line, above the progress bar where there is one."""
        if self._run is not None:
            tqdm.write(text, file=self._console)
            self._console.flush()

    def sync(self) -> None:
        """Make what was written durable; called before a checkpoint is saved."""
        if self._run is None:
            return
        for file in (self._metrics, self._eval):
            os.fsync(file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Close files and progress bar."""
        if self._run is None:
            return
        self._bar.close()
        self._metrics.close()
        self._eval.close()
        self._board.close()
        self._run = None

    def _write(self, file: IO[str], row: Mapping[str, Value]) -> None:
        file.write(json_line(row))
        file.flush()

    def _to_board(self, step: int, values: Mapping[str, Value], prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                # TensorBoard groups by what is before the slash, and knows no @.
                self._board.add_scalar(prefix + key.replace("@", "_at_"), value, step)


def readable(values: Mapping[str, Value]) -> str:
    """Return values on one line, rounded for the console."""
    return "  ".join(f"{key} {_short(value)}" for key, value in values.items())


def _short(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
