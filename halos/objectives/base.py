"""The base class of objectives: the view and the log-probs that a loss needs, and the loss itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor

from halos.data.batches.batch import Batch
from halos.data.preparation.needs import DataNeeds
from halos.loop.batch_loss import BackboneSource
from halos.loop.coupled import of_all_ranks, own_places, with_others_gradient
from halos.loop.humanline import Humanline
from halos.loop.module import LoopOptions, TrainingLoop
from halos.loop.needs import Needs
from halos.loop.output import Output
from halos.metrics import Mean
from halos.policy.heads import RewardHead
from halos.policy.logprobs.completions import LogProbs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The file of a loss imports only these names from halos, and the checks of its parameters.
__all__ = ["BackboneSource", "Batch", "Humanline", "LogProbs", "LoopOptions", "Mean", "Needs", "Objective", "Output"]


class Objective(TrainingLoop):
    """A loss on a view of human feedback, and the LightningModule that trains a backbone on it.

    A subclass sets :attr:`view` and :attr:`needs` and implements :meth:`compute`. Of the other methods, it may override
    only the hooks :meth:`control`, :meth:`build`, :meth:`see_labels` and :meth:`end_step` (a mixture of several views
    also overrides :meth:`data_needs`). For the arguments see :class:`halos.loop.module.TrainingLoop`.
    """

    view: str
    """The form of feedback that the loss takes: ``demonstrations``, ``binary``, ``pairs`` or ``scored``.

    A mixture of several views joins their names with ``+``.
    """
    paper: ClassVar[tuple[str, str] | None] = None
    """Title and address of the paper that the loss is from, for the model card."""
    generates: bool = True
    """False for a reward model: it has a ``reward_head``, is not sampled from, and is exported as a classifier."""
    reward_head: RewardHead

    @abstractmethod
    def compute(self, batch: Batch, policy: LogProbs, reference: Any) -> Output:
        """Return the loss and the rewards of one micro-batch.

        Args:
            batch: B examples, with the labels or scores of the view.
            policy: log π_θ of the completion tokens, [B, K, C], with gradient.
            reference: log π_ref of the same tokens, :class:`LogProbs` if ``needs.reference``, else None. It is
                annotated as ``Any``, so that an override can annotate the type that it expects.
        """

    def control(self, desirable: bool | None) -> str:
        """Return the text that ends the prompt of an example with this label. Sampling uses the text for ``True``."""
        return ""

    def build(self, hidden_size: int) -> None:
        """Make modules outside the backbone, such as a value head, given the width of the policy's hidden states."""

    def see_labels(self, desirable: float, undesirable: float) -> None:
        """Take the numbers of desirable and undesirable training completions by weight, before the first step."""

    def end_step(self) -> None:
        """Called after each optimizer step, for a loss with running statistics over steps."""

    @final
    def ready_tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, in which each of the objective's control tokens is a single token.

        Raises ``ValueError`` for an objective without a backbone, and for a backbone without a tokenizer.
        """
        self.source.add_control_tokens(filter(None, (self.control(True), self.control(False))))
        return self.source.tokenizer

    def data_needs(self) -> DataNeeds:
        """Return what the data module has to prepare for this objective."""
        return self.view_needs(self.view, self.needs)

    @final
    def view_needs(self, view: str, needs: Needs) -> DataNeeds:
        """Return what the data module has to prepare for a loss of one view with these needs."""
        return DataNeeds(view=view, flags=needs, control=self.control)

    @final
    def compute_clamped(self, batch: Batch, policy: LogProbs, reference: LogProbs | None) -> Output:
        """Call :meth:`compute`, on clamped log-probs if ``humanline`` is set; rewards are never clamped."""
        if self.humanline is None or reference is None:
            return self.compute(batch, policy, reference)
        # Rewards are compared across runs, so they must mean the same with and without clamping.
        output = self.compute(batch, self.humanline.clamp(policy, reference), reference)
        with torch.no_grad():
            return replace(output, rewards=self.compute(batch, policy, reference).rewards)

    @final
    def target_margins(self, batch: Batch, margin_weight: float) -> Tensor | float:
        """κ m for each pair, [B]: how much people preferred its chosen completion (m), times κ. 0 for κ = 0.

        A loss that calls this sets ``needs.margins``, so that pairs without a margin are refused before training.
        """
        if not margin_weight:
            return 0.0
        assert batch.margins is not None  # the view is pairs
        return margin_weight * batch.margins

    @final
    def per_example(self, losses: Tensor, batch: Batch) -> Mean:
        """The mean of losses [B] over the examples of the whole optimizer step, by weight."""
        if losses.shape != (len(batch),):
            raise ValueError(f"expected one loss per example, shape ({len(batch)},), found {tuple(losses.shape)}")
        if batch.weights is None:
            return Mean(losses.sum(), len(batch), batch.step.examples)
        return Mean((batch.weights * losses).sum(), batch.weights.sum(), batch.step.examples)

    @final
    def per_coupled_example(self, loss: Callable[..., Tensor], columns: Sequence[Tensor], batch: Batch) -> Mean:
        """The mean of losses that each depend on several examples of the micro-step, on all ranks.

        Args:
            loss: takes the columns and the weights of all ranks' examples, [N] each, and returns their losses, [N].
            columns: values for this rank's examples, [B] each; the first column has the dtype of the losses.
            batch: the micro-batch of this rank.
        """
        rank_weights = torch.ones_like(columns[0]) if batch.weights is None else batch.weights.to(columns[0])
        mine, weights = own_places(len(rank_weights)), of_all_ranks(rank_weights)
        losses = loss(*map(of_all_ranks, columns), weights)
        return with_others_gradient(self.per_example(losses[mine], batch), losses, weights, mine)

    @final
    def per_token(self, losses: Tensor, batch: Batch, branch: int = 0) -> Mean:
        """The mean of losses [B, C] over the branch's scored tokens of the whole optimizer step, by weight."""
        mask = batch.mask[:, branch]
        if losses.shape != mask.shape:
            raise ValueError(f"expected one loss per token, shape {tuple(mask.shape)}, found {tuple(losses.shape)}")
        counts = mask if batch.weights is None else mask * batch.weights[:, None]
        return Mean((losses * counts).sum(), counts.sum(), batch.step.tokens[branch])
