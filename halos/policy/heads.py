"""Heads on the policy's hidden states: the critic of offline PPO and the score of a reward model."""

from __future__ import annotations

from torch import Tensor, nn


class ValueHead(nn.Module):
    """V(s_t) = wᵀ h_t + b on detached states, so that fitting the values never moves the policy. Starts at zero.

    Args:
        hidden_size: width H of the states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return values [...] of states [..., H], in float32 at least."""
        return _scalars(self.linear, hidden.detach())


class RewardHead(nn.Module):
    """s = wᵀ h on states with gradient, without a bias, as in transformers' sequence classifiers. Starts at zero.

    Args:
        hidden_size: width H of the states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return scores [...] of states [..., H], in float32 at least."""
        return _scalars(self.linear, hidden)


def _scalars(linear: nn.Linear, hidden: Tensor) -> Tensor:
    # Objectives subtract and average these, for which half precision is too coarse; float64 stays.
    scalars: Tensor = linear(hidden.to(linear.weight.dtype)).squeeze(-1)
    return scalars if scalars.dtype.itemsize > 4 else scalars.float()
