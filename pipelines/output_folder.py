"""Folders of output that appear complete or not at all."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.manifest import is_session_log


def check_output(
    output: Path,
    overwrite: bool,
    *,
    kind: str = "session-end log",
    is_ours: Callable[[Path], bool] = is_session_log,
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
        elif any(output.iterdir()):
            raise ValueError(
                f"output={output} exists and is no {kind}, so it is not replaced: choose another "
                "folder"
            )
    elif output.exists() or output.is_symlink():
        raise ValueError(f"output={output} exists and is no folder: choose another one")


@contextmanager
def new_folder(output: Path) -> Iterator[tuple[Path, Path]]:
    """Yield (a folder that becomes `output` if all goes well, a folder for scratch files)."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as draft:
        folder, scratch = Path(draft, "log"), Path(draft, "scratch")
        folder.mkdir()
        scratch.mkdir()
        yield folder, scratch
        if output.exists():
            output.rename(Path(draft, "replaced"))
        folder.rename(output)
