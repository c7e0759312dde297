"""CSFT."""

from typing import Any

import pytest
import torch

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.objectives import CSFT
from halos.policy.logprobs.completions import LogProbs


def csft(**parameters: Any) -> CSFT:
    return CSFT(**parameters)


def test_the_control_token_follows_the_label() -> None:
    objective = csft(desirable_token="<yes>", undesirable_token="<no>")
    assert (objective.control(True), objective.control(False)) == ("<yes>", "<no>")
    assert objective.control_tokens == ("<yes>", "<no>")


def test_the_default_tokens_differ() -> None:
    assert csft().control(True) == "<|good|>" != csft().control(False)


def test_both_labels_are_learnt_alike() -> None:
    """The label acts through the control token alone: what people disliked is not pushed down."""
    rows = [Row("a", 0, (1,), ((5, 6),), desirable=True), Row("b", 1, (2,), ((7,),), desirable=False)]
    batch = collate(rows)
    tokens = torch.tensor([[[-1.0, -2.0]], [[-6.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    output = csft().compute(batch, LogProbs(tokens, batch.mask), None)
    term = output.loss["csft"]
    loss = term.total / term.step_count
    loss.backward()
    assert loss.item() == 3.0
    torch.testing.assert_close(tokens.grad, -batch.mask.double() / 3, rtol=0, atol=1e-15)
    assert output.rewards is None


def test_there_is_no_reference() -> None:
    assert not CSFT.needs.reference


@pytest.mark.parametrize(
    ("tokens", "key"),
    [
        ({"desirable_token": ""}, "loss.desirable_token: expected text"),
        ({"undesirable_token": "  "}, "loss.undesirable_token: expected text"),
        ({"undesirable_token": None}, "loss.undesirable_token: expected text"),
        ({"desirable_token": "<a>", "undesirable_token": "<a>"}, "loss.undesirable_token: expected another one"),
    ],
)
def test_tokens_that_cannot_tell_labels_apart(tokens: dict[str, object], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        csft(**tokens)
