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
        view: in a mixture of several views, the index in ``Batch.views`` of the view that the rewards belong to. The
            metrics that all objectives share are computed from its examples.

    Raises:
        ValueError: a term or a metric is a tensor or a number, whose denominator is lost.
    """

    loss: Mapping[str, Mean]
    rewards: Tensor | None = None
    metrics: Mapping[str, Mean] = field(default_factory=dict)
    view: int = 0

    def __post_init__(self) -> None:
        for field_name, made_with in (("loss", "per_example or per_token"), ("metrics", "halos.metrics.Mean")):
            for name, value in getattr(self, field_name).items():
                if not isinstance(value, Mean):
                    raise ValueError(
                        f"Output.{field_name}[{name!r}]: expected a mean made with {made_with}, which keeps its "
                        f"denominator; found {type(value).__name__}"
                    )
