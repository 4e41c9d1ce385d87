"""Delimited text to typed columns; a line that does not fit is set aside with its reason."""

from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv

from pipelines.datasets.description import ARROW_TYPES, Column, ColumnKind, Dataset, TextFormat
from pipelines.datasets.rejected import Rejected

_PATTERNS: dict[ColumnKind, str] = {
    "integer": r"^-?[0-9]{1,18}$",
    "number": r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,2})?$",
    "milliseconds": r"^-?[0-9]{1,12}(\.[0-9]*)?$",
    "text": r"^[!-~]+$",
}
BLOCK_BYTES = 1 << 23


def read_text(
    dataset: Dataset, name: str, file: IO[bytes], rejected: Rejected
) -> Iterator[pa.Table]:
    """Yield the rows of a text file in order, a block at a time.

    Args:
        dataset: its format is not None.
        name: of the file, for messages.
        file: binary.
        rejected: lines that do not fit go there.

    Raises:
        ValueError: if the file is empty, lacks a column, or cannot be read.
    """
    text = dataset.format
    assert text is not None
    bad_lines: list[int] = []
    # A delimiter of two characters is one, with an empty field between them.
    doubled = len(text.delimiter) == 2

    def on_bad_row(row: Any) -> str:
        bad_lines.append(row.number)
        expected = (row.expected_columns + 1) // 2 if doubled else row.expected_columns
        actual = (row.actual_columns + 1) // 2 if doubled else row.actual_columns
        reason = f"expected {expected} fields"
        rejected.add(reason, name, row.number, f"{actual} fields: {row.text}")
        return "skip"

    try:
        reader = _open(file, text, on_bad_row)
        names = reader.schema.names
        missing = [x.source for x in dataset.columns if x.source not in names]
        if missing:
            raise ValueError(f"{name} has no column {missing}; its first line names {names}")
        line = 1 if text.header else 2
        for batch in reader:
            lines, line = _lines(batch.num_rows, line, bad_lines)
            if batch.num_rows:
                yield _typed(pa.Table.from_batches([batch]), dataset, name, lines, rejected)
    except (pa.ArrowInvalid, OSError, EOFError) as error:
        raise ValueError(f"{name} cannot be read as {dataset.name}: {error}") from error


def _open(file: IO[bytes], text: TextFormat, on_bad_row: Any) -> Any:
    header = [*text.header]
    if len(text.delimiter) == 2:
        gaps = [f"empty_{i}" for i in range(len(header) - 1)]
        header = [x for pair in zip(header, [*gaps, ""], strict=True) for x in pair][:-1]
    read = pv.ReadOptions(
        use_threads=False, block_size=BLOCK_BYTES, column_names=header or None, encoding="latin-1"
    )
    if not header:
        read = pv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, encoding="latin-1")
    parse = pv.ParseOptions(
        delimiter=text.delimiter[0],
        quote_char=False,
        ignore_empty_lines=False,
        invalid_row_handler=on_bad_row,
    )
    convert = pv.ConvertOptions(strings_can_be_null=False, default_column_type=pa.string())
    return pv.open_csv(
        pa.PythonFile(file, mode="r"),
        read_options=read,
        parse_options=parse,
        convert_options=convert,
    )


def _lines(num_rows: int, line: int, bad_lines: list[int]) -> tuple[list[tuple[int, int]], int]:
    """Return ((first row, its line) of each run of good lines; the line after them)."""
    runs = []
    row = 0
    while row < num_rows:
        while bad_lines and bad_lines[0] == line:
            bad_lines.pop(0)
            line += 1
        end = num_rows - row
        if bad_lines:
            end = min(end, bad_lines[0] - line)
        runs.append((row, line))
        row, line = row + end, line + end
    return runs, line


def _typed(
    table: pa.Table, dataset: Dataset, name: str, lines: list[tuple[int, int]], rejected: Rejected
) -> pa.Table:
    reasons: list[tuple[pa.Array, str]] = []
    if dataset.format is not None and len(dataset.format.delimiter) == 2:
        for gap in (x for x in table.column_names if x.startswith("empty_")):
            single = pc.not_equal(table[gap], "")
            reasons.append((single, f"expected {dataset.format.delimiter} between fields"))
    columns = {}
    for column in dataset.columns:
        values = table[column.source]
        converted = _convert_all(values, column)
        if converted is not None:
            columns[column.name] = converted
            continue
        empty = pc.equal(values, "")
        fits = pc.match_substring_regex(values, _PATTERNS[column.kind])
        if column.required:
            reasons.append((empty, f"{column.source} is empty"))
        reasons.append((pc.and_not(pc.invert(fits), empty), f"{column.source} is no {column.kind}"))
        columns[column.name] = _convert(pc.if_else(fits, values, None), column)
    bad = _any([flags for flags, _ in reasons]) if reasons else None
    if bad is not None and pc.any(bad).as_py():
        _note(table, reasons, dataset, name, lines, rejected)
        keep = pc.invert(bad)
        return pa.table(columns).filter(keep)
    return pa.table(columns)


def _convert_all(values: pa.ChunkedArray, column: Column) -> pa.ChunkedArray | None:
    """Return the values converted if all fit, without a pattern's slow look at each; else None."""
    if column.kind == "text":
        return None
    try:
        converted = _convert(values, column)
    except pa.ArrowInvalid:
        return None
    # Arrow reads 0x10 and nan as numbers too.
    if column.kind == "integer":
        return None if pc.any(pc.match_substring(values, "x")).as_py() else converted
    return converted if pc.all(pc.is_finite(converted)).as_py() else None


def _convert(values: pa.ChunkedArray, column: Column) -> pa.ChunkedArray:
    if column.kind == "milliseconds":
        return pc.cast(pc.round(pc.multiply(pc.cast(values, pa.float64()), 1000)), pa.int64())
    return pc.cast(values, ARROW_TYPES[column.kind])


def _any(flags: list[pa.Array]) -> pa.Array:
    result = flags[0]
    for more in flags[1:]:
        result = pc.or_(result, more)
    return result


def _note(
    table: pa.Table,
    reasons: list[tuple[pa.Array, str]],
    dataset: Dataset,
    name: str,
    lines: list[tuple[int, int]],
    rejected: Rejected,
) -> None:
    """Note each bad row once, by its first reason."""
    assert dataset.format is not None
    names = [x for x in table.column_names if not x.startswith("empty_")]
    noted: set[int] = set()
    for flags, reason in reasons:
        for row in pc.indices_nonzero(flags).to_pylist():
            if row not in noted:
                noted.add(row)
                first, line = [run for run in lines if run[0] <= row][-1]
                fields = [table[x][row].as_py() for x in names]
                text = dataset.format.delimiter.join(fields)
                rejected.add(reason, name, line + row - first, text)
