"""The load-balancing loss of a mixture of experts: without it, routers come to send most tokens to few experts."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halos.checks import is_number
from halos.metrics import Mean
from halos.processes.collectives import all_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halos.data.batches.batch import Batch, Chunk

log = logging.getLogger(__name__)

KEY = "model.router_loss"


def check_router_loss(setting: str | float) -> None:
    """Raise ``ValueError`` unless the setting is ``auto`` or a number of 0 or more."""
    if setting != "auto" and not (is_number(setting) and 0 <= setting < math.inf):
        raise ValueError(f"{KEY}: expected auto, or a coefficient of 0 (off) or more, found {setting!r}")


@dataclass(frozen=True, slots=True)
class RouterLoss:
    """E · Σ_i f_i · P_i over E experts (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6), as transformers has it.

    f_i is the share of tokens that chose expert i, without gradient, and P_i the mean of the routers' probabilities
    for it, both over the tokens of all layers. Perfect balance gives the number of experts per token.

    The tokens are those of the policy's trained sequences: every prompt and completion without its last token, once
    for each completion, however rows are padded, packed or share prompts. Padding, KTO's mismatched completions and
    the reference do not count.

    A product of two means is not a sum over micro-batches. So f and P are those of a micro-step, on all ranks, and the
    loss of a step is the mean over its micro-steps, weighted by their examples: the division over ranks changes
    nothing, but accumulated micro-batches differ slightly from one large batch, as with KTO's reference point. Weights
    of examples count only in that mean over micro-steps; in f and P every token counts once.

    Attributes:
        coefficient: factor of the loss, above 0.
        experts_per_token: the number of experts that each token chooses.
    """

    coefficient: float
    experts_per_token: int

    def terms(self, load: Tensor, batch: Batch) -> tuple[Mean, Mean]:
        """Return the loss term of one rank's micro-batch, and the loss without its coefficient, to be logged.

        All ranks call this together.

        Args:
            load: the sum of :func:`expert_load` over the micro-batch, [2, E].
            batch: the micro-batch.
        """
        chosen, probabilities = load
        weight = chosen.new_full((), float(len(batch))) if batch.weights is None else batch.weights.sum().to(chosen)
        total = all_sum(torch.cat([chosen, weight[None]]))
        chosen, examples = total[:-1], total[-1]
        tokens = chosen.sum() / self.experts_per_token
        balance = len(chosen) * (chosen / tokens) @ (probabilities / tokens)
        return (
            Mean(self.coefficient * examples * balance, weight, batch.step.examples),
            Mean(examples * balance.detach(), weight),
        )


def find_router_loss(model: PreTrainedModel, setting: str | float) -> RouterLoss | None:
    """Return the router loss that the setting means for this model, or None.

    Args:
        model: a causal language model.
        setting: a coefficient, where 0 means none, or ``auto``: the model's config decides by ``output_router_logits``
            and ``router_aux_loss_coef``.

    Raises:
        ValueError: a coefficient for a model for which transformers has no such loss.
    """
    check_router_loss(setting)
    config = model.config.get_text_config()
    wanted = getattr(config, "output_router_logits", False) if setting == "auto" else setting
    if not wanted:
        return None
    # Mixtures that balance their routers in other ways, such as DeepSeek-V3, come without this function.
    if not hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func"):
        message = f"{KEY}: expected 0 for {type(model).__name__}, which has no load-balancing loss in transformers"
        if setting != "auto":
            raise ValueError(f"{message}, found {setting}")
        log.warning("%s, found output_router_logits=true in its config, which is ignored", message)
        return None
    coefficient = _setting(model, "router_aux_loss_coef", "aux_loss_coef") if setting == "auto" else float(setting)
    return RouterLoss(coefficient, int(_setting(model, "num_experts_per_tok"))) if coefficient else None


def _setting(model: PreTrainedModel, *names: str) -> float:
    # Models copy these from their config, in which some architectures have them at other places.
    places = (model, model.config.get_text_config())
    values = [getattr(place, name, None) for place in places for name in names]
    return next(float(value) for value in values if value is not None)


def expert_load(router_logits: Sequence[Tensor], weights: Tensor, experts_per_token: int) -> Tensor:
    """Return how many tokens chose each expert, and the sum of the probabilities for it, over all layers, [2, E].

    Args:
        router_logits: for each layer, the logits of N tokens [N, E].
        weights: how often each token counts, [N].
        experts_per_token: the number of experts that each token chooses.
    """
    loads = []
    for logits in router_logits:
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        chosen = probabilities.detach().topk(experts_per_token).indices
        counts = torch.zeros_like(probabilities).scatter(1, chosen, 1.0)
        weight = weights.to(probabilities)
        loads.append(torch.stack([weight @ counts, weight @ probabilities]))
    return torch.stack(loads).sum(0)


def padded_weights(chunk: Chunk) -> Tensor:
    """Return 1 for each token of a padded chunk and 0 for padding, [n · T]."""
    ends = torch.zeros_like(chunk.input_ids).flatten()
    ends[chunk.predicts if chunk.last is None else torch.cat([chunk.predicts, chunk.last])] = 1
    return ends.view_as(chunk.input_ids).flip(1).cummax(1).values.flip(1).flatten()
