"""Policy and reference models, and the log-probs of completions under them."""

from halos.policy.backbone import Backbone
from halos.policy.loading import ModelSpec
from halos.policy.logprobs.completions import LogProbs, completion_logprobs

__all__ = ["Backbone", "LogProbs", "ModelSpec", "completion_logprobs"]
