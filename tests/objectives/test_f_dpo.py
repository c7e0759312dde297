"""f-DPO."""

import math
from functools import partial
from typing import Any

import pytest
import torch

from halos.objectives import FDPO, dpo_loss, f_derivative, f_dpo_loss
from halos.testing import check_objective
from tests.pairs import assert_term, columns, log_ratios, pairs

CHOSEN, REJECTED = columns(log_ratios())
KINDS: list[tuple[str, float | None]] = [("forward_kl", None), ("jensen_shannon", None), ("alpha", 0.3), ("alpha", 0.8)]


def derivative_by_hand(r: float, divergence: str, alpha: float | None) -> float:
    """From the ratio u itself."""
    u = math.exp(r)
    if divergence == "forward_kl":
        return 1 - 1 / u
    if alpha is not None:
        return (1 - 1 / u**alpha) / alpha
    return math.log(2 * u / (1 + u))


def by_hand(beta: float, divergence: str, alpha: float | None) -> list[float]:
    margins = [
        beta * (derivative_by_hand(w, divergence, alpha) - derivative_by_hand(l, divergence, alpha))
        for w, l in log_ratios()  # noqa: E741
    ]
    return [math.log(1 + math.exp(-margin)) for margin in margins]


@pytest.mark.parametrize(("divergence", "alpha"), KINDS)
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_loss_by_hand(divergence: str, alpha: float | None, beta: float) -> None:
    found = f_dpo_loss(CHOSEN, REJECTED, beta=beta, divergence=divergence, alpha=alpha)
    torch.testing.assert_close(found, torch.tensor(by_hand(beta, divergence, alpha)).double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize(("divergence", "alpha"), KINDS)
def test_the_derivative_is_that_of_the_f_of_the_divergence(divergence: str, alpha: float | None) -> None:
    """f of the paper's table 1, differentiated by autograd, up to its value at u = 1."""
    r = torch.linspace(-2, 2, 9, dtype=torch.float64)
    u = r.exp().requires_grad_()
    one = torch.ones(1, dtype=torch.float64, requires_grad=True)

    def f(u: torch.Tensor) -> torch.Tensor:
        if divergence == "forward_kl":
            return -u.log()
        if alpha is not None:
            return (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))
        return u * u.log() - (u + 1) * ((u + 1) / 2).log()

    (slope,), (at_one,) = (torch.autograd.grad(f(x).sum(), x) for x in (u, one))
    torch.testing.assert_close(f_derivative(r, divergence, alpha), slope - at_one, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("divergence", "alpha"), KINDS)
def test_gradients(divergence: str, alpha: float | None) -> None:
    loss = partial(f_dpo_loss, beta=0.7, divergence=divergence, alpha=alpha)
    assert torch.autograd.gradcheck(loss, (CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()))


def test_a_small_alpha_is_dpo() -> None:
    zero = torch.zeros_like(CHOSEN)
    found = f_dpo_loss(CHOSEN, REJECTED, divergence="alpha", alpha=1e-9)
    torch.testing.assert_close(found, dpo_loss(CHOSEN, REJECTED, zero, zero), rtol=1e-7, atol=0)


@pytest.mark.parametrize(("divergence", "alpha"), KINDS)
def test_extreme_log_ratios_stay_finite(divergence: str, alpha: float | None) -> None:
    far = torch.tensor([1e4, -1e4, -1e4], requires_grad=True)
    losses = f_dpo_loss(far, far.flip(0).detach(), divergence=divergence, alpha=alpha)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert far.grad.isfinite().all()


@pytest.mark.parametrize(("divergence", "alpha"), KINDS)
def test_the_module_passes_its_parameters_on(divergence: str, alpha: float | None) -> None:
    batch, policy, reference = pairs()
    output = FDPO(beta=0.3, divergence=divergence, alpha=alpha).compute(batch, policy, reference)
    expected = f_dpo_loss(CHOSEN, REJECTED, beta=0.3, divergence=divergence, alpha=alpha)
    assert_term(output.loss["f_dpo"], expected.tolist())
    rewards = [[0.3 * derivative_by_hand(r, divergence, alpha) for r in sides] for sides in log_ratios()]
    torch.testing.assert_close(output.rewards, torch.tensor(rewards).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("divergence", "alpha"), [KINDS[0], KINDS[2]])
def test_the_other_divergences_keep_every_promise(divergence: str, alpha: float | None) -> None:
    check_objective(partial(FDPO, divergence=divergence, alpha=alpha))


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({"beta": 0}, r"loss\.beta: expected a number in \(0, inf\), found 0"),
        ({"divergence": "reverse_kl"}, r"loss\.divergence: expected .*found 'reverse_kl'"),
        ({"divergence": "alpha"}, r"loss\.alpha: expected a number in \(0, 1\)"),
        ({"divergence": "alpha", "alpha": 1}, r"loss\.alpha: expected a number in \(0, 1\), found 1"),
        ({"alpha": 0.5}, r"loss\.alpha: expected null with loss\.divergence=jensen_shannon, found 0\.5"),
    ],
)
def test_parameters_are_checked(parameters: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        FDPO(**parameters)
