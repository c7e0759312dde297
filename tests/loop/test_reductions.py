"""The step is what counts, not how it is divided: over micro-batches, ranks, rows and padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from halos.data.batches.batch import Batch
from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.metrics import Mean
from halos.objectives import (
    BCO,
    CSFT,
    DPO,
    GRPO,
    KTO,
    PPO,
    SFT,
    BradleyTerry,
    Objective,
    Output,
)
from halos.policy.logprobs.completions import LogProbs
from tests.fork import run_ranks
from tests.loop_runs import (
    OBJECTIVES,
    PER_EXAMPLE_OR_TOKEN,
    Run,
    assert_same,
    batch_of,
    evaluate,
    fit,
    loss_of,
    objective_of,
    rows_for,
)


@pytest.mark.parametrize("kind", PER_EXAMPLE_OR_TOKEN)
def test_accumulated_micro_batches_equal_one_batch(kind: type[Objective]) -> None:
    rows = rows_for(kind, 18)
    parts = fit(objective_of(kind, moved=0.1), rows, batch_size=2, accumulate_grad_batches=3)
    assert_same(parts, fit(objective_of(kind, moved=0.1), rows, batch_size=6))


def test_accumulated_kto_is_the_mean_over_micro_batches_with_their_own_reference_points() -> None:
    """One of the two micro-batches has only one kind of feedback."""
    rows = rows_for(KTO, 6, labels=[True, True, True, True, False, False])
    whole = fit(objective_of(KTO, moved=0.1), rows, batch_size=3, accumulate_grad_batches=2)
    halves = [fit(objective_of(KTO, moved=0.1), half, batch_size=3) for half in (rows[:3], rows[3:])]
    first, second = (half.steps[0]["train/z0"] for half in halves)
    assert first > 0
    assert second > 0
    assert first != second
    assert whole.steps[0]["train/z0"] == pytest.approx((first + second) / 2, rel=1e-6)
    mean = {name: sum(half.gradients[0][name] for half in halves) / 2 for name in whole.gradients[0]}
    torch.testing.assert_close(whole.gradients[0], mean, rtol=1e-10, atol=1e-12)


DIVIDED: list[tuple[type[Objective], int]] = [
    *((kind, 1) for kind in (SFT, CSFT, KTO, DPO, PPO, BCO, GRPO, BradleyTerry)),
    *((kind, 2) for kind in (SFT, KTO, BCO, GRPO)),
]
"""Losses, and the micro-batches of their steps."""


def _train(kind: type[Objective], accumulate: int, **options: Any) -> Run:
    # Ragged rows, an odd number of validation examples, and micro-batches that have one label on a rank.
    labels = [True, True, False, False, True, False, True, True] * 2
    rows, val = rows_for(kind, 16, labels=labels), rows_for(kind, 11, seed=1)
    return fit(objective_of(kind, moved=0.1), rows, val=val, accumulate_grad_batches=accumulate, **options)


def _train_all() -> dict[tuple[type[Objective], int], Run]:
    return {case: _train(*case, batch_size=2, ranks=2) for case in DIVIDED}


@pytest.fixture(scope="module")
def divided() -> list[dict[tuple[type[Objective], int], Run]]:
    return run_ranks(_train_all)


@pytest.mark.ranks
@pytest.mark.parametrize(("kind", "accumulate"), DIVIDED)
def test_two_processes_equal_one(kind: type[Objective], accumulate: int, divided: Any) -> None:
    one = _train(kind, accumulate, batch_size=4)
    for found in divided:
        assert_same(found[kind, accumulate], one)
    assert max(one.losses) - min(one.losses) > 1e-3
    assert kind is not KTO or all(metrics["train/z0"] > 0 for metrics in one.steps)


def test_objectives_that_couple_a_step_refuse_to_divide_it() -> None:
    with pytest.raises(ValueError, match=r"^trainer\.accumulate_grad_batches: expected 1 for a loss .* found 2"):
        fit(objective_of(PPO), rows_for(PPO, 4), batch_size=2, accumulate_grad_batches=2)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_order_of_examples_changes_nothing(kind: type[Objective]) -> None:
    rows = rows_for(kind, 7)
    mixed = [rows[i] for i in (3, 0, 6, 2, 5, 1, 4)]
    expected, found = (loss_of(evaluate(objective_of(kind, moved=0.1), batch_of(kind, some))) for some in (rows, mixed))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("chunks", [4, 100])
def test_padding_to_the_longest_or_in_groups_changes_nothing(kind: type[Objective], chunks: int) -> None:
    rows = rows_for(kind, 7)
    expected, found = (
        loss_of(evaluate(objective_of(kind, moved=0.1), batch_of(kind, rows, chunks=parts))) for parts in (1, chunks)
    )
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", PER_EXAMPLE_OR_TOKEN)
def test_a_long_example_adds_its_own_loss_and_changes_no_other(kind: type[Objective]) -> None:
    rows = rows_for(kind, 4)
    last = rows[-1]
    long = Row("long", 9, tuple(range(1, 20)), (tuple(range(1, 30)),) * len(last.branches), last.desirable, last.score)
    few, alone, both = (
        [term.total.item() for term in evaluate(objective_of(kind, moved=0.1), batch_of(kind, some)).loss.values()]
        for some in (rows, [long], [*rows, long])
    )
    assert both == pytest.approx([a + b for a, b in zip(few, alone, strict=True)], rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_empty_columns_of_tokens_change_nothing(kind: type[Objective]) -> None:
    batch = batch_of(kind, rows_for(kind, 5))
    objective = objective_of(kind, moved=0.1)
    expected = loss_of(evaluate(objective, batch))
    policy = objective.backbone.logprobs(batch, with_hidden=objective.needs.hidden)
    reference = objective.backbone.reference_logprobs(batch) if objective.needs.reference else None

    def wider(logprobs: LogProbs | None) -> LogProbs | None:
        if logprobs is None:
            return None
        hidden = None if logprobs.hidden is None else pad(logprobs.hidden, (0, 0, 0, 3), value=5.0)
        return LogProbs(pad(logprobs.tokens, (0, 3)), pad(logprobs.mask, (0, 3)), hidden, logprobs.last)

    batch.mask = pad(batch.mask, (0, 3))
    found = loss_of(objective.compute(batch, wider(policy), wider(reference)))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_losses_of_another_shape_are_refused() -> None:
    objective, batch = SFT(), collate(rows_for(SFT, 4))
    with pytest.raises(ValueError, match=r"expected one loss per example, shape \(4,\), found \(4, 1\)"):
        objective.per_example(torch.zeros(4, 1), batch)
    width = batch.mask.shape[2]
    with pytest.raises(ValueError, match=rf"expected one loss per token, shape \(4, {width}\), found \(4,\)"):
        objective.per_token(torch.zeros(4), batch)


def test_means_over_tokens_leave_the_others_out() -> None:
    rows = [Row("a", 0, (1,), ((5,), (2, 3))), Row("b", 1, (1,), ((4, 5, 6), (7,)))]
    batch, objective = collate(rows), SFT()
    losses = torch.tensor([[1.0, 20.0, 300.0], [4000.0, 50000.0, 600000.0]])
    term = objective.per_token(losses, batch, branch=1)
    assert (float(term.total), float(term.count), term.step_count) == (4021.0, 3.0, 3)


def test_a_term_without_the_steps_count_is_refused() -> None:
    class Uncounted(SFT):
        def compute(self, batch: Batch, policy: LogProbs, reference: None) -> Output:
            return Output({"mine": Mean(-policy.tokens.sum(), batch.mask.sum())})

    with pytest.raises(ValueError, match="'mine' of Uncounted: expected the count of the whole step, found none"):
        fit(objective_of(Uncounted), rows_for(SFT, 4), batch_size=4)
