"""What a training step costs on one GPU and on all of a machine.

    python -m gr.bench_training [MEASUREMENT ...] [--gpus N] [--ranks N] [--records FILE]

Starts itself under torchrun on one GPU and on N (all by default), and prints ratios between numbers
of this one command. The steps are those of `gr.trainer.Trainer`, progressive scoring included, on
the batches of `SessionStream`: HSTU of 8 layers, d = 1024, 4 heads of 256, bf16, up to 4096 tokens,
a table of 50 million rows of 128 with row-wise AdamW; layers keep what backward needs
(`recompute: [silu]`). Unless a line says otherwise the batches were
read before: reading is measured in pipelines/bench.py, and here by the line `stream`.

FLOPs are 6 for each parameter of the layers' matrices and token, and 3.5 (as published figures
have it), or 3.0, times those of the two products of attention over the visible pairs.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gr import parallel
from gr.bench_main import attempt
from gr.bench_steps import Bench, Settings
from gr.parallel import World
from gr.train import short_pauses
from pipelines.bench_log import write_bench_log, zipf_lengths

LONGEST = 4096
EXPONENT = 1.2
PARTITIONS = 32
B = 32
"""Sequences of a GPU's batch, or of the mean batch where batches are filled to a budget."""
LIVE = 18
"""Steps of a run with balanced loads until it has what it balances by."""
SEEN = 120
"""Steps until batches of nearly all sizes have come, of each of which graphs are captured."""
Figures = dict[str, float]
Measurement = Callable[[Bench], Figures]


def measure_zipf(bench: Bench) -> Figures:
    """Lengths of Zipf's law, batches filled to equal FLOPs."""
    return bench.rates(bench.filled("zipf"))


def measure_communication(bench: Bench) -> Figures:
    """The same steps, watched by torch's profiler: what NCCL does while nothing else runs."""
    return bench.profile(bench.filled("zipf"))


def measure_fixed(bench: Bench) -> Figures:
    """All sequences of 4096 tokens."""
    return bench.rates(bench.by_rows("fixed"), steps=16)


def measure_fixed_fp8(bench: Bench) -> Figures:
    """The same with the layers' projection in fp8."""
    return bench.rates(bench.by_rows("fixed", fp8=True), steps=16)


def measure_stream(bench: Bench) -> Figures:
    """Batches read while the step before trains, against those of `zipf`, read ahead."""
    return bench.rates(bench.filled("zipf"), warm_up=SEEN)


def measure_momentum(bench: Bench) -> Figures:
    """The whole step with the first moment in host memory, against HBM; fp16 weights."""
    rows = bench.settings.rows * 2 // 5
    configs = {
        momentum: bench.filled("zipf", rows=rows, momentum=momentum) for momentum in ("hbm", "host")
    }
    batches = bench.read(configs["hbm"], 20)
    of = bench.in_turns({momentum: (config, batches) for momentum, config in configs.items()})
    return {"ratio": of["host"]["step_s"] / of["hbm"]["step_s"], **_steps(of)}


def measure_balance(bench: Bench) -> Figures:
    """Batches filled to equal FLOPs, against as many sequences for each rank."""
    configs = {"by_rows": bench.by_rows("zipf"), "filled": bench.filled("zipf")}
    runs = {name: (config, bench.read(config, 30)) for name, config in configs.items()}
    of = bench.in_turns(runs, trainer=bench.trainer(configs["filled"]))
    speedup = of["filled"]["tflops"] / of["by_rows"]["tflops"]
    bound = of["by_rows"]["max_over_mean"]
    return {"speedup": speedup, "bound": bound, "share": speedup / bound, **_steps(of)}


def measure_parts(bench: Bench) -> Figures:
    """What the batches of `balance` take on one GPU, those of one rank after those of another.

    A step need not be proportional to its FLOPs: max / mean of these times is a bound of its own.
    """
    ranks = bench.settings.ranks
    times: dict[str, list[torch.Tensor]] = {"by_rows": [], "filled": []}
    for rank in range(ranks):
        one = Bench(bench.settings, replace(bench.world, rank=rank, size=ranks))
        for name, config in {"by_rows": one.by_rows("zipf"), "filled": one.filled("zipf")}.items():
            times[name].append(bench.alone(config, one.read(config, 30)))
    found: Figures = {"of_ranks": ranks}
    for name, each in times.items():
        seconds = torch.stack(each)
        found[f"{name}_max_over_mean_s"] = float(seconds.amax(0).sum() / seconds.mean(0).sum())
        found[f"{name}_step_s"] = float(seconds.mean())
    return found


def measure_length(bench: Bench) -> Figures:
    """Stochastic length with balanced loads, against plain; four times as many sequences."""
    configs = {
        "plain": bench.stochastic("zipf", balance=False),
        "balanced": bench.stochastic("zipf", balance=True),
    }
    runs = {  # there is a target after two periods of RECALIBRATE
        name: (config, bench.trained_on(config, 24, after=LIVE)) for name, config in configs.items()
    }
    of = bench.in_turns(runs, trainer=bench.trainer(configs["plain"]))
    return {
        # Of equal work: what is drawn differs by a few percent.
        "speedup": of["balanced"]["tflops"] / of["plain"]["tflops"],
        "balanced_tflop": of["balanced"]["tflop"] / of["plain"]["tflop"],
        **_steps(of),
    }


def _steps(of: dict[str, Figures]) -> Figures:
    """Return the times of steps and the loads of runs that took turns."""
    names = ("step_s", "least_step_s", "most_step_s", "slowest_step_s", "max_over_mean")
    return {f"{run}_{name}": figures[name] for run, figures in of.items() for name in names}


def measure_checkpoint(bench: Bench) -> Figures:
    """100 steps that hold one asynchronous checkpoint, three times, against 100 without."""
    return bench.checkpoint(bench.filled("zipf", rows=bench.settings.rows * 2 // 25))


ON_ONE: dict[str, Measurement] = {
    "zipf": measure_zipf,
    "stream": measure_stream,
    "fixed": measure_fixed,
    "fixed_fp8": measure_fixed_fp8,
    "momentum": measure_momentum,
    "parts": measure_parts,
}
ON_ALL: dict[str, Measurement] = {
    "zipf": measure_zipf,
    "communication": measure_communication,
    "balance": measure_balance,
    "length": measure_length,
    "checkpoint": measure_checkpoint,
}


def main() -> None:
    """Measure what is named, all of it by default."""
    names = list(dict.fromkeys([*ON_ONE, *ON_ALL]))
    parser = argparse.ArgumentParser(prog="python -m gr.bench_training")
    parser.add_argument("what", nargs="*", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="0: on CPUs")
    parser.add_argument(
        "--ranks", type=int, default=0, help="whose batches `parts` times; by default --gpus, or 2"
    )
    parser.add_argument("--rows", type=int, default=50_000_000, help="of the table")
    parser.add_argument("--graph-tokens", type=int, default=512, help="0: layers without graphs")
    parser.add_argument("--small", action="store_true", help="a small model, to try it on CPUs")
    parser.add_argument("--records", type=Path, help="JSON lines, appended")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [name for name in options.what if name not in names]
    if unknown:
        parser.error(f"expected measurements of {names}, got {unknown}")
    if not 0 <= options.ranks <= PARTITIONS:
        parser.error(
            f"--ranks must be 1 to {PARTITIONS}, the log's partitions, got {options.ranks}"
        )
    if options.out is None:
        drive(options)
    else:
        work(options)


def drive(options: argparse.Namespace) -> None:
    """Write the logs, start the processes, print the table."""
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder) / "logs"
        ranks = max(1, options.gpus) if not options.small else 2
        options.ranks = options.ranks or max(ranks, 2)
        write_logs(options.folder, options, max(ranks, options.ranks))
        found: dict[str, Figures] = {}
        for size in sorted({1, ranks}):
            wanted = ON_ONE if size == 1 else ON_ALL
            chosen = [name for name in wanted if not options.what or name in options.what]
            if not chosen:
                continue
            out = Path(folder) / f"on_{size}.jsonl"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(size), "-m", "gr.bench_training", *chosen]
            command += ["--ranks", str(options.ranks)]
            command += ["--rows", str(options.rows), "--folder", str(options.folder)]
            command += ["--graph-tokens", str(options.graph_tokens)]
            command += ["--out", str(out), *(["--small"] if options.small else [])]
            status = subprocess.run(command).returncode
            rows = out.read_text().splitlines() if out.exists() else []
            for row in map(json.loads, rows):
                found[f"{row['what']} on {size}"] = row["figures"]
                if options.records is not None:
                    with options.records.open("a") as lines:
                        lines.write(json.dumps(row | {"command": sys.argv[1:]}) + "\n")
            if status:
                print(f"measurements on {size} ended with status {status}", flush=True)
        print("\n".join(table(found, ranks)), flush=True)


def write_logs(folder: Path, options: argparse.Namespace, ranks: int) -> None:
    """Write a log of each kind of lengths, long enough for all steps that are measured."""
    longest = 64 if options.small else LONGEST
    batches = 170 * ranks
    for name, lengths in (
        ("zipf", zipf_lengths(batches * B, EXPONENT, longest)),
        ("fixed", np.full(32 * B, longest)),
    ):
        lengths = 2 * np.maximum(lengths // 2, 1)  # two tokens an event
        write_bench_log(folder / name, lengths, partitions=PARTITIONS, num_items=options.rows - 1)
        np.save(folder / f"{name}.npy", lengths)


def work(options: argparse.Namespace) -> None:
    """Measure on one rank of a group; rank 0 writes what was found."""
    device = "cpu" if options.small else "cuda"
    # A rank that fails alone leaves the others waiting; they must not wait long.
    world = parallel.start(device, needs_group=True, timeout_minutes=2)
    settings = Settings(
        options.folder,
        options.rows,
        B,
        PARTITIONS,
        options.ranks,
        options.small,
        options.graph_tokens,
    )
    wanted = ON_ONE if world.size == 1 else ON_ALL
    failed: list[str] = []
    for name in options.what:
        gc.collect()  # what the last one left, before it is kept from being collected
        figures = None
        with attempt(name, failed), short_pauses():  # most fail on all ranks alike
            figures = wanted[name](Bench(settings, world))
        if figures is not None and world.is_main:
            with options.out.open("a") as lines:
                lines.write(json.dumps(describe(name, figures, world, options.graph_tokens)) + "\n")
            short = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
            print(f"{name} on {world.size}: {short}", flush=True)
    parallel.stop(world)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def describe(name: str, figures: Figures, world: World, graph_tokens: int) -> dict[str, Any]:
    """Return a line of the records."""
    is_gpu = world.device.type == "cuda"
    return {
        "what": name,
        "ranks": world.size,
        "graph_tokens": graph_tokens,
        "figures": {key: round(value, 6) for key, value in figures.items()},
        "gpu": torch.cuda.get_device_name(world.device) if is_gpu else "none",
        "torch": torch.__version__,
        "commit": os.environ.get("GR_COMMIT", ""),
    }


def table(found: dict[str, Figures], ranks: int) -> list[str]:
    """Return the lines of the report: what, target, measured."""
    lines = []

    def line(what: str, target: str, on: str, value: Callable[[Figures], str]) -> None:
        if on in found:
            lines.append(f"{what:66} {target:16} {value(found[on])}")

    one, all_ = "zipf on 1", f"zipf on {ranks}"
    if ranks > 1 and one in found and all_ in found:
        share = found[all_]["tflops"] / found[one]["tflops"]
        lines.append(f"{f'weak scaling 1 -> {ranks}, Zipf lengths':66} {'>= 88 %':16} {share:.1%}")
    line("MFU, one GPU, Zipf lengths; attention at 3.5 (3.0)", ">= 34 %", one, mfu)
    line("MFU, one GPU, fixed 4096", ">= 37 %", "fixed on 1", mfu)
    line("MFU, one GPU, fixed 4096, projection in fp8", "", "fixed_fp8 on 1", mfu)
    line(
        f"exposed communication, {ranks} GPUs (nothing runs)",
        "<= 8 %",
        f"communication on {ranks}",
        lambda x: (
            f"{x['exposed']:.1%} ({x['idle']:.1%}); without waiting for ranks {x['transfer']:.1%}"
            if x
            else "not on CPUs"
        ),
    )
    line(
        "filled against equally many sequences: share of the bound",
        ">= 95 %",
        f"balance on {ranks}",
        lambda x: f"{x['share']:.1%} ({x['speedup']:.3f}x of {x['bound']:.3f}x)",
    )
    line(
        "the same by time: steps of each rank on one GPU, max/mean",
        "",
        "parts on 1",
        lambda x: (
            f"{x['by_rows_max_over_mean_s']:.3f}x of {x['of_ranks']:.0f} ranks; filled "
            f"{x['filled_max_over_mean_s']:.3f}"
        ),
    )
    line(
        "balanced stochastic length against plain",
        ">= 1.05x",
        f"length on {ranks}",
        lambda x: (
            f"{x['speedup']:.3f}x (max/mean {x['plain_max_over_mean']:.3f} to "
            f"{x['balanced_max_over_mean']:.3f})"
        ),
    )
    line("host momentum, whole step", "<= 1.02x", "momentum on 1", lambda x: f"{x['ratio']:.3f}x")
    line(
        "throughput of 100 steps with an asynchronous checkpoint",
        ">= 97 %",
        f"checkpoint on {ranks}",
        lambda x: (
            f"a run's first {x['throughput_1']:.1%}, then {x['throughput_2']:.1%}, "
            f"{x['throughput_3']:.1%} ({x['state_gb']:.1f} GB a rank)"
        ),
    )
    if one in found and "stream on 1" in found:
        share = found["stream on 1"]["tflops"] / found[one]["tflops"]
        lines.append(f"{'the stream as feeder, of batches read ahead':66} {'':16} {share:.1%}")
    return lines


def mfu(figures: Figures) -> str:
    """Return both shares of the peak and the time of a step."""
    shares = f"{figures['mfu']:.1%} ({figures['mfu_3.0']:.1%})"
    return (
        f"{shares}, {1e3 * figures['step_s']:.0f} ms, {figures['tokens_per_s'] / 1e3:.0f}k tokens/s"
    )


if __name__ == "__main__":
    main()
