"""Files that are there whole or not at all."""

import os
from pathlib import Path


class CheckpointError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a kill at any moment, meets the old file or the new one.

    Args:
        path: file to write; its folder exists.
        text: the whole content.
    """
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and removals inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
