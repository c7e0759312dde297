"""The rows of a data set with their locations: local files, folders that ``datasets`` can load, and hub ids.

A location is ``train.jsonl:12`` (line 12) or ``train.json[3]`` (the third item). Both count from 1 and begin with the
path as the user wrote it.
"""

import difflib
import glob
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from halos.data.reading.excel import read_xlsx
from halos.data.reading.fields import keys_of
from halos.data.reading.json_files import Located, MalformedRow, malformed, read_json, read_jsonl
from halos.data.reading.lines import OPENERS, USUAL
from halos.data.reading.tables import NamedRows, numbered, read_csv, read_folder, read_hub, read_parquet, typed
from halos.files import name_size_and_ends, sha256_of

READERS: dict[str, Callable[..., Iterator[Located]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".xlsx": read_xlsx,
}
CELLS = (".csv", ".tsv", ".xlsx")
"""Kinds of files whose cells are read as texts."""
PIECE_BYTES = 1 << 23
"""Size of the pieces in which a large file is read."""
SMALL = 1 << 24
"""Size in bytes up to which even a file that has to be read whole is read quickly."""
HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(/(?P<folder>\w[\w./-]*))?(:(?P<split>\w[\w.-]*))?")


@dataclass(frozen=True, slots=True)
class Piece:
    """What one task reads: a file, folder or hub data set, or a range of lines of a .jsonl file.

    Attributes:
        file: a local file, a folder (``folder`` or ``folder:split``) or a hub data set (``owner/name``,
            ``owner/name:split``, ``owner/name/folder:split``).
        start: byte at which the lines begin.
        stop: byte at which they end; None unless the piece is a range of lines.
        number: the number of the first line.
        expansion: see :class:`.ReadingLimits`.
    """

    file: str | Path
    start: int = 0
    stop: int | None = None
    number: int = 1
    expansion: int = USUAL.max_expansion

    @property
    def has_cells(self) -> bool:
        """Whether all values are texts, like the cells of a spreadsheet."""
        return _extension(Path(self.file)) in CELLS


def pieces(path: str | Path, *, divide: bool = True, expansion: int = USUAL.max_expansion) -> Iterator[Piece]:
    """Divide a file for several processes: JSON lines into ranges of some megabytes; other files are one piece."""
    file = Path(path)
    if not divide or file.suffix.lower() != ".jsonl" or not file.is_file() or file.stat().st_size <= PIECE_BYTES:
        yield Piece(path, expansion=expansion)
        return
    position, number = 0, 1
    with file.open("rb") as stream:
        while block := stream.read(PIECE_BYTES):
            count = block.count(b"\n")
            # A piece ends at the end of a line. The rest of that line may be huge, so the block is freed first.
            del block
            count += stream.readline().count(b"\n")
            yield Piece(path, position, stream.tell(), number)
            position, number = stream.tell(), number + count


def content_key(path: str | Path) -> str | None:
    """Return a key that changes with the content of a data set; None if it has no key."""
    file = Path(path)
    if file.is_file():
        try:
            return sha256_of(file)
        except OSError:
            # Without a key the file is read, and its reader raises an error that names the file.
            return None
    open_data_set = _data_set_of(path)
    rows = None if open_data_set is None else open_data_set()[1]
    # ``datasets`` keeps a key of the content for its own cache, under a private name.
    key: str | None = getattr(rows, "_fingerprint", None)
    return key


def read_piece(
    piece: Piece,
    columns: Mapping[str, str] | None = None,
    *,
    streaming: bool = False,
    convert_cells: bool = True,
    keep_malformed: bool = False,
) -> Iterator[Located]:
    """Yield the rows of a piece with their locations.

    Args:
        piece: what is read.
        columns: maps the names of keys that a format expects to those in the file.
        streaming: start reading at once, without downloading or converting the whole data set first.
        convert_cells: convert the cells of CSV and Excel files by the names of their columns, see :func:`.typed`.
        keep_malformed: yield a :class:`.MalformedRow` for a malformed row; false: raise an error.

    Raises:
        ValueError: if something cannot be read; the message names the file and the line or item.
    """
    # Columns are renamed before cells are converted, as a cell is converted by the name that the format expects.
    converts = piece.has_cells and convert_cells
    for where, row in _open(piece, streaming, keep_malformed):
        if isinstance(row, MalformedRow) or not (columns or converts):
            yield where, row
            continue
        try:
            renamed = _renamed(where, row, columns) if columns else row
            located = where, typed(where, renamed) if converts else renamed
        except ValueError as error:
            located = malformed(where, error, keep_malformed)
        yield located


def expand(path: str | Path) -> list[str | Path]:
    """Return the files that match a pattern (``data/*.jsonl``), sorted; another path is returned unchanged."""
    if not glob.has_magic(str(path)) or Path(path).exists():
        return [path]
    # Sorted, because splits and draws depend on the order of files, and file systems list them in different orders.
    files: list[str | Path] = [*sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 (Path.glob changes paths)
    if not files:
        raise ValueError(f"{path}: no file matches this pattern")
    return files


def check_streamable(path: str | Path) -> None:
    """Raise ``ValueError`` for a file that does not exist, or whose kind can only be read whole."""
    file = Path(path)
    if _data_set_of(path) is not None:
        return
    _reader(file)
    if _read_whole(file):
        raise ValueError(
            f"{file}: expected a file that can be read row by row with data.streaming=true (.jsonl, .csv, .tsv, each "
            "also compressed, .parquet or .xlsx); this kind is read whole"
        )


def reads_at_once(path: str | Path) -> bool:
    """Return whether the first rows of a path can be read quickly: it is a small file, or one that is read row by row.

    Raises:
        ValueError: there is no such file, or its kind is unknown.
    """
    file = Path(path)
    if _data_set_of(path) is not None:
        return False
    _reader(file)
    return not _read_whole(file) or file.stat().st_size < SMALL


def _read_whole(file: Path) -> bool:
    return _extension(file) == ".json" or (_extension(file) == ".parquet" and file.suffix in OPENERS)


def edges_key(path: str | Path) -> str:
    """Return a key of a file's name, size, beginning and end; for other data, of the name only.

    Unlike :func:`content_key`, this takes no longer for a large file.
    """
    file = Path(path)
    return hashlib.sha256(name_size_and_ends(file) if file.is_file() else str(path).encode()).hexdigest()


def _open(piece: Piece, streaming: bool, keep_malformed: bool) -> Iterator[Located]:
    file = Path(piece.file)
    if piece.stop is not None:
        return read_jsonl(file, piece.start, piece.stop, piece.number, keep_malformed=keep_malformed)
    open_data_set = _data_set_of(piece.file)
    if open_data_set is None:
        reader = _reader(file)
        options = {} if reader is read_parquet else {"keep_malformed": keep_malformed}
        return reader(file, expansion=piece.expansion, **options)
    return numbered(*open_data_set(streaming=streaming))


def _data_set_of(path: str | Path) -> Callable[..., NamedRows] | None:
    """Return what opens a folder or a hub data set; None for a file."""
    # A mistyped data/train.jsonl looks like a hub id, but its extension or its folder shows that a file was meant.
    in_folder = any(parent.is_dir() for parent in Path(path).parents[:-1])
    match = HUB_ID.fullmatch(str(path))
    if match and isinstance(path, str) and not in_folder and _extension(Path(path)) not in READERS:
        return partial(read_hub, path, match)
    # A folder may have a colon in its name, so the whole path is tried first and then the part before the last colon.
    folder, _, split = str(path).rpartition(":")
    if Path(path).is_dir():
        return partial(read_folder, Path(path), None)
    return partial(read_folder, Path(folder), split) if Path(folder).is_dir() and split and folder else None


def _extension(file: Path) -> str:
    """Return the extension for the kind of a file: of ``train.jsonl.gz``, ``.jsonl``."""
    return (file.with_suffix("") if file.suffix in OPENERS else file).suffix.lower()


def _renamed(where: str, row: dict[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    for ours, theirs in columns.items():
        if theirs not in row:
            raise ValueError(f"{where}: expected the key {theirs!r} (data.columns.{ours}); found {keys_of(row)}")
    renamed = set(columns.values())
    others = {key: value for key, value in row.items() if key not in renamed and key not in columns}
    return others | {ours: row[theirs] for ours, theirs in columns.items()}


def _reader(file: Path) -> Callable[..., Iterator[Located]]:
    if not file.exists():
        raise ValueError(f"{file}: no such file{_near_matches(file)}")
    reader = READERS.get(_extension(file))
    if reader is None:
        raise ValueError(
            f"{file}: expected a name that ends in {', '.join(READERS)} (or one of these and {', '.join(OPENERS)}); "
            f"found {''.join(file.suffixes) or 'no extension'}"
        )
    return reader


def _near_matches(file: Path) -> str:
    if not file.parent.is_dir():
        return f"; there is no folder {file.parent} either"
    near = difflib.get_close_matches(file.name, sorted(entry.name for entry in file.parent.iterdir()))
    return f"; did you mean {' or '.join(near)}?" if near else f"; nothing in {file.parent} has a similar name"
