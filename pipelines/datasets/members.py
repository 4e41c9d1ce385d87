"""The files of a dataset: in a folder, in the publisher's archive, or alone."""

import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pipelines.datasets.description import Dataset

_ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar")


def is_parquet(source: Path) -> bool:
    """Return whether `source` is a Parquet file."""
    return source.suffix == ".parquet"


def open_members(dataset: Dataset, source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield (name, open file) of each file of the dataset, in the order in which they lie.

    Nothing is unpacked to disk.

    Args:
        dataset: whose files.
        source: one of its files, the archive, or a folder that holds the files (at any depth) or
            the archive.

    Raises:
        ValueError: if the source or one of the files is missing, a name stands twice, or an archive
            cannot be read.
    """
    archive = _archive(dataset, source)
    members = _in_archive(dataset, archive) if archive else _in_folder(dataset, source)
    seen = set()
    for name, file in members:
        if name in seen:
            raise ValueError(f"{source} holds two files {name}: give the folder of one of them")
        seen.add(name)
        with file:
            yield name, file
    missing = [name for name in dataset.files if name not in seen]
    if missing:
        raise ValueError(
            f"{source} lacks {', '.join(missing)} of {dataset.name}. Expected a folder with "
            f"{', '.join(dataset.files)}, or the archive {_archive_name(dataset)} from "
            f"{dataset.url}; --download fetches it."
        )


def _archive_name(dataset: Dataset) -> str:
    return dataset.url.rsplit("/", 1)[-1]


def _archive(dataset: Dataset, source: Path) -> Path | None:
    """Return the archive to read; None if the files themselves lie there."""
    if source.is_file():
        return source if source.name.endswith(_ARCHIVES) else None
    if not source.is_dir():
        raise ValueError(
            f"{source}: there is no such file or folder. Get {dataset.name} from {dataset.url}, or "
            "give a folder and --download"
        )
    archive = source / _archive_name(dataset)
    plain = any(next(source.rglob(name), None) for name in dataset.files)
    if not plain and archive.name.endswith(_ARCHIVES) and archive.is_file():
        return archive
    return None


def _in_folder(dataset: Dataset, source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if source.is_file():
        if dataset.files != (source.name,):
            return
        yield source.name, source.open("rb")
        return
    for name in dataset.files:
        for path in sorted(source.rglob(name)):
            yield name, path.open("rb")


def _in_archive(dataset: Dataset, archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as opened:
                for info in opened.infolist():
                    if _is_wanted(dataset, info.filename):
                        yield info.filename.rsplit("/", 1)[-1], opened.open(info)
        else:
            # A stream, since going back in a compressed archive reads it from the start.
            with tarfile.open(archive, "r|*") as stream:
                for member in stream:
                    file: Any = stream.extractfile(member) if member.isfile() else None
                    if file is not None and _is_wanted(dataset, member.name):
                        yield member.name.rsplit("/", 1)[-1], file
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(
            f"{archive} is not a readable archive ({error}): fetch it again from {dataset.url}"
        ) from error


def _is_wanted(dataset: Dataset, path: str) -> bool:
    # macOS puts files of its own, named like those they describe, into archives.
    return path.rsplit("/", 1)[-1] in dataset.files and "__MACOSX" not in path
