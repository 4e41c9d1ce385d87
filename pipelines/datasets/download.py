"""Fetching a dataset from its publisher, at the user's wish only."""

import hashlib
import urllib.error
import urllib.request
from pathlib import Path

from pipelines.datasets.description import Dataset

_BLOCK = 1 << 20


def download(dataset: Dataset, folder: Path) -> tuple[Path, str]:
    """Fetch the dataset's file into `folder`, unless it is there, and compare its checksum.

    Args:
        dataset: what to fetch.
        folder: made if missing.

    Returns:
        The file, and a sentence about its checksum.

    Raises:
        ValueError: if it cannot be fetched, or its checksum is another (then it is not kept).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / dataset.url.rsplit("/", 1)[-1]
    if not path.is_file():
        draft = path.with_name(f".{path.name}.part")
        try:
            with (
                urllib.request.urlopen(dataset.url, timeout=60) as response,
                draft.open("wb") as out,
            ):
                while block := response.read(_BLOCK):
                    out.write(block)
            _compare(dataset, draft)
            draft.rename(path)
        except (urllib.error.URLError, OSError) as error:
            raise ValueError(f"cannot fetch {dataset.url} into {folder}: {error}") from error
        finally:
            draft.unlink(missing_ok=True)
    return path, _compare(dataset, path)


def _compare(dataset: Dataset, path: Path) -> str:
    with path.open("rb") as file:
        if not dataset.md5:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            return f"unchecked: the publisher names no checksum (SHA-256 {found})"
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    if digest.hexdigest() != dataset.md5:
        raise ValueError(
            f"{path.name} has MD5 {digest.hexdigest()}, its publisher names {dataset.md5}: the "
            "file was cut or changed. Delete it and fetch it again."
        )
    return f"MD5 {dataset.md5} as the publisher names it"
