"""Which events a run was trained on, whatever killed it in between.

As a program it stands in for the interpreter that torchrun starts (PYTHON_EXEC): it runs `gr` and
writes, after each step, the events that a loss read, by this rank, into the folder that
SUPERVISED_EVENTS names.
"""

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

FOLDER = "SUPERVISED_EVENTS"
Event = tuple[int, int, int, int]
"""user_id, session_id, item_id, timestamp: no two events of the log share them."""


def write_interpreter(path: Path) -> Path:
    """Write what PYTHON_EXEC is to name."""
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -u -m tests.e2e.supervised "$@"\n')
    path.chmod(0o755)
    return path


def logged(log: Path) -> Counter[Event]:
    """Return the events of a session-end log, each of which is to be supervised once."""
    found: Counter[Event] = Counter()
    for path in sorted(log.glob("part-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            found.update(
                (row["user_id"], row["session_id"], event["item_id"], event["timestamp"])
                for event in row["events"]
            )
    return found


def supervised(folder: Path) -> Counter[Event]:
    """Return the events of all steps, each as the last attempt that made the step trained on it.

    A step that a resumed run makes again has left no trace in its weights: the checkpoint that it
    goes on from is older.

    Args:
        folder: holds JOB/RESTART/RANK.jsonl; jobs and restarts are numbered.
    """
    steps: dict[int, tuple[tuple[int, int], list[Event]]] = {}
    for path in folder.glob("*/*/*.jsonl"):
        attempt = (int(path.parts[-3]), int(path.parts[-2]))
        # A line that a kill has cut was followed by no checkpoint either.
        for line in re.findall(r".*\n", path.read_text()):
            row = json.loads(line)
            last, events = steps.get(row["step"], (attempt, []))
            if attempt < last:
                continue
            own = [tuple(event) for event in row["events"]]
            steps[row["step"]] = (attempt, own if attempt > last else events + own)
    assert sorted(steps) == list(range(1, len(steps) + 1)), "a step is missing"
    return Counter(event for _, events in steps.values() for event in events)


def _record() -> int:
    """Run `gr` with the arguments that follow it, and record what it is trained on."""
    from gr import cli, trainer
    from gr.sequence import sequence_index
    from gr.tokens import carries_item

    restart, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    path = Path(os.environ[FOLDER], restart, f"{rank}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    train_step = trainer.Trainer.train_step

    def watched(self, staged, ahead=None):
        result = train_step(self, staged, ahead)
        batch = staged.batch
        sequence = sequence_index(batch.offsets, batch.num_tokens)[batch.ranking_positions]
        place = (carries_item(batch.token_kind).cumsum(0) - 1)[batch.ranking_positions]
        columns = (
            batch.user_id[sequence],
            batch.session_id[sequence],
            batch.ids["item_id"].values()[place] - 1,  # rows of a static table: 0 is unknown
            batch.timestamp[batch.ranking_positions],
        )
        events = list(zip(*(column.tolist() for column in columns), strict=True))
        with path.open("a") as lines:
            lines.write(json.dumps({"step": self.progress.step, "events": events}) + "\n")
        return result

    trainer.Trainer.train_step = watched
    return cli.main(sys.argv[sys.argv.index("gr") + 1 :])


if __name__ == "__main__":
    sys.exit(_record())
