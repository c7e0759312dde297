"""What one validation measures, over all of its batches and all ranks."""

from __future__ import annotations

import math

from torch import Tensor, nn

from halos.data.batches.batch import Batch
from halos.loop.feedback_metrics import labelled
from halos.loop.output import Output
from halos.loop.steps import complete
from halos.metrics import Averages, LabelledRewards, Mean, auc
from halos.processes.collectives import all_gather_list


class Validation(nn.Module):
    """Averages of the metrics, and the rewards of labelled completions.

    Attributes:
        averages: the metrics' sums and counts so far.
        rewards: the rewards and labels so far.
        labelled_rewards: (rewards [n], labels [n]) of the last whole validation, if the loss implies rewards.
    """

    def __init__(self) -> None:
        super().__init__()
        self.averages, self.rewards = Averages(), LabelledRewards()
        self.labelled_rewards: tuple[Tensor, Tensor] | None = None
        self._non_finite_ids: list[str] = []

    def add(self, batch: Batch, output: Output, metrics: dict[str, Mean]) -> None:
        """Add one batch: its output, and all of its metrics."""
        if not all(term.total.isfinite() for term in output.loss.values()):
            self._non_finite_ids += batch.ids
        self.averages.update(metrics)
        if output.rewards is not None:
            self.rewards.update(*labelled(batch.view(output.view), output.rewards))

    def end(self, step: int) -> dict[str, float]:
        """The metrics of the validation after this optimizer step. All ranks call it together.

        Raises:
            FloatingPointError: with the ids of the examples at fault, if the loss is not finite.
        """
        metrics = complete(self.averages.compute(), self.averages.names)
        self.averages.reset()
        if not math.isfinite(metrics["loss"]):
            ids = ", ".join(all_gather_list(self._non_finite_ids))
            problem = f"the validation loss is {metrics['loss']} after step {step}"
            raise FloatingPointError(f"{problem}; the last good checkpoint is kept. Examples: {ids}")
        if self.rewards.rewards:
            rewards, labels, weights = self.rewards.compute()
            self.labelled_rewards = rewards, labels
            self.rewards.reset()
            area = auc(rewards, labels, weights)
            # Pairs have an accuracy, which compares within each prompt; AUC compares across prompts.
            if area is not None and "rewards/accuracies" not in metrics:
                metrics["rewards/auc"] = area
        return metrics
