"""The limits of what is read from a file."""

import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from halos.data.reading import lines as module
from halos.data.reading.json_files import DECODER, read_json, read_jsonl
from halos.data.reading.lines import lines
from halos.data.reading.tables import read_csv

MIB = 1 << 20


@pytest.fixture(autouse=True)
def smaller_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sizes are a 64th of what they are for users, so that the tests are quick."""
    monkeypatch.setattr(module, "LONGEST_LINE", MIB)
    monkeypatch.setattr(lines, "__defaults__", (0, None, 1, MIB))


def bomb(file: Path, *, end: bytes = b"") -> Path:
    """Up to 64 KB that decompress to 64 MB."""
    with pa.CompressedOutputStream(str(file), {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}[file.suffix]) as stream:
        stream.write(b'{"prompt": "p", "completion": "c", "label": true}\n{"prompt": "')
        for _ in range(64):
            stream.write((b"a" * (MIB - 100)) + end)
    assert file.stat().st_size < 100_000
    return file


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_a_line_of_a_bomb_takes_no_more_memory_than_the_limit(suffix: str, tmp_path: Path) -> None:
    file = bomb(tmp_path / f"a.jsonl{suffix}")
    tracemalloc.start()
    # The others make so little of it that the size of what comes out is refused first.
    limit = "lines of up to 1,048,576 bytes" if suffix == ".gz" else "up to 200 times its size"
    with pytest.raises(ValueError, match=rf"a\.jsonl\{suffix}:2: expected {limit}, found"):
        list(read_jsonl(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * MIB


@pytest.mark.parametrize("name", ["a.json.gz", "a.csv.gz", "a.csv.bz2", "a.json.zst"])
def test_a_file_that_decompresses_to_suspiciously_much_is_refused(name: str, tmp_path: Path) -> None:
    file = bomb(tmp_path / name, end=b"\n")
    with pytest.raises(ValueError, match=rf"{name}:\d+: expected up to 200 times its size, found more"):
        for _ in lines(file, longest=None if "json" in name else MIB):
            pass
    if "json" in name:
        with pytest.raises(ValueError, match=rf"{name}:\d+: expected up to 200 times its size, found more"):
            list(read_json(file))


def test_a_plain_line_of_the_longest_size_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    head, tail = b'{"prompt": "', b'"}\n'
    row = head + b"a" * (MIB - len(head) - len(tail)) + tail
    file.write_bytes(row * 3)
    assert len(list(read_jsonl(file))) == 3
    file.write_bytes(row * 2 + b" " + row)
    with pytest.raises(ValueError, match=r"a\.jsonl:3: expected lines of up to"):
        list(read_jsonl(file))
    with pytest.raises(ValueError, match=r"a\.jsonl:3: expected lines of up to"):
        list(read_jsonl(file, start=2 * MIB, number=3))


def test_a_csv_file_has_the_same_limit(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\n" + "a" * 2 * MIB + ",b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.csv:2: expected lines of up to"):
        list(read_csv(tmp_path / "a.csv"))


def test_a_json_file_may_be_one_long_line(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[{"prompt": "' + "a" * 3 * MIB + '"}]', encoding="utf-8")
    ((_, row),) = read_json(file)
    assert len(str(row["prompt"])) == 3 * MIB


def test_memory_that_does_not_suffice_is_reported_with_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{}\n{"a": 1}\n', encoding="utf-8")

    def decode(text: str) -> dict[str, object]:
        if len(text) > 4:
            raise MemoryError
        return {}

    monkeypatch.setattr(DECODER, "decode", decode)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .* fit into memory"):
        list(read_jsonl(file))
