"""A run from its configuration: build, load, loop."""

import json
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

from omegaconf import DictConfig, OmegaConf

from gr import parallel
from gr.checkpoint import CheckpointManager
from gr.config import TrainConfig
from gr.flops import peak_flops
from gr.parallel import World
from gr.rejects import RejectFile, cut_rejects
from gr.runlog import RunDir, RunLog, open_run_dir
from gr.trainer import EVALUATION, Trainer
from pipelines.batch import StreamPosition
from pipelines.config import DataConfig
from pipelines.manifest import Manifest, read_manifest
from pipelines.stream import SessionStream

LIFETIME = "all"


def train(config: TrainConfig, resolved: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Train on one pass over a session-end log, scoring each batch before learning from it.

    Args:
        config: of the run.
        resolved: the same as plain values, for the run directory.
        overrides: of the command line, for the record.

    Raises:
        ValueError: if the configuration, the log, the run directory or a checkpoint cannot be used,
            or the ranks do not agree on them.
        FloatingPointError: if a loss is not finite.
    """
    parallel.set_determinism(config.deterministic)
    world = parallel.start(config.device, needs_group=config.embeddings.form == "sharded")
    try:
        world.agree("configuration", OmegaConf.to_yaml(resolved))
        manifest = read_manifest(config.data.log)
        world.agree("session-end log", json.dumps([part.sha256 for part in manifest.parts]))

        # The run directory comes after all that a wrong configuration can break.
        trainer = Trainer(
            config,
            world,
            utc_offset=utc_offset_seconds(manifest),
            partitions=manifest.partitions,
        )
        run = RunDir(Path(config.run_dir))
        rejects = RejectFile(run.rejects, world.rank)

        def stream_from(position: StreamPosition | None) -> SessionStream:
            return SessionStream(
                config.data,
                seed=config.seed,
                rank=world.rank,
                world_size=world.size,
                position=position,
                on_reject=lambda reject: rejects.write(reject, trainer.progress.step + 1),
            )

        stream = stream_from(None)
        world.on_main(
            lambda: open_run_dir(
                run.path, resume=config.resume, resolved=resolved, overrides=overrides
            )
        )
        checkpoints = CheckpointManager(
            run.checkpoints, keep=config.checkpoint.keep, apart=(EVALUATION,)
        )
        restored = checkpoints.latest() or 0
        if restored:
            trainer.load(checkpoints, restored)
            stream = stream_from(trainer.progress.position)
        world.on_main(lambda: cut_rejects(run.rejects, restored))
        log = RunLog(
            run if world.is_main else None,
            restored_step=restored,
            total=manifest.num_sessions,
            unit="example",
        )
        log.message(_headline(config, world, manifest, trainer, stream, restored))
        with closing(log):
            loop(config, world, trainer, stream, log, checkpoints)
    finally:
        parallel.stop(world)


def loop(
    config: TrainConfig,
    world: World,
    trainer: Trainer,
    stream: SessionStream,
    log: RunLog,
    checkpoints: CheckpointManager,
) -> None:
    """Train from the stream's position to its end, or to max_steps, then report and save."""
    progress = trainer.progress
    log.advance(progress.examples)
    clock = Clock(world, trainer)
    last_step = min(stream.num_steps, config.max_steps or stream.num_steps)

    for batch in stream:
        if progress.step >= last_step:
            break
        for ended in trainer.evaluation.roll(batch.window):
            if config.data.window != "none":
                # A row of the step in progress: a resumed run writes it again.
                name = window_name(ended.window, config.data)
                log.evaluation(progress.step + 1, name, ended.metrics)
        before = progress.examples
        values = trainer.train_step(batch)
        log.advance(progress.examples - before)

        if progress.step % config.log_every == 0 or progress.step == last_step:
            log.metrics(
                progress.step,
                {
                    "examples": progress.examples,
                    "tokens": progress.tokens,
                    **trainer.take_losses(),
                    **values,
                    **progress.skipped_by_name(),
                    **clock.read(),
                },
            )
        every = config.checkpoint.every_steps
        if progress.step == last_step or (every and progress.step % every == 0):
            log.sync()
            if progress.step not in checkpoints.steps():
                checkpoints.save(progress.step, trainer.state())

    for ended in trainer.evaluation.finish():
        if config.data.window != "none":
            log.evaluation(progress.step + 1, window_name(ended.window, config.data), ended.metrics)
    log.evaluation(progress.step + 1, LIFETIME, trainer.evaluation.lifetime())


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

    def read(self) -> dict[str, float]:
        """Return the rates since the last call, over all ranks."""
        progress = self.trainer.progress
        seconds = time.perf_counter() - self.start
        flops_per_s = self.trainer.take_flops() * self.world.size / seconds
        rates = {
            "perf/seconds": seconds,
            "perf/examples_per_s": (progress.examples - self.examples) / seconds,
            "perf/tokens_per_s": (progress.tokens - self.tokens) / seconds,
            "perf/gflops_per_s": flops_per_s / 1e9,
        }
        if self.peak:
            rates["perf/mfu"] = flops_per_s / (self.peak * self.world.size)
        self._mark()
        return rates

    def _mark(self) -> None:
        self.start = time.perf_counter()
        self.examples = self.trainer.progress.examples
        self.tokens = self.trainer.progress.tokens


def window_name(window: int, data: DataConfig) -> str:
    """Return a window as a date, or as a date and hour, in the time that the windows are cut in."""
    seconds = window * (86_400 if data.window == "day" else 3_600)
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.strftime("%Y-%m-%d" if data.window == "day" else "%Y-%m-%dT%H")


def utc_offset_seconds(manifest: Manifest) -> int:
    """Return what to add to a timestamp for local time, as it stands when the log starts."""
    start = datetime.fromtimestamp(manifest.start_ts, ZoneInfo(manifest.timezone))
    offset = start.utcoffset()
    assert offset is not None
    return int(offset.total_seconds())


def _headline(
    config: TrainConfig,
    world: World,
    manifest: Manifest,
    trainer: Trainer,
    stream: SessionStream,
    restored: int,
) -> str:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    lines = [
        f"{config.model.encoder}: {parameters:,} dense parameters, {world.size} process(es) on "
        f"{world.device.type}",
        trainer.tables.plan_summary(),
        f"{manifest.num_sessions:,} sessions with {manifest.num_events:,} events in "
        f"{manifest.partitions} partitions: {stream.num_steps:,} steps",
    ]
    if restored:
        lines.append(
            f"resumed from step {restored}: weights, both optimizers, metrics, position "
            f"({trainer.progress.examples:,} examples seen)"
        )
    return "\n".join(lines)
