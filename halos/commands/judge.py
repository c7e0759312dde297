"""Builds the judge that a ``judge`` node of the configuration names."""

from functools import partial
from typing import Any

from omegaconf import DictConfig

from halos import terminal
from halos.config.nodes import build, class_of
from halos.data.sources.base import Source
from halos.judges.base import CompletionJudge
from halos.judges.chat import ChatJudge
from halos.judges.reward_model import RewardModel
from halos.judges.truth import TruthJudge


def make_judge(
    node: DictConfig | None, source: Source, *, device: str, precision: str, progress: bool
) -> CompletionJudge:
    """Build a judge and check it without loading weights.

    Args:
        node: the class (``_target_``) and its parameters.
        source: the data source; :class:`TruthJudge` asks it for its true reward.
        device: where a reward model computes.
        precision: the number type of a reward model, such as ``32-true``.
        progress: whether a chat judge shows a bar over its requests.

    Raises:
        ValueError: there is no node, the class cannot be imported, is not a judge, or lacks something that it needs.
    """
    if node is None:
        raise ValueError("judge: expected judge=truth, judge=reward_model or judge=chat, found none")
    judge_class = class_of("judge", node._target_, CompletionJudge)
    # Each kind of judge needs something that its YAML node cannot hold.
    extra: dict[str, Any] = {}
    if issubclass(judge_class, TruthJudge):
        extra = {"true_reward": source.true_reward()}
    elif issubclass(judge_class, RewardModel):
        extra = {"device": device, "precision": precision}
    elif issubclass(judge_class, ChatJudge):
        extra = {"track": partial(terminal.track, "asking the judge", shown=progress)}
    judge: CompletionJudge = build(node, **extra)
    judge.check()
    return judge
