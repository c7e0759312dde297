"""The frozen reference π_ref."""

from __future__ import annotations

import copy

from torch import nn


def frozen_copy(policy: nn.Module) -> nn.Module:
    """A copy of the policy as it is now, in evaluation mode, without gradients: the live reference."""
    return copy.deepcopy(policy).eval().requires_grad_(False)
