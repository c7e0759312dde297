"""Human-aware losses from formulas: against the hand-written losses, and by hand."""

from __future__ import annotations

import logging
import math
import re
from functools import partial
from typing import Any

import pytest
import torch

from halos.commands.builders import objective_maker
from halos.objectives import BCO, DPO, HALO, IPO, KTO, Needs, RobustDPO, SimPO, halo_loss
from halos.objectives.base import Objective
from halos.testing import check_objective, check_property
from halos.testing.examples import Make, Result, evaluate, make_inputs, make_objective, tiny_rows
from tests.configs import compose
from tests.testing.test_properties import case

KT = "where(u>0, u**0.88, -2.25*(-u)**0.88)"
POINTS = ("mismatched", "zero", "running", "per_prompt", "token", "policy")


def made(name: str, **parameters: Any) -> Make:
    return partial(objective_maker(compose(f"loss={name}", "model=hf").loss), **parameters)


def results(make: Make) -> list[Result]:
    """At the reference and twice away from it, a step each: running means then have something to remember."""
    objective = make_objective(make)
    found = []
    for at_reference in (True, False, False):
        found.append(evaluate(objective, make_inputs(objective, tiny_rows(objective, 6), at_reference=at_reference)))
        objective.end_step()
    return found


def assert_equal(one: Make, other: Make) -> None:
    for found, expected in zip(results(one), results(other), strict=True):
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-12, atol=1e-12)
        assert found.output.rewards is not None
        torch.testing.assert_close(found.output.rewards, expected.output.rewards, rtol=1e-12, atol=1e-12)
        metrics = [{k: v for k, v in result.means.items() if "loss/" not in k} for result in (found, expected)]
        assert metrics[0] == metrics[1]


@pytest.mark.parametrize("point", POINTS)
def test_the_logistic_value_is_kto(point: str) -> None:
    options: dict[str, Any] = {
        "beta": 0.3,
        "desirable_weight": 1.5,
        "undesirable_weight": 0.7,
        "reference_point": point,
    }
    assert_equal(made("halo_kto", **options), partial(KTO, **options))


CASES: list[tuple[Make, Make]] = [
    (made("halo_kto"), KTO),
    (made("halo_kto", clamp_reference_point=False), partial(KTO, clamp_reference_point=False)),
    (made("halo_kto", reward="log_prob"), partial(KTO, reference_free=True)),
    (made("halo_kto", desirable_weight="auto"), made("kto_balanced")),
    (made("halo_kto", reference_point="running", reference_point_steps=2),
     partial(KTO, reference_point="running", reference_point_steps=2)),
    (made("halo_kto_concave"), partial(BCO, reference_point="mismatched")),
    (made("halo_dpo"), DPO),
    (made("halo_dpo", beta=0.7), partial(DPO, beta=0.7)),
    (made("halo_dpo", noise=0.1), partial(DPO, label_smoothing=0.1)),
    (made("halo_dpo", value="0.9*log_sigmoid(beta*u) + 0.1*log_sigmoid(-beta*u)"), partial(DPO, label_smoothing=0.1)),
    (made("halo_dpo", value="(0.9*log_sigmoid(beta*u) - 0.1*log_sigmoid(-beta*u))/0.8"), RobustDPO),
    (made("halo_dpo", value="-(u - 1/(2*beta))**2", reward="mean_log_ratio"), IPO),
    (made("halo_dpo", value="log_sigmoid(beta*u - 0.5)", reward="mean_log_prob", beta=2.0), SimPO),
]  # fmt: skip


@pytest.mark.parametrize(("halo", "hand_written"), CASES, ids=range(len(CASES)))
def test_special_cases_are_the_hand_written_losses(halo: Make, hand_written: Make) -> None:
    assert_equal(halo, hand_written)


@pytest.mark.parametrize("name", [*map(case, ("halo", "halo_kto_concave", "halo_kto_risk_neutral", "halo_dpo"))])
def test_formulas_are_objectives_like_any_other(name: str) -> None:
    check_objective(made(name))


VARIANTS: list[dict[str, Any]] = [
    {"value": KT, "desirable_weight": 1.5, "undesirable_weight": 0.5},
    {"value": KT, "view": "pairs"},
    {"value": KT, "view": "scored", "threshold": 0.25, "desirable_weight": 1.5},
    {"value": "tanh", "beta": 0.3, "reward": "mean_log_ratio"},
    {"value": "hinge", "beta": 0.3, "reward": "log_prob"},
    {"value": "exponential", "beta": 0.3, "view": "pairs", "reward": "mean_log_prob"},
    {"value": "logistic", "beta": 0.3, "desirable_weight": "auto", "reference_point": "per_prompt"},
    {"value": "kahneman_tversky", "alpha": 0.5, "loss_aversion": 3.0, "reference_point": "token"},
    {"value": "kahneman_tversky", "alpha": 0.5, "reference_point": "token", "reward": "mean_log_ratio"},
    {"value": "linear", "beta": 0.3, "reference_point": "running", "view": "scored"},
    {"value": "-(u - 3)**2", "view": "pairs"},
    {"value": "relu(u)"},
    {"value": KT, "noise": 0.2, "probability_weighting": "prelec"},
]


@pytest.mark.slow
@pytest.mark.parametrize("parameters", VARIANTS, ids=range(len(VARIANTS)))
def test_variants_keep_every_promise(parameters: dict[str, Any]) -> None:
    check_objective(partial(HALO, **parameters))


@pytest.mark.parametrize("parameters", VARIANTS[:4], ids=range(4))
def test_weights_count_as_repeated_examples(parameters: dict[str, Any]) -> None:
    check_property(partial(HALO, **parameters), "weights")
    check_property(partial(HALO, **parameters), "step 0")


def test_losses_by_hand() -> None:
    u, good = torch.tensor([0.5, 0.5, -2.0], dtype=torch.float64), torch.tensor([True, False, False])
    losses = halo_loss(u, good, torch.tanh, constant=1.0, desirable_weight=3.0, undesirable_weight=0.1)
    expected = [3 * (1 - math.tanh(0.5)), 0.1 * (1 + math.tanh(0.5)), 0.1 * (1 - math.tanh(2.0))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-14)


def test_scores_of_plus_and_minus_one_are_labels() -> None:
    binary, scored = (make_objective(partial(HALO, value=KT, view=view)) for view in ("binary", "scored"))
    rows = tiny_rows(binary, 6)
    inputs = make_inputs(binary, rows)
    expected = evaluate(binary, inputs)
    inputs.batch.scores = tuple(1.0 if row.desirable else -1.0 for row in rows)
    found = evaluate(scored, inputs)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-14, atol=0)


def test_a_score_counts_as_many_labels_as_it_is_above_or_below_the_threshold() -> None:
    objective = make_objective(partial(HALO, value="linear", beta=0.5, view="scored", threshold=1.0))
    rows = tiny_rows(objective, 3)
    inputs = make_inputs(objective, rows, at_reference=True)
    inputs.batch.scores = (4.0, 0.5, 1.0)
    gradients = evaluate(objective, inputs).gradients
    slopes = [float(gradients[row.id][0, 0]) for row in rows]
    # Over three examples: 3 labels desirable, half a label undesirable, none.
    assert slopes == pytest.approx([-0.5 * 3 / 3, 0.5 * 0.5 / 3, 0.0], abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("view", ["binary", "pairs", "scored"])
def test_the_gradient_of_step_0_is_finite(view: str, dtype: torch.dtype) -> None:
    objective = make_objective(partial(HALO, value=KT, view=view), dtype=dtype)
    rows = tiny_rows(objective, 4)
    result = evaluate(objective, make_inputs(objective, rows, at_reference=True, dtype=dtype))
    sizes = [gradient.abs().max() for gradient in result.gradients.values()]
    assert all(0 < float(size) < 10 for size in sizes)


# Tversky and Kahneman's figures 1 and 3 have w(0.1) near 0.19; Prelec's function crosses the diagonal at 1/e.
@pytest.mark.parametrize(
    ("weighting", "p", "weight"),
    [
        ("none", 0.1, 0.1),
        ("prelec", 1 / math.e, 1 / math.e),
        ("prelec", 0.1, math.exp(-(math.log(10) ** 0.65))),
        ("tversky_kahneman", 0.25, 0.290743),
        ("tversky_kahneman", 0.1, 0.186303),
    ],
)
def test_small_probabilities_of_a_wrong_label_are_weighed(weighting: str, p: float, weight: float) -> None:
    objective = HALO(value="tanh", noise=p, probability_weighting=weighting)
    assert objective.wrong == pytest.approx(weight, rel=1e-4)
    u = torch.tensor([0.7, 0.7], dtype=torch.float64)
    losses = objective.losses(u, torch.tensor([True, False])).tolist()
    up, down = 1 - math.tanh(0.07), 1 + math.tanh(0.07)
    assert losses == pytest.approx(
        [objective.right * up + objective.wrong * down, objective.right * down + objective.wrong * up], rel=1e-14
    )


def test_it_needs_what_its_parameters_need() -> None:
    assert HALO().needs == KTO().needs == HALO.needs
    assert HALO(reward="log_prob").needs == KTO(reference_free=True).needs
    assert HALO(view="pairs").needs == Needs()
    assert HALO(view="pairs", reward="mean_log_prob").needs == Needs(reference=False)
    assert HALO(reference_point="zero").needs == Needs()
    assert HALO(desirable_weight="auto").needs.label_counts
    assert HALO(value="relu(u)").needs.moves == HALO(value="relu(u)", view="pairs").needs.moves == (None, None)
    assert [HALO(view=view).data_needs().view for view in ("binary", "pairs", "scored")] == [
        "binary",
        "pairs",
        "scored",
    ]


def test_means_over_tokens_are_compared_with_means_over_tokens() -> None:
    objective = make_objective(partial(HALO, reward="mean_log_ratio", reference_point="token"))
    inputs = make_inputs(objective, tiny_rows(objective, 4))
    assert inputs.policy.divergence is not None
    lengths = inputs.batch.mask[:, 0].sum(1)
    assert len(set(lengths.tolist())) > 1
    total, count = evaluate(objective, inputs).means["z0"]
    expected = (inputs.policy.divergence[:, 0].sum(1) / lengths).mean()
    assert total / count == pytest.approx(float(expected), rel=1e-12)


def test_rewards_include_beta_where_the_formula_does() -> None:
    plain, scaled = (make_objective(partial(HALO, value=value)) for value in ("u", "8*beta*u"))
    rewards = [evaluate(o, make_inputs(o, tiny_rows(o, 2))).output.rewards for o in (plain, scaled)]
    assert rewards[0] is not None
    torch.testing.assert_close(rewards[1], 0.1 * rewards[0], rtol=1e-14, atol=0)


def test_automatic_weights_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="halos.objectives.halo")
    objective = HALO(undesirable_weight="auto")
    objective.see_labels(60, 20)
    objective.see_labels(60, 20)
    assert objective.weights == {"desirable_weight": 1.0, "undesirable_weight": pytest.approx(60 / 20 / (4 / 3))}
    message = "HALO weights from 60 desirable and 20 undesirable completions: λ_D = 1, λ_U = 2.25"
    assert [record.getMessage() for record in caplog.records] == [message]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"view": "triples"}, "loss.view: expected one of binary, pairs, scored; found 'triples'"),
        ({"reward": "length"}, "loss.reward: expected one of log_ratio, mean_log_ratio, log_prob, "),
        ({"value": "import os"}, "loss.value: expected a formula in u, found invalid syntax at character"),
        ({"beta": 0.1}, "loss.beta: expected null, as loss.value='where(u > 0, u**alpha, -loss_aversion*(-u)**alpha)'"),
        ({"value": "logistic", "beta": 0.0}, "loss.beta: expected a number in (0, inf), found 0.0"),
        ({"alpha": -1.0}, "loss.alpha: expected a number in (0, inf), found -1.0"),
        ({"undesirable_weight": -1.0}, "loss.undesirable_weight: expected a number in [0, inf), found -1.0"),
        ({"view": "pairs", "desirable_weight": 2.0},
         "loss.desirable_weight: expected null with loss.view=pairs, whose reference point is the rejected completion, "
         "found 2.0"),
        ({"view": "pairs", "reference_point": "zero"}, "loss.reference_point: expected null with loss.view=pairs"),
        ({"view": "pairs", "clamp_reference_point": False}, "loss.clamp_reference_point: expected null with loss.view"),
        ({"view": "pairs", "reference_point_steps": 3}, "loss.reference_point_steps: expected null with loss.view"),
        ({"noise": 0.5}, "loss.noise: expected a number in (0, 0.5), found 0.5"),
        ({"noise": 0.1, "probability_weighting": "linear"},
         "loss.probability_weighting: expected one of none, prelec, tversky_kahneman; found 'linear'"),
        ({"probability_weighting": "prelec"}, "loss.probability_weighting: expected null without loss.noise, found"),
        ({"threshold": 0.5}, "loss.threshold: expected null with loss.view=binary, which has no scores, found 0.5"),
        ({"view": "scored", "desirable_weight": "auto"},
         "loss.desirable_weight: expected a number with loss.view=scored, found auto"),
        ({"reference_point": "median"}, "loss.reference_point: expected one of mismatched, zero, running, "),
        ({"reference_point": "zero", "reward": "log_prob"},
         "loss.reference_point: expected mismatched, running, per_prompt with loss.reward=log_prob, found zero"),
        ({"reference_point": "policy", "reward": "mean_log_ratio"},
         "loss.reference_point: expected mismatched, zero, running, per_prompt, token with loss.reward=mean_log_ratio"),
        ({"reference_point_steps": 3}, "loss.reference_point_steps: expected null with loss.reference_point="),
    ],
)  # fmt: skip
def test_parameters_are_checked(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        HALO(**parameters)


def test_a_formula_is_an_objective() -> None:
    assert isinstance(HALO(value="tanh(u)"), Objective)
