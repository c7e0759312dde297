"""Reading rows: where each one stands, and one clear error for everything that can be wrong with a file."""

import bz2
import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from halos.data.reading.files import Piece, check_streamable, edges_key, expand, read_piece
from halos.data.reading.json_files import Located
from halos.data.sources.feedback_files import FeedbackFiles

ROWS: list[dict[str, Any]] = [{"prompt": "é 😀", "n": 1}, {"prompt": "b", "list": [{"text": "x"}]}]

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}


def read_rows(path: str | Path, columns: Mapping[str, str] | None = None) -> Iterator[Located]:
    return read_piece(Piece(path), columns)


def write(path: Path, content: str | bytes) -> Path:
    content = content.encode() if isinstance(content, str) else content
    pack = PACK.get(path.suffix)
    path.write_bytes(pack(content) if pack else content)
    return path


def error(path: str | Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers check the message)
        list(read_rows(path))
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.zst", "A.JSONL"])
def test_json_lines_are_located_by_line(tmp_path: Path, name: str) -> None:
    first, second = (json.dumps(row, ensure_ascii=False) for row in ROWS)
    file = write(tmp_path / name, f"\ufeff{first}\r\n\n  \n{second}")
    assert list(read_rows(file)) == [(f"{file}:1", ROWS[0]), (f"{file}:4", ROWS[1])]
    assert list(read_rows(str(file))) == list(read_rows(file))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_json_items_are_located_by_number(tmp_path: Path, name: str, wrapped: bool) -> None:
    file = write(tmp_path / name, json.dumps({"data": ROWS} if wrapped else ROWS, indent=2))
    assert list(read_rows(file)) == [(f"{file}[1]", ROWS[0]), (f"{file}[2]", ROWS[1])]


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz", "a.parquet.bz2"])
def test_parquet_gives_plain_rows(tmp_path: Path, name: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{"prompt": "é", "m": [{"role": "user"}]}, {"prompt": "b", "m": None}]), sink)
    file = write(tmp_path / name, sink.getvalue().to_pybytes())
    assert list(read_rows(file)) == [
        (f"{file}[1]", {"prompt": "é", "m": [{"role": "user"}]}),
        (f"{file}[2]", {"prompt": "b", "m": None}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": }\n', "a.jsonl:2: expected JSON, found an error at column 7: Expecting value"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl:2: expected an object {...}, found a list"),
        ("a.jsonl", "12\n", "a.jsonl:1: expected an object {...}, found a number"),
        ("a.jsonl", '[\n{"a": 1}]', "one list of objects is .json, rename the file"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "a.jsonl:2: expected UTF-8 text, found byte 0xff at position 8"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "a.jsonl:1: expected UTF-8 text, found byte 0xff at position 1"),
        ("a.jsonl", '{"a": NaN}', "a.jsonl:1: expected JSON, found NaN, which JSON does not have"),
        ("a.jsonl", '{"a": -Infinity}', "a.jsonl:1: expected JSON, found -Infinity"),
        ("a.jsonl", '{"a": 1, "b": 2, "a": 3}', "a.jsonl:1: expected JSON, found the key 'a' twice"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: expected rows of plain fields, found JSON that is nested too deeply"),
        ("a.jsonl", '{"a": ' + "1" * 5000 + "}", "a.jsonl:1: expected JSON, found Exceeds the limit"),
        ("a.json", '[{"a": 1},\n {"a": 1,}]', "a.json:2: expected JSON, found an error at column 10"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', "one object a line is .jsonl, rename the file"),
        ("a.json", '[{"a": 1}, "b"]', "a.json[2]: expected an object {...}, found a text"),
        ("a.json", '{"a": [], "b": []}', "a.json: expected a list of objects [{...}, ...], found an object"),
        ("a.json", '{"a": 1}', "a.json: expected a list of objects [{...}, ...], found a number"),
        ("a.json", b'[{"a":\n"\xe9"}]', "a.json:2: expected UTF-8 text, found byte 0xe9 at position 2"),
        ("a.json", '[{"a": NaN}]', "a.json: expected JSON, found NaN"),
        ("a.json", "[" * 100_000, "a.json: expected rows of plain fields, found JSON that is nested too deeply"),
        ("a.parquet", "not parquet", "a.parquet: expected a parquet file, found broken data"),
        ("a.parquet", "", "a.parquet: expected a parquet file, found broken data"),
        ("a.csv", "a,b\n1\n", "a.csv:2: expected 2 cells as in the header, found 1"),
        ("a.csv", 'a,b\n1,2\n"x\ny,2\n', "a.csv:3: expected CSV, found a row that is not: unexpected end of data"),
        ("a.csv", "a,a\n1,2\n", "a.csv:1: expected every column once, found 'a' twice"),
        ("a.csv", "a,\n1,2\n", "a.csv:1: expected a name for every column, found none for column 2"),
        ("a.csv", "label\nmaybe\n", "a.csv:2: expected 'label' to be a number or a label; found 'maybe'"),
        ("a.csv", "messages\n[{'role': 1}]\n", "a.csv:2: messages: expected JSON"),
        ("a.csv", "prompt\n[{'role': 'user'}]\n", "a.csv:2: prompt: expected JSON"),
        ("a.csv", b"a\n\xff\n", "a.csv:2: expected UTF-8 text, found byte 0xff at position 1"),
        (
            "a.xls",
            "a",
            "expected a name that ends in .jsonl, .json, .csv, .tsv, .parquet, .xlsx (or one of these and .gz, .bz2, ",
        ),
        ("a", "x", "(or one of these and .gz, .bz2, .zst); found no extension"),
    ],
)
def test_broken_content(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    file = write(tmp_path / name, content)
    message = error(file)
    assert message.startswith(str(file))
    assert expected in message


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.jsonl.gz", ""), ("a.json", ""), ("a.json", "[]"), ("a.csv", "a,b")],
)
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, content: str) -> None:
    file = write(tmp_path / name, content)
    source = FeedbackFiles(file)
    for read in (source.train, lambda: list(source.stream({}))):
        with pytest.raises(ValueError, match=rf"^{file}: expected at least one row, found an empty file$"):
            read()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.parquet.gz", "a.jsonl.bz2", "a.json.zst", "a.csv.zst"])
def test_broken_compression(tmp_path: Path, name: str) -> None:
    suffix = Path(name).suffix
    kind = "gzip" if suffix == ".gz" else suffix[1:]
    packed = PACK[suffix]("\n".join(json.dumps({"a": str(i)}) for i in range(500)).encode())
    (tmp_path / name).write_bytes(packed[:-20])
    assert f"{name}: the {kind} file ends too early, it is truncated" in error(tmp_path / name)
    (tmp_path / name).write_bytes(b'{"a": 1}')
    assert f"{name}: expected a {kind} file because of its name, found broken data" in error(tmp_path / name)
    (tmp_path / name).write_bytes(packed[:40] + b"\x00" * 40 + packed[80:])
    if suffix != ".zst":  # which has checksums only where its writer asked for them
        assert f"{name}: expected a {kind} file because of its name, found broken data" in error(tmp_path / name)


def test_truncated_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": list(range(5000))}), file)
    file.write_bytes(file.read_bytes()[:-10])
    assert "a.parquet: expected a parquet file, found broken data" in error(file)


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "{}")
    write(tmp_path / "other.parquet", "")
    assert error(tmp_path / "trian.jsonl").endswith("trian.jsonl: no such file; did you mean train.jsonl?")
    assert f"nothing in {tmp_path} has a similar name" in error(tmp_path / "something-else.jsonl")
    assert "there is no folder" in error(tmp_path / "nowhere" / "train.jsonl")


def test_a_mistyped_path_never_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, **options: Any) -> list[Any]:
        asked.append(name)
        return []

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for path in ("nowhere/train.jsonl", "nowhere/train.jsonl.gz", "data/train", "data/train.csv", "../x", "train"):
        assert "no such file" in error(path)
    assert asked == []


def test_a_folder_above_very_many_files_is_refused_and_not_walked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halos.data.reading.tables.MAX_ENTRIES", 3)
    folder = tmp_path / "many" / "below"
    folder.mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        (folder / name).write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    assert "found more than 3 files and folders in and below it; name the files" in error(tmp_path / "many")
    assert len(list(read_rows(folder))) == 3


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert "found a folder that datasets cannot load" in error(tmp_path)


@pytest.mark.parametrize(
    ("hub_id", "name", "split"),
    [("owner/my-data.v1", "owner/my-data.v1", "train"), ("owner/d:test", "owner/d", "test")],
)
def test_hub_rows(monkeypatch: pytest.MonkeyPatch, hub_id: str, name: str, split: str) -> None:
    asked: list[Any] = []

    def load(name: str, **options: Any) -> list[dict[str, Any]]:
        asked.append((name, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_rows(hub_id)) == [(f"{name}:{split}[1]", ROWS[0]), (f"{name}:{split}[2]", ROWS[1])]
    assert asked == [(name, {"split": split, "streaming": False})]


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **options: Any) -> None:
        raise ConnectionError("no route\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = error("owner/name:test")
    assert message.startswith("owner/name:test: expected a local file or a hub id that can be reached")
    assert message.endswith("the split 'test' of the hub data set 'owner/name' failed: no route")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'prompt,label,score\n"é, ""q""\n2",1,0.5\nb,,-2\n'),
        ("a.csv.gz", '\ufeffprompt;label;score\r\n"é, ""q""\n2";1;0.5\r\n\r\nb;;-2\r\n'),
        ("a.tsv", 'prompt\tlabel\tscore\n"é, ""q""\n2"\t1\t0.5\nb\t\t-2\n'),
    ],
)
def test_csv_cells_are_text_but_labels_and_scores(tmp_path: Path, name: str, content: str) -> None:
    file = write(tmp_path / name, content)
    after = 5 if "gz" in name else 4  # a blank row, and a cell of two lines
    assert list(read_rows(file)) == [
        (f"{file}:2", {"prompt": 'é, "q"\n2', "label": 1, "score": 0.5}),
        (f"{file}:{after}", {"prompt": "b", "label": None, "score": -2}),
    ]


def test_csv_lists_are_json(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 'prompt,label\n"[{""role"": ""user"", ""content"": ""q""}]",True\n')
    assert list(read_rows(file)) == [(f"{file}:2", {"prompt": [{"role": "user", "content": "q"}], "label": True})]


def test_columns_are_renamed_before_cells_are_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "question,answer,good\nq,a,1\n")
    columns = {"prompt": "question", "completion": "answer", "label": "good"}
    assert list(read_rows(file, columns)) == [(f"{file}:2", {"prompt": "q", "completion": "a", "label": 1})]
    with pytest.raises(
        ValueError, match=r"a.csv:2: expected the key 'quest' \(data.columns.prompt\); found 'question'"
    ):
        list(read_rows(file, {"prompt": "quest"}))


def test_patterns_are_sorted_files(tmp_path: Path) -> None:
    files = [str(write(tmp_path / name, "{}")) for name in ("b.jsonl", "a.jsonl", "c.json")]
    assert expand(str(tmp_path / "*.jsonl")) == sorted(files[:2])
    assert expand(files[0]) == [files[0]]
    with pytest.raises(ValueError, match="no file matches this pattern"):
        expand(str(tmp_path / "*.csv"))


def test_data_sets_on_disk(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list([{"prompt": "q", "completion": "a"}])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, val=one).save_to_disk(tmp_path / "two")
    for path in ("one", "two", "two:val"):
        assert list(read_rows(f"{tmp_path}/{path}")) == [(f"{tmp_path}/{path}[1]", {"prompt": "q", "completion": "a"})]
    assert "expected the split 'test', found train, val" in error(f"{tmp_path}/two:test")
    (tmp_path / "one" / "state.json").write_text("{")
    assert "found a folder that datasets cannot load" in error(tmp_path / "one")


def test_a_clone_of_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "clone").mkdir()
    write(tmp_path / "clone" / "test.jsonl", '{"prompt": "q"}\n')
    assert list(read_rows(f"{tmp_path}/clone:test")) == [(f"{tmp_path}/clone:test[1]", {"prompt": "q"})]


def test_a_folder_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, **options: Any) -> list[dict[str, Any]]:
        asked.append((name, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [where for where, _ in read_rows("o/hh/helpful-base:test")] == [
        f"o/hh/helpful-base:test[{n}]" for n in (1, 2)
    ]
    assert asked == [("o/hh", {"split": "test", "data_dir": "helpful-base", "streaming": False})]


def test_what_can_be_read_row_by_row(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv.gz", "a.csv.zst", "a.parquet", "a.xlsx"):
        write(tmp_path / name, "")
        check_streamable(tmp_path / name)
    check_streamable(tmp_path)
    check_streamable("owner/name:train")
    for name in ("a.json", "a.json.gz", "a.json.bz2", "a.parquet.gz", "a.parquet.zst"):
        write(tmp_path / name, "")
        with pytest.raises(ValueError, match=rf"{name}: expected a file that can be read row by row"):
            check_streamable(tmp_path / name)


def test_a_quick_key_sees_size_name_and_ends(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    keys = set()
    for content in ("a" * 300_000, "b" + "a" * 299_999, "a" * 299_999 + "b", "a" * 300_001):
        file.write_text(content)
        assert edges_key(file) == edges_key(str(file))
        keys.add(edges_key(file))
    assert len(keys) == 4
    assert edges_key(file.rename(tmp_path / "b.jsonl")) not in keys
    assert edges_key("owner/name") != edges_key("owner/name:test")


def test_streamed_data_sets_are_not_converted_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "clone").mkdir()
    write(tmp_path / "clone" / "train.jsonl", '{"prompt": "q"}\n{"prompt": "r"}\n')
    found = list(read_piece(Piece(f"{tmp_path}/clone"), streaming=True))
    assert found == [(f"{tmp_path}/clone[1]", {"prompt": "q"}), (f"{tmp_path}/clone[2]", {"prompt": "r"})]
    asked: list[Any] = []

    def load(name: str, **options: Any) -> list[dict[str, Any]]:
        asked.append((name, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(list(read_piece(Piece("o/n:test"), streaming=True))) == 2
    assert asked == [("o/n", {"split": "test", "streaming": True})]


def test_a_streamed_data_set_that_breaks_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        yield {"prompt": "q"}
        raise ConnectionError("gone\ntrace")

    monkeypatch.setattr(datasets, "load_dataset", lambda name, **more: rows())
    with pytest.raises(ValueError, match=r"^o/n:train\[2\]: expected a row, found gone$"):
        list(read_piece(Piece("o/n"), streaming=True))
