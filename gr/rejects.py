"""rejects/rank_N.jsonl of a run directory: the sessions that were skipped, a line each."""

import json
from dataclasses import asdict
from pathlib import Path

from gr.atomic import write_atomically
from gr.runlog import read_lines
from pipelines.rejects import Reject


class RejectFile:
    """Appends what one rank skips.

    Args:
        folder: of the run's rejects; made with the first one.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"rank_{rank}.jsonl"

    def write(self, reject: Reject, step: int) -> None:
        """Append a session.

        Args:
            reject: where it is and why it was skipped.
            step: the update that its batch belongs to.
        """
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **asdict(reject)}) + "\n")


def cut_rejects(folder: Path, step: int) -> None:
    """Drop what was skipped after `step`, in the files of all ranks. Called on one rank."""
    for path in folder.glob("rank_*.jsonl"):
        kept = [row for row in read_lines(path) if row["step"] <= step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
