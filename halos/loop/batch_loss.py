"""The loss of one micro-batch: log-probs of the backbone, the objective's loss of them, and the metrics to log."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, final

import lightning.pytorch as pl

from halos.data.batches.batch import Batch
from halos.loop.feedback_metrics import feedback_metrics
from halos.loop.needs import Needs
from halos.loop.output import Output
from halos.metrics import Mean
from halos.policy.backbone import Backbone
from halos.policy.heads import RewardHead
from halos.policy.logprobs.completions import LogProbs
from halos.policy.pretrained import ProvidesBackbone

LOG_COLLISION = "log_collision"
"""The token statistic that ``needs.log_collision`` needs, by its name in ``model.statistics``."""

BackboneSource = ProvidesBackbone | None
"""A backbone or a factory that loads one; None if a loss is computed but not trained."""


class BatchLoss(pl.LightningModule, ABC):
    """A backbone and its loss on one micro-batch. :class:`.TrainingLoop` adds the steps of training.

    Args:
        backbone: a :class:`Backbone`; a factory that makes one when the strategy is ready; or None if the loss is
            computed but not trained.
    """

    needs: Needs = Needs()
    """What the loss needs. If this depends on parameters, the constructor sets it on the instance."""

    def __init__(self, backbone: BackboneSource = None) -> None:
        super().__init__()
        # Set in set_up_backbone(), because the weights may not exist before.
        self.backbone: Backbone | None = None
        # In a tuple, so that nn.Module does not register the source as a submodule next to `backbone`.
        self._source: tuple[BackboneSource] = (backbone,)

    @abstractmethod
    def compute_clamped(self, batch: Batch, policy: LogProbs, reference: LogProbs | None) -> Output:
        """Return the loss, rewards and metrics of one micro-batch."""

    @abstractmethod
    def build(self, hidden_size: int) -> None:
        """See :class:`halos.objectives.base.Objective`."""

    @abstractmethod
    def control(self, desirable: bool | None) -> str:
        """See :class:`halos.objectives.base.Objective`."""

    @final
    def set_up_backbone(self, sharding: Any) -> None:
        """Make the backbone and the modules outside it. The strategy's sharding, if there is one, divides both."""
        self.backbone = backbone = self.source.make(reference=self.needs.reference, sharding=sharding)
        backbone.control = self.control(True)
        backbone.loss, backbone.paper = type(self).__name__, getattr(self, "paper", None)
        if self.needs.divergence:
            backbone.check_divergence()
        if self.needs.log_collision and LOG_COLLISION not in backbone.statistics:
            backbone.statistics = (*backbone.statistics, LOG_COLLISION)
        self.build(backbone.hidden_size)
        if isinstance(head := getattr(self, "reward_head", None), RewardHead):
            backbone.reward_head = (head,)
        if backbone.sharding is not None:
            backbone.sharding.shard_beside(self)

    @property
    def trained(self) -> Backbone:
        """The backbone in training. Raises ``ValueError`` until :meth:`configure_model` has set it."""
        if self.backbone is None:
            raise ValueError("expected configure_model() to have been called: the objective has no backbone yet")
        return self.backbone

    @property
    def source(self) -> ProvidesBackbone:
        """The backbone or the factory that loads it. Raises ``ValueError`` for an objective without one."""
        (source,) = self._source
        if source is None:
            name = type(self).__name__
            hint = f"pass one to the constructor: {name}(backbone, …)"
            raise ValueError(f"{name}: expected a backbone to train, found none; {hint}")
        return source

    @source.setter
    def source(self, source: ProvidesBackbone) -> None:
        self._source = (source,)

    @final
    def compute_batch(self, batch: Batch) -> tuple[Output, dict[str, Mean]]:
        """The loss's output for one micro-batch, and all metrics to log: loss terms, feedback, the loss's own."""
        hidden, diverge = self.needs.hidden or self.needs.divergence, self.needs.divergence
        policy = self.trained.logprobs(batch, with_hidden=hidden, with_statistics=True, with_load=True)
        reference = self.trained.reference_logprobs(batch, with_hidden=diverge) if self.needs.reference else None
        if diverge and reference is not None:
            policy.divergence = self.trained.divergence(policy, reference)
        if self.needs.log_collision and policy.statistics is not None:
            policy.log_collision = policy.statistics[..., self.trained.statistics.index(LOG_COLLISION)]
        output = self.compute_clamped(batch, policy, reference)
        if policy.load is not None and self.trained.router_loss is not None:
            term, router_loss = self.trained.router_loss.terms(policy.load, batch)
            output.loss = {**output.loss, "router": term}
            output.metrics = {**output.metrics, "router_loss": router_loss}
        metrics = {f"loss/{name}": Mean(term.total, term.count) for name, term in output.loss.items()}
        seen = batch.view(output.view)
        log_ref = None if reference is None else reference.of(seen)
        metrics |= feedback_metrics(seen, policy.of(seen), log_ref, output.rewards, self.trained.statistics)
        return output, metrics | dict(output.metrics)
