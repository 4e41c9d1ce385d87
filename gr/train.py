"""A run from its configuration: build, load, loop."""

import gc
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from gr import parallel
from gr.atomic import CheckpointError
from gr.checkpoint import CheckpointManager
from gr.config import TrainConfig
from gr.flops import peak_flops, sequence_costs
from gr.logs import Log, open_log, window_name
from gr.metrics import WindowResult
from gr.parallel import World
from gr.progress import Progress
from gr.rejects import RejectFile, cut_rejects
from gr.runlog import RunDir, RunLog, open_run_dir
from gr.trainer import EVALUATION, Trainer
from pipelines.batch import StreamPosition
from pipelines.leave_one_out import LeaveOneOutStream
from pipelines.stream import SessionStream, Snapshots

LIFETIME = "all"
HISTORIES = "histories"
Stream = SessionStream | LeaveOneOutStream


def train(config: TrainConfig, resolved: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Train on one pass over a session-end log, scoring each batch before learning from it.

    With data.window=epoch: on many epochs of user sequences, scoring the held-out events between.

    Args:
        config: of the run.
        resolved: the same as plain values, for the run directory.
        overrides: of the command line, for the record.

    Raises:
        ValueError: if the configuration, the log, the run directory or a checkpoint cannot be used,
            or the ranks do not agree on them.
        FloatingPointError: if a loss is not finite.
    """
    with parallel.joined(config) as world:
        world.agree("configuration", OmegaConf.to_yaml(resolved))
        source = open_log(config.data)
        world.agree("log", source.fingerprint)

        # The run directory comes after all that a wrong configuration can break.
        trainer = Trainer(
            config,
            world,
            utc_offset=source.utc_offset,
            sequences_per_step=source.sequences_per_step,
        )
        run = RunDir(Path(config.run_dir))
        rejects = RejectFile(run.rejects, world.rank)
        snapshots = Snapshots(run.path / HISTORIES, lambda step: is_saved_at(step, config))

        def stream_from(position: StreamPosition | None, histories: Path | None = None) -> Stream:
            if source.users is not None:
                return LeaveOneOutStream(
                    config.data,
                    source.users,
                    seed=config.seed,
                    rank=world.rank,
                    world_size=world.size,
                    position=position,
                )
            return SessionStream(
                config.data,
                seed=config.seed,
                rank=world.rank,
                world_size=world.size,
                position=position,
                histories=histories,
                snapshots=snapshots if config.checkpoint.histories == "snapshot" else None,
                frozen=config.eval.mode == "frozen",
                from_rank_0=world.from_rank_0,
                on_reject=lambda reject: rejects.write(reject, trainer.next_step),
                cost=sequence_costs(config.model),
                load_target=trainer.load_target,
            )

        stream = stream_from(None)
        world.on_main(
            lambda: open_run_dir(
                run.path,
                resume=config.resume,
                resolved=resolved,
                overrides=overrides,
                facts={
                    "device": parallel.device_name(world.device),
                    "processes": world.size,
                    "torch": torch.__version__,
                    "log": source.fingerprint,
                },
                job=parallel.environment_job(),
            )
        )
        checkpoints = CheckpointManager(
            run.checkpoints,
            keep=config.checkpoint.keep,
            apart=(EVALUATION,),
            asynchronous=config.checkpoint.asynchronous,
            timeout_minutes=config.timeout_minutes,
        )
        restored = checkpoints.latest() or 0
        world.on_main(lambda: shutil.rmtree(snapshots.folder, ignore_errors=True))
        histories: Path | None = checkpoints.path(restored) / HISTORIES
        if not (histories and histories.is_dir()):
            histories = None
        if restored:
            trainer.load(checkpoints, restored)
            stream = stream_from(trainer.progress.position, histories)
        world.on_main(lambda: cut_rejects(run.rejects, restored))
        log = RunLog(
            run if world.is_main else None,
            restored_step=restored,
            total=source.num_examples,
            unit="example",
        )
        log.message(_headline(config, world, source, trainer, stream, restored, histories))
        with closing(log), closing(checkpoints), short_pauses():
            loop(config, world, trainer, stream, log, checkpoints, snapshots)
        world.on_main(lambda: shutil.rmtree(snapshots.folder, ignore_errors=True))


def loop(
    config: TrainConfig,
    world: World,
    trainer: Trainer,
    stream: Stream,
    log: RunLog,
    checkpoints: CheckpointManager,
    snapshots: Snapshots,
) -> None:
    """Train from the stream's position to its end, or to max_steps, then report and save."""
    progress = trainer.progress
    log.advance(progress.examples)
    clock = Clock(world, trainer)
    values: dict[str, float] = {}
    began = logged = progress.step
    shown = progress.examples

    def write_metrics() -> None:
        trainer.settle()
        log.metrics(
            progress.step,
            {
                "examples": progress.examples,
                "tokens": progress.tokens,
                "flops": progress.flops,
                **trainer.take_losses(),
                "grad_norm": trainer.dense.grad_norm,
                **values,
                **trainer.skipped_by_name(),
                **trainer.id_rows.dynamic.take_metrics(),
                **clock.read(),
            },
        )

    def save() -> None:
        settle()
        log.sync()
        if progress.step not in checkpoints.steps():
            folders = [snapshots.path(progress.step)]
            attempt(lambda: checkpoints.save(progress.step, trainer.state(), folders))

    def settle() -> None:
        attempt(checkpoints.wait)

    def attempt(action: Callable[[], Any]) -> None:
        try:
            action()
        except CheckpointError as error:
            if config.checkpoint.on_error == "stop":
                raise
            log.message(f"{error}. The run goes on (checkpoint.on_error=continue).")

    last_window: dict[str, Any] = {}

    def write_windows(ended: Sequence[WindowResult]) -> None:
        # Rows of the step in progress: a resumed run writes them again.
        for each in ended if config.data.window != "none" else ():
            if config.data.window == "epoch" and not any(each.metrics.values()):
                continue  # stopped by max_steps before the epoch was scored
            log.evaluation(progress.step + 1, window_name(each.window, config.data), each.metrics)
            last_window.update(each.metrics)

    batches = trainer.ahead(stream)
    ahead = batches if config.overlap else None
    for staged in batches:
        batch = staged.batch
        if config.max_flops:
            trainer.settle()
        if is_over(config, progress):
            break
        write_windows(trainer.evaluation.roll(batch.window))
        if batch.is_frozen:
            with clock.scoring():
                trainer.score_step(staged, ahead)
            continue
        values = trainer.train_step(staged, ahead)
        log.advance(progress.examples - shown)  # of the step before: this one is under way
        shown = progress.examples

        if config.checkpoint.asynchronous and progress.step == began + config.optim.accumulate:
            # Not before: torch steps an optimizer whose state is asked for before its first step.
            checkpoints.reserve(trainer.state())
        if progress.step % config.log_every == 0:
            write_metrics()
            logged = progress.step
        if is_saved_at(progress.step, config):
            save()

    trainer.finish_updates()
    log.advance(progress.examples - shown)
    if progress.step > logged:
        write_metrics()
    save()
    settle()
    write_windows(trainer.evaluation.finish())
    # Epochs are not added up: the run's result is that of the weights it ends with.
    overall = last_window if config.data.window == "epoch" else trainer.evaluation.lifetime()
    log.evaluation(progress.step + 1, LIFETIME, overall)


def is_over(config: TrainConfig, progress: Progress) -> bool:
    """Return whether a run has come to a limit of its own, before the end of the log."""
    steps, flops = config.max_steps, config.max_flops
    return bool(steps and progress.step >= steps) or bool(flops and progress.flops >= flops)


def is_saved_at(step: int, config: TrainConfig) -> bool:
    """Return whether a checkpoint is due after a step; another is saved at the end of the log."""
    every = config.checkpoint.every_steps
    return step == config.max_steps or (every > 0 and step % every == 0)


@contextmanager
def short_pauses() -> Iterator[None]:
    """Let the collection of garbage leave out, inside, what was there before.

    To go through some 400,000 objects of the libraries takes 0.5 s, in which a process launches
    nothing, and the other ranks wait for it.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Clock:
    """Rates between two lines of metrics.jsonl.

    Args:
        world: its device's peak gives the MFU.
        trainer: counts examples, tokens and FLOPs.
    """

    def __init__(self, world: World, trainer: Trainer) -> None:
        self.world, self.trainer = world, trainer
        self.peak = peak_flops(world.device)
        self._mark()

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Count the time inside as spent on frozen evaluation."""
        start = time.perf_counter()
        yield
        self.scoring_s += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Return the rates since the last call, over all ranks."""
        progress = self.trainer.progress
        seconds = time.perf_counter() - self.start
        flops_per_s = (progress.flops - self.flops) / seconds
        rates = {
            "perf/seconds": seconds,
            "perf/examples_per_s": (progress.examples - self.examples) / seconds,
            "perf/tokens_per_s": (progress.tokens - self.tokens) / seconds,
            "perf/gflops_per_s": flops_per_s / 1e9,
        }
        if self.scoring_s:
            # Without the second read of the log, which runs ahead in a thread.
            rates["perf/scoring"] = self.scoring_s / seconds
        hits, asked = self.trainer.tables.take_cache_hits()
        if asked:
            rates["perf/cache_hits"] = hits / asked  # of this rank's lookups
        if self.peak:
            rates["perf/mfu"] = flops_per_s / (self.peak * self.world.size)
        self._mark()
        return rates

    def _mark(self) -> None:
        self.start, self.scoring_s = time.perf_counter(), 0.0
        self.examples = self.trainer.progress.examples
        self.tokens = self.trainer.progress.tokens
        self.flops = self.trainer.progress.flops


def _headline(
    config: TrainConfig,
    world: World,
    source: Log,
    trainer: Trainer,
    stream: Stream,
    restored: int,
    histories: Path | None,
) -> str:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    lines = [
        f"{config.model.encoder}: {parameters:,} dense parameters, {world.size} process(es) on "
        f"{world.device.type}",
        trainer.tables.plan_summary(),
        *trainer.id_rows.dynamic.summary().splitlines(),
        f"{source.summary}: {stream.num_steps:,} steps{' so far' if config.data.follow else ''}",
    ]
    if restored:
        lines.append(
            f"resumed from step {restored}: weights, both optimizers, metrics, "
            f"{'' if source.users else _histories(histories)}position "
            f"({trainer.progress.examples:,} examples seen)"
        )
    return "\n".join(lines)


def _histories(folder: Path | None) -> str:
    return f"histories ({'from the checkpoint' if folder else 'by reading the log again'}), "
