import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.config import StochasticLengthConfig
from pipelines.stream import SessionStream
from tests.pipelines.logs import MODES, SEED, as_float32, content, logs, make_config, take_apart
from tests.pipelines.oracle import Oracle
from tests.pipelines.session_log import session, write_log


class Unchanging(dict):
    """Histories that do not grow by what is appended to them."""

    def setdefault(self, key, default):
        return list(self.get(key, default))


def frozen_steps(make_oracle):
    """Return (window, sequences) of every step, with the histories of the window's start."""
    windows = [window for window, *_ in make_oracle().steps()]
    growing, frozen = make_oracle(), make_oracle()
    learnt, scored, found = growing.steps(), frozen.steps(), []
    for k, window in enumerate(windows):
        if k == 0 or windows[k - 1] != window:
            frozen.seen = Unchanging(copy.deepcopy(growing.seen))
        found.append((window, next(scored)[2]))
        next(learnt)
    return found


@pytest.mark.parametrize("mode", [MODES[0], MODES[7], MODES[-1]], ids="-".join)
@given(log=logs(), data=st.data())
@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_window_is_scored_with_the_histories_before_it(mode, log, data):
    partitions, histories = log
    if not any(partitions):
        return
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder), partitions, histories)
        short = data.draw(
            st.sampled_from(
                [
                    StochasticLengthConfig(),
                    StochasticLengthConfig(selection="weighted", alpha=1.3),
                ]
            )
        )
        config = make_config(
            folder, *mode, prefetch=data.draw(st.sampled_from([0, 2])), stochastic_length=short
        )
        batches = list(SessionStream(config, seed=SEED, frozen=True))
        plain = [content(b) for b in SessionStream(config, seed=SEED)]
        resumed = [
            (
                b.position,
                [
                    content(x)
                    for x in SessionStream(config, seed=SEED, frozen=True, position=b.position)
                ],
            )
            for b in batches
            if not b.is_frozen
        ]
    # What is learnt from is what it is without frozen evaluation, rejects included.
    assert [content(b) for b in batches if not b.is_frozen] == plain
    unshortened = replace(config, stochastic_length=StochasticLengthConfig())
    expected = frozen_steps(lambda: Oracle(unshortened, partitions, histories, seed=SEED))
    frozen = [b for b in batches if b.is_frozen]
    assert [b.window for b in frozen] == [window for window, _ in expected]
    for batch, (_, sequences) in zip(frozen, expected, strict=True):
        drop = ("clipped", "num_cut", "num_events")
        want = [{k: v for k, v in s.items() if k not in drop} for s in sequences]
        assert [as_float32(s) for s in take_apart(batch, config)] == [as_float32(s) for s in want]
        assert batch.num_rejected == {}
    # All of a window is scored before any of it is learnt from.
    order = [(b.window, not b.is_frozen) for b in batches]
    assert order == sorted(order)
    # Resumed inside a window, nothing is scored twice; at its start, nothing is left out.
    all_content = [content(b) for b in batches]
    for position, rest in resumed:
        done = next(
            i + 1 for i, b in enumerate(batches) if not b.is_frozen and b.position == position
        )
        assert rest == all_content[done:]


def test_a_window_that_goes_on_in_another_segment_is_refused(tmp_path):
    for name, start in (("a", 10), ("b", 3000)):
        write_log(tmp_path / name, [[session(1, 0, [{"t": start, "item": 1}])]])
    config = make_config(tmp_path, *MODES[0])
    SessionStream(config, seed=0)
    with pytest.raises(ValueError, match=r"b: its first sessions belong to the last window"):
        SessionStream(config, seed=0, frozen=True)
