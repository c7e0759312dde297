"""Liger's fused losses of ``liger_kernel.chunked_loss``, without their compilation.

A fused loss takes hidden states and the head's weights; the forward of the model is the caller's, here as in a trainer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from liger_kernel.chunked_loss import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)
from torch import Tensor

from parity.referee.subject import Example, Setting, Subject, models, padded, vector

BETA, EPSILON, IGNORED = 0.1, 0.1, -100
TWICE = 2 * math.log(2)
AT_STEP_0 = {
    "sigmoid": math.log(2),
    "hinge": 1.0,
    "exo_pair": (-TWICE - math.log(1 - EPSILON) - math.log(EPSILON)) / 2,
    "nca_pair": TWICE,
    "robust": math.log(2),
    "bco_pair": TWICE,
    "sppo_hard": 2 * (0.5 / BETA) ** 2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": (math.log(2) + 1) / 2,
}
"""The ``loss_type``s of Liger's DPO loss, and their values where all log-ratios are 0."""
NLL = "its NLL term is a mean over the tokens of the batch"


class Liger(Subject):
    """A fused loss; ``options`` are those of its constructor."""

    package = "liger_kernel"

    def __init__(self, name: str, loss_class: Any, parameters: Mapping[str, Sequence[Any]], **changes: Any) -> None:
        self.name, self.loss_class, self.parameters, self.changes = name, loss_class, parameters, changes
        self.view = "labels" if loss_class is LigerFusedLinearKTOLoss else "pairs"

    def measure(self, examples: Sequence[Example], setting: Setting, **parameters: Any) -> Tensor:
        loss = self.loss_class(compiled=False, **parameters)
        policy, reference = models(setting)
        # Pairs are stacked: all chosen completions, then all rejected ones.
        branches = (0, 1) if self.view == "pairs" else (0,)
        rows = [(example.prompt, example.completions[branch]) for branch in branches for example in examples]
        states, target = forward(policy, rows, setting)
        arguments: dict[str, Any] = {"_input": states, "lin_weight": policy.lm_head.weight, "target": target}
        if getattr(loss, "use_ref_model", False):
            arguments |= {"ref_input": forward(reference, rows, setting)[0], "ref_weight": reference.lm_head.weight}
        if self.view == "labels":
            arguments["preference_labels"] = torch.tensor([example.desirable for example in examples])
            arguments["kl"] = z0(policy, reference, examples, setting)
        return vector(loss(**arguments)[0], policy)


def forward(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], setting: Setting) -> tuple[Tensor, Tensor]:
    """Return hidden states [B, T, H] and the next tokens to score [B, T], others ignored."""
    ids, mask, scored = padded(rows, setting, ignored=IGNORED)
    states = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    return states[:, :-1], scored[:, 1:]


def z0(policy: Any, reference: Any, examples: Sequence[Example], setting: Setting) -> Tensor:
    """Return the mean log-ratio of the y', at least 0, which the caller of Liger's KTO computes."""
    rows = [(example.prompt, example.completions[1]) for example in examples]
    sums = []
    for model in (policy, reference):
        with torch.no_grad():
            states, target = forward(model, rows, setting)
            log_probs = (states @ model.lm_head.weight.T).float().log_softmax(-1)
        taken = log_probs.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        sums.append((taken * (target != IGNORED)).sum(-1))
    return (sums[0] - sums[1]).mean().clamp(min=0)


def subjects() -> list[Subject]:
    """Return the fused losses."""
    made: list[Subject] = []
    kto = Liger("KTO", LigerFusedLinearKTOLoss, {"beta": (0.05, 0.3)}, use_ref_model=True)
    kto.at_step_0, kto.batchwise = 0.5, "z₀ is the caller's, here a mean over the batch"
    made.append(kto)
    for loss_type, value in AT_STEP_0.items():
        changes = {"label_smoothing": EPSILON} if loss_type in ("exo_pair", "robust") else {}
        numbers: dict[str, tuple[float, ...]] = {
            "beta": (0.3,), "label_smoothing": (0.3,), "discopop_tau": (0.2,), "alpha": (2.0,),
        }  # fmt: skip
        dpo = Liger(f"DPO, {loss_type}", LigerFusedLinearDPOLoss, numbers, loss_type=loss_type, **changes)
        dpo.at_step_0 = value
        dpo.documented = {
            "label_smoothing": "for robust, exo_pair and cDPO",
            "discopop_tau": "for DiscoPOP",
            "alpha": "of the NLL term, which `compute_nll_loss` adds",
        }
        made.append(dpo)
    numbers = {"beta": (0.05, 0.3), "alpha": (0.5, 2.0), "label_smoothing": (0.05, 0.3)}
    made.append(Liger("CPO", LigerFusedLinearCPOLoss, numbers))
    made.append(Liger("SimPO", LigerFusedLinearSimPOLoss, numbers | {"gamma": (0.1, 1.0)}))
    made.append(Liger("ORPO", LigerFusedLinearORPOLoss, {"beta": (0.05, 0.3)}))
    for subject in made[-3:]:
        subject.batchwise = NLL
    return made
