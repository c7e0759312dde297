"""WPO's weights of completions (Zhou et al. 2024, arXiv 2406.11827)."""

from __future__ import annotations

from torch import Tensor, nn

from halos.policy.logprobs.completions import LogProbs


class PolicyWeights(nn.Module):
    """How probable each completion is under the policy, against the policy's own samples; without gradient.

    w(x, y) = exp(1/|y| Σ_t [log π_θ(y_t|x, y_<t) − log Σ_v π_θ(v|x, y_<t)²]), equation 2 of the paper with its sampled
    alignment: a completion whose tokens are as probable as those that the policy draws has a weight of about 1.
    It is a module without weights of its own, so that the conformance kit can hold its result fixed.
    """

    def forward(self, policy: LogProbs) -> Tensor:
        """Return the weight of each completion, [B, K]."""
        assert policy.log_collision is not None  # needs.log_collision
        aligned = (policy.tokens.detach() - policy.log_collision).sum(-1)
        return (aligned / policy.count).exp()
