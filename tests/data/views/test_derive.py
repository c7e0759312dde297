"""Views: which examples a record gives, in which order, and what is counted."""

from collections.abc import Callable
from typing import Any

import pytest

from halos.data.records.record import Completion, Message, Record
from halos.data.views.derive import VIEWS, binary, demonstrations, of_run, pairs, scored
from halos.data.views.examples import Demonstration, Labelled, Pair, Scored

PAIR = Record("p", "q", (Completion("a"), Completion("b")), ((1, 0),))
GOOD = Record("g", "q", (Completion("good", True),))
BAD = Record("b", (Message("user", "q"),), (Completion("bad", False),))  # the same prompt as GOOD, said as a turn
SCORES = Record("s", "q", tuple(Completion(t, score=s) for t, s in (("mid", 2), ("low", 1), ("high", 3))))
PLAIN = Record("n", "q", (Completion("plain"),))
# a > b > c, with b labelled undesirable and d scored: every kind of feedback in one record.
MIXED = Record(
    "m",
    "q",
    (Completion("a"), Completion("b", False), Completion("c"), Completion("d", score=5.0), Completion("e")),
    ((0, 1), (1, 2)),
)
EVERYTHING = [PAIR, GOOD, BAD, SCORES, PLAIN, MIXED]


def test_demonstrations() -> None:
    view = demonstrations(EVERYTHING)
    assert view.examples == [
        Demonstration("p#0", "q", "b"),
        Demonstration("g#0", "q", "good"),
        Demonstration("s#0", "q", "high"),
        Demonstration("n#0", "q", "plain"),
        Demonstration("m#0", "q", "a"),
        Demonstration("m#1", "q", "d"),
        Demonstration("m#2", "q", "e"),
    ]
    assert view.report == {
        "rejected completions left out": 2,
        "undesirable completions left out": 2,
        "lower-scored completions left out": 2,
    }


def test_a_completion_preferred_twice_is_demonstrated_once() -> None:
    record = Record("r", "q", tuple(map(Completion, "abc")), ((0, 1), (0, 2), (1, 2)))
    assert [d.completion for d in demonstrations([record]).examples] == ["a", "b"]


def test_binary() -> None:
    view = binary(EVERYTHING)
    assert [(e.id, e.completion, e.desirable) for e in view.examples] == [
        ("p#0", "b", True),
        ("p#1", "a", False),
        ("g#0", "good", True),
        ("b#0", "bad", False),
        ("m#0", "a", True),
        ("m#1", "b", False),
        ("m#2", "c", False),
    ]
    assert view.examples[3] == Labelled("b#0", BAD.prompt, "bad", False)
    assert view.report == {
        "labelled completions from pairs": 4,
        "scored completions without a label left out": 4,
        "completions without feedback left out": 2,
    }


def test_pairs_are_interleaved_and_contradictions_kept_and_counted() -> None:
    record = Record("r", "q", tuple(map(Completion, "abc")), ((0, 1), (1, 2), (0, 2)))
    view = binary([record, PAIR])
    assert [(e.id, e.completion, e.desirable) for e in view.examples] == [
        ("r#0", "a", True),
        ("r#1", "b", False),
        ("r#2", "b", True),
        ("r#3", "c", False),
        ("p#0", "b", True),
        ("p#1", "a", False),
    ]
    assert view.report == {"labelled completions from pairs": 6, "completions both preferred and rejected": 1}


def test_pairs() -> None:
    view = pairs(EVERYTHING)
    assert view.examples == [
        Pair("p#0", "q", "b", "a"),
        Pair("g#0", "q", "good", "bad"),
        Pair("s#0", "q", "high", "low", score_chosen=3.0, score_rejected=1.0),
        Pair("m#0", "q", "a", "b"),
        Pair("m#1", "q", "b", "c"),
    ]
    assert view.report == {
        "pairs from labels": 1,
        "pairs from scores": 1,
        "completions with middle scores left out": 1,
        "completions without feedback left out": 2,
        "scored completions with nothing to compare left out": 1,
    }


def labelled(name: str, prompt: str, *labels: bool) -> Record:
    return Record(name, prompt, tuple(Completion(f"{name}{i}", label) for i, label in enumerate(labels)))


def test_labels_are_zipped_within_a_prompt_across_records() -> None:
    view = pairs(
        [labelled("x", "q", True, True), labelled("y", "r", False), labelled("z", "q", False, True, False, False)]
    )
    assert view.examples == [Pair("x#0", "q", "x0", "z0"), Pair("x#1", "q", "x1", "z2"), Pair("z#0", "q", "z1", "z3")]
    assert view.report == {"pairs from labels": 3, "unpaired undesirable completions left out": 1}


def test_ids_stay_unique_when_a_record_has_preferences_and_labels() -> None:
    completions = (Completion("a"), Completion("b"), Completion("c", True), Completion("d", False))
    view = pairs([Record("r", "q", completions, ((0, 1),))])
    assert view.examples == [Pair("r#0", "q", "a", "b"), Pair("r#1", "q", "c", "d")]


def test_tied_scores_make_no_pair() -> None:
    tied = Record("t", "q", (Completion("a", score=1.0), Completion("b", score=1.0)))
    view = pairs([tied, SCORES])
    assert [pair.id for pair in view.examples] == ["s#0"]
    assert view.report["completions with tied scores left out"] == 2
    assert [d.completion for d in demonstrations([tied]).examples] == ["a"]


def test_scored() -> None:
    view = scored(EVERYTHING)
    assert [(e.id, e.completion, e.score) for e in view.examples] == [
        ("p#0", "b", 1.0),
        ("p#1", "a", -1.0),
        ("g#0", "good", 1.0),
        ("b#0", "bad", -1.0),
        ("s#0", "mid", 2.0),
        ("s#1", "low", 1.0),
        ("s#2", "high", 3.0),
        ("m#0", "d", 5.0),
        ("m#1", "a", 1.0),
        ("m#2", "b", -1.0),
        ("m#3", "c", -1.0),
    ]
    assert view.examples[4] == Scored("s#0", "q", "mid", 2.0)
    assert view.report == {"scores from pairs": 4, "scores from labels": 3, "completions without feedback left out": 2}


def test_a_score_goes_before_a_label() -> None:
    view = scored([Record("r", "q", (Completion("a", True, -0.5),))])
    assert view.examples == [Scored("r#0", "q", "a", -0.5)]
    assert not view.report


@pytest.mark.parametrize(
    ("view", "records", "message"),
    [
        (demonstrations, [BAD], r"nothing to imitate \(1 undesirable completions left out\)"),
        (binary, [SCORES, PLAIN], r"set a threshold: data\.select\.labels_from_scores=median, prompt or a number"),
        (binary, [PLAIN], r"no completion has a label .*\(1 completions without feedback left out\)"),
        (pairs, [GOOD], r"no prompt has both a desirable and an undesirable completion: the loss needs pairs"),
        (pairs, [GOOD, labelled("y", "r", False)], r"\(1 unpaired desirable .*, 1 unpaired undesirable"),
        (scored, [PLAIN], "no completion has a score or a label"),
    ],
)
def test_nothing_to_train_on(view: Callable[..., Any], records: list[Record], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        view(records)


@pytest.mark.parametrize("name", VIEWS)
def test_every_view(name: str) -> None:
    view = VIEWS[name](EVERYTHING)
    ids = [example.id for example in view.examples]
    assert len(set(ids)) == len(ids)
    assert VIEWS[name](EVERYTHING) == view
    assert all(count > 0 for count in view.report.values())
    with pytest.raises(ValueError, match=r"^no "):
        VIEWS[name]([])


@pytest.mark.parametrize("view", sorted(VIEWS))
def test_a_few_records_give_what_all_of_them_do(view: str) -> None:
    # All have one prompt, as those of a run do.
    examples, report = of_run(view, EVERYTHING)
    expected = VIEWS[view](EVERYTHING)
    assert examples == list(expected.examples)
    assert +report == +expected.report
    assert of_run(view, [])[0] == []
