"""The chunks of the LM head on a GPU that is only estimated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from halos.policy.logprobs.head import lm_head
from halos.policy.logprobs.head_rows import AUTO, rows_that_fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halos.estimation.step import Plan


def rows_on(plan: Plan, policy: PreTrainedModel) -> int | str | None:
    """Return ``model.head_chunk``, with ``auto`` replaced by the rows that it stands for on the plan's GPU.

    Args:
        plan: the run.
        policy: the model, without values. Before the first step a GPU holds it and, with ``model.reference=live``, its
            copy.
    """
    spec, division = plan.spec, plan.division
    if spec.head_chunk != AUTO:
        return spec.head_chunk
    copies = 2 if spec.reference == "live" else 1
    held = 0 if division.offload else copies * sum(p.nbytes for p in policy.parameters()) / division.shards
    free = max(plan.gpu.gib * 2**30 - held, 0)
    return rows_that_fit(free, lm_head(policy).weight.shape[0], 4 if plan.precision == "32-true" else 2)
