"""TR-DPO's moving reference (Gorbatovski et al. 2024, arXiv 2404.09656)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from halos.checks import check_share, check_whole
from halos.config.combinations import REFERENCE, check_combinations
from halos.objectives.base import Objective
from halos.sharding.sharding import full_state, load_full_state
from halos.training.record import State


class ReferenceSync(Callback):
    """Moves the weights of the reference every τ optimizer steps: π_ref ← α π_θ + (1 − α) π_ref.

    α = 1 is the paper's hard update. From the first update on checkpoints hold the reference too, because it is in no
    other file any more.

    Args:
        every: τ, optimizer steps between updates.
        alpha: α in (0, 1].

    Raises:
        ValueError: a value outside of these.
    """

    def __init__(self, *, every: int, alpha: float = 0.6) -> None:
        check_whole("reference_sync.every", every, 1)
        check_share("reference_sync.alpha", alpha)
        self.every, self.alpha = every, float(alpha)
        self.synced_at = 0
        self._objective: Objective | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(pl_module, Objective):
            check_combinations({"reference_sync.every": self.every, REFERENCE: pl_module.needs.reference})
            self._objective = pl_module

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        step = trainer.global_step
        # Called after every micro-batch; all micro-batches of an optimizer step see the same number.
        if step != self.synced_at and step % self.every == 0:
            self._move()
            self.synced_at = step

    @torch.no_grad()
    def _move(self) -> None:
        reference, policy, _ = self._models()
        for reference_weight, policy_weight in zip(reference.parameters(), policy.parameters(), strict=True):
            reference_weight.lerp_(policy_weight, self.alpha)

    def state_dict(self) -> State:
        # A reference that has not moved yet is in the files that the run started from.
        weights: Mapping[str, torch.Tensor] = {}
        if self.synced_at:
            reference, _, sharded = self._models()
            weights = full_state(reference) if sharded else reference.state_dict()
        return {"synced_at": self.synced_at, "reference": dict(weights)}

    def load_state_dict(self, state: State) -> None:
        self.synced_at = state["synced_at"]
        if self.synced_at:
            reference, _, sharded = self._models()
            load = partial(load_full_state, reference) if sharded else reference.load_state_dict
            load(state["reference"])

    def _models(self) -> tuple[nn.Module, nn.Module, bool]:
        """The reference, the policy, and whether they are sharded."""
        backbone = self._objective.trained if self._objective is not None else None
        if backbone is None or backbone.reference is None:
            expected = "a live reference model, found none; set model.reference=live"
            raise ValueError(f"reference_sync.every: expected {expected}")
        return backbone.reference, backbone.policy, backbone.sharded
