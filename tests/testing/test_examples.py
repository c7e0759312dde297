"""The kit's batches, and what it reads from an objective's result."""

from __future__ import annotations

import pytest
import torch

from halos.objectives import CSFT, DPO, KTO, PPO, SFT, Objective
from halos.testing.examples import evaluate, make_inputs, make_objective, tiny_rows


@pytest.mark.parametrize(
    ("kind", "branches", "labels", "scores"),
    [
        (SFT, 1, False, False),
        (CSFT, 1, True, False),
        (KTO, 2, True, False),
        (DPO, 2, False, False),
        (PPO, 1, True, True),
    ],
)
def test_rows_are_those_of_the_view(kind: type[Objective], branches: int, labels: bool, scores: bool) -> None:
    rows = tiny_rows(make_objective(kind), 5)
    assert {len(row.branches) for row in rows} == {branches}
    assert [row.desirable for row in rows] == ([True, False, True, False, True] if labels else [None] * 5)
    assert all((row.score is not None) == scores for row in rows)
    assert [row.group for row in rows] == [0, 0, 1, 1, 2]
    assert rows[0].prompt == rows[1].prompt != rows[2].prompt
    assert len({len(branch) for row in rows for branch in row.branches}) > 1, "ragged"


def test_log_probs_belong_to_examples_not_to_places() -> None:
    objective = make_objective(KTO)
    rows = tiny_rows(objective, 3)
    one, other = make_inputs(objective, rows), make_inputs(objective, [rows[2]], wider=2)
    width = len(rows[2].branches[0])
    assert torch.equal(one.policy.tokens[2, 0, :width], other.policy.tokens[0, 0, :width])
    assert not other.policy.tokens[~other.batch.mask].any()
    assert one.reference is not None
    assert not torch.equal(one.policy.tokens, one.reference.tokens)
    shifted = make_inputs(objective, rows, at_reference=True, shift=0.25)
    assert shifted.reference is not None
    differences = (shifted.policy.tokens - shifted.reference.tokens)[shifted.batch.mask]
    assert torch.allclose(differences, torch.full_like(differences, 0.25), atol=1e-15)


def test_an_answer_is_the_loss_of_the_step_with_a_gradient_for_each_example() -> None:
    objective = make_objective(SFT)
    rows = tiny_rows(objective, 2)
    result = evaluate(objective, make_inputs(objective, rows))
    lengths = [len(row.branches[0]) for row in rows]
    inputs = make_inputs(objective, rows)
    assert float(result.loss) == pytest.approx(-float(inputs.policy.tokens.detach().sum()) / sum(lengths), rel=1e-12)
    for row, length in zip(rows, lengths, strict=True):
        expected = [[-1 / sum(lengths)] * length + [0.0] * (max(lengths) - length)]
        torch.testing.assert_close(result.gradients[row.id], torch.tensor(expected, dtype=torch.float64))
    assert list(result.means) == ["loss/sft"]
    assert result.means["loss/sft"] == pytest.approx((float(result.loss) * sum(lengths), sum(lengths)))


def _places(module: torch.nn.Module) -> set[int]:
    return {weight.data_ptr() for weight in module.parameters()}


def test_objectives_are_made_alike_and_apart() -> None:
    one, other = make_objective(PPO), make_objective(PPO)
    assert isinstance(one, PPO)
    assert isinstance(other, PPO)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not _places(one.value_head) & _places(other.value_head)
    assert all(p.any() for p in one.value_head.parameters())
    # Those that may be trained share nothing with any other.
    moved = make_objective(DPO, moved=True).trained
    for neighbour in (one, make_objective(DPO, moved=True), make_objective(DPO, dtype=torch.float32)):
        assert not _places(moved) & _places(neighbour)
    assert moved.reference is not None
    pairs = zip(moved.policy.parameters(), moved.reference.parameters(), strict=True)
    assert not any(torch.equal(policy, reference) for policy, reference in pairs)
