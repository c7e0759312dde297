"""State of a loss that goes on from step to step, such as a running mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class RunningState(nn.Module):
    """A module whose buffers stay in float32 or better, whatever the model's precision.

    In bfloat16 a running mean would stop changing after a few hundred updates.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            # From the original tensor: the rounded one has already lost the digits of large counts.
            return tensor.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        super()._apply(at_least_float32, recurse)  # type: ignore[no-untyped-call]
        return self
