"""Training steps on logs whose lengths are known: how long they take, and what they wait for."""

import gc
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.config import EmbeddingsConfig, TableConfig
from gr.bench_trace import Interval, device_intervals, transfer, waits
from gr.checkpoint import CheckpointManager
from gr.config import (
    EncodingConfig,
    EvalConfig,
    HeadConfig,
    HSTUConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from gr.flops import layer_flops, peak_flops, sequence_costs
from gr.parallel import World
from gr.trainer import EVALUATION, Trainer
from pipelines.batch import SequenceBatch
from pipelines.config import ActionConfig, DataConfig, StochasticLengthConfig, TaskConfig
from pipelines.stream import SessionStream

PROFILED = 5
"""Steps that are watched for what they wait for."""
RECALIBRATE = 8


@dataclass(frozen=True)
class Settings:
    """What all measurements share."""

    logs: Path
    """Holds the logs `zipf` and `fixed`."""
    rows: int
    """Of the table."""
    sequences: int
    """Of a rank's batch."""
    partitions: int
    """Of the logs."""
    ranks: int
    """Whose batches one GPU takes in turn, where it stands for a group."""
    is_small: bool = False
    """A model for CPUs, with the update rule that FBGEMM has there."""
    graph_tokens: int = 0
    """model.hstu.graph_tokens."""


class Bench:
    """Measures runs on the ranks of a group.

    Args:
        settings: shared.
        world: the ranks.
    """

    def __init__(self, settings: Settings, world: World) -> None:
        self.settings, self.world = settings, world

    def by_rows(self, log: str, *, fp8: bool = False, times: int = 1) -> TrainConfig:
        """Return a run whose ranks take as many sequences each: `times` those of the settings."""
        settings = self.settings
        each = times * settings.sequences * self.world.size // settings.partitions
        return self._config(log, fp8=fp8, sessions_per_partition=each)

    def filled(
        self, log: str, *, rows: int = 0, momentum: Literal["hbm", "host"] = "hbm"
    ) -> TrainConfig:
        """Return a run whose batches have as many FLOPs, on average those of `sequences`."""
        config = self._config(log, rows=rows, momentum=momentum)
        lengths = torch.from_numpy(np.load(self.settings.logs / f"{log}.npy"))
        linear, attention = flops(config.model, lengths)
        budget = (linear + 3.0 * attention) / len(lengths) * self.settings.sequences
        return replace(
            config,
            data=replace(config.data, fill="flops", budget=budget, sessions_per_partition=8),
        )

    def stochastic(self, log: str, *, balance: bool) -> TrainConfig:
        """Return `by_rows` with stochastic length, and more sequences, since most are cut."""
        config = self.by_rows(log, times=4)
        lengths = StochasticLengthConfig(
            selection="weighted", balance=balance, recalibrate_steps=RECALIBRATE
        )
        return replace(config, data=replace(config.data, stochastic_length=lengths))

    def rates(self, config: TrainConfig, *, steps: int = 30, warm_up: int = 0) -> dict[str, float]:
        """Return seconds of a step, TFLOP/s and MFU of a GPU, tokens/s of a GPU, and loads.

        Args:
            config: the run.
            steps: timed.
            warm_up: 0: the batches are read before, and trained on twice, the second time timed, so
                that kernels for their shapes are there. More: they are read while training, and
                the first so many are not timed.
        """
        trainer = self.trainer(config)
        if warm_up:
            stream = _stream(config, self.world, trainer)
            loop = Loop(trainer, stream)
            loop.run(warm_up)
        else:
            loop = Loop(trainer, itertools.cycle(self.read(config, steps)))
            loop.run(steps)
        self._barrier()
        start = time.perf_counter()
        made = loop.run(steps)
        self._barrier()
        seconds = time.perf_counter() - start
        slowest = self._slowest(loop, steps)
        if warm_up:
            stream.close()
        _check_length(made, steps)
        return {**self._figures(config, made, seconds), "slowest_step_s": slowest}

    def read(self, config: TrainConfig, steps: int) -> list[SequenceBatch]:
        """Return the first batches of a run."""
        stream = _stream(config, self.world, None)
        batches = list(itertools.islice(stream, steps))
        stream.close()
        _check_length(batches, steps)
        return batches

    def trained_on(self, config: TrainConfig, steps: int, *, after: int) -> list[SequenceBatch]:
        """Return the batches of a run after some steps, where what it reads hangs on its steps."""
        # Without graphs: most batches would be the first of their size.
        hstu = replace(config.model.hstu, graph_tokens=0)
        trainer = self.trainer(replace(config, model=replace(config.model, hstu=hstu)))
        stream = _stream(config, self.world, trainer)
        made = Loop(trainer, stream).run(after + steps)
        stream.close()
        _check_length(made, after + steps)
        return made[after:]

    def in_turns(
        self,
        runs: dict[str, tuple[TrainConfig, list[SequenceBatch]]],
        *,
        trainer: Trainer | None = None,
        rounds: int = 4,
    ) -> dict[str, dict[str, float]]:
        """Return what `rates` does of runs that take turns, so that the machine is one for all.

        And `least_step_s` and `most_step_s`, means over a turn.

        Args:
            runs: by name, with the batches of a turn. They are trained on once before.
            trainer: of all runs, its tables without caches, into which a run that waits for its
                turn would have brought rows; None: each has one of its own.
            rounds: turns of each, in one order and the other.
        """
        loops = {
            name: Loop(trainer or self.trainer(config), itertools.cycle(batches))
            for name, (config, batches) in runs.items()
        }
        for name, (_, batches) in runs.items():
            loops[name].run(len(batches))
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(rounds):
            for name in list(runs)[:: -1 if turn % 2 else 1]:
                self._barrier()
                start = time.perf_counter()
                loops[name].run(len(runs[name][1]))
                self._barrier()
                seconds[name].append(time.perf_counter() - start)
        return {
            name: {
                **self._figures(config, batches, sum(seconds[name]) / rounds),
                "slowest_step_s": self._slowest(loops[name], rounds * len(batches)),
                "least_step_s": min(seconds[name]) / len(batches),
                "most_step_s": max(seconds[name]) / len(batches),
            }
            for name, (config, batches) in runs.items()
        }

    def alone(
        self, config: TrainConfig, batches: list[SequenceBatch], *, rounds: int = 2
    ) -> Tensor:
        """Return seconds of each step where no other rank is waited for, means of the rounds.

        Args:
            config: the run.
            batches: of one rank. They are trained on once before.
            rounds: how often.
        """
        loop = Loop(self.trainer(config), itertools.cycle(batches))
        loop.run(len(batches))
        turns = [self._each_step(loop, len(batches)) for _ in range(rounds)]
        return torch.tensor(turns, dtype=torch.float64).mean(0)

    def _each_step(self, loop: "Loop", steps: int) -> list[float]:
        """Run some steps; return the seconds of each, by the clock of the device."""
        if self.world.device.type == "cpu":
            loop.run(steps)
            return loop.seconds[-steps:]
        event: Callable[..., Any] = torch.cuda.Event
        ends = [event(enable_timing=True) for _ in range(steps + 1)]
        torch.cuda.synchronize()
        ends[0].record()
        for end in ends[1:]:
            loop.run(1)
            end.record()
        torch.cuda.synchronize()
        return [1e-3 * start.elapsed_time(end) for start, end in itertools.pairwise(ends)]

    def profile(self, config: TrainConfig) -> dict[str, float]:
        """Return shares of the time of a few steps: communication alone, nothing at all.

        And `transfer`: what communication takes once the last rank has come.
        """
        loop = Loop(self.trainer(config), itertools.cycle(self.read(config, PROFILED)))
        loop.run(PROFILED)
        if self.world.device.type == "cpu":
            return {}
        self._barrier()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            loop.run(PROFILED)
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        communication, others = device_intervals(events)
        ranks: list[list[Interval]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(ranks, communication)
        return {**waits(communication, others), "transfer": transfer(ranks, others)}

    def checkpoint(self, config: TrainConfig, steps: int = 100) -> dict[str, float]:
        """Return what 100 steps lose that hold an asynchronous checkpoint, a run's first or not.

        Against the mean of those before and after, which hold none. And the slowest step on any
        rank: one that stalls is told from many slower ones.
        """
        steps = 10 if self.settings.is_small else steps
        trainer = self.trainer(config)
        some = self.read(config, 20)
        loop = Loop(trainer, itertools.cycle(some))
        loop.run(len(some))
        folder = [tempfile.mkdtemp(dir=self.settings.logs) if self.world.is_main else ""]
        if self.world.size > 1:
            dist.broadcast_object_list(folder)
        path = Path(folder[0])
        checkpoints = CheckpointManager(path, keep=1, apart=(EVALUATION,), asynchronous=True)
        checkpoints.reserve(trainer.state())
        seconds, slowest, saved, asked = [], [], time.perf_counter(), 0.0
        for saves in (False, True, False, True, False, True, False):
            self._barrier()
            start = time.perf_counter()
            loop.run(steps // 4)
            if saves:
                saved = time.perf_counter()
                checkpoints.save(trainer.progress.step, trainer.state())
                asked += time.perf_counter() - saved
            loop.run(steps - steps // 4)
            self._barrier()
            seconds.append(time.perf_counter() - start)
            slowest.append(self._slowest(loop, steps))
            checkpoints.wait()
        written = time.perf_counter() - saved
        checkpoints.close()
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        plain, saving = seconds[::2], seconds[1::2]
        throughput = {
            f"throughput_{i + 1}": (plain[i] + plain[i + 1]) / 2 / saving[i] for i in range(3)
        }
        return {
            **throughput,
            "plain_s": sum(plain) / len(plain),
            "plain_least_s": min(plain),
            "plain_most_s": max(plain),
            "plain_slowest_step_s": max(slowest[::2]),
            "saving_slowest_step_s": max(slowest[1::2]),
            "save_call_s": asked / 3,  # of the host, which launches nothing meanwhile
            "written_after_s": written,
            "state_gb": size / 1e9 / self.world.size,
        }

    def _config(
        self,
        log: str,
        *,
        rows: int = 0,
        momentum: Literal["hbm", "host"] = "hbm",
        fp8: bool = False,
        sessions_per_partition: int = 1,
    ) -> TrainConfig:
        small = self.settings.is_small
        rows = rows or self.settings.rows
        dim, layers, heads, width, longest = (16, 2, 2, 8, 64) if small else (1024, 8, 4, 256, 4096)
        # The log was written for a table of settings.rows: a smaller one takes any of its ids.
        ids: Literal["static", "hashed"] = "static" if rows == self.settings.rows else "hashed"
        table = TableConfig(
            num_embeddings=rows,
            dim=8 if small else 128,
            ids=ids,
            features=("item_id", "target_item_id"),
            init_std=0.0,
        )
        return TrainConfig(
            run_dir="none",
            device="cpu" if small else "cuda",
            precision="bf16",
            data=DataConfig(
                log=str(self.settings.logs / log),
                supervise="all",
                max_history_tokens=longest - 2,
                actions={"like": ActionConfig()},
                tasks={"like": TaskConfig(action="like")},
                positive=("share",),  # of which there is none: no rows of targets
                num_items=self.settings.rows - 1,
                sessions_per_partition=sessions_per_partition,
                window="none",
            ),
            embeddings=EmbeddingsConfig(
                tables={"item": table},
                form="sharded",
                sharding=("row_wise",),
                update_rule="row_wise_adagrad" if small else "row_wise_adamw",
                weights="fp16" if rows != self.settings.rows and not small else "fp32",
                momentum=momentum if not small else "hbm",
            ),
            model=ModelConfig(
                dim=dim,
                num_layers=layers,
                hstu=HSTUConfig(
                    num_heads=heads,
                    qk_dim=width,
                    v_dim=width,
                    scaling_length=longest,
                    precision="fp8" if fp8 and not small else "bf16",
                    recompute=("silu",),  # 16 KB a token and layer are there
                    graph_tokens=self.settings.graph_tokens,
                ),
                encoding=EncodingConfig(position="from_start", position_buckets=longest),
                head=HeadConfig(ranking_hidden=(512 if not small else 8,), retrieval=False),
            ),
            optim=OptimConfig(warmup_steps=10),
            eval=EvalConfig(lifetime_auc=False),
        )

    def trainer(self, config: TrainConfig) -> Trainer:
        """Return the trainer of a run, its tables filled."""
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        trainer = Trainer(
            config,
            self.world,
            utc_offset=0,
            sequences_per_step=self.settings.sequences * self.world.size,
        )
        # Rows drawn on the CPU would take minutes; zeros would make arithmetic cooler and faster.
        for part in trainer.tables.checkpoint_state()["tables"].values():
            for shard in part["weight"].local_shards():
                for rows in shard.tensor.detach().split(1 << 20):
                    rows.normal_(std=0.02)
        return trainer

    def _figures(
        self, config: TrainConfig, batches: list[SequenceBatch], seconds: float
    ) -> dict[str, float]:
        each = np.array([flops(config.model, batch.lengths) for batch in batches])
        tokens = sum(batch.num_tokens for batch in batches)
        own = torch.tensor([*each.sum(0), tokens], dtype=torch.float64, device=self.world.device)
        linear, attention, tokens = (self.world.sum(own) / self.world.size).tolist()
        costs = own.new_zeros(self.world.size, len(batches))
        costs[self.world.rank] = torch.from_numpy(each @ [1.0, 3.0])
        costs = self.world.sum(costs)
        peak = peak_flops(self.world.device) or float("nan")
        return {
            "step_s": seconds / len(batches),
            "tflop": (linear + 3.5 * attention) / len(batches) / 1e12,
            "tflops": (linear + 3.5 * attention) / seconds / 1e12,
            "mfu": (linear + 3.5 * attention) / seconds / peak,
            "mfu_3.0": (linear + 3.0 * attention) / seconds / peak,
            "tokens_per_s": tokens / seconds,
            "max_over_mean": float(costs.amax(0).sum() / costs.mean(0).sum()),
        }

    def _slowest(self, loop: "Loop", steps: int) -> float:
        """Return the seconds of the slowest of the last steps, on any rank."""
        slowest = torch.tensor(max(loop.seconds[-steps:]), device=self.world.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest)

    def _barrier(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()


class Loop:
    """The loop of gr.train, a number of steps at a time.

    Attributes:
        seconds: from step to step, by the host's clock: it waits for the device once in each.
    """

    def __init__(self, trainer: Trainer, batches: Iterable[SequenceBatch]) -> None:
        self.trainer = trainer
        self._source = batches
        self._taken: list[SequenceBatch] = []
        self.ahead = trainer.ahead(self._watched())
        self._staged = iter(self.ahead)
        self.seconds: list[float] = []

    def run(self, steps: int) -> list[SequenceBatch]:
        """Train on the next batches; return them as they were read."""
        first = len(self.seconds)
        start = time.perf_counter()
        for staged in itertools.islice(self._staged, steps):
            self.trainer.evaluation.roll(staged.batch.window)
            self.trainer.train_step(staged, self.ahead)
            self.seconds.append(time.perf_counter() - start)
            start += self.seconds[-1]
        return self._taken[first : len(self.seconds)]

    def _watched(self) -> Iterator[SequenceBatch]:
        for batch in self._source:
            self._taken.append(batch)
            yield batch


def _stream(
    config: TrainConfig, world: World, trainer: Trainer | None
) -> Generator[SequenceBatch, None, None]:
    stream = iter(
        SessionStream(
            config.data,
            seed=0,
            rank=world.rank,
            world_size=world.size,
            cost=sequence_costs(config.model),
            load_target=None if trainer is None else trainer.load_target,
        )
    )
    yield from stream


def _check_length(made: list[SequenceBatch], steps: int) -> None:
    if len(made) < steps:
        raise ValueError(f"the log ended after {len(made)} of {steps} steps: write a longer one")


def flops(model: ModelConfig, lengths: Tensor) -> tuple[float, float]:
    """Return the FLOPs of a training step in matrices, and of attention's forward pass.

    All tokens are supervised, and causal: every layer computes every token and pair.

    Args:
        model: the configuration.
        lengths: (B,) tokens of each sequence.
    """
    per_key, per_query, per_pair = layer_flops(model)
    lengths = lengths.double()
    linear = 3.0 * model.num_layers * (per_key + per_query) * float(lengths.sum())
    pairs = float((lengths * (lengths + 1) / 2).sum())
    return linear, float(model.num_layers * per_pair * pairs)
