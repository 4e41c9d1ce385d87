import itertools
import threading

import pytest

from pipelines.prefetch import prefetch


class Source:
    """An endless generator that knows how far it was asked and whether it was closed."""

    def __init__(self, fail_at=None):
        self.made, self.closed, self.threads = 0, False, set()
        self.fail_at = fail_at

    def items(self):
        try:
            for number in itertools.count():
                if number == self.fail_at:
                    raise ValueError("broken at the source")
                self.threads.add(threading.current_thread().name)
                self.made = number + 1
                yield number
        finally:
            self.closed = True


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.timeout(20)
def test_closing_stops_an_endless_source(depth):
    source = Source()
    before = threading.active_count()
    ahead = prefetch(source.items(), depth)
    assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
    ahead.close()
    assert source.closed
    assert threading.active_count() == before
    made = source.made
    assert made <= 5 + 2 * depth + 2  # one queue before closing, at most one more while it empties
    assert source.threads == ({"MainThread"} if depth == 0 else {"prefetch"})


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_error_arrives_in_its_place(depth):
    received = []
    with pytest.raises(ValueError, match="broken at the source"):
        received.extend(prefetch(Source(fail_at=4).items(), depth))
    assert received == [0, 1, 2, 3]


def test_no_more_than_depth_is_made_ahead():
    source = Source()
    ahead = prefetch(source.items(), 2)
    next(ahead)
    for _ in range(50):
        threading.Event().wait(0.002)
    assert source.made <= 1 + 2 + 1  # taken, queued, and one that waits for room
    ahead.close()
