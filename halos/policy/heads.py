"""The critic of offline PPO."""

from __future__ import annotations

from torch import Tensor, nn


class ValueHead(nn.Module):
    """V(s_t) = wᵀ h_t + b on detached states: fitting the values never moves the policy. Starts at zero."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values [...] in float32 (or float64) of states [..., H]."""
        values = self.linear(hidden.detach().to(self.linear.weight.dtype)).squeeze(-1)
        return values if values.dtype.itemsize > 4 else values.float()


class RewardHead(nn.Module):
    """s = wᵀ h on states with gradient, without a bias, as transformers' sequence classifiers. Starts at zero."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores [...] in float32 (or float64) of states [..., H]."""
        scores = self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1)
        return scores if scores.dtype.itemsize > 4 else scores.float()
