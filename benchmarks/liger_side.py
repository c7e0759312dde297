"""The plain loop with Liger's fused losses, which take states of the last layer and never keep a whole batch's logits.

Earlier versions of TRL offered these losses. They are called without torch.compile, because compilation would take
longer than the runs that are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain import BETA, Loss, logprobs, pad, pad_both
from halos.data.rows.token_rows import Row

IGNORED = -100


def installed() -> bool:
    """Whether Liger's losses can be imported; they need Triton, also on a CPU."""
    return find_spec("liger_kernel") is not None and find_spec("triton") is not None


def loss_of(name: str) -> Loss:
    """The loss of that name."""
    return {"kto": kto, "dpo": dpo}[name]


def dpo(policy: Any, reference: Any, rows: Sequence[Row]) -> Tensor:
    """DPO. Liger computes one pair at a time, from the states to the loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    ids, attended, scored = pad_both(rows)
    states, ref_states = _states(policy, reference, ids, attended)
    head = LigerFusedLinearDPOLoss(beta=BETA, compiled=False)
    loss: Tensor = head(_weight(policy), states, _labels(ids, scored), None, ref_states, _weight(reference))[0]
    return loss


def kto(policy: Any, reference: Any, rows: Sequence[Row]) -> Tensor:
    """KTO with the z₀ of the plain loop, because Liger's loss takes z₀ as an argument."""
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    ids, attended, scored = pad(rows, 0)
    other = pad(rows, 1)
    with torch.no_grad():
        z0 = (logprobs(policy, *other) - logprobs(reference, *other)).mean().clamp(min=0)
    states, ref_states = _states(policy, reference, ids, attended)
    desirable = torch.tensor([bool(row.desirable) for row in rows])
    head = LigerFusedLinearKTOLoss(beta=BETA, compiled=False, use_ref_model=True)
    labels = _labels(ids, scored)
    loss: Tensor = head(states, _weight(policy), labels, None, desirable, ref_states, _weight(reference), None, z0)[0]
    return loss


def _states(policy: Any, reference: Any, ids: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    def read(model: Any) -> Tensor:
        states: Tensor = model.model(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state
        return states[:, :-1]

    with torch.no_grad():
        expected = read(reference)
    return read(policy), expected


def _labels(ids: Tensor, scored: Tensor) -> Tensor:
    return ids.masked_fill(~scored, IGNORED)[:, 1:]


def _weight(model: Any) -> Tensor:
    weight: Tensor = model.get_output_embeddings().weight
    return weight
