"""The pass over a session-end log: sessions in order, each once, as batches of token sequences."""

from collections import Counter
from collections.abc import Callable, Generator, Iterator

from pipelines.assemble import assemble
from pipelines.batch import SequenceBatch, StreamPosition
from pipelines.config import DataConfig
from pipelines.features import EventEncoder
from pipelines.gather import SequenceBuffer
from pipelines.history import Rules
from pipelines.keyed_random import Purpose
from pipelines.manifest import read_manifest
from pipelines.partition import PartitionReader
from pipelines.prefetch import prefetch
from pipelines.reader import check_columns, read_end_ts
from pipelines.rejects import Reject, RejectLog
from pipelines.schedule import make_schedule
from pipelines.stochastic_length import draw_lengths, length_rules, shorten
from pipelines.unify import token_counts

EXTRA_ROWS = 32
OnReject = Callable[[Reject], None]


class SessionStream:
    """One rank's share of one pass over a session-end log.

    Rank r owns the partitions p with p % world_size == r. A global step takes
    `sessions_per_partition` sessions of every partition, so that its sequences do not depend on the
    number of ranks. Every rank yields a batch at every global step, an empty one if it has none.

    Iterating starts at `position`, each time anew: histories are rebuilt by replaying the log up to
    there, and the batches that follow are those of an uninterrupted pass, bit for bit.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        position: StreamPosition | None = None,
        on_reject: OnReject | None = None,
    ) -> None:
        """Read the order of the log and check all its files against the configuration.

        Args:
            config: what to read and how.
            seed: of the run; keys negatives and sampling.
            rank: of this process.
            world_size: number of ranks, at most the number of partitions.
            position: where to start; None is the start of the log.
            on_reject: called in the consumer's thread with each session that is skipped, when the
                batch that it would have been part of is yielded.

        Raises:
            ValueError: if a file is missing, damaged or lacks a column, the log is empty, the rank
                has no partition, or `position` does not belong to this log and configuration.
        """
        self.config, self.seed = config, seed
        self._encoder = EventEncoder(config)
        self._rules = history_rules(config, self._encoder, seed)
        self._lengths = length_rules(config, seed)
        self._on_reject = on_reject
        manifest = read_manifest(config.log)
        num_partitions = manifest.partitions
        if not 0 <= rank < world_size <= num_partitions:
            raise ValueError(
                "a rank owns whole partitions: expected 0 <= rank < world_size <= "
                f"{num_partitions}, the partitions of {config.log}, got rank {rank} of "
                f"{world_size}. Use fewer ranks, or write the log with more partitions."
            )
        self._owned = range(rank, num_partitions, world_size)
        self._logs = [manifest.folder / file.name for file in manifest.parts]
        self._histories = [manifest.folder / file.name for file in manifest.histories]
        self._num_rows = sum(
            files[p].num_sessions
            for files in (manifest.parts, manifest.histories)
            if files
            for p in self._owned
        )
        for path in (*self._logs, *self._histories):
            check_columns(path, self._encoder.columns)
        end_ts = [read_end_ts(path) for path in self._logs]
        self._schedule = make_schedule(
            end_ts,
            window=config.window,
            offset_seconds=config.window_offset_seconds,
            sessions_per_partition=config.sessions_per_partition,
        )
        if self.num_steps == 0:
            raise ValueError(f"the log {config.log} holds no sessions: nothing to read")
        self.position = position or self._schedule.position(0)
        self._schedule.check(self.position)

    @property
    def num_steps(self) -> int:
        """Global steps of a full pass, the same on all ranks."""
        return self._schedule.num_steps

    def __iter__(self) -> Iterator[SequenceBatch]:
        """Yield the batches after `position`.

        Raises:
            ValueError: if more than max_reject_fraction of the sessions cannot be used, or a file
                turns out to be damaged.
        """
        for batch, rejects in prefetch(self._batches(), self.config.prefetch):
            if self._on_reject is not None:
                for reject in rejects:
                    self._on_reject(reject)
            yield batch

    def _batches(self) -> Generator[tuple[SequenceBatch, list[Reject]], None, None]:
        config, schedule, step = self.config, self._schedule, self.position.step
        rejects = RejectLog(config.max_reject_fraction, self._num_rows)
        readers = self._restore(rejects)
        buffer = SequenceBuffer(self._rules, len(config.context_features))
        while step < schedule.num_steps:
            rows, rows_after = schedule.rows_at(step), schedule.rows_at(step + 1)
            spans = [
                span
                for p, reader in readers.items()
                for span in reader.take(int(rows_after[p] - rows[p]))
            ]
            gathered = buffer.gather(spans)
            if self._lengths is not None:
                kept = draw_lengths(gathered.sequences, self._lengths)
                gathered = shorten(gathered, kept, self._lengths)
            new_rejects = rejects.take()
            batch = assemble(
                gathered,
                config,
                seed=self.seed,
                window=schedule.window_of(step),
                position=schedule.position(step + 1),
                num_rejected=dict(Counter(reject.reason for reject in new_rejects)),
            )
            yield batch, new_rejects
            step += 1

    def _restore(self, rejects: RejectLog) -> dict[int, PartitionReader]:
        """Return a reader of each owned partition, with the histories as they are at `position`."""
        readers = {}
        for p in self._owned:
            reader = PartitionReader(p, self._logs[p], self._encoder, self._rules, rejects)
            if self._histories:
                reader.load_history(self._histories[p])
            reader.replay(self.position.rows[p])
            readers[p] = reader
        if self.position.step > 0:
            rejects.take()  # counted again, but reported before the position was saved
        return readers


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
