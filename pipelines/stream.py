"""The pass over a session-end log: sessions in order, each once, as batches of token sequences."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.assemble import assemble
from pipelines.balance import LoadTarget, balance_lengths
from pipelines.batch import SequenceBatch, StreamPosition
from pipelines.budget import Planner
from pipelines.config import DataConfig
from pipelines.cost import TOKENS, SequenceCost, cost_rules
from pipelines.event_memory import spill_of
from pipelines.features import EventEncoder
from pipelines.gather import Gathered, SequenceBuffer, Span
from pipelines.history import Rules
from pipelines.keyed_random import Purpose
from pipelines.partition import PartitionReader
from pipelines.prefetch import prefetch
from pipelines.rejects import Reject, RejectLog, count_sessions
from pipelines.segments import LogSegments
from pipelines.snapshot import encoding_of
from pipelines.stochastic_length import draw_lengths, find_cuts, length_rules, shorten
from pipelines.unify import token_counts

EXTRA_ROWS = 32
POLL_SECONDS = 2.0
PATIENCE_SECONDS = 60.0  # until a shared folder shows to all hosts what it shows to one
_END = "/"  # no folder has this name
OnReject = Callable[[Reject], None]


@dataclass(frozen=True, slots=True)
class Snapshots:
    """When and where a stream writes its histories."""

    folder: Path
    """Holds step_N/histories folders with a file a partition; made when it is needed."""
    is_due: Callable[[int], bool]
    """Whether to write them after so many steps. They are written too when the stream ends."""

    def path(self, step: int) -> Path:
        """Return the folder of a snapshot."""
        return self.folder / f"step_{step}" / "histories"


class SessionStream:
    """One rank's share of one pass over a session-end log.

    Rank r owns the partitions p with p % world_size == r. A global step takes
    `sessions_per_partition` sessions of every partition, so that its sequences do not depend on the
    number of ranks. Every rank yields a batch at every global step, an empty one if it has none.
    With data.fill=tokens or flops, partitions and steps are those of a plan (pipelines/budget.py).

    Iterating starts at `position`, each time anew: histories come from a snapshot, or are rebuilt
    by replaying the log up to there. The batches that follow are those of an uninterrupted pass,
    bit for bit.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        position: StreamPosition | None = None,
        histories: Path | None = None,
        snapshots: Snapshots | None = None,
        frozen: bool = False,
        on_reject: OnReject | None = None,
        from_rank_0: Callable[[str], str] = str,
        cost: SequenceCost | tuple[SequenceCost, ...] = TOKENS,
        load_target: LoadTarget | None = None,
    ) -> None:
        """Read the order of the log and check all its files against the configuration.

        Args:
            config: what to read and how.
            seed: of the run; keys negatives and sampling.
            rank: of this process.
            world_size: number of ranks, at most the number of partitions.
            position: where to start; None is the start of the log.
            histories: folder of the snapshot that was written at `position`, by any number of
                ranks; None: the log is replayed up to there.
            snapshots: when and where to write the histories; None: never.
            frozen: before each window all its sequences come as batches that are only to be scored,
                with the histories as they stand before the window.
            on_reject: called in the consumer's thread with each session that is skipped, when the
                batch that it would have been part of is yielded.
            from_rank_0: returns rank 0's argument on every rank; called in the consumer's thread,
                where data.follow waits for the log to grow.
            cost: of a sequence, where data.fill=flops or data.stochastic_length.balance reads it.
            load_target: of data.stochastic_length.balance; whoever consumes the batches records
                their loads in it. None: batches are balanced about their own expected loads.

        Raises:
            ValueError: if the log is missing or empty or lacks a column, none of its files can be
                used, the rank has no partition, or `position` does not belong to this log and
                configuration.
        """
        self.config, self.seed = config, seed
        self._encoder = EventEncoder(config)
        self._rules = history_rules(config, self._encoder, seed)
        self._lengths = length_rules(config, seed)
        self._histories, self._snapshots, self._frozen = histories, snapshots, frozen
        self._on_reject, self._from_rank_0 = on_reject, from_rank_0
        self._is_main = rank == 0
        self._encoding = encoding_of(config)
        self._costs = cost_rules(config, cost)
        self._load_target = load_target
        self._world_size = world_size
        planner = None
        if config.fill != "sessions":
            planner = Planner(
                config,
                self._rules,
                self._lengths,
                self._costs if config.fill == "flops" else cost_rules(config, TOKENS),
                world_size=world_size,
                start=position,
            )
        begun = position.segments if position else ()
        self._segments = LogSegments(config, self._encoder, begun, planner)
        num_partitions = self._segments.num_partitions
        if not 0 <= rank < world_size <= num_partitions:
            raise ValueError(
                "a rank owns whole partitions: expected 0 <= rank < world_size <= "
                f"{num_partitions}, the partitions of {config.log}, got rank {rank} of "
                f"{world_size}. Use fewer ranks, or write the log with more partitions."
            )
        self._owned: Sequence[int] = range(rank, num_partitions, world_size)
        if planner is not None:
            self._owned = planner.owned[rank]
        if self.num_steps == 0 and not config.follow:
            raise ValueError(f"the log {config.log} holds no sessions: nothing to read")
        if frozen:
            self._segments.check_windows()
        self.position = position or self._segments.position(0)
        self._segments.check(self.position)

    @property
    def num_steps(self) -> int:
        """Global steps of the log as far as it is there, the same on all ranks."""
        return self._segments.num_steps

    def __iter__(self) -> Iterator[SequenceBatch]:
        """Yield the batches after `position`.

        Raises:
            ValueError: if more than max_reject_fraction of the sessions cannot be used, or a
                snapshot of `histories` cannot.
        """
        rejects = RejectLog(self.config.max_reject_fraction, self._segments.folder)
        readers = self._restore(rejects)
        step, is_saved = self.position.step, True
        while True:
            batches = self._batches(step, readers, rejects)
            for batch, new_rejects in prefetch(batches, self.config.prefetch):
                self._report(new_rejects)
                yield batch
                is_saved = batch.is_frozen or self._is_due(batch.position.step)
            step = self.num_steps
            if not self.config.follow or not self._wait(rejects):
                break
        if not is_saved:
            self._save(step, readers)
        for reader in readers.values():  # a last segment without sessions has no batch
            reader.begin(len(self._segments))
        self._report(rejects.take())

    def _batches(
        self, step: int, readers: dict[int, PartitionReader], rejects: RejectLog
    ) -> Generator[tuple[SequenceBatch, list[Reject]], None, None]:
        """Yield all batches from a step on of the segments that are known."""
        segments = self._segments
        buffer = SequenceBuffer(self._rules, self._encoder.num_context)
        rows = segments.rows_at(step)
        while step < segments.num_steps:
            for reader in readers.values():
                reader.begin(segments.num_begun(step + 1))
            segment, within = segments.at(step)
            end = segment.schedule.end_of_window(within) if self._frozen else None
            if end is not None:
                yield from self._frozen_batches(step, end - within, readers, buffer)
            rows, before = segments.rows_at(step + 1), rows
            taken = rows - before
            num_sessions = int(taken.sum())
            spans = [s for p, reader in readers.items() for s in reader.take(int(taken[p]))]
            at = segments.position(step + 1, rows)
            made = self._assemble(buffer, spans, at, step, num_sessions, rejects.take())
            step += 1
            if self._is_due(step):
                self._save(step, readers)
            yield made

    def _frozen_batches(
        self,
        first: int,
        num_steps: int,
        readers: dict[int, PartitionReader],
        buffer: SequenceBuffer,
    ) -> Generator[tuple[SequenceBatch, list[Reject]], None, None]:
        """Yield the sequences of a window, whose sessions join no history yet."""
        segments = self._segments
        cursors = {p: reader.cursor() for p, reader in readers.items()}
        at = segments.position(first)
        for step in range(first, first + num_steps):
            taken = segments.rows_at(step + 1) - segments.rows_at(step)
            spans = [
                span
                for p, reader in readers.items()
                for span in reader.peek(cursors[p], int(taken[p]))
            ]
            num_sessions = int(taken.sum())
            yield self._assemble(buffer, spans, at, step, num_sessions, [], is_frozen=True)

    def _assemble(
        self,
        buffer: SequenceBuffer,
        spans: list[Span],
        position: StreamPosition,
        step: int,
        num_sessions: int,
        new_rejects: list[Reject],
        *,
        is_frozen: bool = False,
    ) -> tuple[SequenceBatch, list[Reject]]:
        segment, within = self._segments.at(step)
        gathered = buffer.gather(spans, extend=not is_frozen)
        expected_load = 0.0
        # Stochastic length is for training: what is only scored is whole, as it is where it serves.
        if not is_frozen:
            gathered, expected_load = self._shorten(gathered, step, num_sessions)
        batch = assemble(
            gathered,
            self._encoder,
            seed=self.seed,
            window=segment.schedule.window_of(within),
            position=position,
            num_rejected=count_sessions(new_rejects),
            is_frozen=is_frozen,
            expected_load=expected_load,
            num_sessions=num_sessions,
        )
        return batch, new_rejects

    def _shorten(self, gathered: Gathered, step: int, num_sessions: int) -> tuple[Gathered, float]:
        """Apply stochastic length; return the sequences and their expected load."""
        lengths, settings = self._lengths, self.config.stochastic_length
        if lengths is None:
            return gathered, 0.0
        sequences = gathered.sequences
        slots = self._encoder.series_slots if self._encoder.merges_context else ()
        cuts = find_cuts(sequences, lengths, gathered.ints, slots)
        if not settings.balance:
            return shorten(gathered, draw_lengths(sequences, lengths, cuts), lengths), 0.0
        of_session = self._load_target.at(step) if self._load_target else None
        target = None if of_session is None else of_session * num_sessions / self._world_size
        kept, load = balance_lengths(sequences, lengths, self._costs, target, cuts)
        return shorten(gathered, kept, lengths), load

    def _restore(self, rejects: RejectLog) -> dict[int, PartitionReader]:
        """Return a reader of each owned partition, with the histories as they are at `position`."""
        segments, position = self._segments, self.position
        num_begun = segments.num_begun(position.step)
        spill = spill_of(self.config.history_memory_gb, self.config.spill_folder)
        for index in range(len(segments)):
            self._expect(index, rejects)
        readers = {}
        for p in self._owned:
            reader = PartitionReader(p, segments, self._encoder, self._rules, rejects, spill)
            if self._histories is not None and position.step > 0:
                reader.restore(self._histories, self._encoding, position.rows[p], num_begun)
            else:
                reader.begin(num_begun)
                reader.replay(position.rows[p])
            readers[p] = reader
        rejects.take()  # counted again, but reported before the position was saved
        return readers

    def _expect(self, index: int, rejects: RejectLog) -> None:
        """Tell the log of rejects how many sessions of a segment this rank will read."""
        segment = self._segments[index]
        for files in filter(None, (segment.parts, segment.histories)):
            rejects.expect(sum(files[p].num_sessions for p in self._owned))

    def _wait(self, rejects: RejectLog) -> bool:
        """Wait for the next segment; return whether one came before the idle time was over."""
        deadline = time.monotonic() + self.config.follow_idle_seconds
        while True:
            name = self._segments.landed() if self._is_main else ""
            if not name and time.monotonic() >= deadline:
                name = _END
            name = self._from_rank_0(name)
            if name == _END:
                return False
            if name:
                break
            if self._is_main:
                time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
        self._segments.append(name, patience=PATIENCE_SECONDS)
        if self._frozen:
            self._segments.check_windows()
        self._expect(len(self._segments) - 1, rejects)
        return True

    def _is_due(self, step: int) -> bool:
        return self._snapshots is not None and self._snapshots.is_due(step)

    def _save(self, step: int, readers: dict[int, PartitionReader]) -> None:
        if self._snapshots is not None:
            folder = self._snapshots.path(step)
            folder.mkdir(parents=True, exist_ok=True)
            for reader in readers.values():
                reader.save(folder, self._encoding)

    def _report(self, rejects: list[Reject]) -> None:
        if self._on_reject is not None:
            for reject in rejects:
                self._on_reject(reject)


def history_rules(config: DataConfig, encoder: EventEncoder, seed: int) -> Rules:
    """Return what the histories need to know of the configuration."""
    max_events = config.max_history_tokens // token_counts(config).per_history_event
    supervise_history = config.supervise != "session"
    return Rules(
        seed=seed,
        purpose=int(Purpose.SAMPLED),
        max_events=max_events,
        keep=max_events + config.overlap_slack,
        extra=EXTRA_ROWS,
        max_session_events=config.max_session_events,
        sampled_rate=config.sampled_rate if config.supervise == "sampled" else float("inf"),
        supervise_history=supervise_history,
        num_ints=encoder.num_ints,
        num_floats=encoder.num_floats,
        num_kept_floats=encoder.num_floats if supervise_history else 0,
        num_codes=encoder.num_codes,
    )
