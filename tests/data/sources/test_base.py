"""Sources: files in, records and counts out."""

import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from halos.data.reading import files
from halos.data.records.adapted import FileCounts
from halos.data.records.record import Completion, Record
from halos.data.records.table import RecordTable
from halos.data.sources.base import Source
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.sources.file_source import FileSource
from halos.data.sources.hh import HHSource
from halos.data.sources.oasst import OasstSource
from halos.data.sources.shp import SHPSource
from halos.data.sources.ultrafeedback import UltraFeedbackSource
from halos.data.store.arrow import Store


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(prompt: str, completion: str = "a", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **more}


def test_records_in_order_with_counts(tmp_path: Path) -> None:
    train = write(
        tmp_path / "train.jsonl", row("q", label=1), row("r", " "), {"prompt": "s", "chosen": "a", "rejected": "b"}
    )
    val = write(tmp_path / "val.jsonl", row("v"))
    source = FeedbackFiles(train=str(train), val=str(val))
    records = source.train()
    assert records.records == [
        Record(f"{train}:1", "q", (Completion("a", True),)),
        Record(f"{train}:3", "s", (Completion("a"), Completion("b")), ((0, 1),)),
    ]
    assert records.dropped == Counter({"empty completion": 1})
    validation = source.val()
    assert validation is not None
    assert [record.id for record in validation.records] == [f"{val}:1"]
    assert validation.dropped == Counter()
    assert (source.name, HHSource.name) == ("files", "hh")
    assert isinstance(source, Source)


def test_several_files_also_as_a_yaml_gives_them(tmp_path: Path) -> None:
    files = [str(write(tmp_path / folder / "a.jsonl", row(folder))) for folder in ("one", "two")]
    config = OmegaConf.create({"train": files})
    for given in (files, tuple(files), config.train):
        assert [record.id for record in FeedbackFiles(given).train().records] == [f"{file}:1" for file in files]


@pytest.mark.parametrize("given", [True, 0.5, 3, {"a": 1}, b"a.jsonl", ["a.jsonl", 3], ["a.jsonl", None]])
@pytest.mark.parametrize("name", ["train", "val"])
def test_what_names_no_file_is_refused(name: str, given: Any) -> None:
    files: dict[str, Any] = {"train": "a.jsonl", name: given}
    with pytest.raises(ValueError, match=rf"^data\.{name}: expected a file or a list of files, found "):
        FeedbackFiles(**files)


@pytest.mark.parametrize("columns", [True, 0.5, "prompt", ["prompt"]])
def test_declarations_that_are_no_mapping_are_refused(columns: Any) -> None:
    for name in ("columns", "roles", "values"):
        with pytest.raises(ValueError, match=rf"^data\.{name}: expected "):
            FeedbackFiles("a.jsonl", **{name: columns})
    with pytest.raises(ValueError, match=r"^data\.columns: expected "):
        HHSource("a.jsonl", columns=columns)


def test_no_validation_data(tmp_path: Path) -> None:
    assert FeedbackFiles(str(write(tmp_path / "a.jsonl", row("q")))).val() is None


@pytest.mark.parametrize("train", [None, []])
def test_training_data_must_be_named(train: Any) -> None:
    with pytest.raises(ValueError, match=r"^data=files needs data.train=FILE$"):
        FeedbackFiles(train)
    with pytest.raises(ValueError, match=r"^data=hh needs data.train=FILE$"):
        HHSource(train)


def test_hh_transcripts(tmp_path: Path) -> None:
    transcript = "\n\nHuman: q\n\nAssistant: "
    file = write(tmp_path / "hh.jsonl", {"chosen": transcript + "a", "rejected": transcript + "b"})
    (record,) = HHSource(str(file)).train().records
    assert (record.completions, record.preferences) == ((Completion("a"), Completion("b")), ((0, 1),))
    assert FeedbackFiles(str(file)).train().records == [record]


def test_an_id_stands_for_one_record(tmp_path: Path) -> None:
    own = {"id": "x", "prompt": "q", "completions": [{"text": "a"}]}
    file = write(tmp_path / "a.jsonl", own, row("q"), own)
    with pytest.raises(ValueError, match=r"a.jsonl:3: expected ids to be unique; found 'x', as at .*a.jsonl:1"):
        FeedbackFiles(str(file)).train()
    plain = str(write(tmp_path / "b.jsonl", row("q")))
    with pytest.raises(ValueError, match=r"b.jsonl:1: expected ids to be unique"):
        FeedbackFiles([plain, plain]).train()


def test_data_of_which_nothing_is_left(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", row("q", ""), row("r", "\n"))
    with pytest.raises(ValueError, match=r"a.jsonl: expected a record .*left out: empty completion \(2\)"):
        FeedbackFiles(str(file)).train()


def test_an_error_names_file_and_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", row("q"), row("q", label="maybe"))
    with pytest.raises(ValueError, match=r"a.jsonl:2: expected 'label' to be true/false"):
        FeedbackFiles(str(file)).train()


def test_only_files_whose_rows_stand_alone_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [{"message_id": f"q{n}", "parent_id": None, "role": "prompter", "text": f"q{n}"} for n in range(9)]
    given = [{"message_id": f"a{n}", "parent_id": f"q{n}", "role": "assistant", "text": f"a{n}"} for n in range(9)]
    messages = write(tmp_path / "messages.jsonl", *asked, *given)
    plain = write(tmp_path / "plain.jsonl", *(row(f"q{n}") for n in range(9)))
    monkeypatch.setattr(files, "PIECE_BYTES", 64)
    records = OasstSource(messages, lang=None).train()
    assert [record.completions[0].text for record in records.records] == [f"a{n}" for n in range(9)]
    assert records.dropped == Counter()
    assert OasstSource.rows_alone is False
    assert (FeedbackFiles.rows_alone, len(list(files.pieces(plain)))) == (True, 5)
    assert len(FeedbackFiles(plain).train().records) == 9


USERS_MODULE = """
from base_of_a_user import Base

class Mine(Base):
    name = "mine"
"""
USERS_BASE = """
from halos.data.reading.fields import prompt_of
from halos.data.records.record import Completion, Record
from halos.data.sources.file_source import RowSource

class Base(RowSource):
    def record(self, where, row, dropped):
        return Record(where, prompt_of(where, row), (Completion("TEXT"),))
"""


def test_prepared_data_of_a_users_source_changes_with_the_users_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    file = write(tmp_path / "data" / "a.jsonl", row("q"))

    def prepared(module: str = USERS_MODULE, base: str = USERS_BASE) -> tuple[list[str], str | None]:
        for name, text in (("source_of_a_user", module), ("base_of_a_user", base)):
            (tmp_path / f"{name}.py").write_text(text)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        source = importlib.import_module("source_of_a_user").Mine(file)
        source.store = Store(tmp_path / "cache", 1)
        records = source.train().records
        return [record.completions[0].text for record in records], records.key

    first = prepared()
    assert first[0] == ["TEXT"]
    assert prepared() == first
    assert prepared(module=USERS_MODULE + "    rows_alone = False\n")[1] != first[1]
    # A class of theirs that the source inherits from lies in another module.
    assert prepared(base=USERS_BASE.replace("TEXT", "other"))[0] == ["other"]


def test_a_class_that_was_typed_in_is_prepared_in_memory(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(USERS_BASE, namespace)  # as a notebook or `python -c` does
    base = namespace["Base"]
    base.name, base.__module__ = "typed", "no_such_module"
    source = base(write(tmp_path / "a.jsonl", row("q")))
    source.store = Store(tmp_path / "cache", 1)
    assert source.train().records.key is None
    assert not (tmp_path / "cache").exists()


def test_prepared_data_of_halos_own_sources_does_not_change_with_a_comment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.jsonl", row("q"))

    def key() -> str | None:
        source = FeedbackFiles(file)
        source.store = Store(tmp_path / "cache", 1)
        records = source.train().records
        assert isinstance(records, RecordTable)
        return records.key

    before = key()
    assert before is not None
    # Whichever file the classes are in: no source file is read.
    monkeypatch.setattr("inspect.getfile", lambda _: str(file))
    assert key() == before


def record_rows() -> Iterator[dict[str, Any]]:
    for n in range(200):
        yield row(f"q{n // 2}", f"a{n}" if n % 7 else " ", label=n % 2, score=n / 10)
        yield {"prompt": f"q{n}", "chosen": "a", "rejected": "" if n % 11 == 0 else "b"}


@pytest.mark.parametrize("piece", [1 << 23, 1000, 64])
def test_a_stream_gives_the_records_and_counts_of_the_table(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", piece)
    paths = [
        write(tmp_path / name, *list(record_rows())[start::2]) for start, name in enumerate(("a.jsonl", "b.jsonl"))
    ]
    table = FeedbackFiles(paths).train()
    origins: dict[str, FileCounts] = {}
    assert list(FeedbackFiles(paths).stream(origins)) == table.records
    assert origins == table.origins
    assert sum((origin.dropped for origin in origins.values()), Counter()) == table.dropped
    assert len(table.dropped) == 2


MESSAGE = {"message_id": "m0", "parent_id": None, "role": "prompter", "text": "q", "lang": "en"}
REPLY = {"message_id": "m1", "parent_id": "m0", "role": "assistant", "text": "a", "lang": "en"}
TRANSCRIPT = {side: f"\n\nHuman: q\n\nAssistant: {side}" for side in ("chosen", "rejected")}
COMMENTS = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_ratio": 3}


@pytest.mark.parametrize(
    ("source", "good", "bad"),
    [
        (HHSource, [TRANSCRIPT], {"chosen": "x", "rejected": "y"}),
        (SHPSource, [COMMENTS], {**COMMENTS, "labels": "one"}),
        (UltraFeedbackSource, [{"instruction": "q", "completions": [{"response": "a", "overall_score": 1}]}], {}),
        (OasstSource, [MESSAGE, REPLY], {**REPLY, "message_id": "m2", "role": "x"}),
        (OasstSource, [MESSAGE, REPLY], REPLY),
    ],
)
def test_every_format_skips_bad_rows(source: type[FileSource], good: Any, bad: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *good, bad)
    with Path(file).open("a") as stream:
        stream.write("{broken")
    with pytest.raises(ValueError, match=rf"a.jsonl:{len(good) + 1}"):
        source(file).train()
    records = source(file, bad_rows="skip").train()
    assert len(records.records) == 1
    assert records.dropped["filtered: malformed rows"] == 2
    with pytest.raises(ValueError, match=r"data\.max_bad_rows = 1 malformed rows, found 2, the first at .*a\.jsonl"):
        source(file, bad_rows="skip", max_bad_rows=1).train()
    with pytest.raises(ValueError, match=r"data\.bad_rows: expected stop or skip, found 'maybe'"):
        source(file, bad_rows="maybe")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "question,answer,thumb\nq,a,up\nq,a\nq,a,up,b\nq,b,down\n"),
        (
            "a.json",
            '[{"question": "q", "answer": "a", "thumb": 1}, 3, [], {"question": "q", "answer": "b", "thumb": 0}]',
        ),
    ],
)
def test_bad_rows_of_every_kind_of_file_are_skipped(name: str, content: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(content)
    records = FeedbackFiles(file, bad_rows="skip").train()
    assert [record.completions[0].desirable for record in records.records] == [True, False]
    assert records.dropped == {"filtered: malformed rows": 2}


def test_rows_without_a_renamed_column_are_bad_rows(tmp_path: Path) -> None:
    names = {"chosen": "good"}
    file = write(tmp_path / "a.jsonl", {"good": TRANSCRIPT["chosen"], "rejected": TRANSCRIPT["rejected"]}, TRANSCRIPT)
    assert len(HHSource(file, columns=names, bad_rows="skip").train().records) == 1
