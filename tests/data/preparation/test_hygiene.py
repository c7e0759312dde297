"""What the report finds, on records where it is known."""

from collections import Counter
from typing import Any

from halos.data.preparation.hygiene import examine, origin_of, percentiles, without_leaks
from halos.data.preparation.intake import Intake
from halos.data.records.adapted import FileCounts
from halos.data.records.record import Completion, Message, Record


def one(name: str, prompt: str, *completions: Completion, better: tuple[int, int] | None = None) -> Record:
    return Record(name, prompt, completions, () if better is None else (better,))


RECORDS = [
    one("a", "q", Completion("yes", True), Completion("no", False)),
    one("b", "q", Completion("yes", False)),  # a duplicate, and marked the other way
    one("c", "q", Completion(" YES "), Completion("ﬁne", score=1.0)),  # the first differs in case and spaces only
    one("d", "Q ", Completion("fine", True)),  # prompt and completion in other forms
    one("e", "r", Completion("x"), Completion("y"), better=(0, 1)),
    one("f", "r", Completion("y"), Completion("x"), better=(0, 1)),  # the other way round
    one("g", "s", Completion("z"), Completion("z"), better=(0, 1)),
]


def test_counts() -> None:
    found = examine(RECORDS)
    assert (found.records, found.completions, found.preferences) == (7, 12, 3)
    assert (found.desirable, found.undesirable, found.scored) == (2, 2, 1)
    assert (found.duplicates.count, found.duplicates.ids) == (4, ["b", "f", "g"])
    assert (found.near_duplicates.count, found.near_duplicates.ids) == (2, ["c", "d"])
    assert (found.contradictions.count, found.contradictions.ids) == (1, ["b"])
    assert (found.contradictory_pairs.count, found.contradictory_pairs.ids) == (1, ["f"])
    assert (found.identical_pairs.count, found.identical_pairs.ids) == (1, ["g"])
    assert found.lengths["completion (characters)"] == {"p5": 1, "p50": 1, "p95": 5, "p99": 5, "p100": 5}


def test_percentiles_occur() -> None:
    assert percentiles(range(1, 101)) == {"p5": 5, "p50": 50, "p95": 95, "p99": 99, "p100": 100}
    assert percentiles([]) == {}


def test_leaks_do_not_hide_behind_case_spaces_or_turns() -> None:
    asked = (Message("user", " What\nis IT"),)
    val = [
        one("v1", "what is it", Completion("a")),
        Record("v2", asked, (Completion("a"),)),
        one("v3", "is it", Completion("a")),
    ]
    kept, leaks = without_leaks([one("t", "What is  it", Completion("b"))], val)
    assert ([record.id for record in kept], leaks.count, leaks.ids) == (["v3"], 2, ["v1", "v2"])


def test_an_examples_file() -> None:
    files = ["a.jsonl", "a.json", "o/d:test", "dir"]
    for name, file in (
        ("a.jsonl:3#0", "a.jsonl"),
        ("a.json[3]#1", "a.json"),
        ("o/d:test[1]#0", "o/d:test"),
        ("dir[2]", "dir"),
    ):
        assert origin_of(name, files) == file
    assert origin_of("mine#0", files) == "(named records)"


def test_plain_data() -> None:
    origin = FileCounts(rows=3, records=1)
    for n in range(7):
        origin.drop(f"a.jsonl:{n}", Counter({"empty completion": 1}))
    cut = Counter({("prompts truncated", "a.jsonl"): 2, ("prompts truncated", "(named records)"): 1})
    intake = Intake(
        reports={"train": Counter(x=1)},
        hygiene={"train": examine(RECORDS)},
        origins={"train": {"a.jsonl": origin}},
        truncated={"train": cut},
    )
    report: Any = intake.report()
    split = report["splits"]["train"]
    assert split["contradictions"] == {"count": 1, "ids": ["b"]}
    assert split["files"] == {
        "a.jsonl": {
            "rows": 3,
            "records": 1,
            "dropped": {"empty completion": {"count": 7, "ids": [f"a.jsonl:{n}" for n in range(5)]}},
            "truncated": {"prompts truncated": 2},
        }
    }
    assert split["truncated elsewhere"] == {"(named records)": {"prompts truncated": 1}}
