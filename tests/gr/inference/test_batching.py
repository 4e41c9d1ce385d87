"""Batches under a clock: what is answered together, refused, late, wrong, or left at the end."""

import asyncio
import threading
import time

import pytest

from gr.inference.batching import Batcher, ClosingError, QueueFullError


class Doubler:
    """Doubles numbers; -1 is an error; waits for `gate` where it is given."""

    def __init__(self, gate=None):
        self.batches, self.gate = [], gate

    def __call__(self, questions):
        self.batches.append(list(questions))
        if self.gate is not None:
            assert self.gate.wait(5)
        if -1 in questions:
            raise ValueError("no answer for -1")
        return [2 * q for q in questions]


OPTIONS = {"window_s": 0.05, "max_batch": 4, "max_queue": 8, "timeout_s": 5.0}


def run(doubler, scenario, **options):
    async def main():
        batcher = Batcher(doubler, **(OPTIONS | options))
        batcher.start()
        try:
            return await asyncio.wait_for(scenario(batcher), 10)
        finally:
            if doubler.gate is not None:
                doubler.gate.set()
            await batcher.close()

    return asyncio.run(main())


def test_what_arrives_in_the_window_is_one_batch():
    doubler = Doubler()

    async def scenario(batcher):
        answers = [asyncio.ensure_future(batcher.ask(n)) for n in range(3)]
        return await asyncio.gather(*answers)

    assert run(doubler, scenario) == [0, 2, 4]
    assert doubler.batches == [[0, 1, 2]]


def test_a_full_batch_does_not_wait():
    doubler = Doubler()

    async def scenario(batcher):
        start = time.monotonic()
        answers = await asyncio.gather(*(batcher.ask(n) for n in range(4)))
        return answers, time.monotonic() - start

    answers, seconds = run(doubler, scenario, window_s=4.0)
    assert answers == [0, 2, 4, 6]
    assert seconds < 2
    assert doubler.batches == [[0, 1, 2, 3]]


def test_too_many_are_refused_and_the_others_answered():
    gate = threading.Event()
    doubler = Doubler(gate)

    async def scenario(batcher):
        first = asyncio.ensure_future(batcher.ask(100))
        while not doubler.batches:
            await asyncio.sleep(0.001)
        rest = [asyncio.ensure_future(batcher.ask(n)) for n in range(11)]
        await asyncio.sleep(0)
        assert batcher.num_waiting == 8
        gate.set()
        return await first, await asyncio.gather(*rest, return_exceptions=True)

    first, rest = run(doubler, scenario, window_s=0.0)
    assert first == 200
    assert rest[:8] == [2 * n for n in range(8)]
    assert [type(x) for x in rest[8:]] == [QueueFullError] * 3
    assert max(map(len, doubler.batches)) <= 4


def test_a_late_question_times_out_and_is_not_computed():
    gate = threading.Event()
    doubler = Doubler(gate)

    async def scenario(batcher):
        first = asyncio.ensure_future(batcher.ask(1))
        while not doubler.batches:
            await asyncio.sleep(0.001)
        late = asyncio.ensure_future(batcher.ask(2))
        results = await asyncio.gather(first, late, return_exceptions=True)
        gate.set()
        return results, await batcher.ask(3)

    results, after = run(doubler, scenario, window_s=0.0, timeout_s=0.1)
    assert [type(x) for x in results] == [TimeoutError] * 2
    assert after == 6
    assert doubler.batches == [[1], [3]]


def test_one_wrong_question_does_not_fail_the_others():
    doubler = Doubler()

    async def scenario(batcher):
        return await asyncio.gather(*(batcher.ask(n) for n in (5, -1, 6)), return_exceptions=True)

    results = run(doubler, scenario)
    assert (results[0], results[2]) == (10, 12)
    assert isinstance(results[1], ValueError)
    assert doubler.batches == [[5, -1, 6], [5], [-1], [6]]


def test_closing_answers_what_waits_and_takes_no_more():
    doubler = Doubler()

    async def scenario(batcher):
        waiting = [asyncio.ensure_future(batcher.ask(n)) for n in range(3)]
        await asyncio.sleep(0)
        await batcher.close()
        with pytest.raises(ClosingError):
            await batcher.ask(9)
        return await asyncio.gather(*waiting)

    assert run(doubler, scenario, window_s=0.2) == [0, 2, 4]


def test_it_takes_questions_between_start_and_close_only():
    doubler = Doubler()

    async def main(batcher):
        with pytest.raises(ClosingError):
            await batcher.ask(1)
        batcher.start()
        answer = await batcher.ask(2)
        await batcher.close()
        await batcher.close()
        return answer

    batcher = Batcher(doubler, **OPTIONS)
    # In loops of their own, one after the other.
    assert [asyncio.run(main(batcher)) for _ in range(2)] == [4, 4]
