"""The plain loop computes the same losses and gradients as ours."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from benchmarks import plain
from halos.data.batches.collate import collate
from halos.objectives import DPO, KTO
from halos.policy.backbone import Backbone
from halos.testing.examples import loss_of
from tests import tiny


@pytest.mark.parametrize("seed", [0, 1, 3])  # z₀ is 0 with the first two and above 0 with the last
@pytest.mark.parametrize(("name", "make"), [("kto", KTO), ("dpo", DPO)])
def test_loss_and_gradient_are_those_of_ours(name: str, make: type, seed: int) -> None:
    backbone = Backbone(tiny.model(seed=seed), with_reference=True, head_chunk=4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in backbone.policy.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    rows = tiny.rows(6, branches=2, seed=seed)
    if name == "dpo":
        rows = [replace(row, desirable=None) for row in rows]
    policy, reference = deepcopy(backbone.policy), deepcopy(backbone.reference)
    objective = make(backbone)
    objective.configure_model()
    ours = loss_of(objective.compute_batch(collate(rows, mismatched=objective.needs.mismatched, packing=True))[0])
    ours.backward()
    theirs = plain.loss_of(name)(policy, reference, rows)
    theirs.backward()
    assert abs(theirs.item() - {"kto": 0.5, "dpo": 0.6931}[name]) > 1e-3
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    for one, other in zip(policy.parameters(), backbone.policy.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-5)


def test_padding_is_not_scored() -> None:
    rows = tiny.rows(3, branches=2)
    ids, attended, scored = plain.pad(rows, 1)
    assert scored.sum(1).tolist() == [len(row.branches[1]) for row in rows]
    assert attended.sum(1).tolist() == [len(row.prompt + row.branches[1]) for row in rows]
    assert ids[0][scored[0]].tolist() == list(rows[0].branches[1])
    assert ids.shape[1] == int(attended.sum(1).max())
