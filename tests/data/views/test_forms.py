"""Each rule has a form for a table and one for a stream: random records in random order give the same in both."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from halos.data.records.record import Completion, Message, Record, prompt_key
from halos.data.records.table import RecordTable, joined, table_of
from halos.data.store.arrow import MEMORY
from halos.data.views.derive import VIEWS, of_run
from halos.data.views.examples import Example, Examples, Labelled
from halos.data.views.selection import Selection
from halos.data.views.turns import expand_turns, with_turns

many = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

SCORES = st.sampled_from([None, None, -1.0, 0.0, 0.5, 1.0, 3.0])
LABELS = st.sampled_from([None, None, True, False])
TURNS = st.lists(st.sampled_from(["user", "assistant", "system"]), max_size=4)


@st.composite
def prompts(draw: st.DrawFn) -> str | tuple[Message, ...]:
    text = f"q{draw(st.integers(0, 3))}"
    if draw(st.booleans()):
        return text
    return (*(Message(role, role[0]) for role in draw(TURNS)), Message("user", text))


@st.composite
def runs(draw: st.DrawFn) -> list[list[Record]]:
    """Records of different prompts, those of one prompt after each other."""
    found: list[list[Record]] = []
    distinct = draw(st.lists(prompts(), min_size=1, max_size=5, unique_by=prompt_key))
    for number, prompt in enumerate(distinct):
        run = []
        for place in range(draw(st.integers(1, 4))):
            count = draw(st.integers(1, 4))
            completions = tuple(Completion(f"{place}.{n}", draw(LABELS), draw(SCORES)) for n in range(count))
            couples = [(i, j) for i in range(count) for j in range(count) if i != j]
            better = draw(st.lists(st.sampled_from(couples), max_size=3, unique=True)) if couples else []
            run.append(Record(f"{number}.{place}", prompt, completions, tuple(better)))
        found.append(run)
    return found


selections = st.builds(
    Selection,
    labels_from_scores=st.sampled_from([None, 0.0, 0.5, "prompt"]),
    pairs_from_scores=st.sampled_from(["best_worst", "all"]),
    min_margin=st.sampled_from([0.0, 1.0, 2.0]),
)


def table_in_parts(records: list[Record], edges: Sequence[int]) -> RecordTable:
    """The records as a table of several record batches."""
    cuts = sorted({0, len(records), *(edge % (len(records) + 1) for edge in edges)})
    return joined([table_of(records[a:z]) for a, z in pairwise(cuts)])


def view_of_table(view: str, records: RecordTable, selection: Selection) -> tuple[list[Example], Counter[str]]:
    try:
        made = VIEWS[view](records, selection.prepare(view, records, records))
    except ValueError:  # no example, which is an error for a table alone
        return [], Counter()
    return list(made.examples), made.report


@many
@given(runs=runs(), view=st.sampled_from(sorted(VIEWS)), selection=selections, edges=st.lists(st.integers(0, 20)))
def test_a_view_of_a_table_is_that_of_its_runs(
    runs: list[list[Record]], view: str, selection: Selection, edges: list[int]
) -> None:
    examples: list[Example] = []
    report: Counter[str] = Counter()
    for run in runs:
        of_one, counts = of_run(view, run, selection.prepare(view, run, run))
        examples += of_one
        report.update(counts)
    expected, counted = view_of_table(view, table_in_parts([r for run in runs for r in run], edges), selection)
    assert examples == expected
    if expected:
        assert +report == +counted


@many
@given(runs=runs(), view=st.sampled_from(sorted(VIEWS)), selection=selections, data=st.data())
def test_the_order_of_prompts_changes_no_example(
    runs: list[list[Record]], view: str, selection: Selection, data: st.DataObject
) -> None:
    mixed = [record for run in data.draw(st.permutations(runs)) for record in run]
    examples, report = view_of_table(view, table_in_parts([r for run in runs for r in run], []), selection)
    others, counts = view_of_table(view, table_in_parts(mixed, []), selection)
    assert sorted(examples, key=lambda example: example.id) == sorted(others, key=lambda example: example.id)
    assert report == counts


def kept_of_runs(examples: Sequence[Example], selection: Selection, seed: int) -> tuple[list[Example], Counter[str]]:
    kept: list[Example] = []
    report: Counter[str] = Counter()
    for _, group in groupby(examples, key=lambda example: prompt_key(example.prompt)):
        of_one, counts = selection.keep_of_run(list(group), seed)
        kept += of_one
        report.update(counts)
    return kept, report


def examples_of(runs: list[list[Record]], view: str) -> Examples[Any] | None:
    try:
        return VIEWS[view]([record for run in runs for record in run]).examples
    except ValueError:
        return None


@many
@given(runs=runs(), view=st.sampled_from(sorted(VIEWS)), seed=st.integers(0, 3))
def test_the_same_example_of_each_prompt_is_kept(runs: list[list[Record]], view: str, seed: int) -> None:
    if (examples := examples_of(runs, view)) is None:
        return
    selection = Selection(one_per_prompt=True)
    kept, report = selection.keep(examples, seed)
    assert (list(kept), report) == kept_of_runs(list(examples), selection, seed)
    assert len(kept) == len({prompt_key(example.prompt) for example in examples})
    assert report.total() == len(examples) - len(kept)
    # A run in which there are several prompts, as there are with train_on=all.
    assert selection.keep_of_run(list(examples), seed) == (list(kept), report)


@many
@given(runs=runs(), share=st.sampled_from([0.2, 0.5, 0.9]), seed=st.integers(0, 3), data=st.data())
def test_shares_keep_the_lowest_draws_in_both_forms(
    runs: list[list[Record]], share: float, seed: int, data: st.DataObject
) -> None:
    if (examples := examples_of(runs, "binary")) is None:
        return
    selection = Selection(keep_desirable=share, keep_undesirable=share)
    kept, report = selection.keep(examples, seed)
    streamed, counts = kept_of_runs(list(examples), selection, seed)
    for desirable, name in ((True, "desirable"), (False, "undesirable")):
        everything, exact, average = (
            {e.id for e in found if isinstance(e, Labelled) and e.desirable == desirable}
            for found in (examples, kept, streamed)
        )
        # The stream's are those below a fixed bar, the table's so many of the lowest: one contains the other.
        assert exact <= average or average <= exact
        assert len(exact) == (max(1, round(share * len(everything))) if everything else 0)
        assert report[f"{name} completions not kept"] == len(everything) - len(exact)
        assert counts[f"{name} completions not kept"] == len(everything) - len(average)
    # Neither form depends on the order of the data.
    order = np.array(data.draw(st.permutations(range(len(examples)))))
    assert {e.id for e in selection.keep(examples.take(order), seed)[0]} == {e.id for e in kept}


@pytest.mark.parametrize("seed", range(3))
def test_labels_do_not_decide_which_example_of_a_prompt_is_kept(seed: int) -> None:
    # One draw for both would keep the label with the smaller share: of those, only low draws are left.
    both = (Completion("a", True), Completion("b", False))
    examples = VIEWS["binary"]([Record(f"{n}", f"q{n}", both) for n in range(4000)]).examples
    kept, _ = Selection(keep_desirable=0.5, one_per_prompt=True).keep(examples, seed)
    # Half of the prompts have both: of those, half keep the desirable one. 1000 of 4000, standard deviation 32.
    assert 870 < sum(example.desirable for example in kept if isinstance(example, Labelled)) < 1130


@many
@given(runs=runs(), edges=st.lists(st.integers(0, 20)))
def test_all_turns_of_a_table_are_those_of_its_records(runs: list[list[Record]], edges: list[int]) -> None:
    records = [record for run in runs for record in run]
    report: Counter[str] = Counter()
    expected = [turn for record in records for turn in with_turns(record, report)]
    assert expand_turns(table_in_parts(records, edges), MEMORY) == (expected, report)
