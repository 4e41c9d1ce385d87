"""Rows that could not be used: counted by reason, the first of them kept."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MAX_KEPT = 100_000


class Rejected:
    """Counts every rejected row; keeps the first MAX_KEPT with their place and text."""

    def __init__(self) -> None:
        """Start without any."""
        self.counts: Counter[str] = Counter()
        """Reason -> rows."""
        self._kept: list[tuple[str, int, str, str]] = []

    def add(self, reason: str, file: str, row: int, text: str) -> None:
        """Count a row; `row` is a line of a text file from 1, a row of a Parquet file from 0."""
        self.counts[reason] += 1
        if len(self._kept) < MAX_KEPT:
            self._kept.append((file, row, reason, text[:1000]))

    @property
    def total(self) -> int:
        """Rows rejected."""
        return self.counts.total()

    def first(self) -> str:
        """Return a sentence about the first row, for messages."""
        file, row, reason, text = self._kept[0]
        return f"the first is row {row} of {file}: {reason}: {text!r}"

    def write(self, path: Path) -> None:
        """Write the rows that were kept."""
        file, row, reason, text = zip(*self._kept, strict=True)
        pq.write_table(pa.table({"file": file, "row": row, "reason": reason, "text": text}), path)
