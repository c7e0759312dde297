"""From a ``judge`` node of the configuration to a judge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig

from halos.config.building import build
from halos.data.sources.base import Source
from halos.judges.base import CompletionJudge
from halos.judges.chat import ChatJudge
from halos.judges.reward_model import RewardModel
from halos.judges.truth import TruthJudge

Track = Callable[[Sequence[Any]], Iterable[Any]]


def make_judge(node: DictConfig, source: Source, *, device: str, precision: str, track: Track) -> CompletionJudge:
    """The judge that the node names. Raises ``ValueError`` if it is none, or lacks what it needs."""
    try:
        kind = get_class(node._target_)
    except Exception as error:  # Hydra raises several kinds
        raise ValueError(f"judge._target_: {node._target_} could not be imported: {error}") from error
    if not issubclass(kind, CompletionJudge):
        raise ValueError(f"judge._target_: expected a subclass of CompletionJudge, found {node._target_}")
    given: dict[str, Any] = {}
    if issubclass(kind, TruthJudge):
        given = {"judge": source.true_reward()}
    elif issubclass(kind, RewardModel):
        given = {"device": device, "precision": precision}
    elif issubclass(kind, ChatJudge):
        given = {"track": track}
    judge: CompletionJudge = build(node, **given)
    judge.check()
    return judge
