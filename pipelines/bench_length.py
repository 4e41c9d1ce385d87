"""What stochastic length costs and saves: python -m pipelines.bench_length FOLDER.

Times are of the CPU: the machine may be shared.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines.bench import quickstart_like, write_synthetic_log
from pipelines.config import ActionConfig, DataConfig, StochasticLengthConfig
from pipelines.gather import Gathered
from pipelines.history import ANCHOR, FIRST_CONTEXT, NUM_EVENTS, NUM_HISTORY, SESSION, USER, Ints
from pipelines.stochastic_length import draw_lengths, length_rules, shorten
from pipelines.stream import SessionStream

Selected = Literal["none", "greedy", "random", "weighted"]
SELECTIONS: tuple[Selected, ...] = ("none", "greedy", "random", "weighted")


def made_sequences(lengths: Ints, num_ints: int, num_codes: int) -> Gathered:
    """Return sequences of `lengths` events, the last of which is the session."""
    rows = np.zeros((len(lengths), FIRST_CONTEXT), np.int64)
    rows[:, USER], rows[:, SESSION] = np.arange(len(lengths)), 7
    rows[:, NUM_HISTORY], rows[:, NUM_EVENTS], rows[:, ANCHOR] = lengths - 1, 1, 10_000_000
    total = int(lengths.sum())
    ints = np.ones((total, num_ints), np.int64)
    ints[:, 1] = np.arange(total) % 9_000_000
    return Gathered(
        rows, ints, np.ones((total, num_codes), np.uint8), np.ones((len(rows), 1), np.float32), 0
    )


def time_shorten(lengths: Ints, longest: int, num_ints: int, num_codes: int) -> None:
    """Print microseconds a sequence and tokens kept, for each selection."""
    for selection in SELECTIONS[1:]:
        config = DataConfig(
            log="none",
            layout="merged",
            num_items=1,
            max_history_tokens=longest,
            stochastic_length=StochasticLengthConfig(selection=selection),
        )
        rules = length_rules(config, 0)
        assert rules is not None
        best, kept_tokens = float("inf"), 0
        for _ in range(5):
            made = made_sequences(lengths, num_ints, num_codes)
            start = time.process_time()
            short = shorten(made, draw_lengths(made.sequences, rules), rules)
            best = min(best, time.process_time() - start)
            kept_tokens = len(short.ints)
        print(
            f"in memory  N={longest} columns={num_ints}+{num_codes} {selection:8s} "
            f"{best / len(lengths) * 1e6:6.2f} us/sequence, {kept_tokens / lengths.sum() - 1:+.1%} "
            f"of {lengths.sum()} tokens"
        )


def squares(lengths: Ints, longest: int) -> None:
    """Print the mean of n^2 after the draw beside the formula's."""
    config = DataConfig(
        log="none",
        layout="merged",
        num_items=1,
        max_history_tokens=longest,
        stochastic_length=StochasticLengthConfig(selection="greedy"),
    )
    rules = length_rules(config, 0)
    assert rules is not None
    rows = made_sequences(lengths, 2, 1).sequences
    after = draw_lengths(rows, rules) + 1.0
    p = np.where(lengths <= rules.threshold, 1.0, rules.whole_weight / lengths.astype(float) ** 2)
    short = np.minimum(lengths, rules.threshold)
    for power, name in ((1, "tokens"), (2, "E[n^2]")):
        expected = (p * lengths.astype(float) ** power + (1 - p) * short**power).mean()
        print(
            f"N={longest} alpha=1.6 {name}: whole {(lengths.astype(float) ** power).mean():.1f}, "
            f"found {(after**power).mean():.1f}, formula {expected:.1f}"
        )


def time_stream(folder: Path) -> None:
    """Print microseconds a session of a whole pass, for each selection, the best of 3."""
    log = folder / "long"
    if not log.exists():
        write_synthetic_log(log, sessions=60_000, users=2_000, mean_events=8.0, history=450)
    four_columns = DataConfig(
        log=str(log),
        layout="merged",
        num_items=7500,
        max_history_tokens=512,
        sessions_per_partition=9,
        prefetch=0,
        actions={"is_click": ActionConfig()},
    )
    features = quickstart_like(log, max_history_tokens=1024, prefetch=0)
    for name, config in (("four columns", four_columns), ("quickstart features", features)):
        best = dict.fromkeys(SELECTIONS, float("inf"))
        tokens = {}
        for _ in range(3):
            for selection in SELECTIONS:
                changed = with_selection(config, selection)
                start = time.process_time()
                batches = list(count(SessionStream(changed, seed=0)))
                best[selection] = min(best[selection], time.process_time() - start)
                tokens[selection] = sum(batches)
        for selection in SELECTIONS:
            us = best[selection] / 60_000 * 1e6
            print(
                f"stream, {name}: {selection:8s} {us:6.2f} us/session "
                f"({us - best['none'] / 60_000 * 1e6:+.2f}), {tokens[selection]} tokens"
            )


def count(stream: SessionStream) -> Iterator[int]:
    for batch in stream:
        yield batch.num_tokens


def with_selection(config: DataConfig, selection: Selected) -> DataConfig:
    return replace(config, stochastic_length=StochasticLengthConfig(selection=selection))


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    tail = np.minimum(rng.lognormal(np.log(400), 1.3, 20_000), 4096).astype(np.int64) + 2
    for num_ints, num_codes in ((2, 2), (6, 5)):
        time_shorten(np.full(20_000, 452), 512, num_ints, num_codes)
        time_shorten(tail, 4096, num_ints, num_codes)
    squares(np.tile(tail, 10), 4096)
    time_stream(Path(sys.argv[1]))
