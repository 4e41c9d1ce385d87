"""kill -9 anywhere, and resume: every event is supervised once, and no bit of a batch changes."""

from random import Random

import pytest

from pipelines.config import FeatureConfig
from pipelines.stream import SessionStream
from tests.e2e.kill import PHASES, Point, attempt, outcome, write_numbered_log
from tests.pipelines.logs import make_config

# What the tests share takes long to make: one worker of pytest-xdist makes it.
pytestmark = pytest.mark.xdist_group("kill")

FADES = FeatureConfig(counter="user", half_life_hours=0.5, column="click", encoding="zscore")
POINTS_PER_PHASE = 8  # of seven phases: 56 points
SAMPLED = 1


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """The log, its usable events, and the configuration of each depth of prefetching."""
    folder = tmp_path_factory.mktemp("numbered")
    events = write_numbered_log(folder)
    configs = [
        make_config(
            *(folder, "merged", "session", "session", "none"),
            num_items=len(events) + 99,
            prefetch=n,
            item_features={"tab": FeatureConfig(), "fades": FADES},
        )
        for n in (0, 2)
    ]
    list(SessionStream(configs[0], seed=0))  # compiles the kernels, for all forks
    return events, configs


@pytest.fixture(scope="module")
def whole(numbered, tmp_path_factory):
    """What a run remembers that nothing interrupted, and how often it passed through each phase."""
    run = tmp_path_factory.mktemp("whole")
    passed = attempt(numbered[1][0], run, 1, None)
    assert passed.keys() == PHASES.keys()
    return outcome(run), passed


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Make blocks, and the batches of a snapshot, so small that kills fall between them."""
    monkeypatch.setattr("pipelines.partition.ROWS_PER_BLOCK", 5)
    monkeypatch.setattr("pipelines.snapshot._USERS_PER_BATCH", 2)


def draw_points(phase, passed, count, random):
    return [
        Point(phase, random.randrange(1, passed[phase] + 1), random.random() < 0.5)
        for _ in range(count)
    ]


def kill_and_resume(phase, count, numbered, whole, tmp_path):
    expected, passed = whole
    assert sorted(expected["events"]) == numbered[0]
    assert expected["rejected"] == 4
    for i, point in enumerate(draw_points(phase, passed, count, Random())):
        run = tmp_path / str(i)
        run.mkdir()
        config = numbered[1][i % 2]
        attempt(config, run, 1, point)
        attempt(config, run, 1, None)
        assert outcome(run) == expected, point


@pytest.mark.parametrize("phase", [p for p in PHASES if p not in ("fsync", "record")])
def test_a_run_killed_at_a_drawn_point_goes_on_bit_for_bit(phase, numbered, whole, tmp_path):
    kill_and_resume(phase, SAMPLED, numbered, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_at_any_point_goes_on_bit_for_bit(phase, numbered, whole, tmp_path):
    kill_and_resume(phase, POINTS_PER_PHASE, numbered, whole, tmp_path)


def kill_on_more_ranks(phases, numbered, whole, tmp_path):
    """Kill on one rank, on two, and finish on four, one partition each."""
    events, (_, config) = numbered
    expected, passed = whole
    random = Random()
    for phase in phases:
        run = tmp_path / phase
        run.mkdir()
        # Ranks in one process share its counts: passes of the phase grow with what is left to do.
        number = random.randrange(1, passed[phase] // 2 + 1)
        attempt(config, run, 1, Point(phase, number, random.random() < 0.5))
        left = max(1, passed[phase] // 4)
        attempt(config, run, 2, Point(phase, random.randrange(1, left + 1), True))
        attempt(config, run, 4, None)
        assert sorted(outcome(run)["events"]) == events, phase
        assert outcome(run)["rejected"] == expected["rejected"]


def test_a_run_goes_on_with_more_ranks(numbered, whole, tmp_path):
    kill_on_more_ranks(["mid-batch", "rename"], numbered, whole, tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_with_more_ranks_from_any_phase(numbered, whole, tmp_path):
    kill_on_more_ranks(PHASES, numbered, whole, tmp_path)
