"""A moving reference: TR-DPO's (Gorbatovski et al. 2024, arXiv 2404.09656), or a BEMA of the policy (2508.00180)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from halos.checks import check_number, check_share, check_whole, is_number
from halos.config.combinations import REFERENCE, check_combinations
from halos.objectives.base import Objective
from halos.sharding.sharding import full_state, load_full_state
from halos.training.record import State


class ReferenceSync(Callback):
    """Moves the weights of the reference every τ optimizer steps: π_ref ← α π_θ + (1 − α) π_ref.

    α = 1 is TR-DPO's hard update, τ = 1 with a small α an exponential moving average of the policy. BEMA (Block and
    Zhang 2025) lets α fall with the optimizer step t, and corrects the average's lag behind the policy:

        EMA ← α_t θ + (1 − α_t) EMA, α_t = (ρ + t)^−κ;
        π_ref ← EMA + (ρ + t)^−η (θ − θ_0), θ_0 the policy before its first step.

    From the first update on, checkpoints also hold the reference, because no other file has it any more. With η they
    also hold EMA and θ_0. These two copies of the weights are in memory as well.

    Args:
        every: τ, optimizer steps between updates.
        alpha: α in (0, 1].
        ema_power: κ, above 0; None: α stays ``alpha``.
        bias_power: η, above 0; None: no correction.
        lag: ρ, 1 or more.

    Raises:
        ValueError: a value is outside of its range.
    """

    def __init__(
        self,
        *,
        every: int,
        alpha: float = 0.6,
        ema_power: float | None = None,
        bias_power: float | None = None,
        lag: float = 10.0,
    ) -> None:
        check_whole("reference_sync.every", every, 1)
        check_share("reference_sync.alpha", alpha)
        for name, power in (("ema_power", ema_power), ("bias_power", bias_power)):
            if not (power is None or (is_number(power) and 0 < power < math.inf)):
                raise ValueError(f"reference_sync.{name}: expected a number above 0 or null, found {power!r}")
        check_number("reference_sync.lag", lag, 1.0)
        self.every, self.alpha, self.lag = every, float(alpha), float(lag)
        self.ema_power, self.bias_power = ema_power, bias_power
        self.synced_at = 0
        self._start: list[torch.Tensor] = []
        self._average: list[torch.Tensor] = []
        self._objective: Objective | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(pl_module, Objective):
            check_combinations({"reference_sync.every": self.every, REFERENCE: pl_module.needs.reference})
            self._objective = pl_module

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.bias_power is None or self._start:  # a resumed run has them from its checkpoint
            return
        _, policy, sharded = self._models()
        if sharded:
            raise ValueError("reference_sync.bias_power: expected null where weights are sharded, found a number")
        self._start = [weight.detach().clone() for weight in policy.parameters()]
        self._average = [weight.clone() for weight in self._start]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        step = trainer.global_step
        # Called after every micro-batch; all micro-batches of an optimizer step see the same number.
        if step != self.synced_at and step % self.every == 0:
            self._move(step)
            self.synced_at = step

    @torch.no_grad()
    def _move(self, step: int) -> None:
        reference, policy, _ = self._models()
        alpha = self.alpha if self.ema_power is None else (self.lag + step) ** -self.ema_power
        if self.bias_power is None:
            for reference_weight, policy_weight in zip(reference.parameters(), policy.parameters(), strict=True):
                reference_weight.lerp_(policy_weight, alpha)
            return
        correction = (self.lag + step) ** -self.bias_power
        weights = zip(reference.parameters(), policy.parameters(), self._average, self._start, strict=True)
        for reference_weight, policy_weight, average, start in weights:
            average.lerp_(policy_weight, alpha)
            reference_weight.copy_(average + correction * (policy_weight - start))

    def state_dict(self) -> State:
        # A reference that has not moved yet is in the files that the run started from.
        weights: Mapping[str, torch.Tensor] = {}
        if self.synced_at:
            reference, _, sharded = self._models()
            weights = full_state(reference) if sharded else reference.state_dict()
        state: State = {"synced_at": self.synced_at, "reference": dict(weights)}
        return state | {"start": self._start, "average": self._average} if self._start else state

    def load_state_dict(self, state: State) -> None:
        self.synced_at = state["synced_at"]
        # The policy is on its device by then, so its first weight has this device.
        self._start, self._average = (self._on_device(state.get(name, [])) for name in ("start", "average"))
        if self.synced_at:
            reference, _, sharded = self._models()
            load = partial(load_full_state, reference) if sharded else reference.load_state_dict
            load(state["reference"])

    def _on_device(self, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        return [weight.to(next(self._models()[1].parameters()).device) for weight in weights]

    def _models(self) -> tuple[nn.Module, nn.Module, bool]:
        """The reference, the policy, and whether they are sharded."""
        backbone = self._objective.trained if self._objective is not None else None
        if backbone is None or backbone.reference is None:
            expected = "a live reference model, found none; set model.reference=live"
            raise ValueError(f"reference_sync.every: expected {expected}")
        return backbone.reference, backbone.policy, backbone.sharded
