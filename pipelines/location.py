"""Files and folders by path or by URL: local ones as pathlib.Path, others through fsspec.

A store that cannot answer is asked again; what it raises in the end is an OSError, whatever its
client raised. Object stores have no rename: what is written there is complete once its last file
is there (pipelines/output_folder.py).
"""

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa

T = TypeVar("T")

WAITS_SECONDS = (0.5, 2.0, 8.0)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A file or folder of a file system of fsspec; methods are those of pathlib.Path."""

    filesystem: Any
    path: str
    """Without the protocol."""

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.filesystem, f"{self.path.rstrip('/')}/{name}") if name else self

    def __str__(self) -> str:
        url: str = self.filesystem.unstrip_protocol(self.path)
        return url

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    def is_dir(self) -> bool:
        """Return whether there is anything under it."""
        return self._ask("isdir")

    def is_file(self) -> bool:
        """Return whether it is a file."""
        return self._ask("isfile")

    def exists(self) -> bool:
        """Return whether it is there."""
        return self._ask("exists")

    def iterdir(self) -> Iterator["RemotePath"]:
        """Yield what the folder holds."""
        self.filesystem.invalidate_cache()
        for path in patiently(lambda: self.filesystem.ls(self.path, detail=False)):
            yield RemotePath(self.filesystem, path)

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the content of a file."""
        with self.open() as file:
            return file.read().decode(encoding)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Open a file for reading bytes.

        Raises:
            ValueError: for another mode: what is written goes through pipelines/output_folder.py.
        """
        if mode != "rb":
            raise ValueError(f"{self}: a file of a store is opened to be read (rb), got {mode!r}")
        return io.BufferedReader(_Ranges(self.filesystem, self.path), 1 << 22)

    def _ask(self, question: str) -> bool:
        self.filesystem.invalidate_cache()  # what it listed before may be out of date
        answer: bool = patiently(lambda: getattr(self.filesystem, question)(self.path))
        return answer


Location = Path | RemotePath


def locate(url: str | Location) -> Location:
    """Return the place that a path or a URL names.

    Raises:
        ValueError: if the protocol is unknown, or needs a package that is not installed.
    """
    if not isinstance(url, str):
        return url
    if "://" not in url:
        return Path(url)
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{url}: {error}") from error
    return Path(path) if "file" in protocols(filesystem) else RemotePath(filesystem, path)


def protocols(filesystem: Any) -> tuple[str, ...]:
    """Return the names of a file system in URLs."""
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def path_within(path: Location, folder: Location) -> str:
    """Return a path below a folder as text, relative to it."""
    return str(path).removeprefix(str(folder)).lstrip("/")


def open_input(path: Location) -> pa.NativeFile:
    """Open a file for random access by Arrow: mapped if it is local, else read by ranges.

    Raises:
        OSError: if it cannot be opened.
    """
    if isinstance(path, Path):
        return pa.memory_map(str(path))
    return pa.PythonFile(_Ranges(path.filesystem, path.path), mode="r")


def patiently(call: Callable[[], T]) -> T:
    """Return what `call` returns, called again after a while where it fails.

    Raises:
        OSError: if it fails every time, or at once where asking again is of no use.
    """
    for wait in (*WAITS_SECONDS, None):
        try:
            return call()
        except _FINAL:
            raise
        except Exception as error:  # each store's client has errors of its own
            if wait is None:
                if isinstance(error, OSError):
                    raise
                raise OSError(f"{type(error).__name__}: {error}") from error
            time.sleep(wait)
    raise AssertionError


class _Ranges(io.RawIOBase):
    """A file that is read by ranges, each of them whole or not at all."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem, self._path, self._at = filesystem, path, 0
        self._size = int(patiently(lambda: filesystem.size(path)))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = origin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._at + size, self._size)
        data = patiently(lambda: self._range(self._at, end)) if end > self._at else b""
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _range(self, first: int, end: int) -> bytes:
        data: bytes = self._filesystem.cat_file(self._path, start=first, end=end)
        if len(data) != end - first:
            raise OSError(
                f"{self._path}: {len(data)} bytes came of {end - first} from byte {first} on"
            )
        return data
