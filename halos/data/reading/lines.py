"""The lines of a file, compressed or not. Errors while reading are raised as a ``ValueError`` that names the file."""

import bz2
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa

LONGEST_LINE = 1 << 26
"""Bytes of a line; parsing one takes several times its size in memory."""
EXPANSION = 200
"""The largest ratio of decompressed to compressed size. :data:`LONGEST_LINE` bytes are allowed in any case.
Text compresses to a third or a tenth. A file of a megabyte that is made to do harm decompresses to a gigabyte."""


def _open_gz(file: Path) -> IO[bytes] | io.BufferedIOBase:
    return gzip.GzipFile(file)


def _open_bz2(file: Path) -> IO[bytes] | io.BufferedIOBase:
    return bz2.BZ2File(file)


def _open_zst(file: Path) -> IO[bytes] | io.BufferedIOBase:
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"))


OPENERS = {".gz": _open_gz, ".bz2": _open_bz2, ".zst": _open_zst}
"""What opens a compressed file, by its last suffix."""


def lines(
    file: Path, start: int = 0, stop: int | None = None, number: int = 1, longest: int | None = LONGEST_LINE
) -> Iterator[bytes]:
    """Yield the lines of a file, decompressed, and keep none of them in memory.

    Args:
        file: its name tells whether it is compressed.
        start: byte of a plain file at which a line begins.
        stop: byte of a plain file at which the last line ends; None: the end of the file.
        number: the number of the line that begins at ``start``, for errors.
        longest: bytes that a line may have; None: longer lines are divided.

    Raises:
        ValueError: the file cannot be read, a line is too long, or a compressed file decompresses to suspiciously much.
    """
    opener = OPENERS.get(file.suffix)
    try:
        most = max(EXPANSION * file.stat().st_size, LONGEST_LINE) if opener else None
        with opener(file) if opener else file.open("rb") as stream:
            if start:
                stream.seek(start)
            position = start
            while (stop is None or position < stop) and (line := stream.readline((longest or LONGEST_LINE) + 1)):
                position += len(line)
                if most is not None and position > most:
                    hint = "decompress the file yourself to use it"
                    raise ValueError(f"{file}:{number}: expected up to {EXPANSION} times its size, found more; {hint}")
                if longest is not None and len(line) > longest:
                    raise ValueError(f"{file}:{number}: expected lines of up to {longest:,} bytes, found a longer one")
                yield line
                del line  # the reader may have dropped it
                number += 1
    except MemoryError:
        raise ValueError(f"{file}:{number}: the line does not fit into memory") from None
    # A fault is found only when it is reached, perhaps after gigabytes: each kind says what to do about the file.
    except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
        raise ValueError(_unreadable(file, error)) from None


def _unreadable(file: Path, error: Exception) -> str:
    kind = {".gz": "gzip"}.get(file.suffix, file.suffix.removeprefix("."))
    if isinstance(error, EOFError) or "Truncated" in str(error):
        return f"{file}: the {kind} file ends too early, it is truncated; copy or download it again"
    # What the system says of a file has a number; a fault in compressed data has none.
    if isinstance(error, OSError) and (error.errno is not None or file.suffix not in OPENERS):
        return f"{file}: cannot be read: {error.strerror or error}"
    return f"{file}: expected a {kind} file because of its name, found broken data ({error})"


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
