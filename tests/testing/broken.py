"""Objectives with one fault each, as people make them."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import logsigmoid

from halos.metrics import Mean
from halos.objectives import DPO, KTO, SFT, Objective, Output, kto_loss
from halos.policy.logprobs.completions import LogProbs
from halos.processes.collectives import all_sum


def pair_margin(policy: LogProbs, reference: LogProbs) -> Any:
    ratios = policy.sum - reference.sum
    return ratios[:, 0] - ratios[:, 1]


class WrongSign(DPO):
    def compute(self, batch: Any, policy: LogProbs, reference: LogProbs) -> Output:
        losses = -logsigmoid(-self.beta * pair_margin(policy, reference))
        return Output({"dpo": self.per_example(losses, batch)})


class MeanOverPadding(SFT):
    def compute(self, batch: Any, policy: LogProbs, reference: None) -> Output:
        losses = -policy.tokens[:, 0].mean(-1)
        return Output({"sft": self.per_example(losses, batch)})


class LengthsByNonZero(DPO):
    """IPO's token means, over tokens whose log-ratio is not 0."""

    def compute(self, batch: Any, policy: LogProbs, reference: LogProbs) -> Output:
        ratios = policy.tokens - reference.tokens
        means = ratios.sum(-1) / (ratios != 0).sum(-1)
        return Output({"ipo": self.per_example((means[:, 0] - means[:, 1] - 5) ** 2, batch)})


class ExamplesAgainstTokens(SFT):
    """A (B,) tensor added to a (B, C) one."""

    def compute(self, batch: Any, policy: LogProbs, reference: None) -> Output:
        tokens = policy.tokens[:, 0]
        return Output({"sft": self.per_token(-tokens + tokens.mean(-1), batch)})


class KLFromTheNextExample(KTO):
    def compute(self, batch: Any, policy: LogProbs, reference: Any) -> Output:
        r = (policy.sum - reference.sum)[:, 0]
        z0 = (r - r.roll(1)).abs().detach()[0]
        return Output({"kto": self.per_example(kto_loss(r, 0 * r, batch.desirable, z0), batch)})


class MeanOfTheMicroBatch(DPO):
    def compute(self, batch: Any, policy: LogProbs, reference: LogProbs) -> Output:
        losses = -logsigmoid(self.beta * pair_margin(policy, reference))
        return Output({"dpo": Mean(losses.mean(), 1.0, 1.0)})


class TokensOfTheMicroBatch(SFT):
    """The most frequent fault of all: a token mean whose denominator is the micro-batch's."""

    def compute(self, batch: Any, policy: LogProbs, reference: None) -> Output:
        total, count = -policy.tokens[:, 0].sum(), float(batch.mask.sum())
        return Output({"sft": Mean(total / count * len(batch), len(batch), batch.step.examples)})


class ReferencePointOfOneRank(KTO):
    def compute(self, batch: Any, policy: LogProbs, reference: Any) -> Output:
        r, mismatched = (policy.sum - reference.sum).unbind(1)
        z0 = mismatched.mean().clamp(min=0).detach()
        return Output({"kto": self.per_example(kto_loss(r, 0 * r, batch.desirable, z0), batch)})


class GradientIntoTheReferencePoint(KTO):
    def compute(self, batch: Any, policy: LogProbs, reference: Any) -> Output:
        r, mismatched = (policy.sum - reference.sum).unbind(1)
        losses = torch.where(batch.desirable, -(r - mismatched.mean()), r - mismatched.mean())
        return Output({"kto": self.per_example(losses.sigmoid(), batch)})


class DetachedHalf(DPO):
    """The gradient of the rejected side is lost."""

    def compute(self, batch: Any, policy: LogProbs, reference: LogProbs) -> Output:
        ratios = policy.sum - reference.sum
        losses = -logsigmoid(self.beta * (ratios[:, 0] - ratios[:, 1].detach()))
        return Output({"dpo": self.per_example(losses, batch)})


class EmptyMean(KTO):
    """NaN where a batch lacks one kind of completion."""

    def compute(self, batch: Any, policy: LogProbs, reference: Any) -> Output:
        r = self.beta * (policy.sum - reference.sum)[:, 0]
        gap = r[batch.desirable].mean() - r[~batch.desirable].mean()
        return Output({"kto": self.per_example((-gap).sigmoid().expand(len(r)), batch)})


class OverflowInHalf(DPO):
    def compute(self, batch: Any, policy: LogProbs, reference: LogProbs) -> Output:
        margin = self.beta * pair_margin(policy, reference)
        return Output({"dpo": self.per_example((1e3 + (-margin).exp() * 1e5).log(), batch)})


class ReferenceInTheOptimizer(DPO):
    def build(self, hidden_size: int) -> None:
        reference: Any = self.trained.reference
        self.second = reference.requires_grad_()

    def compute(self, batch: Any, policy: LogProbs, reference: LogProbs) -> Output:
        output = super().compute(batch, policy, reference)
        pull = sum(weight.square().sum() for weight in self.second.parameters())
        output.loss["dpo"].total = output.loss["dpo"].total + 1e-3 * pull
        return output


class InPlace(DPO):
    def compute(self, batch: Any, policy: LogProbs, reference: LogProbs) -> Output:
        reference.tokens.mul_(self.beta)
        return super().compute(batch, policy, reference)


class IgnoredParameter(DPO):
    """label_smoothing is accepted, and that is all."""

    def compute(self, batch: Any, policy: LogProbs, reference: LogProbs) -> Output:
        losses = -logsigmoid(self.beta * pair_margin(policy, reference))
        return Output({"dpo": self.per_example(losses, batch)})


class ForgetfulMean(KTO):
    """A running mean that no checkpoint knows of."""

    shift = 0.0

    def compute(self, batch: Any, policy: LogProbs, reference: Any) -> Output:
        r = (policy.sum - reference.sum)[:, 0]
        self.shift = 0.9 * self.shift + 0.1 * float(r.detach().mean())
        return Output({"kto": self.per_example(kto_loss(r, 0 * r, batch.desirable, self.shift), batch)})


class MeanOfMeans(DPO):
    def compute(self, batch: Any, policy: LogProbs, reference: LogProbs) -> Output:
        output = super().compute(batch, policy, reference)
        lengths = policy.count[:, 0].double()
        return Output(output.loss, output.rewards, {"length": Mean(lengths.mean() * len(batch), batch.step.examples)})


class IgnoredWeights(DPO):
    def compute(self, batch: Any, policy: LogProbs, reference: LogProbs) -> Output:
        losses = -logsigmoid(self.beta * pair_margin(policy, reference))
        return Output({"dpo": Mean(losses.sum(), len(batch), batch.step.examples)})


class UnweightedReferencePoint(KTO):
    """Losses are weighted, but not the statistic that they share."""

    def compute(self, batch: Any, policy: LogProbs, reference: Any) -> Output:
        r, mismatched = (policy.sum - reference.sum).unbind(1)
        total, count = all_sum(torch.stack([mismatched.detach().sum(), r.new_full((), len(r))]))
        losses = kto_loss(r, 0 * r, batch.desirable, total / count)
        return Output({"kto": self.per_example(losses, batch)})


class UnweightedMetric(DPO):
    def compute(self, batch: Any, policy: LogProbs, reference: LogProbs) -> Output:
        output = super().compute(batch, policy, reference)
        return Output(output.loss, output.rewards, {"length": Mean(policy.count[:, 0].sum(), len(batch))})


class NoDenominator(SFT):
    def compute(self, batch: Any, policy: LogProbs, reference: None) -> Output:
        return Output({"sft": Mean(-policy.tokens[:, 0].sum(), batch.mask.sum())})


class OffsetRewards(DPO):
    """Rewards that forget the reference."""

    def compute(self, batch: Any, policy: LogProbs, reference: LogProbs) -> Output:
        output = super().compute(batch, policy, reference)
        return Output(output.loss, self.beta * policy.sum)


class NothingToTrain(SFT):
    def compute(self, batch: Any, policy: LogProbs, reference: None) -> Output:
        return Output({})


class LossOfEachExample(SFT):
    """Losses that nobody added up."""

    def compute(self, batch: Any, policy: LogProbs, reference: None) -> Output:
        return Output({"sft": Mean(-policy.tokens[:, 0].sum(-1), len(batch), batch.step.examples)})


class LossAsANumber(SFT):
    def compute(self, batch: Any, policy: LogProbs, reference: None) -> Output:
        total: Any = float(-policy.tokens[:, 0].sum())
        return Output({"sft": Mean(total, len(batch), batch.step.examples)})


class OtherMask(SFT):
    """The batch's mask is replaced, rather than changed in place."""

    def compute(self, batch: Any, policy: LogProbs, reference: None) -> Output:
        batch.mask = batch.mask.clone()
        return super().compute(batch, policy, reference)


class IgnoredNumber(DPO):
    """A whole number that is accepted, and that is all."""

    def __init__(self, backbone: Any, *, steps: int = 3, **base: Any) -> None:
        super().__init__(backbone, **base)
        self.steps = steps


class MarginOfTheMicroBatch(DPO):
    """Every pair gets the mean margin of the micro-batch."""

    def target_margins(self, batch: Any, margin_weight: float) -> Any:  # type: ignore[misc]
        margins = super().target_margins(batch, margin_weight)
        return margins.mean() if isinstance(margins, torch.Tensor) else margins


FAULTS: dict[type[Objective], str] = {
    WrongSign: "signs",
    MeanOverPadding: "padding",
    LengthsByNonZero: "step 0",
    ExamplesAgainstTokens: "shapes",
    KLFromTheNextExample: "row order",
    MeanOfTheMicroBatch: "accumulation",
    TokensOfTheMicroBatch: "accumulation",
    ReferencePointOfOneRank: "ranks",
    GradientIntoTheReferencePoint: "gradient",
    DetachedHalf: "gradient",
    EmptyMean: "one-sided batches",
    OverflowInHalf: "precision",
    ReferenceInTheOptimizer: "frozen reference",
    InPlace: "inputs untouched",
    IgnoredParameter: "parameters",
    IgnoredNumber: "parameters",
    MarginOfTheMicroBatch: "margins",
    ForgetfulMean: "state",
    MeanOfMeans: "metrics",
    IgnoredWeights: "weights",
    UnweightedReferencePoint: "weights",
    UnweightedMetric: "weights",
    NoDenominator: "shapes",
    NothingToTrain: "shapes",
    LossOfEachExample: "shapes",
    LossAsANumber: "shapes",
    OtherMask: "inputs untouched",
    OffsetRewards: "step 0",
}
"""The property that names each fault."""
