"""The router loss in training: with every objective, over all ranks, and with accumulated micro-batches."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from halos.objectives import DPO, Objective
from halos.optim import AdamW
from halos.policy.backbone import Backbone
from tests import architectures
from tests.fork import run_ranks
from tests.loop_runs import OBJECTIVES, REQUIRED, Run, batch_of, described, fit, rows_for


def mixture(kind: type[Objective] = DPO, coefficient: float = 0.5) -> Objective:
    model = architectures.model("mixtral", dtype=torch.float64)
    needs = described(kind).needs
    backbone = Backbone(model, with_reference=needs.reference, router_loss=coefficient)
    return kind(backbone, optim=AdamW(lr=3e-3, warmup=0, schedule="constant"), **REQUIRED.get(kind, {}))


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_objective_has_it_as_a_term_of_its_loss(kind: type[Objective]) -> None:
    rows = rows_for(kind, 6)
    with_it, without = mixture(kind), mixture(kind, 0)
    for objective in (with_it, without):
        objective.configure_model()
        objective.see_labels(3, 3)
    (output, metrics), (plain, _) = (o.compute_batch(batch_of(kind, rows)) for o in (with_it, without))
    assert {*output.loss} == {*plain.loss, "router"}
    for name, term in plain.loss.items():
        assert torch.equal(output.loss[name].total, term.total)
    term, logged = output.loss["router"], metrics["router_loss"]
    assert float(term.total) == pytest.approx(0.5 * float(logged.total), rel=1e-6)
    # Perfect balance gives 2, the number of experts per token; all tokens to the same two experts up to 4.
    assert 1.5 < float(logged.total) / float(logged.count) < 3
    assert term.total.requires_grad


def test_weights_that_are_all_equal_change_nothing() -> None:
    rows = rows_for(DPO, 6)
    terms = []
    for weight in (1.0, 2.0):
        objective = mixture()
        objective.configure_model()
        output, metrics = objective.compute_batch(batch_of(DPO, [replace(row, weight=weight) for row in rows]))
        term, logged = output.loss["router"], metrics["router_loss"]
        terms.append((float(term.total) / float(term.step_count or 0), float(logged.total) / float(logged.count)))
    assert terms[0] == pytest.approx(terms[1], rel=1e-6)


def test_accumulated_micro_steps_have_the_mean_of_their_own_losses() -> None:
    rows = rows_for(DPO, 8)
    whole = fit(mixture(), rows, batch_size=4, accumulate_grad_batches=2)
    halves = [fit(mixture(), half, batch_size=4) for half in (rows[:4], rows[4:])]
    losses = [half.steps[0]["train/router_loss"] for half in halves]
    assert losses[0] != losses[1]
    assert whole.steps[0]["train/router_loss"] == pytest.approx(sum(losses) / 2, rel=1e-7)
    assert whole.steps[0]["train/loss/router"] == pytest.approx(sum(losses) / 4, rel=1e-7)
    mean = {name: sum(half.gradients[0][name] for half in halves) / 2 for name in whole.gradients[0]}
    torch.testing.assert_close(whole.gradients[0], mean, rtol=1e-6, atol=1e-10)


def _train(accumulate: int, **options: Any) -> Run:
    return fit(mixture(), rows_for(DPO, 8), accumulate_grad_batches=accumulate, **options)


def _train_on_a_rank() -> list[Run]:
    return [_train(1, batch_size=4, ranks=2), _train(2, batch_size=2, ranks=2)]


@pytest.mark.ranks
def test_two_processes_equal_one() -> None:
    expected = [_train(1, batch_size=8), _train(2, batch_size=4)]
    for found in run_ranks(_train_on_a_rank):
        for mine, one in zip(found, expected, strict=True):
            assert mine.steps[0]["train/router_loss"] == pytest.approx(one.steps[0]["train/router_loss"], rel=1e-7)
            torch.testing.assert_close(mine.gradients, one.gradients, rtol=1e-6, atol=1e-10)
