"""A dataset's files to an event log.

OUTPUT/events/*.parquet: the log; OUTPUT/sessionize.yaml: a configuration of `gr sessionize` for it;
OUTPUT/rejects.parquet: lines that did not fit; OUTPUT/event_log.json: counts, and what was checked.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml  # type: ignore[import-untyped]

from pipelines.datasets.description import Count, Dataset
from pipelines.datasets.members import is_parquet, open_members
from pipelines.datasets.parquet_reader import read_parquet
from pipelines.datasets.rejected import Rejected
from pipelines.datasets.text_reader import read_text
from pipelines.event_log_writer import (
    EVENTS_FOLDER,
    SUMMARY,
    is_event_log,
    write_events,
    write_summary,
)
from pipelines.location import Location
from pipelines.output_folder import check_output, new_folder

CONFIG = "sessionize.yaml"
REJECTS = "rejects.parquet"


def convert(
    dataset: Dataset,
    source: Path,
    output: Location,
    *,
    overwrite: bool = False,
    partial: bool = False,
    max_reject_fraction: float = 0.01,
) -> str:
    """Write the event log of a dataset; it appears complete or not at all. Memory is constant.

    Args:
        dataset: what `source` holds.
        source: a folder with the publisher's files or archive, one of them, or a Parquet file with
            the columns of the event log.
        output: folder of the result.
        overwrite: replace an event log that is already there.
        partial: accept another number of rows than the publisher names.
        max_reject_fraction: stop if more than this share of the rows does not fit.

    Returns:
        What was written and checked, in a few lines.

    Raises:
        ValueError: if something is missing or cannot be read, the number of rows is another than
            the publisher names, too many rows do not fit, or `output` may not be replaced.
    """
    check_output(output, overwrite, kind="converted event log", is_ours=is_event_log)
    rejected = Rejected()
    rows: Counter[tuple[str, str]] = Counter()
    with new_folder(output, last=SUMMARY) as (folder, _):
        for name, file in _files(dataset, source):
            tables = _counted(_read(dataset, source, name, file, rejected), dataset, name, rows)
            path = folder / EVENTS_FOLDER / f"{name.rsplit('.', 1)[0]}.parquet"
            write_events(tables, path, dataset.schema)
        num_rows = sum(count for (_, where), count in rows.items() if not where)
        _check_rejects(dataset, num_rows, rejected, max_reject_fraction)
        checks = _check_counts(dataset, rows, rejected, partial)
        if rejected.total:
            rejected.write(folder / REJECTS)
        _write_config(dataset, output, folder)
        content = {
            "dataset": dataset.name,
            "url": dataset.url,
            "terms": dataset.terms,
            "num_rows": num_rows,
            "rejects": dict(rejected.counts),
            "counts": checks,
        }
        write_summary(folder, content)
    lines = [f"wrote {num_rows} events to {output / EVENTS_FOLDER}", *checks]
    if rejected.total:
        lines.append(f"rejected {rejected.total} rows: {dict(rejected.counts)}")
    return "\n".join([*lines, f"next: gr sessionize {output / CONFIG}"])


def _files(dataset: Dataset, source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if is_parquet(source) and source.name not in dataset.files:
        if not source.is_file():
            raise ValueError(f"{source}: there is no such file")
        with source.open("rb") as file:
            yield source.name, file
    else:
        yield from open_members(dataset, source)


def _read(
    dataset: Dataset, source: Path, name: str, file: IO[bytes], rejected: Rejected
) -> Iterator[pa.Table]:
    if dataset.format is None or is_parquet(source):
        plain = is_parquet(source) and name not in dataset.files
        return read_parquet(dataset, name, file, rejected, plain=plain)
    return read_text(dataset, name, file, rejected)


def _counted(
    tables: Iterable[pa.Table], dataset: Dataset, name: str, rows: Counter[tuple[str, str]]
) -> Iterator[pa.Table]:
    """Count the rows of a file, all of them and those of each `where`."""
    for table in tables:
        rows[name, ""] += table.num_rows
        for where in {count.where for count in dataset.counts if count.where}:
            rows[name, where] += pc.sum(table[where]).as_py() or 0
        yield table


def _check_rejects(dataset: Dataset, num_rows: int, rejected: Rejected, most: float) -> None:
    total = num_rows + rejected.total
    if total == 0:
        raise ValueError(f"the files of {dataset.name} are empty")
    if rejected.total > most * total or num_rows == 0:
        raise ValueError(
            f"{rejected.total} of {total} rows do not fit {dataset.name}, more than "
            f"max_reject_fraction={most} allows: {dict(rejected.counts)}; {rejected.first()}. Is "
            "it the file of another dataset?"
        )


def _check_counts(
    dataset: Dataset, rows: Counter[tuple[str, str]], rejected: Rejected, partial: bool
) -> list[str]:
    """Return a sentence on each number that the publisher names."""
    counts = dataset.counts
    if not {name for name, _ in rows} <= set(dataset.files):
        # A Parquet file with everything in it.
        named = [count.num_rows for count in counts if count.files]
        counts = (Count(num_rows=sum(named)),) if named else counts
    checks = []
    for count in counts:
        found = sum(
            number
            for (name, where), number in rows.items()
            if where == count.where and (not count.files or name in count.files)
        )
        what = f"rows with {count.where}" if count.where else "rows"
        if count.files:
            what += f" of {', '.join(count.files)}"
        if found == count.num_rows:
            checks.append(f"{what}: {found}, as in {dataset.counted_by}")
        elif partial:
            checks.append(f"{what}: {found}, not the {count.num_rows} of {dataset.counted_by}")
        else:
            bad = f" ({rejected.total} rejected; {rejected.first()})" if rejected.total else ""
            raise ValueError(
                f"{dataset.name}: found {found} {what}{bad}, {dataset.counted_by} says "
                f"{count.num_rows}. Fetch the files again, or give --partial to use them as they "
                "are."
            )
    return checks


def _write_config(dataset: Dataset, output: Location, folder: Path) -> None:
    settings: dict[str, Any] = {"input": str(output / EVENTS_FOLDER), "output": f"{output}_log"}
    text = yaml.safe_dump(settings | dataset.sessionize, sort_keys=False, width=100)
    head = (
        f"# Sessions of {dataset.name} by a gap of half an hour; `gr sessionize` reads this file.\n"
    )
    (folder / CONFIG).write_text(head + text, encoding="utf-8")
