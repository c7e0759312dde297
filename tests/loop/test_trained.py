"""Where training starts, what it moves, what it leaves alone and what is saved."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from halos.data.batches.collate import collate
from halos.objectives import (
    AOT,
    BCO,
    DPO,
    EXO,
    FDPO,
    GRPO,
    IPO,
    KTO,
    NCA,
    PPO,
    SFT,
    SPPO,
    APODown,
    APOZero,
    BCOPair,
    BradleyTerry,
    EXORewards,
    Hinge,
    InfoNCA,
    Mix,
    NCAPair,
    Objective,
    RobustDPO,
)
from halos.optim import AdamW
from halos.policy.backbone import Backbone
from tests import tiny
from tests.loop_runs import OBJECTIVES, REQUIRED, WITH_REFERENCE, evaluate, fit, objective_of, rows_for, tiny_backbone


@pytest.mark.parametrize(
    ("kind", "parameters", "labels", "loss"),
    [
        (DPO, {}, None, math.log(2)),
        (DPO, {"beta": 0.7, "label_smoothing": 0.2}, None, math.log(2)),
        (KTO, {}, None, 0.5),
        (KTO, {"desirable_weight": 1.5, "undesirable_weight": 0.5}, [True, False, True, True], 0.5 * 5 / 4),
        (KTO, {"desirable_weight": 1.5}, [True] * 4, 0.75),
        (KTO, {"undesirable_weight": 0.5}, [False] * 4, 0.25),
        (KTO, {"reference_point": "zero"}, None, 0.5),
        (RobustDPO, {"label_smoothing": 0.2}, None, math.log(2)),
        (IPO, {"beta": 0.5}, None, 1.0),
        (APOZero, {}, None, 1.0),
        (APODown, {}, None, 1.0),
        (BCO, {}, None, math.log(2)),
        (AOT, {}, None, math.log(2)),
        (BCOPair, {}, None, 2 * math.log(2)),
        (EXO, {"label_smoothing": 0.25}, None, 0.5 * math.log(4 / 3)),
        (EXORewards, {"alpha": 1e9}, None, 0.0),
        (FDPO, {}, None, math.log(2)),
        (Hinge, {}, None, 1.0),
        (NCAPair, {}, None, 2 * math.log(2)),
        (NCA, {}, None, 2 * math.log(2)),
        # Groups of three and of one: −log 1/3 and −log 1.
        (InfoNCA, {}, None, 0.75 * math.log(3)),
        (SPPO, {"beta": 0.5}, None, 2.0),
        (GRPO, {}, [True, False, True, False], 0.0),
        (Mix, {}, None, 0.5 + 0.5 * math.log(2)),
    ],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_at_step_0_the_policy_equals_the_reference(
    kind: type[Objective], parameters: dict[str, Any], labels: list[bool] | None, loss: float, precision: str
) -> None:
    rows = rows_for(kind, 4, labels=labels)
    (first,) = fit(objective_of(kind, **parameters), rows, batch_size=4, precision=precision).steps
    assert first["train/loss"] == pytest.approx(loss, abs=1e-6)
    rewards = [name for name in ("train/rewards/chosen", "train/rewards/rejected", "train/z0/raw") if name in first]
    assert rewards
    assert [first[name] for name in rewards] == [0.0] * len(rewards)


def test_labels_are_counted_before_the_first_step() -> None:
    objective = objective_of(KTO, desirable_weight="auto", undesirable_weight="auto")
    rows = rows_for(KTO, 4, labels=[True, False, False, False])
    run = fit(objective, rows, batch_size=4, label_counts=(100, 300))
    assert run.losses[0] == pytest.approx(0.5 * (3 + 1 + 1 + 1) / 4, abs=1e-6)


def test_dropout_depends_on_the_seed_and_on_nothing_before() -> None:
    rows = rows_for(SFT, 8)

    def losses(seed: int, before: int) -> list[float]:
        torch.manual_seed(before)
        return fit(objective_of(SFT, dropout=0.5, seed=seed), rows, batch_size=4).losses

    assert losses(0, before=1) == losses(0, before=2)
    assert losses(0, before=1) != losses(1, before=1)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_reference_and_the_metrics_are_in_no_checkpoint_and_no_optimizer(kind: type[Objective]) -> None:
    objective = objective_of(kind)
    fit(objective, rows_for(kind, 4), batch_size=4, val=rows_for(kind, 4))
    policy = {f"backbone.policy.{name}" for name in objective.backbone.policy.state_dict()}
    own = {
        PPO: {"value_head.linear.weight", "value_head.linear.bias"},
        BCO: {"shift.means", "shift.counts"},
        BCOPair: {"shift.means", "shift.counts"},
        BradleyTerry: {"reward_head.linear.weight"},
        Mix: {"parts.bco.shift.means", "parts.bco.shift.counts"},
    }
    assert objective.state_dict().keys() == policy | own.get(kind, set())
    configured: Any = objective.configure_optimizers()
    (group,) = configured["optimizer"].param_groups
    trained = {name: id(p) for name, p in objective.named_parameters() if p.requires_grad}
    assert {id(p) for p in group["params"]} == set(trained.values())
    assert len(group["params"]) == len(trained)
    frozen = {"backbone.policy.lm_head.weight"} if kind is BradleyTerry else set()
    assert dict(objective.named_parameters()).keys() - trained == frozen


@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_the_reference_stays_and_the_policy_moves(kind: type[Objective]) -> None:
    objective, start = objective_of(kind), tiny_backbone().policy.double().state_dict()
    fit(objective, rows_for(kind, 8), batch_size=4)
    torch.testing.assert_close(dict(objective.backbone.reference.state_dict()), dict(start), rtol=0, atol=0)
    moved = [not torch.equal(weight, start[name]) for name, weight in objective.backbone.policy.state_dict().items()]
    assert all(moved)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_only_some_objectives_need_a_reference(kind: type[Objective]) -> None:
    objective = kind(tiny_backbone(with_reference=False), **REQUIRED.get(kind, {}))
    if kind in WITH_REFERENCE:
        with pytest.raises(ValueError, match="expected a backbone with a reference"):
            fit(objective, rows_for(kind, 2), batch_size=2)
    else:
        fit(objective, rows_for(kind, 2), batch_size=2)
        assert objective.backbone.reference is None


def test_frozen_parameters_stay_out_of_the_optimizer() -> None:
    backbone = tiny_backbone(with_reference=False)
    backbone.policy.model.embed_tokens.requires_grad_(False)
    objective = SFT(backbone, optim=AdamW(lr=1e-2))
    run = fit(objective, rows_for(SFT, 4), batch_size=4)
    start = tiny_backbone().policy.double()
    assert torch.equal(run.weights["backbone.policy.model.embed_tokens.weight"], start.model.embed_tokens.weight)
    assert not torch.equal(run.weights["backbone.policy.lm_head.weight"], start.lm_head.weight)
    configured: Any = objective.configure_optimizers()
    (group,) = configured["optimizer"].param_groups
    assert all(p.requires_grad for p in group["params"])


def test_the_critic_alone_does_not_move_the_policy() -> None:
    objective = objective_of(PPO, moved=0.1)
    batch = collate(rows_for(PPO, 4))
    output = evaluate(objective, batch)
    output.loss["critic"].total.backward()
    assert all(p.grad is None for p in objective.backbone.parameters())
    assert all(p.grad is not None and p.grad.any() for p in objective.value_head.parameters())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_models_are_made_on_the_cpu_whatever_lightnings_default_device(device: str) -> None:
    seen: list[torch.device] = []

    class Loaded(Backbone):
        def make(self, *, reference: bool, sharding: Any) -> Backbone:
            seen.append(torch.empty(0).device)
            return self

    objective = PPO(Loaded(tiny.model(), with_reference=False))
    with torch.device(device):  # as Lightning's strategies call it, with the device that they train on
        objective.configure_model()
    assert seen == [torch.device("cpu")]
    assert {p.device.type for p in objective.parameters()} == {"cpu"}
