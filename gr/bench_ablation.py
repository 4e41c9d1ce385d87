"""What a step of each variant of a sweep takes, on its own log: time and memory on one GPU.

    python -m gr.bench_ablation SWEEP_FOLDER FIRST [--skip N] [--steps N] [--records FILE]

Reads the configurations that a sweep left (`python -m gr.ablation` reads its metrics), and trains a
new model of each on the same batches from within the log. `step` is a whole step of `gr train`,
launched by the host, its reading of the log apart; `scoring` a batch scored on whole sequences.
`encoder` is the encoder alone as CUDA graphs: forward, backward and AdamW, or a forward pass.
Times are medians.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import torch

from gr import parallel
from gr.ablation import in_order, read_variants
from gr.bench_encoders import GIB, Figures, Shape, Stack, free, median_ms, replayed_ms
from gr.bench_main import attempt, report
from gr.bench_steps import Loop
from gr.config import TrainConfig
from gr.config_io import load_config
from gr.evaluate import scored_data
from gr.flops import sequence_costs
from gr.hstu import kept_history
from gr.logs import open_log
from gr.mixture import mixture_groups
from gr.parallel import World
from gr.report import markdown_table
from gr.runlog import CONFIG
from gr.sequence import sequence_info
from gr.trainer import Trainer
from pipelines.batch import SequenceBatch
from pipelines.stream import SessionStream


def measure_steps(config: TrainConfig, *, skip: int, steps: int) -> Figures:
    """Return times and memory of whole steps of one variant.

    Args:
        config: of a run.
        skip: batches of the log before those that are timed: histories are short at its start.
        steps: batches that are timed.

    Raises:
        ValueError: if the log ends before.
    """
    with parallel.joined(config) as world:
        free()
        before = _memory(world)
        source = open_log(config.data)
        trainer = Trainer(
            config,
            world,
            utc_offset=source.utc_offset,
            sequences_per_step=source.sequences_per_step,
        )
        trained, scored = _batches(config, skip, steps)
        # The first time compiles kernels, and makes the moments of the optimizers.
        loop = Loop(trainer, chain(trained, trained))
        loop.run(steps)
        standing = _memory(world)
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loop.run(steps)
        peak = _memory(world, at_most=True)
        found = {
            "step_ms": 1e3 * statistics.median(loop.seconds[-steps:]),
            "step_gib": (peak - standing) / GIB,
            "standing_gib": (standing - before) / GIB,
        }
        for batch in scored:
            trainer.score_step(batch)
        calls = {str(i): (lambda b=batch: trainer.score_step(b)) for i, batch in enumerate(scored)}
        found["scoring_ms"] = statistics.median(median_ms(calls, rounds=2, warm_up=0).values())
    return found


def measure_encoder(config: TrainConfig, *, skip: int, steps: int) -> Figures:
    """Return times of one variant's encoder, on batches as `measure_steps` takes them."""
    with parallel.joined(config) as world:
        free()
        trained, scored = _batches(config, skip, steps)
        return {
            "encoder_ms": _encoder_ms(config, trained, world, "train"),
            "encoder_forward_ms": _encoder_ms(config, scored, world, "infer"),
        }


def _batches(
    config: TrainConfig, skip: int, steps: int
) -> tuple[list[SequenceBatch], list[SequenceBatch]]:
    """Return batches to train on, and the same sequences as they are scored: whole."""
    lots = []
    for data in (config.data, scored_data(config.data)):
        stream = SessionStream(data, seed=config.seed, cost=sequence_costs(config.model))
        lots.append(list(islice(stream, skip, skip + steps)))
        if len(lots[-1]) < steps:
            raise ValueError(
                f"{data.log} has fewer than {skip + steps} batches: skip or time fewer, with "
                "--skip and --steps"
            )
    trained, scored = lots
    return trained, scored


def _encoder_ms(
    config: TrainConfig,
    batches: Sequence[SequenceBatch],
    world: World,
    kind: Literal["train", "infer"],
) -> float:
    """Return the median over eight of the batches: each is a graph of its own."""
    model = config.model
    shape = Shape(dim=model.dim, num_layers=model.num_layers, device=world.device.type)
    groups, keep = mixture_groups(model, config.data), kept_history(model)
    times = []
    for batch in batches[:: max(1, len(batches) // 8)]:
        info = sequence_info(batch.to(world.device), keep_history=keep, groups=groups)
        times.append(replayed_ms({"": Stack(model, info, shape)}, kind)[""])
    return statistics.median(times)


def _memory(world: World, *, at_most: bool = False) -> int:
    if world.device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() if at_most else torch.cuda.memory_allocated()


def table(found: Mapping[str, Figures]) -> str:
    """Return the figures of all variants in Markdown, shares of the first's beside the times."""
    first = next(iter(found.values()))

    def time(of: Figures, name: str) -> str:
        return (
            f"{of[name]:.3g} ({of[name] / first[name]:.2f})" if name in of and name in first else ""
        )

    names = ("step_ms", "encoder_ms", "scoring_ms", "encoder_forward_ms")
    sizes = ("step_gib", "standing_gib")
    rows = [
        [
            variant,
            *(time(of, x) for x in names),
            *(f"{of[x]:.3f}" if x in of else "" for x in sizes),
        ]
        for variant, of in found.items()
    ]
    head = ["variant", "step, ms", "its encoder", "scoring a batch, ms", "its encoder"]
    return markdown_table([*head, "GiB of a step", "GiB of tables and weights"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and append the records.

    Raises:
        SystemExit: at the end, if a measurement failed.
    """
    parser = argparse.ArgumentParser(prog="python -m gr.bench_ablation")
    parser.add_argument("folder", help="of the sweep")
    parser.add_argument("first", help="variant that the others are compared with")
    parser.add_argument("--skip", type=int, default=600, help="batches before those timed")
    parser.add_argument("--steps", type=int, default=40, help="batches timed")
    parser.add_argument("--records", type=Path, help="JSON lines, appended")
    options = parser.parse_args(argv)
    found: dict[str, Figures] = {}
    failed: list[str] = []
    for name, runs in in_order(read_variants(options.folder), options.first):
        config, _ = load_config(TrainConfig, runs[min(runs)].path / CONFIG)
        of = found.setdefault(name, {})
        for measure in (measure_steps, measure_encoder):
            with attempt(f"{measure.__name__} of {name}", failed):
                of |= measure(config, skip=options.skip, steps=options.steps)
        report(name, of, options.records)
    print(table(found))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
