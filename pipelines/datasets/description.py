"""What a dataset is: its files, their columns, and what its publisher says of them."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

# integer: digits, perhaps a minus; number: decimal; milliseconds: seconds, kept as whole ms;
# text: printable ASCII without spaces.
ColumnKind = Literal["integer", "number", "milliseconds", "text"]

ARROW_TYPES: dict[ColumnKind, pa.DataType] = {
    "integer": pa.int64(),
    "number": pa.float64(),
    "milliseconds": pa.int64(),
    "text": pa.string(),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of the event log."""

    name: str
    """In the event log."""
    source: str
    """In the publisher's file."""
    kind: ColumnKind = "integer"
    """What the file holds; an empty field is null, except where `required`."""
    required: bool = False
    """A row without it is rejected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFormat:
    """Delimited text without quotes."""

    delimiter: str
    """Between fields: one character, or the same one twice."""
    header: tuple[str, ...] = ()
    """Names of the fields, where the file does not begin with them; () means that it does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """Number of rows that the publisher names."""

    num_rows: int
    files: tuple[str, ...] = ()
    """Names of the files counted together; () means all."""
    where: str = ""
    """Boolean column of the event log that is true in the rows counted; empty means every row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """One variant of a public dataset."""

    name: str
    """On the command line."""
    files: tuple[str, ...]
    """Names of the files that are read, in this order; they may lie in any folder of the source."""
    format: TextFormat | None
    """None: Parquet."""
    columns: tuple[Column, ...]
    """Of the event log."""
    counts: tuple[Count, ...]
    """What the publisher says; checked."""
    counted_by: str
    """Where the publisher says it."""
    url: str
    """What `--download` fetches."""
    md5: str = ""
    """Of the file at `url`; empty: the publisher names none."""
    terms: str
    """Licence, in a few words."""
    sessionize: dict[str, Any] = field(default_factory=dict)
    """Settings of `gr sessionize` that fit: actions, features, timestamp, ..."""
    batches: Any = None
    """Function of (open Parquet file) -> record batches with the columns; None: as they are."""

    @property
    def schema(self) -> pa.Schema:
        """Schema of the event log."""
        return pa.schema([(x.name, ARROW_TYPES[x.kind]) for x in self.columns])
