"""Recommendations for every user of a log, as Parquet, on all ranks, resumable."""

import json
import sys
import time as clock
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from gr import parallel
from gr.atomic import sync_folder, write_atomically
from gr.config import TrainConfig
from gr.inference.engine import (
    Question,
    Recommendation,
    Recommender,
    before,
    load_trainer,
    recommender_of,
)
from gr.inference.score_tables import RETRIEVAL
from gr.parallel import World
from gr.runlog import json_line
from pipelines.history import Ints
from pipelines.segments import read_manifests

PROGRESS = "progress.json"
USERS_PER_FILE = 4096
USERS_AT_A_TIME = 64


@dataclass(frozen=True, kw_only=True)
class TopItems:
    """What each user is recommended."""

    top: int
    """Items of a user."""
    retrieve: int = 100
    """Items found in the catalogue, of which the best `top` are kept."""
    exclude_seen: bool = False
    """Leave out what the history that the model reads holds."""
    time: int = 0
    """s: of the recommendation; 0: a second after the log."""

    def __post_init__(self) -> None:
        if not 1 <= self.top <= self.retrieve:
            raise ValueError(
                f"--top must be within 1 and --retrieve={self.retrieve}, got {self.top}: keep "
                "fewer, or find more"
            )
        if self.time < 0:
            raise ValueError(f"--time must be at least 0, got {self.time}")


def recommend_users(
    config: TrainConfig,
    run_dir: str | Path,
    output: str | Path,
    what: TopItems,
    *,
    step: int | None = None,
    overrides: Sequence[str] = (),
    users_per_file: int = USERS_PER_FILE,
) -> None:
    """Write the best items of every user of the log.

    OUTPUT/top/part-N.parquet has a row an item: user_id, place (1 is best), item_id, order, and a
    score of each task and of retrieval. Each rank answers for its share of the files, with tables
    of its own; files that are there are kept, so the same command goes on after a kill.

    Args:
        config: `gr.evaluate.run_config` of the run.
        run_dir: the run directory.
        output: folder: new, empty, or begun by the same command.
        what: how many items, and of when.
        step: of the checkpoint; None means the newest.
        overrides: of the command line, which must be the same when it goes on.
        users_per_file: users of one file.

    Raises:
        ValueError: if the checkpoint or the log cannot be used, the model does not retrieve, the
            output holds something else, tables are sharded over several ranks, or ranks find
            different checkpoints.
    """
    with parallel.joined(config) as world:
        form = config.embeddings.form
        is_sharded = form == "sharded" or (form == "auto" and world.device.type == "cuda")
        if world.size > 1 and is_sharded:
            raise ValueError(
                "each rank needs tables of its own: add embeddings.form=replicated, or use one "
                "process"
            )
        alone = World(0, 1, world.device)
        trainer, step = load_trainer(config, str(run_dir), world=alone, step=step)
        world.agree("checkpoint", str(step))
        recommender = recommender_of(trainer, step)
        if recommender.index is None:
            raise ValueError("the model has no retrieval head, so it cannot find items for users")
        time = what.time or max(each.end_ts for each in read_manifests(config.data.log)) + 1
        origin = {
            "run": str(Path(run_dir).resolve()),
            "step": step,
            "log": config.data.log,
            "time": time,
            "top": what.top,
            "retrieve": what.retrieve,
            "exclude_seen": what.exclude_seen,
            "users_per_file": users_per_file,
            "overrides": " ".join(sorted(overrides)),
        }
        world.agree("arguments", json.dumps(origin))
        folder = Path(output)
        world.on_main(lambda: _open(folder, origin))
        users = recommender.store.users()
        _write_files(recommender, users, folder, what, time, world, users_per_file)


def _write_files(
    recommender: Recommender,
    users: Ints,
    folder: Path,
    what: TopItems,
    time: int,
    world: World,
    users_per_file: int,
) -> None:
    files = range(world.rank, -(-len(users) // users_per_file), world.size)
    start, num_users = clock.perf_counter(), 0
    for number in tqdm(files, unit="file", disable=not (world.is_main and sys.stderr.isatty())):
        path = folder / "top" / f"part-{number:06d}.parquet"
        if path.exists():
            continue
        mine = users[number * users_per_file : (number + 1) * users_per_file]
        tables = [
            _answers(recommender, mine[first : first + USERS_AT_A_TIME], what, time)
            for first in range(0, len(mine), USERS_AT_A_TIME)
        ]
        draft = path.with_name(f".{path.name}.tmp")
        pq.write_table(pa.concat_tables(tables), draft, compression="zstd")
        draft.replace(path)
        sync_folder(path.parent)
        num_users += len(mine)
        seconds = clock.perf_counter() - start
        if world.is_main:
            tqdm.write(
                f"recommend file {number + 1} of {-(-len(users) // users_per_file)}: "
                f"{num_users / seconds:,.0f} users/s on this rank",
                file=sys.stderr,
            )


def _answers(recommender: Recommender, users: Ints, what: TopItems, time: int) -> pa.Table:
    """Return the rows of some users; those without a history have none."""
    questions = []
    for user in users.tolist():
        stored = recommender.store.history(user)
        assert stored is not None
        history = before(stored, time, recommender.max_events)
        if len(history.ints):
            seen = history.ints[:, 0] if what.exclude_seen else np.empty(0, np.int64)
            questions.append(
                Question(
                    user_id=user,
                    time=time,
                    history=history,
                    retrieve=what.retrieve,
                    exclude=seen,
                    top=what.top,
                )
            )
    found = recommender.answer(questions) if questions else []
    names = [*recommender.tasks, RETRIEVAL]
    counts = [len(x.item_ids) for x in found]
    columns = {
        "user_id": np.repeat([q.user_id for q in questions], counts).astype(np.int64),
        "place": np.concatenate([*(np.arange(1, n + 1) for n in counts), np.empty(0, np.int64)]),
        "item_id": _joined([x.item_ids for x in found], np.int64),
        "order": _joined([x.order for x in found], np.float64),
        **{name: _joined(_of(found, name), np.float32) for name in names},
    }
    return pa.table({name: pa.array(x) for name, x in columns.items()})


def _of(found: Sequence[Recommendation], name: str) -> list[Any]:
    return [x.scores[name] for x in found]


def _joined(parts: Sequence[Any], dtype: Any) -> Any:
    return np.concatenate([*parts, np.empty(0, dtype)]).astype(dtype)


def _open(folder: Path, origin: dict[str, Any]) -> None:
    """Make the folder, or take it up.

    Raises:
        ValueError: if it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file: name a folder, new or empty")
    path = folder / PROGRESS
    if folder.exists() and any(folder.iterdir()):
        if not path.is_file():
            raise ValueError(
                f"output {folder} is not empty and holds nothing of gr recommend: name another"
            )
        stored = json.loads(path.read_text(encoding="utf-8"))
        for name, value in origin.items():
            if stored.get(name) != value:
                raise ValueError(
                    f"output {folder} holds recommendations of another {name}: "
                    f"{stored.get(name)!r} then, {value!r} now. Name another folder, or repeat "
                    "that command."
                )
    (folder / "top").mkdir(parents=True, exist_ok=True)
    write_atomically(path, json_line(origin))
