import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gr import bench_steps
from gr.bench_steps import Bench, Settings, flops
from gr.bench_trace import covered, device_intervals, transfer, waits
from gr.bench_training import measure_parts
from gr.flops import training_flops
from gr.parallel import World
from gr.sequence import sequence_info
from pipelines.bench_log import write_bench_log, zipf_lengths
from pipelines.stream import SessionStream

ROOT = Path(__file__).parents[2]
TOKENS = np.array([2, 64, 8, 40, 4, 2, 64, 10, 30, 6, 64, 2])


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    write_bench_log(folder / "zipf", TOKENS, partitions=4, num_items=999)
    np.save(folder / "zipf.npy", TOKENS)
    return folder


def bench(logs):
    settings = Settings(logs, 1000, 4, 4, ranks=2, is_small=True)
    return Bench(settings, World(0, 1, torch.device("cpu")))


def test_a_log_has_the_lengths_that_were_asked_for(logs):
    config = bench(logs).by_rows("zipf")
    batches = list(SessionStream(config.data, seed=0))
    # A global batch takes the next sequence of each partition.
    assert [batch.lengths.tolist() for batch in batches] == TOKENS.reshape(3, 4).tolist()
    for batch in batches:
        assert batch.num_tokens == 2 * len(batch.ranking_positions)
        assert len(batch.retrieval_positions) == 0
        # Of every token a loss is read, or it stands before one that is: all layers compute all.
        info = sequence_info(batch)
        assert int(info.tail_offsets[-1]) == batch.num_tokens
        linear, attention = flops(config.model, batch.lengths)
        assert linear + 3 * attention == pytest.approx(training_flops(config.model, info))


def test_a_budget_is_that_of_the_mean_batch(logs):
    config = bench(logs).filled("zipf")
    linear, attention = flops(config.model, torch.from_numpy(TOKENS))
    assert config.data.budget == pytest.approx((linear + 3 * attention) / 3)
    batches = list(SessionStream(config.data, seed=0))
    assert sum(batch.num_sequences for batch in batches) == len(TOKENS)


def test_runs_that_take_turns_see_the_same_machine(logs, monkeypatch):
    """A machine that slows down by a tenth of a second a step."""
    now, taken = [0.0], []

    class Loop:
        def __init__(self, trainer, batches):
            self.cost, self.batches, self.seconds = trainer.cost, iter(batches), []

        def run(self, steps):
            for _ in range(steps):
                self.seconds.append(self.cost + 0.1 * len(taken))
                now[0] += self.seconds[-1]
                taken.append(self.cost)
            return list(itertools.islice(self.batches, steps))

    monkeypatch.setattr(bench_steps, "Loop", Loop)
    monkeypatch.setattr(bench_steps.time, "perf_counter", lambda: now[0])
    some = bench(logs)
    monkeypatch.setattr(some, "_barrier", lambda: None)
    monkeypatch.setattr(some, "_slowest", lambda loop, steps: max(loop.seconds[-steps:]))
    costs = {"slow": 3.0, "fast": 1.0}
    built = []

    def trainer(config):
        built.append(config)
        return SimpleNamespace(cost=costs.get(config.run_dir, 0.0), load_target=None)

    monkeypatch.setattr(some, "trainer", trainer)
    config = some.by_rows("zipf")
    batches = some.read(config, 2)
    runs = {name: (replace(config, run_dir=name), batches) for name in costs}
    found = some.in_turns(runs, rounds=2)
    assert taken == [3, 3, 1, 1, *[3, 3], *[1, 1], *[1, 1], *[3, 3]]
    # The steps after those that warm up are 4 to 11; each run has those of a mean of 7.5.
    assert found["slow"]["step_s"] == pytest.approx(3 + 0.75)
    assert found["fast"]["step_s"] == pytest.approx(1 + 0.75)
    assert found["slow"]["least_step_s"] == pytest.approx(3 + 0.45)
    assert found["slow"]["most_step_s"] == pytest.approx(3 + 1.05)
    assert found["slow"]["slowest_step_s"] == pytest.approx(3 + 1.1)
    assert found["fast"]["tflops"] * 1.75 == pytest.approx(found["slow"]["tflops"] * 3.75)
    assert found["fast"]["tflops"] * 1.75 == pytest.approx(found["fast"]["tflop"])
    assert built == [config for config, _ in runs.values()]
    graphs = replace(
        config, model=replace(config.model, hstu=replace(config.model.hstu, graph_tokens=8))
    )
    made = some.trained_on(graphs, 2, after=1)
    assert [x.lengths.tolist() for x in made] == TOKENS.reshape(3, 4).tolist()[1:]
    assert built[-1] == config  # launched
    for read in (lambda: some.read(config, 4), lambda: some.trained_on(config, 3, after=1)):
        with pytest.raises(ValueError, match="the log ended after 3 of 4 steps"):
            read()


def test_parts_are_what_each_rank_would_take_by_itself(logs, monkeypatch):
    """A step takes two seconds, and one more for each token; rounds differ, the first most."""
    lengths = {
        "by_rows": [[[2, 64], [8, 40], [30]], [[4, 2], [64, 10], [6, 6, 6]]],
        "filled": [[[64], [8, 30], [3]], [[50, 9], [12], [20]]],
    }
    some = bench(logs)

    def cost(tokens):
        return 2.0 + sum(tokens)

    class Loop:
        def __init__(self, trainer, batches):
            self.batches, self.seconds = iter(batches), []

        def run(self, steps):
            late = 3.0 if not self.seconds else 0.5 if len(self.seconds) == steps else -0.5
            some = list(itertools.islice(self.batches, steps))
            self.seconds += [late + cost(batch.lengths.tolist()) for batch in some]

    monkeypatch.setattr(bench_steps, "Loop", Loop)
    monkeypatch.setattr(some, "trainer", lambda config: None)

    def read(one, config, steps):
        name = "filled" if config.data.fill == "flops" else "by_rows"
        assert one.world.size == 2
        return [SimpleNamespace(lengths=torch.tensor(n)) for n in lengths[name][one.world.rank]]

    monkeypatch.setattr(Bench, "read", read)
    found = measure_parts(some)
    for name, (first, second) in lengths.items():
        pairs = [(cost(a), cost(b)) for a, b in zip(first, second, strict=True)]
        slower, mean = sum(map(max, pairs)), sum(map(sum, pairs)) / 2
        assert found[f"{name}_max_over_mean_s"] == pytest.approx(slower / mean, rel=1e-12)
        assert found[f"{name}_step_s"] == pytest.approx(mean / 3)
    assert found["of_ranks"] == 2


@pytest.mark.gpu
def test_steps_are_timed_by_the_clock_of_the_gpu(logs):
    """The host has launched them all long before the GPU comes to their end."""
    cycles = iter([2 * 10**7, 6 * 10**7, 2 * 10**7])
    loop = SimpleNamespace(run=lambda steps: torch.cuda._sleep(next(cycles)))
    some = Bench(bench(logs).settings, World(0, 1, torch.device("cuda")))
    first, second, third = some._each_step(loop, 3)
    assert second / first == pytest.approx(3, rel=0.2)
    assert third / first == pytest.approx(1, rel=0.2)


def test_lengths_follow_the_law_up_to_the_longest():
    lengths = zipf_lengths(200_000, 1.2, 4096)
    zeta = (np.arange(1, 10**6) ** -1.2).sum() + 10 ** (6 * -0.2) / 0.2
    assert np.mean(lengths == 1) == pytest.approx(1 / zeta, abs=0.005)
    tail = 1 - (np.arange(1, 4096) ** -1.2).sum() / zeta
    assert np.mean(lengths == 4096) == pytest.approx(tail, abs=0.005)


intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=12)


def test_what_a_rank_waits_for_others_is_no_transfer():
    # Two collectives; rank 1 comes late to the first, rank 0 to the second.
    ranks = [[(6.0, 7.0), (0.0, 5.0)], [(3.0, 5.0), (5.0, 8.0)]]
    assert transfer(ranks, [(0.0, 10.0)]) == pytest.approx((2.0 + 1.0) / 10)
    assert math.isnan(transfer([[(0.0, 1.0)], []], [(0.0, 10.0)]))


@given(intervals, intervals)
def test_waiting_against_a_count_of_seconds(communication, others):
    def spans(drawn):
        return [(float(start), float(start + length)) for start, length in drawn]

    def seconds(drawn):
        return {s for start, length in drawn for s in range(start, start + length)}

    a, b = seconds(communication), seconds(others)
    assert covered(spans(communication)) == len(a)
    every = [*spans(communication), *spans(others)]
    span = max((end for _, end in every), default=0) - min((s for s, _ in every), default=0)
    if span:
        found = waits(spans(communication), spans(others))
        assert found["exposed"] == pytest.approx(len(a - b) / span)
        assert found["idle"] == pytest.approx(1 - len(a | b) / span)


def test_what_a_trace_calls_communication():
    def event(name, cat="kernel"):
        return {"name": name, "cat": cat, "ts": 5, "dur": 2}

    events = [event("ncclDevKernel_AllReduce"), event("gemm"), event("Memcpy", "gpu_memcpy")]
    communication, others = device_intervals([*events, {"name": "python", "cat": "cpu_op"}])
    assert communication == [(5.0, 7.0)]
    assert len(others) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_of_it_runs_on_cpus():
    command = [sys.executable, "-m", "gr.bench_training", "--small", "--rows", "20000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for what in (
        "weak scaling 1 -> 2",
        "share of the bound",
        "by time",
        "host momentum",
        "checkpoint",
    ):
        assert what in done.stdout
    assert "failed" not in done.stderr
