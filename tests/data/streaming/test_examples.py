"""Streams: the examples of all the data, shuffled in a buffer, each with another prompt's completion."""

import gc
import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from halos.data.records.adapted import FileCounts
from halos.data.records.record import Completion, Message, Record
from halos.data.records.table import loose_prompt, table_of
from halos.data.sources.base import Records, Source
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.store.arrow import MEMORY
from halos.data.streaming import examples as streams
from halos.data.streaming.examples import IN_VALIDATION, Counted, Drawn, Stream, bundles, runs, shuffled, with_partners
from halos.data.views.derive import VIEWS
from halos.data.views.examples import Labelled
from halos.data.views.selection import Selection
from halos.data.views.turns import expand_turns
from tests.data.streaming.streams import stream_of


class Listed(Source):
    """Records from a list."""

    name = "listed"

    def __init__(self, records: list[Record]) -> None:
        self._records = records

    def train(self) -> Records:
        return Records(self._records, Counter())

    def val(self) -> None:
        return None


def labelled(n: int, prompt: str = "", **more: Any) -> Record:
    return Record(f"f:{n}", prompt or f"q{n}", (Completion(f"a{n}", n % 2 == 0, **more),))


def stream(records: list[Record], view: str = "binary", **options: Any) -> Stream:
    return stream_of(Listed(records), view, **options)


def first(made: Stream, count: int, counted: Counted | None = None) -> list[str]:
    return [one.example.id for one in islice(made.drawn(counted or Counted()), count)]


# Which examples


@pytest.mark.parametrize("view", sorted(VIEWS))
def test_a_pass_has_the_examples_of_the_view(view: str) -> None:
    rng = random.Random(view)
    records = []
    for n in range(60):
        count = rng.randint(1, 4)
        completions = tuple(
            Completion(f"{n}.{i}", rng.choice([None, True, False]), rng.choice([None, 1.0, 2.0])) for i in range(count)
        )
        better = tuple((i, i + 1) for i in range(count - 1) if rng.random() < 0.3)
        records.append(Record(f"f:{n}", f"q{n}", completions, better))
    expected = VIEWS[view](records)
    counted = Counted()
    found = [example for bundle in stream(records, view).examples(counted) for example in bundle]
    assert found == list(expected.examples)
    assert len(found) > 10
    assert counted.read == Counter({"records": 60, "examples": len(found)}) + expected.report


def test_labels_are_paired_over_the_records_of_a_run() -> None:
    records = [labelled(0, "q"), labelled(1, "q"), labelled(2, "r"), labelled(3, "q")]
    counted = Counted()
    (bundle,) = stream(records, "pairs").examples(counted)
    assert [(e.id, e.chosen, e.rejected) for e in bundle] == [("f:0#0", "a0", "a1")]
    assert counted.read["unpaired desirable completions left out"] == 1  # that of r
    assert counted.read["unpaired undesirable completions left out"] == 1


def test_a_prompts_own_median_is_that_of_its_run() -> None:
    completions = tuple(Completion(text, score=score) for text, score in (("low", 1.0), ("mid", 2.0), ("high", 6.0)))
    records = [Record("a", "q", completions), Record("b", "q", (Completion("best", score=9.0),)), labelled(0)]
    made = stream(records, selection=Selection(labels_from_scores="prompt"))  # 1 2 6 9: 4
    found = [example for bundle in made.examples(Counted()) for example in bundle]
    assert [(e.completion, e.desirable) for e in found] == [
        ("low", False), ("mid", False), ("high", True), ("best", True), ("a0", True),
    ]  # fmt: skip


def test_a_threshold_is_that_number() -> None:
    records = [Record(f"f:{n}", f"q{n}", (Completion("x", score=n),)) for n in (1.0, 2.0, 3.0)]
    made = stream(records, selection=Selection(labels_from_scores=2.5))
    assert [e.desirable for bundle in made.examples(Counted()) for e in bundle] == [False, False, True]


def test_all_turns_are_trained_on() -> None:
    turns = tuple(Message(role, text) for role, text in (("user", "u1"), ("assistant", "r1"), ("user", "u2")))
    records = [Record("a", turns, (Completion("r2"),)), Record("b", "q", (Completion("s"),))]
    expanded, report = expand_turns(table_of(records), MEMORY)
    counted = Counted()
    found = [e for bundle in stream(records, "demonstrations", train_on="all").examples(counted) for e in bundle]
    assert found == list(VIEWS["demonstrations"](expanded).examples)
    assert [e.completion for e in found] == ["r1", "r2", "s"]
    assert counted.read == Counter({"records": 2, "examples": 3}) + report


def test_prompts_that_are_validated_on_are_left_out_and_counted() -> None:
    records = [labelled(n) for n in range(6)]
    held = frozenset(map(loose_prompt, ["Q1", "q4 "]))
    counted = Counted()
    made = stream(records, held=held, shuffle_buffer=1)
    assert first(made, 8, counted) == [f"f:{n}#0" for n in (0, 2, 3, 5, 0, 2, 3, 5)]
    assert counted.read[IN_VALIDATION] == 2
    assert counted.read["records"] == 4, "a second pass counts nothing again"
    with pytest.raises(ValueError, match=r"data.strict: expected training prompts that are not .* found that of f:1"):
        first(stream(records, held=held, strict_held=True), 1)


def test_a_pass_without_an_example_says_what_was_left_out() -> None:
    with pytest.raises(ValueError, match=r"learns from pairs, found none in 2 records \(1 unpaired desirable"):
        first(stream([labelled(0), labelled(1)], "pairs"), 1)


# In which order


def test_runs_are_records_of_one_prompt_that_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [labelled(n, prompt) for n, prompt in enumerate("aabaccc")]
    assert [[r.id for r in run] for run in runs(records)] == [["f:0", "f:1"], ["f:2"], ["f:3"], ["f:4", "f:5", "f:6"]]
    monkeypatch.setattr(streams, "RUN_MAX_RECORDS", 2)
    assert [len(run) for run in runs(records)] == [2, 1, 1, 2, 1]


def test_bundles_have_at_most_so_many() -> None:
    assert list(bundles([1, 2, 3], 2)) == [[1, 2], [3]]
    assert list(bundles([1, 2, 3], None)) == [[1, 2, 3]]


@pytest.mark.parametrize("sizes", [[1] * 50, [2] * 25, [1, 2, 3, 4] * 6])
@pytest.mark.parametrize("buffer", [1, 2, 7, 1000])
def test_the_buffer_shuffles_and_loses_nothing(buffer: int, sizes: list[int]) -> None:
    given = [[(n, i) for i in range(size)] for n, size in enumerate(sizes)]
    live: Counter[str] = Counter()

    def source() -> Any:
        for bundle in given:
            live["read"] += len(bundle)
            yield bundle

    found = []
    for bundle in shuffled(source(), buffer, random.Random(0)):
        live["given"] += len(bundle)
        found.append(bundle)
        assert live["read"] - live["given"] < buffer + max(sizes) - 1
    assert sorted(found) == given  # type: ignore[type-var]
    assert (found == given) == (buffer <= min(sizes))


def test_a_shuffled_bundle_comes_from_the_next_ones() -> None:
    # An independent derivation: what stands at place n can come from no farther than the buffer reaches.
    found = [bundle[0] for bundle in shuffled(([n] for n in range(500)), 20, random.Random(1))]
    assert all(item - place <= 19 for place, item in enumerate(found))
    assert max(place - item for place, item in enumerate(found)) > 19  # some wait for long
    assert found[:20] != sorted(found[:20])


def test_order_depends_on_the_seed_alone_and_is_another_in_each_pass() -> None:
    records = [labelled(n) for n in range(40)]
    made = first(stream(records, shuffle_buffer=16), 80)
    assert sorted(made[:40]) == sorted(made[40:]) == sorted(f"f:{n}#0" for n in range(40))
    assert made[:40] != made[40:]
    assert made == first(stream(records, shuffle_buffer=16), 80)
    assert made != first(stream(records, shuffle_buffer=16, seed=1), 80)
    assert first(stream(records, shuffle_buffer=1), 41) == [*(f"f:{n}#0" for n in range(40)), "f:0#0"]


def test_examples_of_a_prompt_are_drawn_together() -> None:
    records = [Record(f"f:{n}", f"q{n}", (Completion("a"), Completion("b")), ((0, 1),)) for n in range(20)]
    made = first(stream(records, shuffle_buffer=10), 40)
    assert all(one.replace("#0", "#1") == other for one, other in zip(made[::2], made[1::2], strict=True))
    alone = first(stream(records, shuffle_buffer=10, keep_together=1), 40)
    assert not all(one.replace("#0", "#1") == other for one, other in zip(alone[::2], alone[1::2], strict=True))
    assert sorted(alone) == sorted(made)


# Whose completion is the mismatched one


def drawn(prompts: str) -> list[Drawn]:
    return [Drawn(Labelled(f"{n}", prompt, f"c{n}", True), 1) for n, prompt in enumerate(prompts)]


@pytest.mark.parametrize("prompts", ["abcd", "aabbccdd", "aabacbbc", "aaaabbbb"])
def test_partners_are_others_each_once_in_order(prompts: str) -> None:
    given = drawn(prompts * 3)
    found = list(with_partners(given))
    assert [one.example for one in found] == [one.example for one in given][: len(found)]
    assert len(found) >= 2 * len(prompts)
    assert all(one.partner is not None and one.partner.prompt != one.example.prompt for one in found)
    partners = [one.partner.id for one in found if one.partner]
    assert len(set(partners)) == len(partners)


def test_partners_of_pairs_are_one_bundle_on() -> None:
    # Two of a prompt at a time: first with first, second with second, never twice the first.
    found = {one.example.id: one.partner.id for one in with_partners(drawn("aabbcc")) if one.partner}
    assert found == {"0": "2", "1": "3", "2": "4", "3": "5"}


def test_a_partner_that_was_given_stays_while_an_earlier_example_waits() -> None:
    # 2 has its partner, 3, and still waits for 1 to have one; 4 is nobody's.
    found = {one.example.id: one.partner.id for one in with_partners(drawn("aacaabb")) if one.partner}
    assert found == {"0": "2", "1": "5", "2": "3", "3": "6"}


def test_a_prompt_with_most_of_the_stream_shares_partners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MISMATCH_MAX_WAITING_EXAMPLES", 5)
    found = list(with_partners(drawn("b" + "a" * 50)))
    assert len(found) == 46
    assert {one.partner.id for one in found[1:] if one.partner} == {"0"}
    with pytest.raises(ValueError, match="expected different prompts in the stream, found one in 5 examples"):
        list(with_partners(drawn("a" * 50)))


# In which memory


def test_no_more_records_are_alive_than_the_buffer_holds(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    with file.open("w") as out:
        out.writelines(json.dumps({"prompt": f"q{n}", "completion": "x", "label": n % 2}) + "\n" for n in range(5000))
    alive: list[int] = []

    def count() -> int:
        return sum(type(found) is Labelled for found in gc.get_objects())

    before = count()

    made = stream_of(FeedbackFiles(file), shuffle_buffer=100, mismatched=True)
    for n, _ in enumerate(islice(made.drawn(Counted()), 4800)):
        if n % 400 == 0:
            alive.append(count() - before)
    assert max(alive) <= 110
    assert min(alive) >= 99


def test_files_are_counted_and_named(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "x", "label": 1}, {"prompt": "r", "completion": " ", "label": 1}]
    file = tmp_path / "f.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counted = Counted()
    first(stream_of(FeedbackFiles(file)), 5, counted)
    columns = Counter({"prompt: prompt": 2, "completion: completion": 2, "label: label": 2})
    dropped = Counter({"empty completion": 1})
    places = {"empty completion": [f"{file}:2"]}
    assert counted.origins == {str(file): FileCounts(2, 1, dropped, places, columns=columns)}
    assert counted.passes == 5
    with pytest.raises(ValueError, match=r"data.strict: .*found empty completion \(1: .*f.jsonl:2\)"):
        first(stream_of(FeedbackFiles(file), strict=True), 1)
    file.write_text(json.dumps(rows[0]) + "\n{\n")
    with pytest.raises(ValueError, match=r"f.jsonl:2: expected JSON"):
        first(stream_of(FeedbackFiles(file)), 1)
