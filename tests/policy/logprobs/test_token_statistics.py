"""What is measured at scored tokens, against torch's own distributions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from halos.policy.logprobs.token_statistics import STATISTICS, check_statistics, measure


def logits() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    given = 5 * torch.randn(40, 7, generator=generator, dtype=torch.float64)
    return given, given.logsumexp(1), torch.randint(7, (40,), generator=generator)


def test_entropy_is_that_of_the_distribution() -> None:
    found = measure(["entropy"], *logits())
    torch.testing.assert_close(found[:, 0], Categorical(logits=logits()[0]).entropy(), rtol=0, atol=1e-13)


def test_of_a_uniform_distribution_and_of_one_token_beside_ruled_out_ones() -> None:
    given = torch.tensor(
        [[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, -math.inf, -math.inf], [-math.inf, 1.0, -math.inf, -math.inf]]
    )
    found = measure(["entropy"], given, given.logsumexp(1), torch.tensor([0, 1, 1]))
    torch.testing.assert_close(found[:, 0], torch.tensor([math.log(4), math.log(2), 0.0]), rtol=0, atol=1e-6)


def test_accuracy_says_where_the_target_is_the_most_probable_token() -> None:
    given, normaliser, targets = logits()
    (found,) = measure(["token_accuracy"], given, normaliser, targets).unbind(1)
    assert found.tolist() == (given.argmax(1) == targets).double().tolist()
    assert 0 < found.mean() < 1


def test_the_log_collision_is_that_of_two_draws() -> None:
    found = measure(["log_collision"], *logits())
    expected = Categorical(logits=logits()[0]).probs.square().sum(1).log()
    torch.testing.assert_close(found[:, 0], expected, rtol=0, atol=1e-13)
    ruled_out = torch.tensor([[0.0, 0.0, -math.inf]])
    found = measure(["log_collision"], ruled_out, ruled_out.logsumexp(1), torch.tensor([0]))
    assert float(found) == pytest.approx(-math.log(2))


def test_several_stand_in_the_order_of_their_names() -> None:
    names = [*STATISTICS][::-1]
    found = measure(names, *logits())
    assert torch.equal(found, torch.cat([measure([name], *logits()) for name in names], 1))
    assert measure([], *logits()).shape == (40, 0)


@pytest.mark.parametrize("names", ["entropy", ["entropies"], None, 3, [["entropy"]], ["entropy", "entropy"]])
def test_other_names_are_refused(names: Any) -> None:
    with pytest.raises(ValueError, match=r"model\.statistics: expected .* entropy, token_accuracy"):
        check_statistics(names)


def test_names_are_kept() -> None:
    assert check_statistics(["token_accuracy", "entropy"]) == ("token_accuracy", "entropy")
    assert check_statistics([]) == ()
