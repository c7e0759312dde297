"""The base of every objective: steps, optimizer, reductions and logging. An objective adds only its mathematics."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from halos.data.batches.collate import Batch
from halos.loop.feedback_metrics import feedback_metrics, labelled
from halos.loop.humanline import Humanline
from halos.loop.steps import Step, Steps, complete
from halos.metrics import Averages, LabelledRewards, Mean, auc
from halos.optim import AdamW, Optim
from halos.policy.backbone import Backbone
from halos.policy.logprobs.completions import LogProbs
from halos.processes.collectives import (
    all_gather_list,
    clip_gradients,
    data_ranks,
    full_tensor,
    total_norm,
    use_data_group,
)

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Output:
    """What an objective computes from one micro-batch.

    ``loss``: named terms, added up; each carries the denominator of its whole step. ``rewards`` [B, K]: the implied
    rewards (β included) of the branches that the view holds, if the objective has any. ``metrics``: anything else.
    """

    loss: Mapping[str, Mean]
    rewards: Tensor | None = None
    metrics: Mapping[str, Mean] = field(default_factory=dict)


BackboneSource = Backbone | Callable[[], Backbone]


class Objective(pl.LightningModule, ABC):
    """A loss on a view of human feedback, trained on a :class:`Backbone`.

    Subclasses set the class variables and implement :meth:`compute`; they override no concrete method of this class
    except the hooks :meth:`control`, :meth:`build` and :meth:`see_labels`.

    Args:
        backbone: a :class:`Backbone`, or a function that makes one, called when the strategy is ready.
        optim: the optimizer and its schedule.
        seed: seeds whatever randomness a forward has (dropout).
        humanline: clamps the policy's token log-probs beside the reference's before the loss sees them; the metrics
            that all objectives share stay unclamped.
        non_finite: what a loss or gradient that is not finite does: ``stop`` the run, or ``skip`` the step, which then
            changes neither weights nor the optimizer's moments, and is counted.

    Metrics stay on the device until a step is logged (every ``log_every_n_steps``), a checkpoint is due or training
    ends, so that the host need not wait for every step; a loss that is not finite is found then. ``skip`` reads every
    step.
    """

    # Variables of the class; where they depend on parameters, the constructor sets them on the instance.
    view: str
    """What the objective eats: ``demonstrations``, ``binary``, ``pairs`` or ``scored``."""
    needs_reference: bool = True
    mismatched: bool = False
    """Whether each example carries another prompt's completion as its last branch (KTO's y')."""
    needs_hidden: bool = False
    """Whether :class:`LogProbs` of the policy come with detached hidden states."""
    needs_last_hidden: bool = False
    """Whether completions are fed whole and :class:`LogProbs` come with ``last``, instead of a gradient of tokens."""
    grouped: bool = False
    """Whether the completions of one prompt should meet in one step."""
    couples_step: bool = False
    """Whether the loss of an example depends on the whole step's others, which rules out accumulation."""
    couples_micro_step: bool = False
    """Whether it depends on the others of its micro-step, on all ranks (KTO's z₀): accumulated micro-batches are then
    not quite one large batch."""
    needs_label_counts: bool = False
    """Whether :meth:`see_labels` has to be called, which a stream cannot."""
    moves: tuple[int, int] = (1, -1)
    """Which way the first step moves log π of desirable and of undesirable completions: 1, -1, or 0 for neither."""
    generates: bool = True
    """False for a reward model: it has a ``reward_head``, is not sampled from, and is exported as a classifier."""
    reward_head: Any
    own_clip: float | None = None
    """Gradient-norm limit of modules beside the backbone; None: that of the policy."""

    def __init__(
        self,
        backbone: BackboneSource,
        *,
        optim: Optim | None = None,
        seed: int = 0,
        humanline: Humanline | None = None,
        non_finite: str = "stop",
    ) -> None:
        super().__init__()
        if non_finite not in ("stop", "skip"):
            raise ValueError(f"non_finite: expected stop or skip, found {non_finite!r}")
        self.seed, self.humanline, self.non_finite = seed, humanline, non_finite
        self.skipped_steps = 0
        self.backbone: Backbone | None = None
        self._make_backbone = (lambda: backbone) if isinstance(backbone, Backbone) else backbone
        self._optim = optim or AdamW()
        self._steps, self.val_averages = Steps(), Averages()
        self.val_rewards = LabelledRewards()
        self.labelled_rewards: tuple[Tensor, Tensor] | None = None
        self._losses: list[float] = []
        self._norm: Any = None
        self._non_finite_ids: list[str] = []

    # What an objective says

    @abstractmethod
    def compute(self, batch: Batch, policy: LogProbs, reference: Any) -> Output:
        """Loss and rewards of one micro-batch; ``reference``: :class:`LogProbs` if ``needs_reference``, or None."""

    def control(self, desirable: bool | None) -> str:
        """Text that ends the prompt of an example with this label; at sampling time the label is True."""
        return ""

    def build(self, hidden_size: int) -> None:
        """Make modules of one's own, such as a value head, once the policy's width is known."""

    def see_labels(self, desirable: int, undesirable: int) -> None:
        """Learn how many desirable and undesirable completions the training data has, before the first step."""

    @final
    def outcome(self, batch: Batch, policy: LogProbs, reference: LogProbs | None) -> Output:
        """:meth:`compute`, of clamped log-probs if ``humanline`` is set; rewards are always those of the given ones."""
        if self.humanline is None or reference is None:
            return self.compute(batch, policy, reference)
        output = self.compute(batch, self.humanline.clamp(policy, reference), reference)
        with torch.no_grad():
            return replace(output, rewards=self.compute(batch, policy, reference).rewards)

    @final
    def per_example(self, losses: Tensor, batch: Batch) -> Mean:
        """The mean of losses [B] over the examples of the whole step."""
        if losses.shape != (len(batch),):
            raise ValueError(f"expected one loss per example, shape ({len(batch)},), found {tuple(losses.shape)}")
        return Mean(losses.sum(), len(batch), batch.step.examples)

    @final
    def per_token(self, losses: Tensor, batch: Batch, branch: int = 0) -> Mean:
        """The mean of losses [B, C] over the branch's scored tokens of the whole step."""
        mask = batch.mask[:, branch]
        if losses.shape != mask.shape:
            raise ValueError(f"expected one loss per token, shape {tuple(mask.shape)}, found {tuple(losses.shape)}")
        return Mean((losses * mask).sum(), mask.sum(), batch.step.tokens[branch])

    # What Lightning calls

    @final
    def configure_model(self) -> None:
        if self.backbone is None:
            with torch.device("cpu"):  # Lightning's default here is the run's, where random numbers would be others
                self.backbone = self._make_backbone()
                self.build(self.backbone.hidden_size)
            if self.backbone.sharding is not None:
                self.backbone.sharding.shard_beside(self)

    @final
    def setup(self, stage: str) -> None:
        group = getattr(self.trainer.strategy, "data_group", None)
        use_data_group(group)
        for metric in (self._steps.averages, self.val_averages, self.val_rewards):
            metric.process_group = group
        counts = getattr(getattr(self.trainer, "datamodule", None), "label_counts", None)
        self.check(self.trainer.accumulate_grad_batches, counts)

    @final
    def check(self, accumulate: int, counts: tuple[int, int] | None) -> None:
        """Take in what the run will look like: micro-batches a step, and (desirable, undesirable) training completions.

        Raises ``ValueError`` if the objective cannot work with it.
        """
        if self.humanline is not None and not self.needs_reference:
            raise ValueError(f"humanline.enabled: expected a loss with a reference, found {type(self).__name__}")
        if self.couples_step and accumulate != 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches: {type(self).__name__} needs all examples of a step at once, so "
                f"expected 1, found {accumulate}; raise data.batch_size or trainer.devices instead"
            )
        self._optim.check()
        if counts is not None:
            self.see_labels(*counts)

    @final
    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        # `estimated_stepping_batches` sets up the train loader, too early for a checkpoint's position to reach it.
        steps = getattr(getattr(self.trainer, "datamodule", None), "steps", 0)
        steps = steps or int(self.trainer.estimated_stepping_batches)
        optimizer, schedule = self._optim.build(parameters, steps, fused=self.trainer.precision != "16-mixed")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @final
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped_steps"] = self.skipped_steps

    @final
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped_steps = checkpoint.get("skipped_steps", 0)

    @final
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._steps.begin()
        # Dropout is a function of (seed, batch, rank), so that a resumed run draws as the uninterrupted one did.
        torch.manual_seed((self.seed * 1_000_003 + batch_idx * 4_099 + data_ranks(self.trainer)[0]) % 2**63)
        if self.trained.sharding is not None:
            last = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
            self.trained.sharding.begin_micro_batch(self, last=last)

    @final
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        output, metrics = self._evaluate(batch)
        self._steps.add(batch, metrics)
        # Lightning divides by the number of micro-batches, DDP by that of ranks; the counts are the step's already.
        scale = self.trainer.accumulate_grad_batches * data_ranks(self.trainer)[1]
        terms = [term.total / self._step_count(name, term) for name, term in output.loss.items()]
        return scale * torch.stack(terms).sum()

    @final
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self._norm = total_norm([p.grad for p in self.parameters() if p.grad is not None])
        step = self._steps.end(self.trainer.global_step + 1, full_tensor(self._norm), optimizer.param_groups[0]["lr"])
        logged = step.number % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # set when it is built
        if not logged and self.non_finite == "stop":
            return
        metrics = self._read()
        if self.non_finite == "skip":
            self._skip_non_finite(step, metrics, optimizer)
        named = {f"train/{name}": value for name, value in metrics.items()}
        # Through Lightning's log() alone, a metric that this step lacks would get the value of an earlier one.
        for logger in self.trainer.loggers if logged else ():
            logger.log_metrics(named, step.number)
        self.log_dict(named, prog_bar=True, logger=False)

    @final
    def take_losses(self) -> list[float]:
        """The losses of the steps since the last call; all ranks call it.

        Raises :class:`FloatingPointError` if one is not finite and steps are not to be skipped.
        """
        self._catch_up()
        losses, self._losses = self._losses, []
        return losses

    @final
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        policy = list(self.trained.parameters())
        if gradient_clip_val and gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(
                f"trainer.gradient_clip_algorithm: expected norm, found {gradient_clip_algorithm}; "
                "the policy and modules beside it are each clipped by their norm"
            )
        inside = {id(p) for p in policy}
        own = [p for p in self.parameters() if id(p) not in inside]
        if gradient_clip_val:  # of the policy alone the norm is known: it is logged
            clip_gradients(policy, gradient_clip_val, None if own else self._norm)
        own_clip = self.own_clip or gradient_clip_val
        if own_clip and own:
            clip_gradients(own, own_clip)

    @final
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Lightning does so after the next forward pass, whose activations can now take the gradients' place.
        optimizer.zero_grad(set_to_none=True)

    @final
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        output, metrics = self._evaluate(batch)
        if not all(term.total.isfinite() for term in output.loss.values()):
            self._non_finite_ids += batch.ids
        self.val_averages.update(metrics)
        if output.rewards is not None:
            self.val_rewards.update(*labelled(batch, output.rewards))

    @final
    def on_validation_epoch_end(self) -> None:
        metrics = complete(self.val_averages.compute())
        self.val_averages.reset()
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"the validation loss is {metrics['loss']} after step {self.trainer.global_step}; the last good "
                f"checkpoint is kept. Examples: {', '.join(all_gather_list(self._non_finite_ids))}"
            )
        if self.val_rewards.rewards:
            self.labelled_rewards = self.val_rewards.compute()
            self.val_rewards.reset()
            area = auc(*self.labelled_rewards)
            if area is not None and "rewards/accuracies" not in metrics:
                metrics["rewards/auc"] = area
        self.log("step", float(self.trainer.global_step))
        self.log_dict({f"val/{name}": value for name, value in metrics.items()})

    @final
    def on_validation_start(self) -> None:
        self._catch_up()

    @final
    def on_train_end(self) -> None:
        self._catch_up()

    # The pieces

    @property
    def trained(self) -> Backbone:
        if self.backbone is None:
            raise ValueError("expected configure_model() to have been called: the objective has no backbone yet")
        return self.backbone

    def _evaluate(self, batch: Batch) -> tuple[Output, dict[str, Mean]]:
        policy = self.trained.logprobs(batch, with_hidden=self.needs_hidden, with_statistics=True)
        reference = self.trained.reference_logprobs(batch) if self.needs_reference else None
        output = self.outcome(batch, policy, reference)
        metrics = {f"loss/{name}": Mean(term.total, term.count) for name, term in output.loss.items()}
        metrics |= feedback_metrics(batch, policy, reference, output.rewards, self.trained.statistics)
        return output, metrics | dict(output.metrics)

    def _step_count(self, name: str, term: Mean) -> float:
        if term.step_count is None:
            raise ValueError(
                f"loss term {name!r} of {type(self).__name__}: expected the count of the whole step, found none; "
                "make loss terms with per_example() or per_token()"
            )
        return term.step_count

    def _catch_up(self) -> None:
        # Before anything that takes its time and is to know whether all is well.
        if self._steps.unread:
            self._read()
        self._steps.pause()

    def _read(self) -> dict[str, float]:
        # Metrics of the last step; earlier ones that were not read are looked through with it.
        found = self._steps.read(data_ranks(self.trainer)[1])
        for step, metrics in found:
            told = self._non_finite_step(step, metrics)
            if told and self.non_finite == "stop":
                raise FloatingPointError(told)
        self._losses += [metrics["loss"] for _, metrics in found]
        return found[-1][1]

    def _skip_non_finite(self, step: Step, metrics: dict[str, float], optimizer: Optimizer) -> None:
        # Loss and gradient are those of all ranks by now, so all of them skip.
        if told := self._non_finite_step(step, metrics):
            optimizer.zero_grad(set_to_none=True)  # what has no gradient is left alone, moments and all
            self.skipped_steps += 1
            if self.global_rank == 0:
                log.warning("%s", told)
        metrics["skipped_steps"] = float(self.skipped_steps)

    def _non_finite_step(self, step: Step, metrics: dict[str, float]) -> str | None:
        scaled = self.trainer.precision == "16-mixed"  # its gradient scaler skips such steps by itself
        for name in ("loss",) if scaled else ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                late = self.trainer.global_step >= step.number
                weights = (
                    "the weights are spoilt, those of the last checkpoint are not"
                    if late
                    else "the weights were not changed"
                )
                return (
                    f"{name} is {metrics[name]} at step {step.number}; {weights}. "
                    f"Examples of this step: {', '.join(all_gather_list(step.ids))}"
                )
        return None
