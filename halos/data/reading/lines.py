"""The lines of a file, gzipped or not; what goes wrong while reading becomes a ``ValueError`` naming the file."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def lines(file: Path, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The lines of ``file``, decompressed, of a plain one perhaps those between two bytes. Holds none of them: memory
    is the caller's."""
    opened: BinaryIO | gzip.GzipFile
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as opened:
            if start:
                opened.seek(start)
            if stop is None:
                yield from opened
            else:
                while opened.tell() < stop:
                    yield opened.readline()
    except EOFError:
        raise ValueError(f"{file}: the gzip file ends too early, it is truncated; copy or download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: expected a gzip file because of its name, found broken data ({error})") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror or error}") from None


def decode(where: str, line: bytes) -> str:
    """``line`` as text, without a byte order mark."""
    try:
        return line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: expected UTF-8 text, found byte 0x{line[error.start]:02x} at position {error.start + 1}; "
            "save the file as UTF-8"
        ) from None


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
