"""The page of metrics has every name that runs and evaluations log, and no other."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from halos.evaluation.heldout import HeldOut, feedback_metrics, likelihood_metrics, on_policy_metrics
from halos.evaluation.statistics import Bootstrap
from halos.objectives import BCO, CPO, GRPO, IPO, KTO, PPO, SFT, Mix, Objective
from halos.reporting.replies import STALE
from halos.sampling.before_after import Comparison, Samples
from halos.sampling.replies import Reply, reply_metrics
from halos.sampling.scoring import Scores
from tests.loop_runs import fit, objective_of, rows_for

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
OPTIONAL = {"entropy", "token_accuracy", "log_collision", "skipped_steps", "router_loss", "examples", "epoch"}
"""Logged with model.statistics, non_finite=skip, by mixtures of experts and with halos' own data module; other tests
look for these names."""
JUDGED = {f"judge/{name}" for name in ("win_rate", "score_policy", "score_opponent")} | {
    "judge/desirable_policy",
    "judge/desirable_opponent",
}


def documented(*titles: str) -> set[str]:
    """The names in the first column of the tables under these headings."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    rows = [row for part in sections if part.partition("\n")[0] in titles for row in part.splitlines()]
    names = [match[1] for row in rows if (match := re.match(r"\| `(.+?)` \|", row))]
    assert len(names) == len(set(names))
    return set(names)


def logged(kind: type[Objective]) -> set[str]:
    """The names that a run of one step logs, without their stage and the name of a mixture's part."""
    run = fit(objective_of(kind), rows_for(kind, 4), batch_size=4, val=rows_for(kind, 4))
    names = {name.partition("/")[2] for name in (*run.steps[0], *run.val)}
    return {re.sub("^(kto|bco)/", "", name) for name in names}


@pytest.mark.long
def test_it_has_what_runs_log() -> None:
    # The other losses log no names that these do not: test_train_outputs.py has the names of each.
    found = set().union(*(logged(kind) for kind in (KTO, BCO, PPO, GRPO, IPO, CPO, SFT, Mix)))
    page = documented("Of every loss", "Of single losses")
    terms = {name for name in found if name.startswith("loss/")}
    assert found - terms | OPTIONAL | {"loss/…", "loss/kl_penalty"} == page
    assert "loss/kl_penalty" in terms


def test_it_has_what_sampled_validations_log() -> None:
    found = {*reply_metrics([Reply(0, [1], False, 0.5), Reply(1, [1], False, 0.5)]), "samples/win_rate"}
    assert documented("Of the policy's replies") == found
    assert {f"val/{name}" for name in found} == set(STALE)


def test_it_has_the_numbers_of_samples() -> None:
    samples = Samples(["a"], [1.0], [True])
    assert documented("Of samples") == Comparison(["a"], samples, samples, 0.0).summary().keys()


def test_it_has_what_evaluations_write() -> None:
    held = HeldOut(["a", "b"], ["c", "d"], [0, 1], [(0, 1)], [(0, True), (1, False)], Counter())
    sums, tokens, bootstrap = np.array([-1.0, -2.0]), np.array([1.0, 2.0]), Bootstrap(resamples=10)
    scores = Scores(sums, sums, -sums, -sums, tokens)
    found = feedback_metrics(held, sums, tokens, bootstrap) | likelihood_metrics(held, scores, bootstrap)
    for plain in (True, False):
        found |= on_policy_metrics(scores, [0, 1], bootstrap, plain=plain)
    page = documented("Of an evaluation") | documented("Of every loss")
    assert {*found, "samples/truncated"} | JUDGED <= page
    assert documented("Of an evaluation") <= {*found, "samples/truncated"} | JUDGED
