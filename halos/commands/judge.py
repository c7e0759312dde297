"""Builds the judge that a ``judge`` node of the configuration names."""

from functools import partial
from typing import Any

from omegaconf import DictConfig

from halos import terminal
from halos.config.nodes import build, class_of
from halos.config.signatures import accepted_names
from halos.data.sources.base import Source
from halos.judges.base import CompletionJudge


def make_judge(
    node: DictConfig | None, source: Source, *, device: str, precision: str, progress: bool
) -> CompletionJudge:
    """Build a judge and check it without loading weights.

    Args:
        node: the class (``_target_``) and its parameters.
        source: the data source. Its true reward is passed to a judge whose constructor takes ``true_reward``.
        device: the device, passed to a judge whose constructor takes ``device``.
        precision: the number type, such as ``32-true``, passed to a judge whose constructor takes ``precision``.
        progress: whether a judge whose constructor takes ``track`` shows a bar over its requests.

    Raises:
        ValueError: there is no node, or the class cannot be imported, is not a judge, or lacks something that it needs.
    """
    if node is None:
        raise ValueError("judge: expected judge=truth, judge=reward_model or judge=chat, found none")
    judge_class = class_of("judge", node._target_, CompletionJudge)
    # Arguments that a YAML node cannot hold, for judges that take them. Checking for classes would import torch.
    offered: dict[str, Any] = {
        "true_reward": source.true_reward(),
        "device": device,
        "precision": precision,
        "track": partial(terminal.track, "asking the judge", shown=progress),
    }
    taken = set(accepted_names(judge_class) or ()) - set(node)
    extra: dict[str, Any] = {name: value for name, value in offered.items() if name in taken}
    judge: CompletionJudge = build(node, **extra)
    judge.check()
    return judge
