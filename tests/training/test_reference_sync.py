"""A reference that moves towards the policy."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from halos.objectives import DPO, SFT
from halos.training.reference_sync import ReferenceSync
from tests.loop_runs import InOrder, objective_of, rows_for, trainer_for


class Watch(Callback):
    """Weights of policy and reference after each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        parts = (module.trained.policy, module.trained.reference)
        self.seen.append(tuple(torch.cat([p.detach().flatten() for p in part.parameters()]) for part in parts))  # type: ignore[arg-type]


def run(sync: ReferenceSync, *, accumulate: int = 1) -> list[tuple[Tensor, Tensor]]:
    watch = Watch()
    objective, rows = objective_of(DPO), rows_for(DPO, 24)
    trainer = trainer_for(sync, watch, accumulate_grad_batches=accumulate)
    trainer.fit(objective, datamodule=InOrder(rows, batch_size=4 // accumulate))
    return watch.seen[accumulate - 1 :: accumulate]


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_so_many_steps_the_reference_moves_part_of_the_way(alpha: float, accumulate: int) -> None:
    seen = run(ReferenceSync(every=2, alpha=alpha), accumulate=accumulate)
    assert len(seen) == 6
    before = seen[0][1]
    for step, (policy, reference) in enumerate(seen, start=1):
        expected = alpha * policy + (1 - alpha) * before if step % 2 == 0 else before
        torch.testing.assert_close(reference, expected, rtol=1e-12, atol=1e-14)
        assert not torch.equal(policy, reference) or alpha == 1.0
        before = reference
    assert not torch.equal(seen[0][1], seen[-1][1])


@pytest.mark.parametrize("ema_power", [None, 0.5])
@pytest.mark.parametrize("bias_power", [None, 0.2])
def test_bema_by_hand(ema_power: float | None, bias_power: float | None) -> None:
    seen = run(ReferenceSync(every=2, alpha=0.25, ema_power=ema_power, bias_power=bias_power, lag=3))
    start = average = expected = run(ReferenceSync(every=9))[0][1]  # the reference before it moves is the first policy
    for step, (policy, reference) in enumerate(seen, start=1):
        if step % 2 == 0:
            alpha = 0.25 if ema_power is None else 1 / (3 + step) ** ema_power
            average = alpha * policy + (1 - alpha) * average
            correction = 0.0 if bias_power is None else 1 / (3 + step) ** bias_power
            expected = average + correction * (policy - start)
        torch.testing.assert_close(reference, expected, rtol=1e-12, atol=1e-14)
    assert not torch.equal(start, expected)


def test_bema_goes_on_from_its_state() -> None:
    """The average and the first policy are in the state, with which a new callback moves on as the old one would."""
    first, objective = ReferenceSync(every=1, ema_power=0.5, bias_power=0.2), objective_of(DPO)
    trainer_for(first).fit(objective, datamodule=InOrder(rows_for(DPO, 8), batch_size=4))
    second = ReferenceSync(every=1, ema_power=0.5, bias_power=0.2)
    second.setup(None, objective, "fit")
    second.load_state_dict(deepcopy(first.state_dict()))
    second.on_train_start(None, objective)
    found = []
    for sync in (first, second):
        sync._move(7)
        found.append([weight.clone() for weight in objective.trained.reference.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_reference_stays_frozen_and_out_of_the_optimizer() -> None:
    sync = ReferenceSync(every=1)
    objective = objective_of(DPO)
    trainer_for(sync).fit(objective, datamodule=InOrder(rows_for(DPO, 8), batch_size=4))
    assert not any(p.requires_grad for p in objective.trained.reference.parameters())
    assert not any("reference" in name for name in objective.state_dict())


def test_nothing_is_kept_before_the_first_update() -> None:
    sync = ReferenceSync(every=9)
    trainer_for(sync).fit(objective_of(DPO), datamodule=InOrder(rows_for(DPO, 8), batch_size=4))
    assert sync.state_dict() == {"synced_at": 0, "reference": {}}


def test_an_objective_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reference_sync\.every: expected 0, or a loss with a reference"):
        trainer_for(ReferenceSync(every=1)).fit(objective_of(SFT), datamodule=InOrder(rows_for(SFT, 4), batch_size=4))


def test_a_reference_that_is_no_live_model_is_refused() -> None:
    sync, objective = ReferenceSync(every=1), objective_of(DPO)
    objective.configure_model()
    objective.trained._reference = ()
    sync.setup(None, objective, "fit")
    with pytest.raises(ValueError, match=r"reference_sync\.every: expected a live reference model"):
        sync._move(1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, r"reference_sync\.every: expected a whole number from 1 on, found 0"),
        ({"every": 1.5}, r"reference_sync\.every: .* found 1\.5"),
        ({"every": True}, r"reference_sync\.every: .* found True"),
        ({"every": 1, "alpha": 0.0}, r"reference_sync\.alpha: expected a share in \(0, 1\], found 0\.0"),
        ({"every": 1, "alpha": 1.1}, r"reference_sync\.alpha: .* found 1\.1"),
        ({"every": 1, "alpha": True}, r"reference_sync\.alpha: .* found True"),
        ({"every": 1, "ema_power": 0}, r"reference_sync\.ema_power: expected a number above 0 or null, found 0"),
        ({"every": 1, "bias_power": -1.0}, r"reference_sync\.bias_power: expected a number above 0 or null"),
        ({"every": 1, "lag": 0.5}, r"reference_sync\.lag: expected a number from 1 on, found 0\.5"),
    ],
)
def test_parameters_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ReferenceSync(**options)


def test_alpha_may_be_1() -> None:
    assert ReferenceSync(every=1, alpha=1).alpha == 1.0
