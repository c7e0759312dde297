"""The limits of what is read from a file."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from halos.data import FeedbackFiles, PreferenceDataModule, StreamingDataModule
from halos.data.reading import lines as module
from halos.data.reading.fields import messages_of
from halos.data.reading.files import READERS
from halos.data.reading.json_files import DECODER, parse_json, read_json, read_jsonl
from halos.data.reading.lines import lines
from halos.data.reading.tables import read_csv
from halos.data.records.adapted import BAD_ROW

MIB = 1 << 20


@pytest.fixture(autouse=True)
def smaller_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sizes are a 64th of what they are for users, so that the tests are quick."""
    monkeypatch.setattr(module, "LONGEST_LINE", MIB)
    monkeypatch.setattr(lines, "__defaults__", (0, None, 1, MIB, 200))


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
    limit = "lines of up to 1,048,576 bytes" if suffix == ".gz" else "up to data.max_expansion = 200 times its size"
    with pytest.raises(ValueError, match=rf"a\.jsonl\{suffix}:2: expected {limit}, found"):
        list(read_jsonl(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * MIB


@pytest.mark.parametrize("name", ["a.json.gz", "a.csv.gz", "a.csv.bz2", "a.json.zst"])
def test_a_file_that_decompresses_to_suspiciously_much_is_refused(name: str, tmp_path: Path) -> None:
    file = bomb(tmp_path / name, end=b"\n")
    with pytest.raises(ValueError, match=rf"{name}:\d+: expected up to data.max_expansion = 200 times its size"):
        for _ in lines(file, longest=None if "json" in name else MIB):
            pass
    if "json" in name:
        with pytest.raises(ValueError, match=rf"{name}:\d+: expected up to data.max_expansion = 200 times its size"):
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


def test_how_much_a_file_may_decompress_to_can_be_set(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    row = b'{"prompt": "' + b"p" * 10_000 + b'", "completion": "c", "label": true}\n'
    with gzip.open(file, "wb") as stream:
        stream.write(row * 200)
    ratio = len(row) * 200 // file.stat().st_size
    assert 200 < ratio < 2000  # what a honest file of repetitions may have
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz:\d+: expected up to data\.max_expansion = 200 times its size"):
        PreferenceDataModule(file, cache_dir=None).preparation.read()
    records = PreferenceDataModule(file, max_expansion=ratio + 1, cache_dir=None).preparation.read().records
    assert len(records["train"]) == 200
    streamed = StreamingDataModule(file, max_expansion=50, cache_dir=None, val_size=1).preparation
    streamed.read()  # the first record alone
    with pytest.raises(ValueError, match=r"data\.max_expansion = 50 "):
        list(streamed.source.stream({}))


def test_a_record_has_a_limit_of_characters(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "pp", "completion": "c", "label": true}\n' + json.dumps(ABSURD), encoding="utf-8")
    assert len(PreferenceDataModule(file, max_characters=2005, cache_dir=None).preparation.read().records["train"]) == 2
    expected = r"a\.jsonl:2: expected a record of up to data\.max_characters = 2,004 characters, found 2,005"
    with pytest.raises(ValueError, match=expected):
        PreferenceDataModule(file, max_characters=2004, cache_dir=None).preparation.read()
    skipping = FeedbackFiles(file, bad_rows="skip")
    read = PreferenceDataModule(skipping, max_characters=2004, cache_dir=None).preparation.read()
    assert (len(read.records["train"]), skipping.train().dropped[BAD_ROW]) == (1, 1)
    with pytest.raises(ValueError, match=r"data\.max_characters: expected a whole number"):
        PreferenceDataModule(file, max_characters=0)
    with pytest.raises(ValueError, match=r"data\.max_expansion: expected a whole number"):
        PreferenceDataModule(file, max_expansion=0)


ABSURD = {"prompt": [{"role": "user", "content": "p" * 2000}], "completion": "abcde", "label": False}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("depth", [100, 101, 400, 900, 100_000])
def test_json_has_a_limit_of_nesting(name: str, depth: int, tmp_path: Path) -> None:
    file, is_csv = tmp_path / name, name.endswith("csv")
    # In a table it is the value itself that has 100 levels, in a row of JSON that is the first.
    nested = "[" * (depth - (not is_csv)) + "]" * (depth - (not is_csv))
    line = f'{{"prompt": "p", "completion": "c", "label": true, "tools": {nested}}}'
    text = {"a.json": f"[{line}]", "a.jsonl": line, "a.csv": f'prompt,tools\np,"{nested}"\n'}[name]
    file.write_text(text, encoding="utf-8")

    def read() -> object:
        return parse_json(f"{file}:2: tools", nested) if is_csv else list(READERS[file.suffix](file))

    if depth == 100:
        assert read()
        return
    where = r"a\.(jsonl:1|json|csv:2: tools)"
    with pytest.raises(ValueError, match=rf"{where}: expected .*(more than 100 levels|nested too)"):
        read()


def test_deep_arguments_of_a_tool_call_stay_a_text(tmp_path: Path) -> None:
    # They are what a model wrote: text that is no JSON is no fault of the file either.
    for depth in (101, 900, 100_000):
        arguments = '{"a": ' + "[" * depth + "]" * depth + "}"
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        (turn,) = messages_of("a.jsonl:1", "messages", [message])
        assert json.loads(turn.fields)["tool_calls"][0]["function"]["arguments"] == arguments
