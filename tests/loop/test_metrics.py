"""What a step and a validation report: names, values by hand, and each counted anew."""

from __future__ import annotations

import math
from typing import Any

import pytest

from halos.data.batches.collate import collate
from halos.objectives import (
    BCO,
    CSFT,
    DPO,
    FDPO,
    GRPO,
    HALO,
    IPO,
    KTO,
    PPO,
    SFT,
    BradleyTerry,
    Mix,
    Objective,
)
from halos.optim import AdamW
from tests.loop_runs import WITH_REFERENCE, evaluate, fit, loss_of, objective_of, rows_for, tiny_backbone

REWARDS = {"rewards/chosen", "rewards/rejected", "rewards/margins"}
BINARY = REWARDS | {"log_ratio/chosen", "log_ratio/rejected"}
LOGPS = {"logps/chosen", "logps/rejected"}
MISMATCHED = {"logps/mismatched", "log_ratio/mismatched"}
PAIRS = REWARDS | {"rewards/accuracies"}


@pytest.mark.parametrize(
    ("kind", "names", "val_only"),
    [
        (SFT, {"logps/chosen"}, set()),
        (CSFT, LOGPS, set()),
        (KTO, BINARY | LOGPS | MISMATCHED | {"z0", "z0/raw"}, {"rewards/auc"}),
        (DPO, BINARY | LOGPS | {"rewards/accuracies"}, set()),
        (PPO, BINARY | LOGPS | {"loss/policy", "loss/critic", "loss/kl_penalty"}, {"rewards/auc"}),
        (BCO, BINARY | LOGPS | {"delta"}, {"rewards/auc"}),
        (GRPO, BINARY | LOGPS | {"loss/policy", "loss/kl_penalty", "groups/incomplete"}, {"rewards/auc"}),
        (BradleyTerry, PAIRS | LOGPS, set()),
        (
            Mix,
            BINARY | LOGPS | MISMATCHED | {"loss/kto", "loss/bco", "kto/z0", "kto/z0/raw", "bco/delta"},
            {"rewards/auc"},
        ),
    ],
)
def test_the_names_of_metrics(kind: type[Objective], names: set[str], val_only: set[str]) -> None:
    run = fit(objective_of(kind), rows_for(kind, 4), batch_size=4, val=rows_for(kind, 4))
    of_step = {"grad_norm", "lr", "examples_per_second", "tokens_per_second"}
    assert run.steps[0].keys() == {f"train/{name}" for name in names | of_step | {"loss"}}
    assert run.val.keys() == {f"val/{name}" for name in names | val_only | {"loss"}}


@pytest.mark.parametrize("kind", [kind for kind in WITH_REFERENCE if kind not in (FDPO, IPO, Mix)])
def test_validation_metrics_by_hand(kind: type[Objective]) -> None:
    """Each row alone through policy and reference after the last of several validations, put together in Python."""
    formula: Any = {"value": "logistic"} if kind is HALO else {}  # one that reads β
    objective, val = objective_of(kind, beta=0.25, **formula), rows_for(kind, 11, seed=1)
    run = fit(objective, rows_for(kind, 12), batch_size=4, val=val, val_check_interval=1)
    chosen: list[float] = []
    rejected: list[float] = []
    log_ratios: dict[str, list[float]] = {"chosen": [], "rejected": [], "mismatched": []}
    logps: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for row in val:
        batch = collate([row], mismatched=kind.needs.mismatched)
        sums = objective.backbone.logprobs(batch).sum[0].tolist()
        references = objective.backbone.reference_logprobs(batch).sum[0].tolist()
        for branch, liked in enumerate((True, False) if kind.view == "pairs" else (row.desirable,)):
            side = "chosen" if liked else "rejected"
            log_ratios[side].append(sums[branch] - references[branch])
            (chosen if liked else rejected).append(0.25 * log_ratios[side][-1])
            logps[side].append(sums[branch])
        if kind.needs.mismatched:
            log_ratios["mismatched"].append(sums[1] - references[1])

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values)

    def wins(pairs: list[tuple[float, float]]) -> float:
        return mean([(a > b) + 0.5 * (a == b) for a, b in pairs])

    expected = {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/margins": mean(chosen) - mean(rejected),
        "logps/chosen": mean(logps["chosen"]),
        "logps/rejected": mean(logps["rejected"]),
        **{f"log_ratio/{side}": mean(values) for side, values in log_ratios.items() if values},
    }
    if kind.needs.mismatched:
        expected |= {"z0/raw": mean(log_ratios["mismatched"])}
    if kind.view == "pairs":
        expected["rewards/accuracies"] = wins(list(zip(chosen, rejected, strict=True)))
    else:
        expected["rewards/auc"] = wins([(a, b) for a in chosen for b in rejected])
    assert {name: run.val[f"val/{name}"] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert abs(expected["rewards/margins"]) > 1e-3


def test_a_tie_counts_half() -> None:
    """At step 0 all rewards are equal."""
    pairs = fit(objective_of(DPO), rows_for(DPO, 4), batch_size=4)
    assert pairs.steps[0]["train/rewards/accuracies"] == 0.5
    still = KTO(tiny_backbone(), optim=AdamW(lr=0))
    assert fit(still, rows_for(KTO, 4), batch_size=4, val=rows_for(KTO, 5)).val["val/rewards/auc"] == 0.5


def test_a_side_without_examples_has_no_metrics() -> None:
    (first,) = fit(objective_of(KTO), rows_for(KTO, 2, labels=[False, False]), batch_size=2).steps
    assert "train/rewards/rejected" in first
    assert not first.keys() & {"train/rewards/chosen", "train/logps/chosen", "train/rewards/margins"}


def test_each_step_counts_anew() -> None:
    one, other = rows_for(SFT, 2), rows_for(SFT, 2, seed=1)
    still = SFT(tiny_backbone(with_reference=False), optim=AdamW(lr=0))
    first, second, third = fit(still, one + other + one, batch_size=2).losses
    assert first == third != second


def test_each_validation_counts_anew() -> None:
    objective, val = objective_of(SFT), rows_for(SFT, 4, seed=1)
    run = fit(objective, rows_for(SFT, 6), batch_size=2, val=val, val_check_interval=1)
    assert run.val["val/loss"] == pytest.approx(loss_of(evaluate(objective, collate(val))).item(), rel=1e-6)


def test_the_terms_of_a_loss_add_up() -> None:
    metrics = fit(objective_of(PPO), rows_for(PPO, 8), batch_size=4).steps[1]
    terms = [metrics[f"train/loss/{name}"] for name in ("policy", "critic", "kl_penalty")]
    assert all(terms)
    assert metrics["train/loss"] == pytest.approx(sum(terms), rel=1e-6)
