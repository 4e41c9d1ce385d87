"""Load-balanced stochastic length: chances as without it, loads closer to each other."""

import numpy as np
import pytest

from pipelines.balance import MOST_SHIFT, LoadTarget, balance_lengths
from pipelines.config import DataConfig, StochasticLengthConfig
from pipelines.cost import TOKENS, SequenceCost, cost_rules
from pipelines.history import FIRST_CONTEXT, NUM_EVENTS, NUM_HISTORY, SESSION, USER
from pipelines.stochastic_length import draw_lengths, length_rules
from pipelines.stream import SessionStream
from tests.pipelines.logs import MERGED_MODES, MODES, make_config
from tests.pipelines.session_log import session, write_log
from tests.pipelines.test_stream import content

N = 4096
COST = SequenceCost(1000.0, 0.0, 1.0, 0.0)
CONFIG = DataConfig(
    log="none",
    layout="merged",
    anchor="session",
    num_items=1,
    max_history_tokens=N,
    stochastic_length=StochasticLengthConfig(selection="greedy", balance=True),
)
LENGTHS, COSTS = length_rules(CONFIG, 0), cost_rules(CONFIG, COST)


def make_rows(num_history, first_user=0):
    rows = np.zeros((len(num_history), FIRST_CONTEXT), np.int64)
    rows[:, USER] = first_user + np.arange(len(rows))
    rows[:, SESSION], rows[:, NUM_HISTORY], rows[:, NUM_EVENTS] = 1, num_history, 1
    return rows


def cost_by_hand(n):
    """A candidate sees n events and itself."""
    n = np.asarray(n, float)
    return 1000 * (n + 1) + n * (n + 1) / 2 + n + 1


def chance_by_hand(n):
    return np.where(n + 1 <= 776, 1.0, N**1.6 / (n + 1.0) ** 2)


HISTORY = np.array([3000, 10, 900, 776, 1500, 1501, 2000, 775, 1200, 1900, 850, 600, 1000, 800])
HISTORY = np.append(np.tile(HISTORY, 3), [3500, 4095])


@pytest.mark.parametrize("shift", [None, 0.7, 1.25])
def test_each_sequence_stays_whole_with_its_chance(shift):
    chance, trials = chance_by_hand(HISTORY), 1500
    cut = np.where(HISTORY + 1 <= 776, HISTORY, 775)
    gain = cost_by_hand(HISTORY) - cost_by_hand(cut)
    shifted = chance if shift is None else np.where(gain > 0, np.minimum(1, shift * chance), 1)
    goal = cost_by_hand(cut).sum() + (shifted * gain).sum()
    stays, loads = np.zeros(len(HISTORY)), []
    for trial in range(trials):
        rows = make_rows(HISTORY, first_user=trial * 100)
        kept, expected = balance_lengths(rows, LENGTHS, COSTS, None if shift is None else goal)
        assert set(kept[kept < HISTORY]) <= {775}
        assert expected == pytest.approx(cost_by_hand(cut).sum() + (chance * gain).sum())
        stays += kept == HISTORY
        loads.append(cost_by_hand(kept).sum())
    deviation = np.sqrt(shifted * (1 - shifted) * trials)
    assert (np.abs(stays - shifted * trials) <= 4 * deviation + 1e-9 * trials).all()
    assert np.abs(np.array(loads) - goal).max() <= gain.max()
    assert np.std(loads) < 0.75 * np.sqrt((shifted * (1 - shifted) * gain**2).sum())


def test_the_shift_is_bounded():
    chance = chance_by_hand(HISTORY)
    for target, shift in ((0.0, 1 / MOST_SHIFT), (1e12, MOST_SHIFT)):
        stays = np.zeros(len(HISTORY))
        for trial in range(600):
            rows = make_rows(HISTORY, first_user=trial * 100)
            stays += balance_lengths(rows, LENGTHS, COSTS, target)[0] == HISTORY
        expected = np.where(chance < 1, np.minimum(1, shift * chance), 1)
        assert np.abs(stays / 600 - expected).max() < 4.5 * np.sqrt(0.25 / 600)


def simulate(num_ranks, num_steps, per_rank):
    """Return loads balanced and plain (steps, ranks), and (history, stayed whole) of all."""
    rng = np.random.default_rng(3)
    target, loads, drawn = LoadTarget(period=8), [], []
    for step in range(num_steps):
        loads.append([])
        recorded = 0.0
        goal = target.at(step)
        for rank in range(num_ranks):
            history = np.minimum(rng.lognormal(np.log(700), 1.2, per_rank), N).astype(np.int64)
            rows = make_rows(history, first_user=(step * num_ranks + rank) * per_rank)
            kept, load = balance_lengths(rows, LENGTHS, COSTS, goal and goal * per_rank)
            plain = draw_lengths(rows, LENGTHS)
            loads[-1].append((cost_by_hand(kept).sum(), cost_by_hand(plain).sum()))
            recorded += load
            if goal is not None:
                drawn.append((history, kept == history))
        target.record(step, recorded, per_rank * num_ranks)
    return np.array(loads[16:]).transpose(2, 0, 1), map(np.concatenate, zip(*drawn, strict=True))


def test_ranks_are_balanced_and_chances_as_they_were():
    (balanced, plain), (history, whole) = simulate(num_ranks=8, num_steps=116, per_rank=256)
    ratio = [float((x.max(1) / x.mean(1)).mean()) for x in (balanced, plain)]
    assert ratio[0] < 1.02 < 1.08 < ratio[1]
    assert balanced.mean() == pytest.approx(plain.mean(), rel=0.01)
    chance = chance_by_hand(history)
    assert whole[chance == 1].all()
    for low, high in (
        (776, 900),
        (900, 1200),
        (1200, 1800),
        (1800, 2700),
        (2700, 4096),
        (4096, 4097),
    ):
        among = (history >= low) & (history < high)
        expected = chance[among].mean()
        deviation = np.sqrt((chance[among] * (1 - chance[among])).sum()) / among.sum()
        # 2 %: a batch that has more long sequences than others keeps fewer of them.
        assert abs(whole[among].mean() - expected) < 4 * deviation + 0.02 * expected


def test_a_target_is_that_of_two_periods_ago():
    target = LoadTarget(period=3)
    for step in range(12):
        period = step // 3
        assert target.at(step) == (None if period < 2 else (period - 2) * 10.0)
        restored = LoadTarget(period=3)
        restored.load_state(target.state())
        assert [restored.at(s) for s in range(step, step + 3)] == [
            target.at(s) for s in range(step, step + 3)
        ]
        target.record(step, load=period * 40.0, num_sessions=4)


def test_a_resumed_stream_balances_as_the_first(tmp_path):
    rows = [
        [
            session(9 * (n % 5) + p, n, [{"t": 10 * n, "item": 1, "click": True}] * (1 + n % 3))
            for n in range(80)
        ]
        for p in range(2)
    ]
    write_log(tmp_path, rows)
    lengths = StochasticLengthConfig(
        selection="random", alpha=1.3, balance=True, recalibrate_steps=6
    )
    config = make_config(
        tmp_path, *MODES[0], max_history_tokens=30, stochastic_length=lengths, prefetch=2
    )

    def read(position=None, state=(), stop=10**9):
        target = LoadTarget(lengths.recalibrate_steps)
        target.load_state(list(state))
        batches = []
        stream = SessionStream(
            config, seed=0, position=position, cost=COST, load_target=target, world_size=2
        )
        for batch in stream:
            batches.append(batch)
            # As if the other rank had 1.5 times the load.
            load = 2.5 * batch.expected_load
            target.record(batch.position.step - 1, load, batch.num_sessions)
            if batch.position.step == stop:
                break
        return batches, target.state()

    whole, _ = read()
    assert len(whole) == 40
    assert sum(batch.num_sessions for batch in whole) == 160
    for stop in (5, 13, 20, 29):
        begun, state = read(stop=stop)
        rest, _ = read(begun[-1].position, state)
        assert [content(b) for b in begun + rest] == [content(b) for b in whole]
    untargeted = list(SessionStream(config, seed=0, cost=COST, world_size=2))
    differ = [content(a) != content(b) for a, b in zip(whole, untargeted, strict=True)]
    assert not any(differ[:12])
    assert any(differ[12:])


@pytest.mark.parametrize("mode", MERGED_MODES[:4], ids="-".join)
def test_tokens_of_series_are_part_of_the_load(tmp_path, mode):
    rows = [
        session(1, n, [{"t": 10 * n, "item": 1, "click": True}] * (1 + n % 3))
        | {"context": {"country": n // 2 % 5, "age": 20.0 + 30 * (n % 3 > 0)}}
        for n in range(40)
    ]
    write_log(tmp_path, [rows])

    def read(max_length):
        lengths = StochasticLengthConfig(
            selection="greedy", alpha=2.0, max_length=max_length, balance=True
        )
        config = make_config(
            tmp_path, *mode, max_history_tokens=60, stochastic_length=lengths, window="none"
        )
        return list(SessionStream(config, seed=0, cost=TOKENS))

    whole = read(max_length=1000)  # more than any sequence has: all stay whole
    assert sum(batch.num_tokens - 2 * batch.num_sequences for batch in whole) > 0
    for batch in whole:
        assert batch.expected_load == batch.num_tokens
    for limit in (20, 33):
        for batch, of_whole in zip(read(limit), whole, strict=True):
            least = most = 0.0
            for n, kept in zip(of_whole.lengths.tolist(), batch.lengths.tolist(), strict=True):
                p = 1.0 if n <= limit else limit**2 / n**2
                assert kept == n or kept <= limit
                # The cut has the most events that fit, so it lacks less than one with its series.
                longest = min(limit, n)
                least += p * n + (1 - p) * (longest if p == 1 else longest - 4)
                most += p * n + (1 - p) * longest
            assert least - 1e-9 <= batch.expected_load <= most + 1e-9
