"""What a loss returns for one micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from halos.metrics import Mean


@dataclass(slots=True)
class Output:
    """What an objective computes from one micro-batch.

    Attributes:
        loss: terms by name, whose sum is the loss. Each carries the denominator of the whole optimizer step: make them
            with ``per_example`` or ``per_token``.
        rewards: the implied rewards (β included) of the view's branches, [B, K], or None if the loss implies none.
        metrics: other means to log, by name.
    """

    loss: Mapping[str, Mean]
    rewards: Tensor | None = None
    metrics: Mapping[str, Mean] = field(default_factory=dict)
