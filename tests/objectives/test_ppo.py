"""Offline PPO."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.objectives import PPO, PPOLosses, ppo_loss
from halos.objectives.ppo import generalised_advantages, whiten
from halos.policy.logprobs.completions import LogProbs
from tests.fork import run_ranks

LENGTHS = [4, 1, 3]
SCORES = [1.0, -1.0, 0.3]
MASK = torch.arange(4) < torch.tensor(LENGTHS)[:, None]
_generator = torch.Generator().manual_seed(0)
REFERENCE = -3 * torch.rand(3, 4, dtype=torch.float64, generator=_generator)
POLICY = REFERENCE + torch.randn(3, 4, dtype=torch.float64, generator=_generator)
VALUES = torch.randn(3, 4, dtype=torch.float64, generator=_generator)
SCORE = torch.tensor(SCORES, dtype=torch.float64)


def advantages_by_hand(values: list[float], score: float, gamma: float, lam: float) -> list[float]:
    """The definition, as a double sum over one completion's tokens."""
    length = len(values)
    rewards = [0.0] * (length - 1) + [score]
    following = [*values[1:], 0.0]
    deltas = [r + gamma * after - now for r, after, now in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** n * deltas[t + n] for n in range(length - t)) for t in range(length)]


def losses_by_hand(gamma: float, lam: float, clip: float) -> PPOLosses:
    raw = [advantages_by_hand(VALUES[b, :length].tolist(), SCORES[b], gamma, lam) for b, length in enumerate(LENGTHS)]
    flat = [a for row in raw for a in row]
    mean = math.fsum(flat) / len(flat)
    deviation = math.sqrt(math.fsum((a - mean) ** 2 for a in flat) / len(flat))
    policy, critic, penalty = (torch.zeros(3, 4, dtype=torch.float64) for _ in range(3))
    for b, row in enumerate(raw):
        for t, advantage in enumerate(row):
            log_ratio = float(POLICY[b, t]) - float(REFERENCE[b, t])
            ratio = math.exp(log_ratio)
            whitened = (advantage - mean) / (deviation + 1e-8)
            policy[b, t] = -min(whitened * ratio, whitened * min(max(ratio, 1 - clip), 1 + clip))
            critic[b, t] = advantage**2 / 2
            penalty[b, t] = ratio * log_ratio - ratio + 1
    return PPOLosses(policy, critic, penalty)


def losses(
    policy: Tensor = POLICY,
    values: Tensor = VALUES,
    *,
    clip_range: float = 0.5,
    gamma: float = 1.0,
    lam: float = 0.95,
    weights: Tensor | None = None,
) -> PPOLosses:
    settings = {"clip_range": clip_range, "gamma": gamma, "lam": lam}
    return ppo_loss(policy, REFERENCE, values, SCORE, MASK, weights=weights, **settings)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
@pytest.mark.parametrize("clip", [0.5, 0.1])
@pytest.mark.parametrize("term", PPOLosses._fields)
def test_the_losses_by_hand(gamma: float, lam: float, clip: float, term: str) -> None:
    found = getattr(losses(gamma=gamma, lam=lam, clip_range=clip), term)
    expected = getattr(losses_by_hand(gamma, lam, clip), term)
    torch.testing.assert_close(found * MASK, expected, rtol=0, atol=1e-12)


def test_the_clip_is_felt_on_both_sides() -> None:
    """Otherwise the comparison by hand would show nothing of it."""
    ratio = (POLICY - REFERENCE).exp()[MASK]
    assert (ratio < 0.5).any()
    assert (ratio > 1.5).any()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0)])
def test_advantages_by_hand(gamma: float, lam: float) -> None:
    found = generalised_advantages(SCORE, VALUES, MASK, gamma=gamma, lam=lam)
    for b, length in enumerate(LENGTHS):
        expected = advantages_by_hand(VALUES[b, :length].tolist(), SCORES[b], gamma, lam)
        torch.testing.assert_close(found[b, :length], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
        assert (found[b, length:] == 0).all()


def test_with_lambda_1_the_return_is_the_score() -> None:
    returns = generalised_advantages(SCORE, VALUES, MASK, gamma=1.0, lam=1.0) + VALUES
    torch.testing.assert_close(returns[MASK], SCORE[:, None].expand(3, 4)[MASK], rtol=0, atol=1e-14)


def test_the_kl_term_is_a_divergence_of_the_policy_from_the_reference() -> None:
    """Its mean over the reference's tokens is KL(π_θ ‖ π_ref), by enumeration of a vocabulary."""
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    policy = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    zero = torch.zeros(1, 3, dtype=torch.float64)
    penalty = ppo_loss(policy.log()[None], reference.log()[None], zero, zero[:, 0], mask).kl_penalty
    expected = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    assert float((reference * penalty).sum()) == pytest.approx(expected, abs=1e-14)
    assert (penalty >= 0).all()


def test_whitened_advantages_have_mean_0_and_variance_1() -> None:
    white = whiten(VALUES, MASK)[MASK]
    assert float(white.mean()) == pytest.approx(0, abs=1e-14)
    assert float(white.var(correction=0)) == pytest.approx(1, abs=1e-7)
    assert (whiten(VALUES, MASK)[~MASK] == 0).all()


@pytest.mark.parametrize("score", [1.0, 0.3, -0.7, 1e-3])
@pytest.mark.parametrize("tokens", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_advantages_whiten_to_nothing(score: float, tokens: int, dtype: torch.dtype) -> None:
    """Rounding must not be blown up to a preference between tokens."""
    white = whiten(torch.full((1, tokens), score, dtype=dtype), torch.ones(1, tokens, dtype=torch.bool))
    assert white.abs().max() < 1e-3


def _whiten_of_rank() -> Tensor:
    dist.init_process_group("gloo")
    mine = slice(0, 2) if dist.get_rank() == 0 else slice(2, 3)
    return whiten(VALUES[mine], MASK[mine])


@pytest.mark.ranks
def test_advantages_are_whitened_over_all_ranks() -> None:
    torch.testing.assert_close(torch.cat(run_ranks(_whiten_of_rank)), whiten(VALUES, MASK), rtol=0, atol=1e-14)


def test_what_lies_behind_the_mask_changes_nothing() -> None:
    policy, reference, values = POLICY.clone(), REFERENCE.clone(), VALUES.clone()
    policy[~MASK], reference[~MASK], values[~MASK] = 7.0, -50.0, 9.0
    for found, expected in zip(ppo_loss(policy, reference, values, SCORE, MASK), losses(), strict=True):
        torch.testing.assert_close(found[MASK], expected[MASK], rtol=0, atol=1e-14)
        assert (found[~MASK] == 0).all()


def test_padding_changes_nothing() -> None:
    def pad(tensor: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, 5), value=value)

    wide = ppo_loss(pad(POLICY, 3.0), pad(REFERENCE, -4.0), pad(VALUES, 9.0), SCORE, pad(MASK, False))
    for found, expected in zip(wide, losses(), strict=True):
        torch.testing.assert_close(found, pad(expected * MASK, 0.0), rtol=0, atol=1e-14)


def test_at_step_0_the_policy_follows_the_advantages() -> None:
    policy = REFERENCE.clone().requires_grad_()
    ppo_loss(policy, REFERENCE, VALUES, SCORE, MASK).policy.sum().backward()
    white = whiten(generalised_advantages(SCORE, VALUES, MASK, gamma=1.0, lam=0.95), MASK)
    torch.testing.assert_close(policy.grad, -white, rtol=0, atol=1e-14)


def test_a_ratio_past_the_clip_is_pushed_no_further() -> None:
    policy = POLICY.clone().requires_grad_()
    losses(policy).policy.sum().backward()
    white = whiten(generalised_advantages(SCORE, VALUES, MASK, gamma=1.0, lam=0.95), MASK)
    ratio = (POLICY - REFERENCE).exp()
    saturated = ((white > 0) & (ratio > 1.5)) | ((white < 0) & (ratio < 0.5))
    assert torch.equal(policy.grad != 0, MASK & ~saturated)
    assert (MASK & saturated).any()


def test_only_the_critic_moves_the_values_and_it_moves_nothing_else() -> None:
    policy, values = POLICY.clone().requires_grad_(), VALUES.clone().requires_grad_()
    terms = losses(policy, values)
    (moved,) = torch.autograd.grad(
        (terms.policy + terms.kl_penalty).sum(), values, retain_graph=True, allow_unused=True
    )
    assert moved is None
    (moved,) = torch.autograd.grad(terms.critic.sum(), policy, retain_graph=True, allow_unused=True)
    assert moved is None
    (moved,) = torch.autograd.grad(terms.critic.sum(), values)
    towards = -generalised_advantages(SCORE, VALUES, MASK, gamma=1.0, lam=0.95)
    torch.testing.assert_close(moved, towards, rtol=0, atol=1e-14)


@pytest.mark.parametrize("term", ["policy", "kl_penalty"])
def test_gradients(term: str) -> None:
    def loss(policy: Tensor) -> Tensor:
        return getattr(losses(policy, clip_range=0.3), term)

    assert torch.autograd.gradcheck(loss, POLICY.clone().requires_grad_())


def module(**parameters: Any) -> PPO:
    objective = PPO(**parameters)
    objective.build(2)
    objective.double()
    with torch.no_grad():
        objective.value_head.linear.weight.copy_(torch.tensor([[1.0, -2.0]]))
        objective.value_head.linear.bias.fill_(0.5)
    return objective


def test_the_module_weighs_and_averages_the_terms_over_tokens() -> None:
    rows = [
        Row(str(b), b, (1,), (tuple(range(2, 2 + length)),), desirable=score > 0, score=score)
        for b, (length, score) in enumerate(zip(LENGTHS, SCORES, strict=True))
    ]
    batch = collate(rows)
    hidden = torch.randn(3, 1, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    policy = LogProbs((POLICY * MASK)[:, None], batch.mask, hidden)
    reference = LogProbs((REFERENCE * MASK)[:, None], batch.mask)
    parameters: dict[str, Any] = {"clip_range": 0.2, "gamma": 0.9, "lam": 0.7}
    output = module(beta=0.3, critic_coefficient=0.6, **parameters).compute(batch, policy, reference)
    values = hidden[:, 0, :, 0] - 2 * hidden[:, 0, :, 1] + 0.5
    terms = losses(values=values, **parameters)
    for name, weight in (("policy", 1.0), ("critic", 0.6), ("kl_penalty", 0.3)):
        expected = weight * (getattr(terms, name) * MASK).sum() / 8
        torch.testing.assert_close(output.loss[name].total / output.loss[name].step_count, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(output.rewards[:, 0], 0.3 * ((POLICY - REFERENCE) * MASK).sum(1), rtol=0, atol=1e-13)


def test_the_value_head_starts_at_zero() -> None:
    objective = PPO()
    objective.build(3)
    assert (objective.value_head(torch.randn(2, 5, 3)) == 0).all()


def test_the_values_do_not_move_the_states_they_read() -> None:
    hidden = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    objective = module()
    objective.value_head(hidden).sum().backward()
    assert hidden.grad is None
    assert objective.value_head.linear.weight.grad is not None
