"""A checkpoint against a log: scored as in training, learning nothing."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from gr import parallel
from gr.atomic import write_atomically
from gr.checkpoint import CheckpointManager
from gr.config import TrainConfig
from gr.config_io import load_config
from gr.flops import sequence_costs
from gr.logs import Log, open_log, window_name
from gr.metrics import WindowResult
from gr.parallel import World
from gr.runlog import CONFIG, RunDir, Value, json_line, readable
from gr.train import LIFETIME
from gr.trainer import EVALUATION, Trainer
from pipelines.batch import SequenceBatch
from pipelines.config import DataConfig, StochasticLengthConfig
from pipelines.leave_one_out import LeaveOneOutStream
from pipelines.rejects import REASONS
from pipelines.stream import SessionStream

EVALUATE = "evaluate.jsonl"


def run_config(run_dir: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Return the configuration of a run, with changes.

    Args:
        run_dir: the run directory.
        overrides: `key=value`, for instance data.log=OTHER.

    Raises:
        ValueError: if it is no run directory, or an override does not fit.
    """
    path = Path(run_dir) / CONFIG
    if not path.is_file():
        found = f"no {CONFIG} in it" if path.parent.is_dir() else "no such directory"
        raise ValueError(f"{run_dir} is not a run directory: {found}. Name what `gr train` wrote.")
    config, _ = load_config(TrainConfig, path, overrides)
    return config


def evaluate(
    config: TrainConfig,
    run_dir: str | Path,
    *,
    step: int | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Score a whole log with the weights of one checkpoint; histories grow as the log goes on.

    Sequences are whole, also where training shortens them (data.stochastic_length).
    Writes evaluate.jsonl into the run directory: rows as in eval.jsonl, and in each row the log and
    the overrides; in the last one the sessions that were skipped, by reason.

    Args:
        config: `run_config` of the run.
        run_dir: the run directory.
        step: of the checkpoint; None means the newest.
        overrides: of the command line, for the record.

    Raises:
        ValueError: if there is no such checkpoint, it is of another model, the log cannot be used,
            or the ranks do not agree.
    """
    with parallel.joined(config) as world:
        world.agree("configuration", OmegaConf.to_yaml(OmegaConf.structured(config)))
        source = open_log(config.data)
        world.agree("log", source.fingerprint)
        run = RunDir(run_dir)
        trainer, step = load_learnt(config, run, world=world, source=source, step=step)
        batches: Iterable[SequenceBatch]
        if source.users is not None:
            epochs = LeaveOneOutStream(
                config.data, source.users, seed=config.seed, rank=world.rank, world_size=world.size
            )
            batches, num_batches = epochs.score(window=0), epochs.num_scored_batches
        else:
            batches = stream = SessionStream(
                scored_data(config.data),
                seed=config.seed,
                rank=world.rank,
                world_size=world.size,
                cost=sequence_costs(config.model),
            )
            num_batches = stream.num_steps
        origin: dict[str, Value] = {
            "step": step,
            "log": config.data.log,
            "overrides": " ".join(overrides),
        }
        rows = score(config.data, world, trainer, with_bar(world, batches, num_batches), origin)
        lines = "".join(json_line(row) for row in rows)
        world.on_main(lambda: write_atomically(run.path / EVALUATE, lines))


def score(
    data: DataConfig,
    world: World,
    trainer: Trainer,
    batches: Iterable[SequenceBatch],
    origin: dict[str, Value],
) -> list[dict[str, Value]]:
    """Return the rows of all batches, of which rank 0 prints each as its window ends.

    Args:
        data: configuration of the batches.
        world: this process among all.
        trainer: holds the weights; its metrics are those of these batches afterwards.
        batches: of a whole log.
        origin: goes into every row.
    """
    rows: list[dict[str, Value]] = []
    rejected = torch.zeros(len(REASONS), dtype=torch.int64)

    def add(window: str, metrics: dict[str, Value]) -> None:
        rows.append({"window": window, **origin, **metrics})
        if world.is_main:
            tqdm.write(f"evaluate {window}  {readable(metrics)}", file=sys.stderr)

    def add_windows(ended: list[WindowResult]) -> None:
        for each in ended if data.window in ("hour", "day") else ():
            add(window_name(each.window, data), dict(each.metrics))

    for batch in batches:
        add_windows(trainer.evaluation.roll(batch.window))
        for reason, count in batch.num_rejected.items():
            rejected[REASONS.index(reason)] += count
        trainer.score_step(batch)
    add_windows(trainer.evaluation.finish())
    counts = world.sum(rejected.to(world.device)).tolist()
    skipped = {f"data/rejected/{REASONS[i]}": n for i, n in enumerate(counts) if n}
    add(LIFETIME, {**trainer.evaluation.lifetime(), **skipped})
    return rows


def scored_data(data: DataConfig) -> DataConfig:
    """Return the configuration of a session-end log that is only scored: each session once, whole.

    Stochastic length and labels of the history are for training: what is served reads whole
    sequences, and predicts what is new.
    """
    return replace(
        data,
        follow=False,
        supervise="session",
        sampled_rate=1.0,
        stochastic_length=StochasticLengthConfig(),
    )


def with_bar(
    world: World, batches: Iterable[SequenceBatch], num_batches: int
) -> Iterable[SequenceBatch]:
    """Return the batches behind a progress bar, where rank 0 has a terminal."""
    silent = not (world.is_main and sys.stderr.isatty())
    shown: Iterable[SequenceBatch] = tqdm(batches, total=num_batches, unit="batch", disable=silent)
    return shown


def load_learnt(
    config: TrainConfig, run: RunDir, *, world: World, source: Log, step: int | None
) -> tuple[Trainer, int]:
    """Return a trainer with the weights of a checkpoint, and the checkpoint's step.

    Args:
        config: `run_config` of the run.
        run: its directory.
        world: all ranks that call this.
        source: the log that the configuration names.
        step: of the checkpoint; None means the newest.

    Raises:
        ValueError: if there is no such checkpoint, it is of another model, or ranks find different
            ones.
    """
    checkpoints = CheckpointManager(run.checkpoints, apart=(EVALUATION,))
    step = find_step(checkpoints, step)
    world.agree("checkpoint", str(step))
    trainer = Trainer(
        config,
        world,
        utc_offset=source.utc_offset,
        sequences_per_step=source.sequences_per_step,
    )
    trainer.load_learnt(checkpoints, step)
    return trainer, step


def find_step(checkpoints: CheckpointManager, step: int | None) -> int:
    """Return the step to load: the one that is asked for, or the newest.

    Raises:
        ValueError: if it is not there; the message says which are.
    """
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(
            f"{checkpoints.folder} holds no complete checkpoint, so there is nothing to evaluate. "
            "Finish the run (gr train ... resume=true), or set checkpoint.every_steps in the next."
        )
    if step is not None and step not in steps:
        raise ValueError(
            f"{checkpoints.folder} holds no complete checkpoint of step {step}, but of {steps}: "
            "name one of these, or leave --step out for the newest."
        )
    return steps[-1] if step is None else step
