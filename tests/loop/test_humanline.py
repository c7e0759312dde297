"""Humanline's clamp, beside any loss with a reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from halos.objectives import DPO, SFT, Humanline, dpo_loss
from halos.policy.logprobs.completions import LogProbs
from tests.loop_runs import fit, objective_of, rows_for
from tests.pairs import POLICY, REFERENCE, columns, pairs

CLAMP = Humanline(log_epsilon_P=-0.4, log_epsilon_R=0.7)


def clamped_sums() -> list[tuple[float, float]]:
    """Log-ratios of each pair, every token's clamped by hand."""
    found = []
    for ours, theirs in zip(POLICY, REFERENCE, strict=True):
        sides = []
        for mine, base in zip(ours, theirs, strict=True):
            ratios = [a - b for a, b in zip(mine, base, strict=True)]
            sides.append(math.fsum(-0.4 if r < -0.4 else 0.7 if r > 0.7 else r for r in ratios))
        found.append((sides[0], sides[1]))
    return found


def test_the_loss_is_that_of_clamped_token_log_ratios() -> None:
    batch, policy, reference = pairs()
    output = DPO(beta=0.5, humanline=CLAMP).compute_clamped(batch, policy, reference)
    chosen, rejected = columns(clamped_sums())
    zero = torch.zeros_like(chosen)
    term = output.loss["dpo"]
    assert term.step_count is not None
    expected = dpo_loss(chosen, rejected, zero, zero, beta=0.5).mean()
    torch.testing.assert_close(term.total / term.step_count, expected, rtol=1e-12, atol=0)
    assert not torch.allclose(chosen, policy.sum[:, 0] - reference.sum[:, 0])


def test_rewards_stay_unclamped() -> None:
    batch, policy, reference = pairs()
    plain = DPO(beta=0.5).compute_clamped(batch, policy, reference)
    clamped = DPO(beta=0.5, humanline=CLAMP).compute_clamped(batch, policy, reference)
    assert clamped.rewards is not None
    assert plain.rewards is not None
    assert torch.equal(clamped.rewards, plain.rewards)
    assert float(clamped.loss["dpo"].total) != float(plain.loss["dpo"].total)


def test_tokens_outside_the_range_have_no_gradient_and_those_within_keep_their_value() -> None:
    batch, policy, reference = pairs()
    policy.tokens.requires_grad_()
    seen = CLAMP.clamp(policy, reference).tokens
    ratios = (policy.tokens - reference.tokens).detach()
    within = (ratios >= -0.4) & (ratios <= 0.7) & batch.mask
    assert (within & batch.mask).any()
    assert ((ratios < -0.4) & batch.mask).any()
    assert ((ratios > 0.7) & batch.mask).any()
    assert torch.equal(seen[within], policy.tokens[within])
    assert (seen[~batch.mask] == 0).all()
    (gradient,) = torch.autograd.grad(seen[batch.mask].sum(), policy.tokens)
    assert torch.equal(gradient, within.double())


def test_nothing_but_token_log_probs_changes() -> None:
    batch, policy, reference = pairs()
    given = LogProbs(policy.tokens, batch.mask, torch.ones(1), torch.zeros(2))
    seen = CLAMP.clamp(given, reference)
    assert (seen.mask is batch.mask, seen.hidden is given.hidden, seen.last is given.last) == (True, True, True)


def test_a_range_that_nothing_leaves_changes_nothing() -> None:
    rows = rows_for(DPO, 8)
    wide = fit(objective_of(DPO, humanline=Humanline(log_epsilon_P=-99.0, log_epsilon_R=99.0)), rows, batch_size=4)
    assert wide.losses == fit(objective_of(DPO), rows, batch_size=4).losses
    narrow = fit(objective_of(DPO, humanline=Humanline(log_epsilon_P=-1e-3, log_epsilon_R=1e-3)), rows, batch_size=4)
    assert narrow.losses[0] == wide.losses[0]
    assert narrow.losses[1] != wide.losses[1]


def test_an_objective_without_a_reference_refuses_it() -> None:
    with pytest.raises(ValueError, match=r"humanline\.enabled: expected false, or a loss with a reference, found true"):
        SFT(humanline=CLAMP).check(1, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("log_epsilon_P", 0.0),
        ("log_epsilon_P", 1.0),
        ("log_epsilon_R", 0.0),
        ("log_epsilon_R", math.inf),
        ("log_epsilon_R", True),
        ("log_epsilon_R", None),
        ("log_epsilon_P", "-1"),
    ],
)
def test_the_range_must_hold_zero(name: str, value: Any) -> None:
    side = "below" if name.endswith("P") else "above"
    with pytest.raises(ValueError, match=rf"humanline\.{name}: expected a number {side} 0, found {value!r}$"):
        Humanline(**{name: value})
