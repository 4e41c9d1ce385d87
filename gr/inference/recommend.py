"""Batch scoring: a checkpoint against a log, Parquet in, Parquet out, on all ranks, resumable."""

import hashlib
import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from gr import parallel
from gr.atomic import sync_folder, write_atomically
from gr.config import TrainConfig
from gr.evaluate import load_learnt, scored_data, with_bar
from gr.flops import sequence_costs
from gr.inference.score_tables import tables_of
from gr.logs import open_log
from gr.parallel import World
from gr.runlog import RunDir, json_line
from gr.trainer import Trainer
from pipelines.batch import SequenceBatch, StreamPosition
from pipelines.stream import SessionStream

PROGRESS = "progress.json"
STEPS_PER_FILE = 128


def recommend(
    config: TrainConfig,
    run_dir: str | Path,
    output: str | Path,
    *,
    step: int | None = None,
    overrides: Sequence[str] = (),
    steps_per_file: int = STEPS_PER_FILE,
) -> None:
    """Score every event of a log with the weights of one checkpoint, and write the scores.

    Each event is scored as `gr evaluate` scores it: the same batches, the same forward pass. Each
    rank writes OUTPUT/ranking/part-STEP-RANK.parquet and OUTPUT/retrieval/... (columns:
    score_tables.schemas) of so many global steps; OUTPUT/progress.json then says up to where all
    ranks have written, and from there the same command goes on after a kill, on any number of
    ranks.

    Args:
        config: `gr.evaluate.run_config` of the run.
        run_dir: the run directory.
        output: folder of the scores: new, empty, or begun by the same command.
        step: of the checkpoint; None means the newest.
        overrides: of the command line, which must be the same when it goes on.
        steps_per_file: global steps of one file.

    Raises:
        ValueError: if there is no such checkpoint, it is of another model, the log cannot be used,
            the output holds something else, or the ranks do not agree.
    """
    if steps_per_file < 1:
        raise ValueError(f"--steps-per-file must be at least 1, got {steps_per_file}")
    if config.data.window == "epoch":
        raise ValueError(
            "data.window=epoch numbers the users and items of an event log anew, so scores could "
            "not name them: gr recommend reads session-end logs. Use gr evaluate for metrics."
        )
    with parallel.joined(config) as world:
        world.agree("configuration", OmegaConf.to_yaml(OmegaConf.structured(config)))
        source = open_log(config.data)
        world.agree("log", source.fingerprint)
        trainer, step = load_learnt(config, RunDir(run_dir), world=world, source=source, step=step)
        origin = {
            "run": str(Path(run_dir).resolve()),
            "step": step,
            "log": config.data.log,
            "fingerprint": hashlib.sha256(source.fingerprint.encode()).hexdigest(),
            "overrides": " ".join(sorted(overrides)),
        }
        files = ScoreFiles(Path(output), world, origin)
        if files.progress.complete:
            if world.is_main:
                tqdm.write(f"{output} is complete: nothing is left to score", file=sys.stderr)
            return
        stream = SessionStream(
            scored_data(config.data),
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            position=files.progress.position,
            cost=sequence_costs(config.model),
        )
        _score(trainer, stream, files, steps_per_file)


@dataclass(frozen=True)
class Progress:
    """Up to where all ranks have written their files."""

    position: StreamPosition | None = None
    """None: nothing is written."""
    sessions: int = 0
    """Sequences scored, over all ranks."""
    events: int = 0
    """Events scored, over all ranks."""
    seconds: float = 0.0
    """Spent on them, over all attempts."""
    complete: bool = False
    """Whether the log is at its end."""


class ScoreFiles:
    """The output folder: what is written of it, and how it goes on.

    Args:
        folder: of the scores.
        world: this process among all.
        origin: what the scores are of, the same in every attempt.

    Raises:
        ValueError: if the folder holds something else.
    """

    def __init__(self, folder: Path, world: World, origin: dict[str, Any]) -> None:
        self.folder, self.world, self.origin = folder, world, origin
        world.on_main(self._open)
        state = world.from_rank_0(self._stored() if world.is_main else "")
        self.progress = _progress(json.loads(state)) if state else Progress()

    def write(self, tables: list[dict[str, pa.Table]], first_step: int) -> None:
        """Write this rank's share of some global steps; no other rank sees it yet."""
        for name in tables[0] if tables else ():
            table = pa.concat_tables(each[name] for each in tables)
            path = self.folder / name / f"part-{first_step:08d}-{self.world.rank:05d}.parquet"
            path.parent.mkdir(exist_ok=True)
            draft = path.with_name(f".{path.name}.tmp")
            pq.write_table(table, draft, compression="zstd", write_page_checksum=True)
            draft.replace(path)
            sync_folder(path.parent)

    def commit(self, progress: Progress) -> None:
        """Let what all ranks have written count; called by all ranks, after `write`."""
        self.world.sum(torch.zeros(1, device=self.world.device)).tolist()  # all have written
        self.progress = progress
        at = progress.position
        state = {
            **self.origin,
            "rows": list(at.rows) if at else [],
            "segments": list(at.segments) if at else [],
            "global_step": at.step if at else 0,
            "sessions": progress.sessions,
            "events": progress.events,
            "seconds": round(progress.seconds, 3),
            "complete": progress.complete,
        }
        self.world.on_main(lambda: write_atomically(self.folder / PROGRESS, json_line(state)))

    def _stored(self) -> str:
        path = self.folder / PROGRESS
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def _open(self) -> None:
        """Make the folder, or take it up and remove what no progress counts."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"output {self.folder} is a file: name a folder, new or empty")
        self.folder.mkdir(parents=True, exist_ok=True)
        found = sorted(p.name for p in self.folder.iterdir() if not p.name.endswith(".tmp"))
        if not found:
            write_atomically(self.folder / PROGRESS, json_line({**self.origin, "global_step": 0}))
            return
        if PROGRESS not in found:
            raise ValueError(
                f"output {self.folder} is not empty ({', '.join(found[:4])}) and holds no scores "
                "of gr recommend: name another folder"
            )
        stored = json.loads(self._stored())
        for name, value in self.origin.items():
            if stored.get(name) != value:
                raise ValueError(
                    f"output {self.folder} holds scores of another {name}: {stored.get(name)!r} "
                    f"then, {value!r} now. Name another folder, or repeat that command."
                )
        for path in self.folder.glob("*/*part-*"):
            first = path.name.removeprefix(".").split("-")[1]
            if path.name.startswith(".") or int(first) >= stored["global_step"]:
                path.unlink()


def _progress(state: dict[str, Any]) -> Progress:
    if not state["global_step"]:
        return Progress()
    return Progress(
        position=StreamPosition(
            rows=tuple(state["rows"]),
            step=state["global_step"],
            segments=tuple(state["segments"]),
        ),
        sessions=state["sessions"],
        events=state["events"],
        seconds=state["seconds"],
        complete=state["complete"],
    )


def _score(trainer: Trainer, stream: SessionStream, files: ScoreFiles, steps_per_file: int) -> None:
    world, tasks = trainer.world, trainer.config.data.tasks
    raw: deque[SequenceBatch] = deque()

    def kept(batches: Iterable[SequenceBatch]) -> Iterator[SequenceBatch]:
        for batch in batches:
            raw.append(batch)
            yield batch

    begun = files.progress
    first = begun.position.step if begun.position else 0
    batches = trainer.ahead(kept(with_bar(world, stream, stream.num_steps - first)))
    start, counts = time.perf_counter(), torch.zeros(2, dtype=torch.int64, device=world.device)
    tables: list[dict[str, pa.Table]] = []
    position = begun.position

    def commit(*, complete: bool) -> None:
        files.write(tables, first)
        tables.clear()
        sessions, events = world.sum(counts).tolist()
        seconds = time.perf_counter() - start
        files.commit(
            Progress(
                position,
                begun.sessions + sessions,
                begun.events + events,
                begun.seconds + seconds,
                complete,
            )
        )
        if world.is_main:
            tqdm.write(
                f"recommend step {position.step if position else 0:,} of {stream.num_steps:,}: "
                f"{files.progress.events:,} events of {files.progress.sessions:,} sessions, "
                f"{sessions / seconds:,.0f} sessions/s, {events / seconds:,.0f} events/s",
                file=sys.stderr,
            )

    for staged in batches:
        scored = trainer.predict_step(staged, batches)
        batch = raw.popleft()
        tables.append(tables_of(batch, scored, tasks))
        counts += torch.tensor([batch.num_sequences, batch.num_events], device=world.device)
        position = batch.position
        if position.step - first >= steps_per_file:
            commit(complete=False)
            first = position.step
    commit(complete=True)
