"""Mutated data files: each gives a data set or one ``ValueError`` on one line that names the file, whatever is in it.

python -m tests.fuzz_data [COUNT] [SEED]    (from the repository; 10,000 take some minutes)
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import random
import signal
import tracemalloc
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from halos.data.reading.lines import LONGEST_LINE
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.sources.file_source import FileSource
from halos.data.sources.hh import HHSource
from halos.data.sources.oasst import OasstSource
from halos.data.sources.shp import SHPSource
from halos.data.sources.ultrafeedback import UltraFeedbackSource
from tests.campaign import main

KINDS = ("jsonl", "json", "csv", "parquet", *(("xlsx",) if find_spec("openpyxl") else ()))
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}
SECONDS = 10
CSV_FACTOR = 14
"""Python's csv module builds a cell of four-byte characters in a buffer that it doubles: a cell that is most of its
file takes more than twice its size."""
ALLOWANCE = 10 * 2**20
"""Bytes beyond twice the file's (decompressed) size: the interpreter's, pyarrow's and one row's own."""

TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "tool", "content": "42"}]
SEEDS: dict[str, tuple[type[FileSource], list[dict[str, Any]]]] = {
    "own": (
        FeedbackFiles,
        [
            {
                "id": f"r{n}",
                "prompt": TURNS,
                "completions": [{"text": "a", "desirable": True}, {"text": "b", "score": 1.5}],
                "preferences": [[0, 1]],
            }
            for n in range(4)
        ],
    ),
    "pairs": (
        FeedbackFiles,
        [{"prompt": f"q{n} é", "chosen": "good 🙂", "rejected": "bad", "score_chosen": 2.0} for n in range(9)],
    ),
    "labels": (
        FeedbackFiles,
        [{"prompt": "q", "completion": f"a{n}", "label": n % 2, "score": n / 3} for n in range(9)],
    ),
    "votes": (
        FeedbackFiles,
        [{"question": "q", "answer": f"a{n % 3}", "votes": {"up": n, "down": 2}, "weight": n / 4} for n in range(9)],
    ),
    "thumbs": (FeedbackFiles, [{"Question": "q", "Reply": f"a{n % 3}", "thumb": "👍👎"[n % 2]} for n in range(9)]),
    "scores": (
        FeedbackFiles,
        [{"prompt": f"q{n % 2}", "response": f"a{n % 3}", "rating": f"{n}/9", "upvotes": n} for n in range(9)],
    ),
    "sides": (
        FeedbackFiles,
        [
            {"prompt": "q", "response_a": "a", "response_b": "b", "winner": winner}
            for winner in ("a", "model_b", "tie", "left")
        ],
    ),
    "chats": (
        FeedbackFiles,
        [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": f"a{n}"}]} for n in range(4)]
        + [{"transcript": "Human: q\n\nAssistant: a", "label": 1}],
    ),
    "lists": (FeedbackFiles, [{"prompt": f"q{n}", "responses": ["a", "b"], "scores": [1, n]} for n in range(4)]),
    "hh": (HHSource, [{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}] * 5),
    "shp": (
        SHPSource,
        [
            {
                "history": "q",
                "human_ref_A": "a",
                "human_ref_B": "b",
                "labels": n % 2,
                "score_A": 5,
                "score_B": 2,
                "score_ratio": 2.5,
            }
            for n in range(5)
        ],
    ),
    "oasst": (
        OasstSource,
        [{"message_id": "m0", "parent_id": None, "role": "prompter", "text": "q", "lang": "en", "rank": None}]
        + [
            {"message_id": f"m{n}", "parent_id": "m0", "role": "assistant", "text": f"a{n}", "lang": "en", "rank": n}
            for n in range(1, 4)
        ],
    ),
    "ultrafeedback": (
        UltraFeedbackSource,
        [
            {"instruction": f"q{n}", "completions": [{"response": f"a{k}", "overall_score": k} for k in range(4)]}
            for n in range(3)
        ],
    ),
}
WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**80,
    1.5,
    1e308,
    "",
    " \n",
    "\ud83d",
    "\x00",
    [],
    [[]],
    {},
    [None],
    {"role": "user"},
    [0, 0],
    [{"role": "user", "content": None}],
    [{"role": "x", "content": "y"}],
    {"text": 3},
    "[{'role': 'user'",
    "NaN",
    "1e999",
)


class Hung(Exception):
    """Loading took more than :data:`SECONDS` of processor time."""


DEEPEST = 8
"""Levels that mutations reach; what lies deeper is there to be refused."""


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if len(path) > DEEPEST:
        return [path]
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, item in inside for found in _paths(item, (*path, key))]


def _replace(rows: list[Any], path: tuple[Any, ...], value: Any) -> None:
    at: Any = rows
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value


def wrong_types(rows: list[Any], rng: random.Random) -> None:
    _replace(rows, rng.choice(_paths(rows)), deepcopy(rng.choice(WRONG)))


def huge_field(rows: list[Any], rng: random.Random) -> None:
    _replace(rows, rng.choice(_paths(rows)), rng.choice('a\n",é') * rng.choice((1000, 140_000, 500_000)))


def deep_nesting(rows: list[Any], rng: random.Random) -> None:
    deep: Any = "x"
    for _ in range(rng.choice((5, 50, 300))):
        deep = [deep] if rng.random() < 0.5 else {"role": deep}
    _replace(rows, rng.choice(_paths(rows)), deep)


def missing_key(rows: list[Any], rng: random.Random) -> None:
    row = rng.choice(rows)
    row.pop(rng.choice(list(row)))


STRUCTURAL: tuple[Callable[[list[Any], random.Random], None], ...] = (
    wrong_types,
    huge_field,
    deep_nesting,
    missing_key,
)


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 20))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def splice(content: bytes, rng: random.Random) -> bytes:
    at, piece = (
        rng.randrange(len(content)),
        rng.choice(
            (
                b"\xff\xfe",
                b"\x00" * 9,
                b'"',
                b"\n",
                b"{" * 50,
                b"[" * 100_000,
                b'{"prompt": 1, "prompt": 2}',
                b"9" * 5000,
                b"\xed\xa0\x80",
                b"NaN",
                b",,,,",
                content[:200],
            )
        ),
    )
    return content[:at] + piece + content[at + rng.randrange(5) :]


def duplicate_keys(content: bytes, rng: random.Random) -> bytes:
    return content.replace(b'{"', b'{"text": 1, "text": 2, "', 1 + rng.randrange(3))


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (flip_bits, cut, splice, duplicate_keys)


def encode(rows: list[Any], kind: str) -> bytes:
    """Rows in a format; a Parquet file cannot hold all that JSON can (mixed types): such rows are its text."""
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "json":
        return json.dumps(rows, indent=1).encode()
    rows = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    names = list(dict.fromkeys(str(name) for row in rows for name in row)) or ["prompt"]
    if kind == "csv":
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(names)
        plain = [[row.get(name) for name in names] for row in rows]
        writer.writerows([[v if isinstance(v, str) else "" if v is None else json.dumps(v) for v in r] for r in plain])
        return text.getvalue().encode("utf-8", "surrogatepass")
    if kind == "xlsx":
        return _workbook(names, rows)
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(pa.Table.from_pylist(rows), sink)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, NotImplementedError):
        return encode([{"prompt": json.dumps(row), "completion": "a"} for row in rows], kind)
    return sink.getvalue().to_pybytes()


def _workbook(names: list[str], rows: list[Any]) -> bytes:
    """A sheet of the rows; what Excel cannot hold is left out."""
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book, stream = Workbook(), io.BytesIO()
    for row in [dict(zip(names, names, strict=True)), *rows]:
        values = (row.get(name) for name in names)
        texts = [v if isinstance(v, str) else "" if v is None else json.dumps(v) for v in values]
        cells = [ILLEGAL_CHARACTERS_RE.sub("", text.encode("utf-8", "ignore").decode())[:32767] for text in texts]
        book.active.append([cell.lstrip("=") for cell in cells])
    book.save(stream)
    return stream.getvalue()


def mutate(rng: random.Random, folder: Path) -> tuple[type[FileSource], Path, int]:
    """A mutated file, the source that reads it, and the size of its content."""
    kind, name = rng.choice(KINDS), rng.choice(sorted(SEEDS))
    source, seed = SEEDS[name]
    rows = json.loads(json.dumps(seed))
    by_bytes = rng.random() < 0.5
    for _ in range(0 if by_bytes else rng.choice((1, 2, 5))):
        if rows and any(isinstance(row, dict) and row for row in rows):
            rows = [row for row in rows if not isinstance(row, dict) or row] if not by_bytes else rows
            mutation = rng.choice(STRUCTURAL)
            if mutation is not missing_key or all(isinstance(row, dict) for row in rows):
                mutation(rows, rng)
    content = encode(rows, kind)
    size = max(len(content), len(encode(rows, "json")))  # Parquet is compressed
    packed = rng.random() < 0.15 and kind != "xlsx"
    if by_bytes and not packed:
        content = rng.choice(BYTES)(content, rng)
        size = max(size, len(content))
    suffix = rng.choice(sorted(PACK)) if packed else ""
    file = folder / f"f.{kind}{suffix}"
    data = PACK[suffix](content) if packed else content
    file.write_bytes(rng.choice((flip_bits, cut))(data, rng) if by_bytes and packed else data)
    return source, file, size


def load(source: type[FileSource], file: Path) -> str:
    """``loaded`` or ``refused``; any other exception, and an error that does not say where, comes out."""
    try:
        source(str(file)).train()
    except ValueError as error:
        said = str(error)
        if type(error) not in (ValueError,) or "\n" in said or not said.startswith(str(file)) or len(said) > 4000:
            raise AssertionError(
                f"expected a ValueError of one line that starts with {file}, found {error!r:.500}"
            ) from error
        return "refused"
    return "loaded"


def _hung(*_: Any) -> None:
    raise Hung


def fuzz(count: int, seed: int, folder: Path) -> Counter[str]:
    """Outcomes of ``count`` mutated files. Raises ``AssertionError`` naming the seeds of what breaks the promise."""
    outcomes: Counter[str] = Counter()
    broken: list[str] = []
    signal.signal(signal.SIGPROF, _hung)
    if "xlsx" in KINDS:
        import openpyxl  # noqa: F401 (its memory is no file's)
    for n in range(seed, seed + count):
        source, file, size = mutate(random.Random(n), folder)
        arrow = pa.total_allocated_bytes()
        tracemalloc.start()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            outcome = load(source, file)
        except Exception as error:
            outcome = "broken"
            broken.append(f"seed {n}: {source.name} from {file.name}: {type(error).__name__}: {error!s:.300}")
        signal.setitimer(signal.ITIMER_PROF, 0)
        peak = tracemalloc.get_traced_memory()[1] + max(0, pa.total_allocated_bytes() - arrow)
        tracemalloc.stop()
        # A damaged frame of zstd, which need not have a checksum, may become up to LONGEST_LINE bytes.
        size += LONGEST_LINE if file.suffix == ".zst" else 0
        factor = CSV_FACTOR if file.name.startswith(("f.csv", "f.xlsx")) else 3 if ".parquet" in file.name else 2
        # A row of a sheet has up to 16,384 cells, however few of them the file holds.
        allowance = 3 * ALLOWANCE if file.name.startswith("f.xlsx") else ALLOWANCE
        if peak > factor * size + allowance:
            broken.append(f"seed {n}: {peak:,} bytes for {size:,} in {file.name}")
        outcomes[f"{file.name.removeprefix('f.')} {outcome}"] += 1
    assert not broken, "\n".join(broken)
    return outcomes


if __name__ == "__main__":
    main(fuzz)
