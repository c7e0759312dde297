"""SFT."""

from functools import partial

import pytest
import torch

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.objectives import SFT, sft_loss
from halos.policy.logprobs.completions import LogProbs
from halos.testing import check_objective

ROWS = [Row("a", 0, (1,), ((5,),)), Row("b", 1, (2, 3), ((4, 5, 6),))]
TOKENS = torch.tensor([[[-0.5, 0.0, 0.0]], [[-1.0, -2.0, -4.0]]], dtype=torch.float64)


def test_each_token_costs_its_negative_log_probability() -> None:
    assert torch.equal(sft_loss(torch.tensor([[-1.5, -0.25]])), torch.tensor([[1.5, 0.25]]))


def test_the_loss_is_the_mean_over_tokens_not_over_examples() -> None:
    batch = collate(ROWS)
    term = SFT().compute(batch, LogProbs(TOKENS, batch.mask), None).loss["sft"]
    assert float(term.total / term.step_count) == 7.5 / 4
    assert float(term.total / term.count) == 7.5 / 4


def test_every_token_goes_up_alike() -> None:
    batch = collate(ROWS)
    tokens = TOKENS.clone().requires_grad_()
    term = SFT().compute(batch, LogProbs(tokens, batch.mask), None).loss["sft"]
    (term.total / term.step_count).backward()
    assert torch.equal(tokens.grad, -batch.mask.double() / 4)


def test_the_denominator_is_that_of_the_whole_step() -> None:
    first = collate(ROWS[:1], step=collate(ROWS).step)
    term = SFT().compute(first, LogProbs(TOKENS[:1, :, :1], first.mask), None).loss["sft"]
    assert (float(term.total), float(term.count), term.step_count) == (0.5, 1.0, 4)


def test_there_are_no_rewards_and_no_reference() -> None:
    batch = collate(ROWS)
    assert SFT().compute(batch, LogProbs(TOKENS, batch.mask), None).rewards is None
    assert not SFT.needs.reference


def test_the_mean_over_completions_of_each_ones_mean() -> None:
    batch = collate(ROWS)
    term = SFT(average="completions").compute(batch, LogProbs(TOKENS, batch.mask), None).loss["sft"]
    assert float(term.total / term.step_count) == pytest.approx((0.5 + 7 / 3) / 2, rel=1e-14)


@pytest.mark.long
def test_the_mean_over_completions_keeps_every_promise() -> None:
    check_objective(partial(SFT, average="completions"))


def test_another_average_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss\.average: expected .*found 'steps'"):
        SFT(average="steps")
