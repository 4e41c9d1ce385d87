"""Many epochs over user sequences whose last event is held out: the protocol of public tables.

An epoch takes every user once, in an order of its own. A user's training sequence is the newest
events before the one that is held out, each of them predicted from those before it. Between epochs
come batches that are only to be scored: the same users, one prediction each, of the held-out event.

Letters: U users, B sequences, E events.
"""

from collections.abc import Generator, Iterator
from dataclasses import replace

import numpy as np

from pipelines.assemble import assemble
from pipelines.batch import SequenceBatch, StreamPosition
from pipelines.config import DataConfig, LeaveOneOutConfig
from pipelines.features import EventEncoder
from pipelines.gather import Gathered
from pipelines.history import (
    ANCHOR,
    FIRST_CONTEXT,
    NUM_EVENTS,
    NUM_HISTORY,
    SESSION,
    TIMESTAMP,
    USER,
    Ints,
)
from pipelines.keyed_random import Purpose
from pipelines.prefetch import prefetch
from pipelines.stochastic_length import draw_lengths, length_rules, shorten
from pipelines.unify import token_counts
from pipelines.user_sequences import UserSequences


class LeaveOneOutStream:
    """One rank's share of the epochs: the counterpart of pipelines.stream.SessionStream.

    A global step takes data.leave_one_out.users_per_batch users, of which rank r has every
    world_size-th. Iterating starts at `position`, each time anew, with the batches of an
    uninterrupted run; what is scored after the epoch that ends there comes first.
    """

    def __init__(
        self,
        config: DataConfig,
        sequences: UserSequences,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        position: StreamPosition | None = None,
    ) -> None:
        """Stand at a position.

        Args:
            config: `leave_one_out` and the layout.
            sequences: all users.
            seed: of the run; keys the order of users, negatives and stochastic length.
            rank: of this process.
            world_size: number of ranks.
            position: where to start; None is the start.
        """
        self.config, self.sequences, self.seed = config, sequences, seed
        self.position = position or StreamPosition(rows=(0,), step=0)
        self._rank, self._world_size = rank, world_size
        self._rules = config.leave_one_out
        self._encoder = EventEncoder(config)
        # Of what is only scored, the last event alone is predicted.
        self._scored = EventEncoder(
            replace(config, supervise="session", window="none", leave_one_out=LeaveOneOutConfig())
        )
        self._max_history = config.max_history_tokens // token_counts(config).per_history_event
        self._lengths = length_rules(config, seed)
        self._steps_per_epoch = -(-sequences.num_users // self._rules.users_per_batch)

    @property
    def num_steps(self) -> int:
        """Global steps of all epochs."""
        return self._rules.epochs * self._steps_per_epoch

    @property
    def num_scored_batches(self) -> int:
        """Batches of one scoring."""
        return -(-self.sequences.num_users // self._rules.scored_users_per_batch)

    def __iter__(self) -> Iterator[SequenceBatch]:
        """Yield the batches after `position`."""
        return prefetch(self._batches(), self.config.prefetch)

    def score(self, window: int) -> Iterator[SequenceBatch]:
        """Yield the held-out event of every user once, as batches that are only to be scored."""
        return prefetch(self._scored_batches(window, self.position.step), self.config.prefetch)

    def _batches(self) -> Generator[SequenceBatch, None, None]:
        every, spe = self._rules.eval_every, self._steps_per_epoch
        step = self.position.step
        while True:
            epoch, within = divmod(step, spe)  # epochs that are complete, steps of the next
            if epoch > 0 and within == 0 and (epoch % every == 0 or step == self.num_steps):
                yield from self._scored_batches(epoch, step)
            if step >= self.num_steps:
                return
            if within == 0 or step == self.position.step:
                order = self._order(epoch)
            size = self._rules.users_per_batch
            users = order[within * size : (within + 1) * size]
            step += 1
            # The window is the next epoch that is scored, so that none is without predictions.
            window = min(-(-(epoch + 1) // every) * every, self._rules.epochs)
            yield self._training_batch(users, epoch, step, window)

    def _order(self, epoch: int) -> Ints:
        generator = np.random.default_rng([self.seed, int(Purpose.EPOCH_ORDER), epoch])
        return generator.permutation(self.sequences.num_users)

    def _training_batch(self, users: Ints, epoch: int, step: int, window: int) -> SequenceBatch:
        held_out = 2 if self._rules.hold_out == "validation" else 1
        gathered = self._gather(users[self._rank :: self._world_size], held_out, epoch)
        if self._lengths is not None:
            kept = draw_lengths(gathered.sequences, self._lengths)
            gathered = shorten(gathered, kept, self._lengths)
        return assemble(
            gathered,
            self._encoder,
            seed=self.seed,
            window=window,
            position=self._position(step),
            num_rejected={},
            num_sessions=len(users),
        )

    def _scored_batches(self, window: int, step: int) -> Generator[SequenceBatch, None, None]:
        size, num_users = self._rules.scored_users_per_batch, self.sequences.num_users
        held_out = 1 if self._rules.hold_out == "validation" else 0
        for first in range(0, num_users, size):
            users = np.arange(first, min(first + size, num_users))
            gathered = self._gather(users[self._rank :: self._world_size], held_out, 0)
            last = np.cumsum(gathered.sequences[:, NUM_HISTORY] + 1) - 1
            yield assemble(
                replace(gathered, floats=gathered.floats[last]),
                self._scored,
                seed=self.seed,
                window=window,
                position=self._position(step),
                num_rejected={},
                is_frozen=True,
                num_sessions=len(users),
            )

    def _position(self, step: int) -> StreamPosition:
        epoch, within = divmod(step, self._steps_per_epoch)
        users = epoch * self.sequences.num_users + within * self._rules.users_per_batch
        return StreamPosition(rows=(users,), step=step)

    def _gather(self, users: Ints, held_out: int, epoch: int) -> Gathered:
        """Return the newest events of users but the last `held_out`; the last one is the session.

        The epoch is the number of the session, which keys draws: each epoch has its own.
        """
        sequences = self.sequences
        stop_B = sequences.offsets[users + 1] - held_out
        start_B = np.maximum(sequences.offsets[users], stop_B - (self._max_history + 1))
        length_B = stop_B - start_B
        first_B = np.cumsum(length_B) - length_B
        event_E = np.repeat(start_B - first_B, length_B) + np.arange(int(length_B.sum()))
        rows = np.zeros((len(users), FIRST_CONTEXT), np.int64)
        rows[:, USER], rows[:, SESSION] = users, epoch
        rows[:, ANCHOR] = sequences.ints[stop_B - 1, TIMESTAMP]
        rows[:, NUM_HISTORY], rows[:, NUM_EVENTS] = length_B - 1, 1
        return Gathered(
            sequences=rows,
            ints=sequences.ints[event_E],
            codes=sequences.codes[event_E],
            floats=sequences.floats[event_E],
            num_clipped=0,
        )
