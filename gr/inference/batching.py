"""Questions that arrive together are answered together, within bounds of time and number."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class QueueFullError(Exception):
    """As many questions wait as may."""


class ClosingError(Exception):
    """The batcher takes no more questions."""


@dataclass(eq=False)
class _Waiting(Generic[Question, Answer]):
    question: Question
    arrived: float
    future: "asyncio.Future[Answer]"


class Batcher(Generic[Question, Answer]):
    """Answers questions in batches on one thread of its own.

    A batch starts when the first of its questions has waited for the window, or when it is full;
    what arrives while one is answered is the next. An answer that fails fails its whole batch, so
    the questions of such a batch are then asked one by one.

    Args:
        answer: returns an answer for each question; called on the thread.
        window_s: how long the first question of a batch waits for others.
        max_batch: questions of one batch.
        max_queue: questions that may wait.
        timeout_s: how long a question may take in all.
        on_batch: called with the size of each batch.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Question]], Sequence[Answer]],
        *,
        window_s: float,
        max_batch: int,
        max_queue: int,
        timeout_s: float,
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._answer, self._on_batch = answer, on_batch
        self.window_s, self.max_batch = window_s, max_batch
        self.max_queue, self.timeout_s = max_queue, timeout_s
        self._waiting: deque[_Waiting[Question, Answer]] = deque()
        self.is_closing = True

    @property
    def num_waiting(self) -> int:
        """Questions that no batch has yet."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether a question would be refused for want of room."""
        return len(self._waiting) >= self.max_queue

    def start(self) -> None:
        """Begin to answer; inside a running event loop, before the first question."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")
        # Events belong to the loop in which they are waited for.
        self._some, self._full, self._idle = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._idle.set()
        self.is_closing = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    def require_room(self) -> None:
        """Refuse what `ask` would refuse now.

        Raises:
            QueueFullError: if max_queue questions wait.
            ClosingError: before `start` and after `close`.
        """
        if self.is_closing:
            raise ClosingError
        if self.is_full:
            raise QueueFullError

    async def ask(self, question: Question) -> Answer:
        """Return the answer.

        Raises:
            QueueFullError: if max_queue questions wait.
            ClosingError: before `start` and after `close`.
            TimeoutError: if it takes longer than timeout_s; it is then left out of its batch if it
                still waits.
            Exception: what answering this question alone raised.
        """
        self.require_room()
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(question, time.monotonic(), future)
        self._waiting.append(waiting)
        self._idle.clear()
        self._some.set()
        if len(self._waiting) >= self.max_batch:
            self._full.set()
        try:
            return await asyncio.wait_for(future, self.timeout_s)
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(waiting)  # late: it leaves its place to another

    async def close(self) -> None:
        """Take no more questions, answer those that wait, and end the thread."""
        if self.is_closing:
            return
        self.is_closing = True
        await self._idle.wait()
        self._task.cancel()
        self._thread.shutdown(wait=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._some.wait()
            arrived = self._waiting[0].arrived if self._waiting else 0.0
            left = arrived + self.window_s - time.monotonic()
            if left > 0 and len(self._waiting) < self.max_batch and not self.is_closing:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._full.wait(), left)
            batch = [self._waiting.popleft() for _ in range(min(self.max_batch, self.num_waiting))]
            if batch:
                self._on_batch(len(batch))
                questions = [x.question for x in batch]
                answers = await loop.run_in_executor(self._thread, self._answers, questions)
                for x, answer in zip(batch, answers, strict=True):
                    if x.future.done():
                        continue
                    if isinstance(answer, Exception):
                        x.future.set_exception(answer)
                    else:
                        x.future.set_result(answer)
            if len(self._waiting) < self.max_batch:
                self._full.clear()
            if not self._waiting:
                self._some.clear()
                self._idle.set()

    def _answers(self, questions: Sequence[Question]) -> list[Answer | Exception]:
        try:
            return list(self._answer(questions))
        except Exception as error:
            if len(questions) == 1:
                return [error]
        found: list[Answer | Exception] = []
        for question in questions:
            found += self._answers([question])
        return found
