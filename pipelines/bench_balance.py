"""How even the loads of 8 simulated ranks are: python -m pipelines.bench_balance FOLDER."""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.balance import LoadTarget
from pipelines.batch import SequenceBatch
from pipelines.bench import quickstart_like, write_synthetic_log
from pipelines.config import DataConfig, StochasticLengthConfig
from pipelines.cost import SequenceCost
from pipelines.stream import SessionStream

RANKS = 8
# Training of HSTU with d = 512, 3 layers, 4 heads of 128 (gr.flops.sequence_cost), in MFLOP.
COST = SequenceCost(
    per_token=18.874368, per_tail_token=4.718592, per_pair=0.012288, per_tail_pair=0.006144
)


def cost_of(batch: SequenceBatch) -> float:
    """Return what training on a batch costs, from its finished sequences."""
    length, start = batch.lengths.double(), batch.session_start.double()
    session = length - start
    pairs = length * (length + 1) / 2
    tail = session + (start > 0)
    tail_pairs = pairs - (length - tail) * (length - tail + 1) / 2
    parts = (length, tail, pairs, tail_pairs)
    return sum(float(c * x.sum()) for c, x in zip(COST, parts, strict=True))


def loads(config: DataConfig) -> NDArray[np.float64]:
    """Return (steps, ranks): the cost of each batch."""
    lengths = config.stochastic_length
    target = LoadTarget(lengths.recalibrate_steps) if lengths.balance else None
    streams: list[Iterator[SequenceBatch]] = [
        iter(SessionStream(config, seed=0, rank=r, world_size=RANKS, cost=COST, load_target=target))
        for r in range(RANKS)
    ]
    rows = []
    for step, batches in enumerate(zip(*streams, strict=True)):
        rows.append([cost_of(batch) for batch in batches])
        if target is not None:
            expected = sum(batch.expected_load for batch in batches)
            target.record(step, expected, batches[0].num_sessions)
    return np.array(rows)


def report(name: str, load: NDArray[np.float64]) -> None:
    """Print how far the dearest rank is above the mean."""
    busy = load[(load > 0).all(1)]
    each = np.sort(busy.max(1) / busy.mean(1))
    print(
        f"{name:44s} {len(load):5d} steps, mean {load.mean() / 1e3:7.1f} GFLOP, "
        f"sum of max / sum of mean {load.max(1).sum() / load.mean(1).sum():.3f}, "
        f"median step {np.median(each):.3f}, 95 % {each[int(0.95 * len(each))]:.3f}"
    )


if __name__ == "__main__":
    log = Path(sys.argv[1]) / "zipf"
    if not log.exists():
        write_synthetic_log(
            log, partitions=64, sessions=200_000, users=20_000, mean_events=4.0, skew=1.0
        )
    base = quickstart_like(
        log, max_history_tokens=2048, context="none", num_negatives=0, prefetch=0, window="none"
    )
    for per_partition in (4, 8, 16):
        by_rows = replace(base, sessions_per_partition=per_partition)
        load = loads(by_rows)
        report(f"{per_partition * 64 // RANKS} sessions a rank", load)
        even = float(load[(load > 0).all(1)].mean())
        report("  filled to as many FLOPs", loads(replace(base, fill="flops", budget=even)))
        for balance in (False, True):
            lengths = StochasticLengthConfig(
                selection="weighted", balance=balance, recalibrate_steps=10
            )
            name = "load-balanced" if balance else "plain"
            report(
                f"  {name} stochastic length",
                loads(replace(by_rows, stochastic_length=lengths)),
            )
    start = time.perf_counter()
    SessionStream(base, seed=0)
    plain = time.perf_counter() - start
    start = time.perf_counter()
    SessionStream(replace(base, fill="flops", budget=1e6), seed=0, cost=COST)
    print(f"planning 200000 sessions: {time.perf_counter() - start - plain:.3f} s")
