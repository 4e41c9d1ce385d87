"""Folders of output that appear complete or not at all.

A local folder is made beside its place and renamed. Object stores have no rename: there the files
are made locally and then sent, the one that says what the folder holds (manifest.json) last, so
that no reader takes what is half there for a log. A marker tells what a killed run left behind from
folders that are not ours.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.location import Location, RemotePath, patiently
from pipelines.manifest import is_session_log
from pipelines.schema import MANIFEST

UNFINISHED = "_unfinished"


def check_output(
    output: Location,
    overwrite: bool,
    *,
    kind: str = "session-end log",
    is_ours: Callable[[Location], bool] = is_session_log,
) -> None:
    """Refuse an output folder that holds something else, or that may not be replaced.

    Args:
        output: where the result will go.
        overwrite: whether a folder of the same kind may be replaced.
        kind: what the folder will be, for messages.
        is_ours: tells whether a folder is of that kind.

    Raises:
        ValueError: if `output` exists and may not be replaced.
    """
    if output.is_dir():
        if is_ours(output):
            if not overwrite:
                raise ValueError(
                    f"output={output} holds a {kind} already: set overwrite=true to replace it, or "
                    "choose another folder"
                )
        elif any(output.iterdir()) and not (output / UNFINISHED).exists():
            raise ValueError(
                f"output={output} exists and is no {kind}, so it is not replaced: choose another "
                "folder"
            )
    elif output.exists() or (isinstance(output, Path) and output.is_symlink()):
        raise ValueError(f"output={output} exists and is no folder: choose another one")


@contextmanager
def new_folder(output: Location, *, last: str = MANIFEST) -> Iterator[tuple[Path, Path]]:
    """Yield (a folder that becomes `output` if all goes well, a folder for scratch files).

    Args:
        output: path or URL; of a URL both lie in the system's folder for temporary files.
        last: file without which the folder is not complete.

    Raises:
        ValueError: if a store does not take what is sent.
    """
    if isinstance(output, RemotePath):
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.") as draft:
            folder, scratch = _draft(Path(draft))
            yield folder, scratch
            _send(folder, output, last)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as draft:
        folder, scratch = _draft(Path(draft))
        yield folder, scratch
        if output.exists():
            output.rename(Path(draft, "replaced"))
        folder.rename(output)


def _draft(draft: Path) -> tuple[Path, Path]:
    folder, scratch = draft / "log", draft / "scratch"
    folder.mkdir()
    scratch.mkdir()
    return folder, scratch


def _send(folder: Path, output: RemotePath, last: str) -> None:
    """Send the files of a folder in place of those that are there, `last` at the end."""
    store, marker = output.filesystem, output / UNFINISHED
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files.sort(key=lambda path: path == folder / last)
    try:
        patiently(lambda: store.pipe_file(marker.path, b""))
        old = [path for path in patiently(lambda: store.find(output.path)) if path != marker.path]
        for path in sorted(old, key=lambda path: path != (output / last).path):
            patiently(lambda path=path: store.rm_file(path))  # type: ignore[misc]
        for path in files:
            patiently(lambda path=path: _send_file(path, folder, output))  # type: ignore[misc]
        patiently(lambda: store.rm_file(marker.path))
    except OSError as error:
        raise ValueError(
            f"output={output}: the store did not take the files ({error}). Nothing complete is "
            "there now: run the command again"
        ) from error


def _send_file(path: Path, folder: Path, output: RemotePath) -> None:
    target, size = (output / path.relative_to(folder).as_posix()).path, path.stat().st_size
    output.filesystem.put_file(str(path), target)
    output.filesystem.invalidate_cache()
    found = output.filesystem.size(target)
    if found != size:
        raise OSError(f"{target} has {found} bytes, {size} were sent")
