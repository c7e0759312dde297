"""Bradley-Terry reward models."""

import math
from typing import Any

import pytest
import torch

from halos.data.batches.collate import collate
from halos.objectives import BradleyTerry, bradley_terry_loss
from halos.policy.backbone import Backbone
from halos.testing.examples import evaluate, make_inputs, make_objective, tiny_rows
from tests import tiny

SCORES = [(2.0, 0.5), (-1.0, 1.5), (0.3, 0.3)]
CHOSEN, REJECTED = (torch.tensor(side, dtype=torch.float64) for side in zip(*SCORES, strict=True))


def test_the_loss_by_hand() -> None:
    """Minus the log of the share of the chosen's strength in both strengths."""
    expected = [-math.log(math.exp(w) / (math.exp(w) + math.exp(r))) for w, r in SCORES]
    found = bradley_terry_loss(CHOSEN, REJECTED)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


def test_a_margin_and_centring_by_hand() -> None:
    margins = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    expected = [
        math.log(1 + math.exp(r - w + m)) + 0.3 * (w * w + 2 * w * r + r * r)
        for (w, r), m in zip(SCORES, margins.tolist(), strict=True)
    ]
    found = bradley_terry_loss(CHOSEN, REJECTED, margin=margins, centring=0.3)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


def test_the_module_passes_margins_and_centring_on() -> None:
    objective = make_objective(BradleyTerry, margin_weight=0.5, centring=0.1)
    rows = tiny_rows(objective, 3)
    output = evaluate(objective, make_inputs(objective, rows)).output
    margins = 0.5 * torch.tensor([row.margin for row in rows], dtype=torch.float64)
    losses = bradley_terry_loss(*output.rewards.detach().unbind(1), margin=margins, centring=0.1)
    assert float(output.loss["bradley_terry"].total.detach()) == pytest.approx(float(losses.sum()), rel=1e-13)


def test_gradients() -> None:
    inputs = (CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_())
    assert torch.autograd.gradcheck(bradley_terry_loss, inputs)


def reward_model(**overrides: Any) -> BradleyTerry:
    objective = BradleyTerry(Backbone(tiny.model(**overrides), with_reference=False))
    objective.configure_model()
    return objective.double()


def test_it_starts_undecided() -> None:
    objective, batch = reward_model(), collate(tiny.rows(4, branches=2), last_hidden=True)
    output = objective.compute(batch, objective.trained.logprobs(batch), None)
    assert (output.rewards == 0).all()
    term = output.loss["bradley_terry"]
    assert float(term.total / term.step_count) == pytest.approx(math.log(2), rel=1e-14)


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_score_is_read_at_the_last_token_of_each_completion(chunks: int) -> None:
    """Each sequence alone through the model, without padding."""
    objective, rows = reward_model(), tiny.rows(5, branches=2)
    with torch.no_grad():
        objective.reward_head.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    batch = collate(rows, last_hidden=True, chunks=chunks)
    scores = objective.compute(batch, objective.trained.logprobs(batch), None).rewards
    weight = objective.reward_head.linear.weight[0]
    for b, row in enumerate(rows):
        for k, branch in enumerate(row.branches):
            states = objective.trained.policy.model(torch.tensor([row.prompt + branch])).last_hidden_state
            torch.testing.assert_close(scores[b, k], states[0, -1] @ weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_the_backbone_learns_and_an_lm_head_of_its_own_does_not(tied: bool) -> None:
    objective, batch = reward_model(tie_word_embeddings=tied), collate(tiny.rows(4, branches=2), last_hidden=True)
    with torch.no_grad():
        objective.reward_head.linear.weight.fill_(0.1)
    objective.compute(batch, objective.trained.logprobs(batch), None).loss["bradley_terry"].total.backward()
    without = [name for name, p in objective.named_parameters() if p.grad is None]
    assert without == ([] if tied else ["backbone.policy.lm_head.weight"])
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


def test_a_model_without_a_classifier_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config("llama")
    policy = tiny.model()
    monkeypatch.setattr(type(config), "model_type", "unheard_of")
    monkeypatch.setattr("transformers.AutoModelForSequenceClassification._model_mapping", {})
    objective = BradleyTerry(Backbone(policy, with_reference=False))
    with pytest.raises(ValueError, match=r"model\.path: a reward model .* unheard_of has none with a linear score"):
        objective.configure_model()
