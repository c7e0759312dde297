"""The training loop of every objective: steps, optimizer, clipping, denominators, logging and non-finite numbers."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypedDict, final

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from halos.config.combinations import DIVERGENCE, REFERENCE, WHOLE_STEP, check_combinations
from halos.data.batches.batch import Batch
from halos.data.module import PreferenceDataModule
from halos.loop.batch_loss import BackboneSource, BatchLoss
from halos.loop.feedback_metrics import labelled
from halos.loop.humanline import Humanline
from halos.loop.non_finite import non_finite_problem
from halos.loop.point_refresh import check_refreshed
from halos.loop.reference_pass import check_sequences, run_reference_pass
from halos.loop.steps import Step, Steps
from halos.loop.validation import Validation
from halos.metrics import Mean
from halos.optim import AdamW, Optim
from halos.processes.collectives import clip_gradients, data_ranks, total_norm, use_data_group

log = logging.getLogger(__name__)


class LoopOptions(TypedDict, total=False):
    """The keywords that every objective takes in addition to its own parameters; see :class:`TrainingLoop`."""

    optim: Optim | None
    seed: int
    humanline: Humanline | None
    non_finite: str


class TrainingLoop(BatchLoss):
    """Trains a :class:`Backbone` on the loss that :meth:`compute_clamped` returns.

    For a micro-batch, ``training_step`` calls ``compute_batch`` (log-probs), which calls ``compute_clamped``
    (humanline), which calls ``compute`` in the file of the loss.

    Metrics stay on the device until a step is logged (every ``log_every_n_steps``), a checkpoint is due or training
    ends, so that the host does not wait in every step. A loss that is not finite is noticed only then, except with
    ``non_finite="skip"``, which reads the metrics of every step.

    Args:
        backbone: a :class:`Backbone`; a factory that makes one when the strategy is ready; or None if the loss is
            computed but not trained.
        optim: the optimizer and its schedule (default: ``AdamW()``).
        seed: seeds the randomness of the forward pass (dropout).
        humanline: clamps the policy's token log-probs around the reference's before the loss reads them. The metrics
            that all objectives share stay unclamped.
        non_finite: what to do about a loss or gradient that is not finite. ``stop`` ends the run. ``skip`` skips the
            step, which then changes neither the weights nor the optimizer's moments, and counts it.
    """

    own_clip: float | None = None
    """Gradient-norm limit of the modules outside the backbone, such as a value head; None: the policy's limit."""

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        optim: Optim | None = None,
        seed: int = 0,
        humanline: Humanline | None = None,
        non_finite: str = "stop",
    ) -> None:
        super().__init__(backbone)
        if non_finite not in ("stop", "skip"):
            raise ValueError(f"non_finite: expected stop or skip, found {non_finite!r}")
        self.seed, self.humanline, self.non_finite = seed, humanline, non_finite
        self.skipped_steps = 0
        self._checked_data: PreferenceDataModule | None = None
        self._optim = optim or AdamW()
        # Submodules, so that their metrics move to the device with the model.
        self._steps, self._validation = Steps(), Validation()
        self._losses: list[float] = []
        self._grad_norm: Tensor | None = None

    # The hooks that an objective defines and the loop calls

    @abstractmethod
    def see_labels(self, desirable: float, undesirable: float) -> None:
        """See :class:`halos.objectives.base.Objective`."""

    @abstractmethod
    def end_step(self) -> None:
        """See :class:`halos.objectives.base.Objective`."""

    # The hooks that Lightning calls, in the order in which they return

    @final
    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        # Forked processes train copies: the objective of the calling process would keep its first weights.
        if stage == "fit" and isinstance(strategy.launcher, _MultiProcessingLauncher):
            expected = "expected one whose processes run the whole script (ddp), found forked or spawned processes"
            hint = "in a notebook use one device, or halos.train with overrides={'strategy': 'ddp'}"
            raise ValueError(f"strategy: {expected}; {hint}")
        if stage == "fit" and self.needs.samples:
            check_refreshed(self.trainer)
        group = getattr(strategy, "data_group", None)
        use_data_group(group)
        steps, validation = self._steps, self._validation
        for metric in (steps.averages, steps.rewards, validation.averages, validation.rewards):
            metric.process_group = group
        counts = getattr(getattr(self.trainer, "datamodule", None), "label_counts", None)
        self.check(self.trainer.accumulate_grad_batches, counts)

    @final
    def configure_model(self) -> None:
        # _trainer, because trainer raises if there is none, as in tests and notebooks that only make the models.
        data = getattr(self._trainer, "datamodule", None)
        sharding = getattr(getattr(self._trainer, "strategy", None), "sharding", None)
        # Lightning makes the run's device the default device. Its random generator would draw other weights than the
        # CPU's.
        with torch.device("cpu"):
            if self.backbone is None:
                self.set_up_backbone(sharding)
            if not isinstance(data, PreferenceDataModule):
                return
            backbone = self.trained
            if data is not self._checked_data:  # a run validates and fits: warn only once
                check_sequences(backbone, data)
                self._checked_data = data
            # If the backbone has a model of the reference, the steps compute the reference's log-probs themselves.
            if self.needs.reference and not backbone.scores_reference and data.reference is None:
                scorer = self.source.reference_scorer(backbone, sharding)
                backbone.reference_seconds = run_reference_pass(scorer, data, self.trainer)

    @final
    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = [p for p in self.parameters() if p.requires_grad]
        # `estimated_stepping_batches` would set up the train loader before a checkpoint's position is restored.
        steps = getattr(getattr(self.trainer, "datamodule", None), "steps", 0)
        steps = steps or int(self.trainer.estimated_stepping_batches)
        optimizer, schedule = self._optim.build(parameters, steps, fused=self.trainer.precision != "16-mixed")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @final
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._steps.begin()
        # Dropout depends only on (seed, batch, rank), so that a resumed run draws as the uninterrupted one did.
        number = self.trainer.fit_loop.total_batch_idx  # over all epochs
        torch.manual_seed((self.seed * 1_000_003 + number * 4_099 + data_ranks(self.trainer)[0]) % 2**63)
        if self.trained.sharding is not None:
            last = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
            self.trained.sharding.begin_micro_batch(self, last=last)

    @final
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        output, metrics = self.compute_batch(batch)
        rewards = None if output.rewards is None else labelled(batch.view(output.view), output.rewards)
        self._steps.add(batch, metrics, rewards)
        # Lightning divides by the number of micro-batches and DDP by the number of ranks. The terms are already
        # divided by the counts of the whole step, so both divisions are undone here.
        scale = self.trainer.accumulate_grad_batches * data_ranks(self.trainer)[1]
        return scale * torch.stack([self._of_step(name, term) for name, term in output.loss.items()]).sum()

    @final
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self._grad_norm = total_norm([p.grad for p in self.parameters() if p.grad is not None])
        step = self._steps.end(self.trainer.global_step + 1, self._grad_norm, optimizer.param_groups[0]["lr"])
        logged = step.number % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # set when it is built
        if not logged and self.non_finite == "stop":
            return
        metrics = self._read_metrics()
        if self.non_finite == "skip":
            self._skip_non_finite(step, metrics, optimizer)
        named = {f"train/{name}": value for name, value in (metrics | self._read_so_far(step.number)).items()}
        # Loggers are called directly: Lightning's log() would repeat an earlier value of a metric that this step lacks.
        for logger in self.trainer.loggers if logged else ():
            logger.log_metrics(named, step.number)
        # Lightning reads the metrics of a progress bar after every micro-batch, even long after they were logged. In
        # the host's memory, reading them does not wait for the device.
        on_host = {name: torch.full((), value, dtype=torch.float32, device="cpu") for name, value in named.items()}
        self.log_dict(on_host, prog_bar=self.trainer.progress_bar_callback is not None, logger=False)

    @final
    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if gradient_clip_val and gradient_clip_algorithm not in (None, "norm"):
            why = "the policy and the modules outside it are each clipped by their norm"
            raise ValueError(f"trainer.gradient_clip_algorithm: expected norm, found {gradient_clip_algorithm}; {why}")
        policy = list(self.trained.parameters())
        policy_ids = {id(p) for p in policy}
        outside_policy = [p for p in self.parameters() if id(p) not in policy_ids]
        if gradient_clip_val:
            # The logged norm is that of all parameters, so it is the policy's only if there are no others.
            clip_gradients(policy, gradient_clip_val, None if outside_policy else self._grad_norm)
        own_clip = self.own_clip or gradient_clip_val
        if own_clip and outside_policy:
            clip_gradients(outside_policy, own_clip)

    @final
    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], object] | None = None,
    ) -> None:
        # Runs the closure: training_step, the backward pass, on_before_optimizer_step, configure_gradient_clipping.
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Lightning frees the gradients after the next forward pass. Freed here, they leave room for its activations.
        optimizer.zero_grad(set_to_none=True)
        self.trained.updated = True
        self.end_step()

    @final
    def on_validation_start(self) -> None:
        self._flush_metrics()

    @final
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        output, metrics = self.compute_batch(batch)
        self._validation.add(batch, output, metrics)

    @final
    def on_validation_epoch_end(self) -> None:
        metrics = self._validation.end(self.trainer.global_step)
        self.log("step", float(self.trainer.global_step))
        self.log_dict({f"val/{name}": value for name, value in metrics.items()})

    @final
    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        checkpoint["skipped_steps"] = self.skipped_steps

    @final
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped_steps = checkpoint.get("skipped_steps", 0)

    @final
    def on_train_end(self) -> None:
        self._flush_metrics()

    @final
    def on_fit_end(self) -> None:
        if self.trainer.global_step == 0:
            hint = "look at the training data and at the limits of the Trainer (max_steps, max_time, …)"
            raise ValueError(f"fit: expected at least one training step, found none; {hint}")

    # The methods that callbacks and commands call

    @property
    def labelled_rewards(self) -> tuple[Tensor, Tensor] | None:
        """(rewards [n], labels [n]) of the last validation's chosen and rejected completions, on all ranks."""
        return self._validation.labelled_rewards

    @final
    def step_rewards(self) -> tuple[Tensor, Tensor] | None:
        """Return (rewards [n], labels [n]) of the last optimizer step's chosen and rejected completions, on all ranks.

        All ranks must call it together. None: the loss implies no rewards.
        """
        if not self._steps.rewards.rewards:
            return None
        rewards, labels, _ = self._steps.rewards.compute()
        return rewards, labels

    @final
    def check(self, accumulate: int, counts: tuple[float, float] | None) -> None:
        """Check that the loss can work in this run, and pass it the label counts.

        Args:
            accumulate: micro-batches in an optimizer step.
            counts: numbers of (desirable, undesirable) training completions by weight, if they are known.

        Raises:
            ValueError: if the loss cannot work with these settings.
        """
        # The command has checked these rules already; runs without a configuration have not.
        needs = self.needs
        traits = {REFERENCE: needs.reference, WHOLE_STEP: needs.whole_step, DIVERGENCE: needs.divergence}
        humanline = self.humanline is not None
        check_combinations(traits | {"humanline.enabled": humanline, "trainer.accumulate_grad_batches": accumulate})
        self._optim.check()
        if counts is not None:
            self.see_labels(*counts)

    @final
    def take_losses(self) -> list[float]:
        """The losses of the steps since the last call. All ranks must call it together.

        Raises:
            FloatingPointError: if one of them is not finite, unless ``non_finite`` is ``skip``.
        """
        self._flush_metrics()
        losses, self._losses = self._losses, []
        return losses

    # Helpers

    def _of_step(self, name: str, term: Mean) -> Tensor:
        if term.step_count is None:
            expected = f"{name!r} of {type(self).__name__}: expected the count of the whole step, found none"
            raise ValueError(f"loss term {expected}; make loss terms with per_example() or per_token()")
        return term.of_step

    def _flush_metrics(self) -> None:
        # Called before validations and checkpoints. Both take long, and are useless after a loss that is not finite.
        if self._steps.unread:
            self._read_metrics()
        self._steps.pause()

    def _read_metrics(self) -> dict[str, float]:
        # Returns the metrics of the last step; all steps since the last reading are checked.
        steps = self._steps.read(data_ranks(self.trainer)[1])
        for step, metrics in steps:
            if self.non_finite == "stop" and (problem := self._problem_of(step, metrics)):
                raise FloatingPointError(problem)
        self._losses += [metrics["loss"] for _, metrics in steps]
        return steps[-1][1]

    def _read_so_far(self, step: int) -> dict[str, float]:
        # How much of the data has been read, if the data module is one of halos.
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, PreferenceDataModule):
            return {}
        examples = step * data.batch_size * self.trainer.accumulate_grad_batches * data_ranks(self.trainer)[1]
        passes = data.passes(step)
        return {"examples": float(examples)} | ({} if passes is None else {"epoch": passes})

    def _skip_non_finite(self, step: Step, metrics: dict[str, float], optimizer: Optimizer) -> None:
        # The metrics are reduced over all ranks by now, so all ranks skip the same steps.
        if problem := self._problem_of(step, metrics):
            # An optimizer ignores parameters without a gradient: weights and moments stay as they are.
            optimizer.zero_grad(set_to_none=True)
            self.skipped_steps += 1
            if self.global_rank == 0:
                log.warning("%s", problem)
        metrics["skipped_steps"] = float(self.skipped_steps)

    def _problem_of(self, step: Step, metrics: dict[str, float]) -> str | None:
        scaled, spoilt = self.trainer.precision == "16-mixed", self.trainer.global_step >= step.number
        return non_finite_problem(step, metrics, scaled=scaled, spoilt=spoilt)
