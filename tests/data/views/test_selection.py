"""Selection: labels and pairs from scores, imbalance, one example of a prompt, all assistant turns."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from halos.data.records.record import Completion, Record, Reply
from halos.data.views.derive import VIEWS, binary, of_run, pairs
from halos.data.views.examples import Examples, Labelled, Pair
from halos.data.views.selection import Selection


def scored(name: str, prompt: str, *scores: float) -> Record:
    return Record(name, prompt, tuple(Completion(f"{name}{n}", score=s) for n, s in enumerate(scores)))


RECORDS = [
    scored("a", "p", 1, 2, 3),
    scored("b", "p", 10),
    scored("c", "q", 4, 8),
    Record("d", "r", (Completion("x"),)),
]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (3, {"a0": False, "a1": False, "b0": True, "c0": True, "c1": True}),  # a2 scores just this
        (2.5, {"a0": False, "a1": False, "a2": True, "b0": True, "c0": True, "c1": True}),
        ("median", {"a0": False, "a1": False, "a2": False, "b0": True, "c0": True, "c1": True}),  # of 1 2 3 4 8 10: 3.5
        ("prompt", {"a0": False, "a1": False, "a2": True, "b0": True, "c0": False, "c1": True}),  # p: 2.5, q: 6
    ],
)
def test_labels_from_scores(given: Any, expected: dict[str, bool]) -> None:
    made = binary(RECORDS, Selection(labels_from_scores=given).prepare("binary", RECORDS, RECORDS))
    assert {e.completion: e.desirable for e in made.examples} == expected
    desirable = sum(expected.values())
    assert made.report["desirable by their scores"] == desirable
    assert made.report["undesirable by their scores"] == len(expected) - desirable
    assert RECORDS[0].completions[0].desirable is None, "records are never changed in place"


def test_the_median_is_that_of_the_training_data_and_labels_stay() -> None:
    held = [Record("v", "p", (Completion("x", False, 99.0), Completion("y", score=5.0)))]
    made = binary(held, Selection(labels_from_scores="median").prepare("binary", held, RECORDS))
    assert [(e.completion, e.desirable) for e in made.examples] == [("x", False), ("y", True)]


@pytest.mark.parametrize("setting", ["median", "prompt"])
def test_a_median_counts_scores_by_weight(setting: str) -> None:
    weighted = [replace(record, weight=weight) for record, weight in zip(RECORDS, (1.0, 4.0, 2.0, 1.0), strict=True)]
    repeated = [
        replace(record, id=f"{record.id}{copy}", weight=1.0)
        for record in weighted
        for copy in range(int(record.weight))
    ]

    def labels(records: list[Record]) -> dict[Reply, bool]:
        made = binary(records, Selection(labels_from_scores=setting).prepare("binary", records, records))
        return {example.completion: example.desirable for example in made.examples}

    assert labels(weighted) == labels(repeated) != labels(RECORDS)


@pytest.mark.parametrize(
    ("options", "expected", "left_out"),
    [
        ({"pairs_from_scores": "all"}, [("s3", "s0"), ("s3", "s1"), ("s3", "s2"), ("s1", "s0"), ("s2", "s0")], 0),
        ({"pairs_from_scores": "all", "min_margin": 2}, [("s3", "s0"), ("s3", "s1"), ("s3", "s2")], 0),
        ({"min_margin": 3}, [("s3", "s0")], 2),
        ({"pairs_from_scores": "all", "min_margin": 3}, [("s3", "s0")], 2),
        ({}, [("s3", "s0")], 0),
    ],
)
def test_pairs_from_scores(options: dict[str, Any], expected: list[tuple[str, str]], left_out: int) -> None:
    record = scored("s", "p", 1, 2, 2, 4)  # equal scores never make a pair
    made = pairs([record], Selection(**options).prepare("pairs", [record], [record]))
    assert sorted((e.chosen, e.rejected) for e in made.examples) == sorted(expected)
    assert made.report["completions with close scores left out"] == left_out
    assert made.report["pairs from scores"] == len(expected)


def test_a_record_without_a_pair_of_that_margin_is_left_out() -> None:
    prepare = Selection(min_margin=5).prepare("pairs", [], [])
    with pytest.raises(ValueError, match=r"the loss needs pairs.*\(2 completions with close scores left out\)"):
        pairs([scored("s", "p", 1, 2)], prepare)
    paired = Record(
        "m", "p", (Completion("a", score=1), Completion("b", score=2), *scored("s", "p", 5, 6).completions), ((0, 1),)
    )
    view = pairs([scored("s", "p", 1, 2), paired], prepare)
    assert view.examples == [Pair("m#0", "p", "a", "b", score_chosen=1.0, score_rejected=2.0)]
    assert view.report == {"completions with close scores left out": 4}


FEEDBACK = {
    "labels": (Completion("a", True), Completion("b", False)),
    "one label": (Completion("a", True),),
    "preferences": (Completion("a"), Completion("b")),
    "scores": (Completion("a", score=3.0), Completion("b", score=1.0), Completion("c", score=2.0)),
    "one score": (Completion("a", score=1.0),),
    "tied scores": (Completion("a", score=1.0), Completion("b", score=1.0)),
    "no feedback": (Completion("a"), Completion("b")),
    "labels and scores": (Completion("a", True, 3.0), Completion("b", score=1.0), Completion("c", False)),
    "preferences and scores": (Completion("a", score=3.0), Completion("b", score=1.0), Completion("c", score=2.0)),
    "binarized UltraFeedback": (Completion("a", score=8.5), Completion("b", score=2.0)),
}
PREFERRING = {"preferences", "preferences and scores", "binarized UltraFeedback"}


def record_of(kind: str) -> Record:
    return Record(kind, kind, FEEDBACK[kind], ((0, 1),) if kind in PREFERRING else ())


@pytest.mark.parametrize("kind", FEEDBACK)
@pytest.mark.parametrize("margin", [0.0, 1.5, 9.0])
@pytest.mark.parametrize("how", ["best_worst", "all"])
def test_every_setting_takes_every_kind_of_feedback(kind: str, margin: float, how: str) -> None:
    record, usual = record_of(kind), Record("usual", "usual", FEEDBACK["labels and scores"])
    # Of completions that stand in no pair and have no label, the scores, by hand; the others are not compared.
    scores = {"scores": (3, 1, 2), "one score": (1,), "tied scores": (1, 1), "labels and scores": (1,)}
    scores |= {"preferences and scores": (2,)}
    ordered = sorted(scores.get(kind, ()), reverse=True)
    couples = [(i, j) for n, i in enumerate(ordered) for j in ordered[n + 1 :]] if how == "all" else []
    couples = [(ordered[0], ordered[-1])] if how == "best_worst" and len(ordered) > 1 else couples
    expected = sum(better > worse and better - worse >= margin for better, worse in couples)
    for threshold in (None, 1.0, "median", "prompt"):
        selection = Selection(min_margin=margin, pairs_from_scores=how, labels_from_scores=threshold)
        for view, make in VIEWS.items():
            made = make([record, usual], selection.prepare(view, [record, usual], [record, usual]))
            alone, _ = of_run(view, [record], selection.prepare(view, [record], [record, usual]))
            assert [example for example in made.examples if example.id.startswith(f"{kind}#")] == alone
            if view == "pairs":
                assert len(alone) == expected + (kind in PREFERRING) + (kind in ("labels", "labels and scores"))


def labelled(count: int, prompts: int = 100) -> Examples[Labelled]:
    return binary([Record(f"r{n}", f"p{n % prompts}", (Completion("a", n % 2 == 0),)) for n in range(count)]).examples


def test_a_share_of_a_kind_is_kept_in_order_by_the_seed() -> None:
    examples = labelled(100)
    kept, report = Selection(keep_desirable=0.1).keep(examples, seed=3)
    assert (sum(e.desirable for e in kept), len(kept)) == (5, 55)
    assert report == {"desirable completions not kept": 45}
    assert [e for e in examples if e in kept] == kept
    assert (
        Selection(keep_desirable=0.1).keep(examples, seed=3)[0]
        == kept
        != Selection(keep_desirable=0.1).keep(examples, 4)[0]
    )
    both, _ = Selection(keep_desirable=0.1, keep_undesirable=0.5).keep(examples, 0)
    assert (sum(e.desirable for e in both), len(both)) == (5, 30)


def test_one_of_each_prompt() -> None:
    kept, report = Selection(one_per_prompt=True).keep(labelled(100, prompts=7), seed=0)
    assert sorted(str(e.prompt) for e in kept) == [f"p{n}" for n in range(7)]
    assert {e.desirable for e in kept} == {True, False}, "drawn, not the first"
    assert report == {"further examples of a prompt not kept": 93}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_desirable": 0}, r"keep_desirable: expected a share in \(0, 1\], found 0"),
        ({"keep_undesirable": 1.1}, "keep_undesirable"),
        ({"labels_from_scores": "mean"}, "labels_from_scores: expected a number, median, prompt or null, found 'mean'"),
        ({"pairs_from_scores": "none"}, "pairs_from_scores: expected best_worst or all, found 'none'"),
        ({"min_margin": -1}, "min_margin: expected a number from 0 on, found -1"),
        ({"min_margin": True}, "min_margin: expected a number from 0 on, found True"),
        ({"min_margin": math.nan}, "min_margin: expected a number from 0 on, found nan"),
        ({"keep_desirable": True}, r"keep_desirable: expected a share in \(0, 1\], found True"),
        ({"keep_undesirable": "1"}, r"keep_undesirable: expected a share in \(0, 1\], found '1'"),
        ({"labels_from_scores": True}, "labels_from_scores: expected a number, .* found True"),
        ({"labels_from_scores": math.inf}, "labels_from_scores: expected a number, .* found inf"),
        ({"labels_from_scores": [1]}, r"labels_from_scores: expected a number, .* found \[1\]"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Selection(**options)


def test_shares_of_labels_need_labels() -> None:
    with pytest.raises(ValueError, match="learns from pairs"):
        Selection(keep_desirable=0.5).check("pairs")
    Selection(keep_desirable=0.5).check("binary")


# Of a stream


def test_shares_of_a_stream_are_kept_on_average_and_the_same_ones_every_time() -> None:
    examples = [Labelled(f"f:{n}#0", "p", "x", n % 4 != 0) for n in range(4000)]
    selection = Selection(keep_desirable=0.1)
    kept, report = selection.keep_of_run(examples, seed=0)
    desirable = [example for example in kept if example.desirable]
    assert len(kept) - len(desirable) == 1000
    assert 240 < len(desirable) < 360  # 300 expected, with a standard deviation of 16
    assert report == {"desirable completions not kept": 3000 - len(desirable)}
    # Drawn one by one, whatever stands beside it.
    assert kept == [e for example in examples for e in selection.keep_of_run([example], seed=0)[0]]
    assert kept != selection.keep_of_run(examples, seed=1)[0]


def test_one_example_of_a_run_is_kept() -> None:
    runs = [[Labelled(f"{n}#{i}", f"p{n}", f"{i}", True) for i in range(3)] for n in range(300)]
    found = [Selection(one_per_prompt=True).keep_of_run(run, seed=0) for run in runs]
    assert all(report == {"further examples of a prompt not kept": 2} for _, report in found)
    chosen = [kept[0].completion for kept, _ in found if len(kept) == 1]
    assert len(chosen) == 300
    assert all(70 < chosen.count(place) < 130 for place in "012")


def test_a_median_of_all_data_is_refused_for_a_stream() -> None:
    with pytest.raises(
        ValueError, match=r"data.select.labels_from_scores: expected a number or prompt .* found median"
    ):
        Selection(labels_from_scores="median").check_stream()
    Selection(labels_from_scores="prompt").check_stream()


@pytest.mark.parametrize("setting", [None, 2.0, "prompt"])
def test_a_run_gets_the_labels_that_a_table_gets(setting: float | str | None) -> None:
    draw = random.Random(0)
    selection = Selection(labels_from_scores=setting)
    for n in range(60):
        run = [
            replace(
                scored(f"{n}-{i}", "p", *draw.choices(range(5), k=draw.randint(1, 4))), weight=draw.choice([1, 2, 3])
            )
            for i in range(draw.randint(1, 4))
        ]
        run.append(Record(f"{n}", "p", (Completion("x"), Completion("y", True, 9.0))))
        of_table = of_run("binary", run, selection.prepare("binary", run, run))
        assert of_run("binary", run, selection.prepare_run("binary", run)) == of_table
    assert selection.prepare_run("pairs", RECORDS[3:]) is None
    unscored = of_run("binary", RECORDS[3:], selection.prepare_run("binary", RECORDS[3:]))
    assert unscored == of_run("binary", RECORDS[3:], selection.prepare("binary", RECORDS[3:], RECORDS[3:]))
