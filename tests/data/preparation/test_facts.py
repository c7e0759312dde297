"""The numbers by which a loss is chosen, counted from records."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from halos.data.preparation.facts import Facts, facts_of
from halos.data.preparation.prepare import Preparation
from halos.data.rows.chat_tokens import Limits
from halos.data.sources.feedback_files import FeedbackFiles


def facts(folder: Path, *rows: dict) -> Facts:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return facts_of(Preparation(source=FeedbackFiles(train=str(file)), limits=Limits(64, None)).read())


def label(prompt: str, completion: str, good: bool) -> dict:
    return {"prompt": prompt, "completion": completion, "label": good}


def pair(prompt: str, chosen: str, rejected: str, **more: float) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def test_labels_are_counted_by_kind_and_prompt(tmp_path: Path) -> None:
    found = facts(
        tmp_path,
        label("p", "long one", True),
        label("p", "bad", False),
        label("q", "fine", True),
        {"prompt": "r", "completion": "nobody judged this"},
    )
    assert (found.records, found.prompts, found.completions, found.bare) == (4, 3, 4, 1)
    assert (found.desirable, found.undesirable, found.both_kinds, found.alone) == (2, 1, 1, 1)
    assert found.labels
    assert found.longer == 1.0
    assert found.judgements == 3
    assert (found.repeated, found.noise) == (0, None)


def test_labels_that_disagree_are_counted_although_they_become_one(tmp_path: Path) -> None:
    rows = [label("p", "a", True), label("p", "a", False), label("p", "a", True), label("q", "b", True)]
    found = facts(tmp_path, *rows, label("q", "b", True), label("r", "c", False))
    assert (found.desirable, found.undesirable) == (3, 1)
    assert (found.judgements, found.repeated, found.disputed) == (6, 2, 1)
    # Two of three judgements of the same thing differ with 2 ε (1 − ε) = 1/2, which is chance.
    assert found.noise == 0.5


def test_pairs_are_counted_with_their_contradictions_margins_and_lengths(tmp_path: Path) -> None:
    found = facts(
        tmp_path,
        pair("p", "longer", "bad", margin=1.0),
        pair("p", "bad", "longer"),
        pair("q", "ab", "cd"),
        pair("q", "ab", "cd"),
        pair("r", "x", "yyy"),
    )
    assert (found.pairs, found.margins, found.bare, found.alone) == (5, 1, 0, 0)
    assert (found.judgements, found.repeated, found.disputed) == (5, 2, 1)
    assert found.longer == pytest.approx((1 + 0 + 0.5 + 0.5 + 0) / 5)


def test_the_longer_one_of_labelled_replies_is_that_of_all_pairs_of_both_kinds(tmp_path: Path) -> None:
    good, bad = ("aaaa", "aa", "a"), ("bb", "bbb")
    rows = [label(f"g{reply}", reply, True) for reply in good] + [label(f"b{reply}", reply, False) for reply in bad]
    by_hand = sum((len(a) > len(b)) + 0.5 * (len(a) == len(b)) for a in good for b in bad) / 6
    assert facts(tmp_path, *rows).longer == pytest.approx(by_hand, rel=1e-12)


def test_scores_are_compared_within_prompts(tmp_path: Path) -> None:
    rows = [("p", "a", 1.0), ("p", "b", 2.0), ("q", "c", 3.0), ("q", "d", 3.0), ("r", "e", 1.0)]
    found = facts(tmp_path, *({"prompt": p, "completion": c, "score": s} for p, c, s in rows))
    assert (found.scored, found.score_groups, found.bare, found.alone) == (5, 1, 0, 1)
    assert found.longer is None


def test_counted_votes_hide_how_many_judgements_are_repeated(tmp_path: Path) -> None:
    found = facts(tmp_path, {"prompt": "p", "completion": "a", "votes": {"up": 3, "down": 1}})
    assert (found.repeated, found.disputed, found.noise) == (None, 1, None)


@pytest.mark.parametrize(("repeated", "disputed"), [(100, 18), (50, 0), (8, 4)])
def test_noise_is_the_rate_at_which_two_independent_judgements_differ_so_often(repeated: int, disputed: int) -> None:
    found = Facts(repeated=repeated, disputed=disputed)
    assert 2 * found.noise * (1 - found.noise) == pytest.approx(disputed / repeated, abs=1e-12)
    low, high = found.noise_interval
    assert 0 <= low <= found.noise <= high <= 0.5
    # Wilson's interval is where (share − p)² = z² p (1 − p) / n.
    for end in {low, high} - {0.0, 0.5}:
        p = 2 * end * (1 - end)
        assert abs(disputed / repeated - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / repeated), rel=1e-6)
