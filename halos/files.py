"""Files and folders that appear complete or not at all, and journals that survive a kill.

What is written goes to a name that ends in ``.part`` first, then to the disk (fsync), and takes its final name last. A
kill, a full disk or a power failure leaves the earlier version in place. That first name is random and made exclusively
next to the final one, so that a link put there by others who may write into the folder is not written through.
"""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from glob import escape
from pathlib import Path

PART = ".part"
"""Ending of the name that a file or folder has until it is complete."""
EDGE_BYTES = 1 << 16
"""Bytes at each end of a file that :func:`name_size_and_ends` reads: whole models or data sets would take minutes."""


def write_atomically(path: Path, text: str) -> None:
    """Write a text file in UTF-8, complete or not at all."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def atomic_file(path: Path, *, shared: bool = False, private: bool = False) -> AbstractContextManager[Path]:
    """Yield a path to write to; the file takes its final name when the block ends without an error.

    Args:
        path: the final name.
        shared: whether several processes may write this file at the same time. The last one to finish then wins.
            Otherwise what killed processes have left is removed.
        private: whether only its owner may read it, whatever the umask.
    """
    if not shared:
        _remove_leftovers(path)
    part = _unused_name(path)
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if private else 0o666))
    return _moved_into_place(part, path)


def atomic_folder(folder: Path, *, private: bool = False) -> AbstractContextManager[Path]:
    """Yield an empty folder to write to; it replaces ``folder`` when the block ends without an error."""
    _remove_leftovers(folder)
    part = _unused_name(folder)
    part.parent.mkdir(parents=True, exist_ok=True)
    part.mkdir(mode=0o700 if private else 0o777)
    return _moved_into_place(part, folder)


def _unused_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{PART}")


def _remove_leftovers(path: Path) -> None:
    for part in path.parent.glob(f".{escape(path.name)}.{'[0-9a-f]' * 16}{PART}"):
        with suppress(OSError):  # of another user
            remove(part)


@contextmanager
def _moved_into_place(part: Path, path: Path) -> Iterator[Path]:
    # The mode of a new file or folder follows the umask. safetensors makes files that only their owner can read.
    mode = stat.S_IMODE(part.stat().st_mode)
    try:
        with path_named(path):
            yield part
            for file in part.rglob("*") if part.is_dir() else (part,):
                if file.is_file():
                    file.chmod(mode & 0o666)
            move_into_place(part, path)
    except BaseException:
        remove(part)
        raise


@contextmanager
def path_named(path: Path) -> Iterator[None]:
    """Add ``path`` to errors of the system that name no file, as those of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def exclusive(file: Path) -> Iterator[None]:
    """Hold a lock until the block ends or the process dies; the file is removed when the block ends.

    On a file system without locks nothing is held.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be made.
    """
    descriptor = _take(file)
    while not file.exists() or not os.path.samestat(file.stat(), os.fstat(descriptor)):
        os.close(descriptor)  # the process that held the lock has just removed this file
        descriptor = _take(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _take(file: Path) -> int:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        # Not flock, which worker processes inherit: they may outlive a killed run for seconds.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(descriptor)
            raise BlockingIOError(error.errno, error.strerror, str(file)) from None
        # Other errors are those of file systems without locks, on which runs are not protected from each other.
    return descriptor


def move_into_place(part: Path, path: Path) -> None:
    """Give a complete file or folder its final name, in place of what has that name now.

    The contents reach the disk before the name does: after a power failure a file system may otherwise have the new
    name with an empty file behind it.
    """
    for file in part.rglob("*") if part.is_dir() else ():
        _sync(file)
    _sync(part)
    if path.is_dir():  # a rename replaces files and empty folders only
        remove(path)
    part.replace(path)
    _sync(path.parent)


def link_atomically(link: Path, path: Path) -> None:
    """Let ``link`` be a second name of the file or folder ``path`` in the same folder, in place of what it was."""
    _remove_leftovers(link)
    part = _unused_name(link)
    try:
        os.link(path, part)
    except OSError:  # a folder, or a file system without hard links
        part.symlink_to(path.name)
    part.replace(link)
    part.unlink(missing_ok=True)  # POSIX: renaming onto another name of the same file does nothing
    _sync(link.parent)


def in_home(path: str | Path) -> Path:
    """Return the path with ``~`` replaced by the home folder.

    Raises:
        ValueError: it is not a path, or it begins with ``~`` and the user or the home folder does not exist.
    """
    if not isinstance(path, str | Path):  # a saved config may hold anything
        raise ValueError(f"expected the path of a file or folder, found {path!r}")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        hint = "set HOME, or write the whole path (HALOS_CACHE or cache_dir=… for the cache)"
        raise ValueError(f"{path}: expected a home folder for ~, found none; {hint}") from None


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all it holds; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not know fsync for folders.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits; the file is read in blocks."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def name_size_and_ends(file: Path) -> bytes:
    """Return bytes that change with a file's name, its size or one of its ends; cheap for a file of any size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        beginning = stream.read(EDGE_BYTES)
        stream.seek(max(0, size - EDGE_BYTES))
        return f"{file.name} {size}".encode() + beginning + stream.read()


class Journal:
    """An append-only file of JSON objects; each is on disk when :meth:`append` returns.

    Opening it removes an unfinished last line, which a killed process leaves.

    Attributes:
        rows: the objects of the file, including those that earlier processes wrote.

    Raises:
        ValueError: another line is not a JSON object, so the file is not a journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, object]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.truncate(path, end)
        for number, line in enumerate(data[:end].splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected a JSON object, found {line[:60]!r}")
            self.rows.append(row)

    def append(self, row: Mapping[str, object]) -> None:
        """Write one object and wait until it is on disk."""
        with self.path.open("ab") as stream:
            stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        if not self.rows:  # the file may be new: its name has to reach the disk too
            _sync(self.path.parent)
        self.rows.append(dict(row))
