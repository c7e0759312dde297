"""The lines of a file, gzipped or not. Errors while reading are raised as a ``ValueError`` that names the file."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def lines(file: Path, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield the lines of a file, decompressed, and keep none of them in memory.

    Args:
        file: its name tells whether it is gzipped.
        start: byte of a plain file at which a line begins.
        stop: byte of a plain file at which the last line ends; None: the end of the file.
    """
    stream: BinaryIO | gzip.GzipFile
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            if start:
                stream.seek(start)
            if stop is None:
                yield from stream
            else:
                while stream.tell() < stop:
                    yield stream.readline()
    # gzip finds a fault only when it reaches it, perhaps after gigabytes: each kind says what to do about the file.
    except EOFError:
        raise ValueError(f"{file}: the gzip file ends too early, it is truncated; copy or download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: expected a gzip file because of its name, found broken data ({error})") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror or error}") from None


def decode(where: str, line: bytes) -> str:
    """Return a line as text, without a byte order mark."""
    try:
        return line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: expected UTF-8 text, found byte 0x{line[error.start]:02x} at position {error.start + 1}; "
            "save the file as UTF-8"
        ) from None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
