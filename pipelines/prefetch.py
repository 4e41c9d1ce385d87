"""Runs an iterator ahead of its consumer, in a thread."""

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Generator[T, None, None], depth: int) -> Iterator[T]:
    """Yield `items` in order, up to `depth` of them made ahead in a thread.

    What `items` raises is raised to the consumer, in its place. When the consumer stops early
    (close, or the last reference dropped), the thread ends and `items` is closed first.

    Args:
        items: used in the thread only.
        depth: items made ahead; 0 means no thread.
    """
    if depth == 0:
        with closing(items):
            yield from items
        return
    ahead: queue.Queue[T | None] = queue.Queue(depth)
    failure: list[BaseException] = []
    stop = threading.Event()
    thread = threading.Thread(
        target=_produce, args=(items, ahead, failure, stop), name="prefetch", daemon=True
    )
    thread.start()
    try:
        while (item := ahead.get()) is not None:
            yield item
        if failure:
            raise failure[0]
    finally:
        stop.set()
        while thread.is_alive():
            _discard(ahead)  # makes room for a put that waits
            thread.join(timeout=0.01)


def _produce(
    items: Generator[T, None, None],
    ahead: "queue.Queue[T | None]",
    failure: list[BaseException],
    stop: threading.Event,
) -> None:
    try:
        with closing(items):
            for item in items:
                ahead.put(item)
                if stop.is_set():
                    return
    except BaseException as error:  # whatever it is, the consumer must not wait for ever
        failure.append(error)
    ahead.put(None)


def _discard(ahead: "queue.Queue[T | None]") -> None:
    while True:
        try:
            ahead.get_nowait()
        except queue.Empty:
            return
