"""Reference points of KTO: z₀, with which the loss compares the log-ratio of each completion.

The paper defines z₀ = KL(π_θ(·|x) ‖ π_ref(·|x)), in expectation over prompts, at the current policy. Each class below
is one estimator of it. r(x, y) = log π_θ(y|x) − log π_ref(y|x) in nats, and no gradient flows into any z₀. Means are
weighted by the examples' weights. :mod:`halos.evaluation.reference_points` measures all of them for a finished run.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from halos.checks import check_choice, check_whole
from halos.data.batches.batch import Batch
from halos.loop.needs import Needs
from halos.loop.state import RunningState
from halos.metrics import Mean
from halos.policy.logprobs.completions import LogProbs
from halos.processes.collectives import all_gather_list, all_sum


class ReferencePoint(RunningState, ABC):
    """An estimator of z₀, which reads one micro-batch and may keep statistics of earlier steps.

    Args:
        clamp: take the maximum of the estimate and 0, as the paper does: a KL divergence is never negative.
    """

    needs = Needs(reference=False)
    """What the estimator needs of data and backbone, besides the needs of the loss."""

    def __init__(self, *, clamp: bool = True) -> None:
        super().__init__()
        self.clamp = clamp

    @abstractmethod
    def estimate(self, batch: Batch, ratios: Tensor, divergence: Tensor | None) -> Tensor:
        """Estimate z₀ before the clamp. All ranks call this together.

        Args:
            batch: this rank's examples.
            ratios: r of each branch, [B, K]; y is the first, and y' the last if the estimator needs it.
            divergence: the divergence at each token, [B, K, C] (:class:`LogProbs`), if the estimator needs it.

        Returns:
            One z₀ for all examples, a scalar, or one for each, [B].
        """

    def forward(self, batch: Batch, policy: LogProbs, reference: Tensor) -> tuple[Tensor, dict[str, Mean]]:
        """Return z₀, and its metrics: z₀ after and before the clamp.

        Args:
            batch: this rank's examples.
            policy: their log-probs under π_θ.
            reference: log π_ref(y|x) of each branch, [B, K].
        """
        raw = self.estimate(batch, (policy.sum - reference).detach(), policy.divergence)
        z0, weights = raw.clamp(min=0) if self.clamp else raw, _weights(batch, raw)
        metrics = {"z0": z0, "z0/raw": raw}
        return z0, {name: Mean((weights * value).sum(), weights.sum()) for name, value in metrics.items()}

    def end_step(self) -> None:
        """Called after each optimizer step."""


class Zero(ReferencePoint):
    """z₀ = 0, which is the true z₀ before the first step.

    Bias: −KL, which grows as the policy moves. Variance: none. Cost: none.
    """

    def estimate(self, batch: Batch, ratios: Tensor, divergence: Tensor | None) -> Tensor:
        return ratios.new_zeros(())

    def forward(self, batch: Batch, policy: LogProbs, reference: Tensor) -> tuple[Tensor, dict[str, Mean]]:
        return reference.new_zeros(()), {}


class Mismatched(ReferencePoint):
    """The paper's estimator (section 4.1): the mean of r(x, y') over the micro-step, where y' answers another prompt.

    Bias: downwards. A KL is a mean over samples of π_θ(·|x); y' is not such a sample, and becomes unlikely as the
    policy learns to answer its prompt. The clamp at 0 turns a part of the noise into an upward bias. Variance: that of
    r(x, y') divided by the examples in the micro-step. Cost: a forward pass of π_θ over y', without gradient.
    """

    needs = Needs(reference=False, mismatched=True, whole_micro_step=True)

    def estimate(self, batch: Batch, ratios: Tensor, divergence: Tensor | None) -> Tensor:
        return _mean(ratios[:, -1], batch.weights)


class Running(ReferencePoint):
    """The mean of r(x, y') over the ``steps`` optimizer steps before this one; 0 in the first step, where r is 0.

    The current step is left out, so that the loss of an example never depends on the other examples of its step.

    Bias: that of :class:`Mismatched`, and a lag: the mean is of policies that are (steps + 1) / 2 steps old on average.
    Variance: that of :class:`Mismatched` divided by ``steps`` while the policy moves little; the clamp acts on the
    mean, not on each step. Cost: that of :class:`Mismatched`.

    Args:
        clamp: see :class:`ReferencePoint`.
        steps: optimizer steps in the mean.

    Attributes:
        sums: (sum, count) of the current step, followed by those of the steps before it, newest first, [steps + 1, 2].
    """

    needs = Needs(reference=False, mismatched=True)
    sums: Tensor

    def __init__(self, *, clamp: bool = True, steps: int = 32) -> None:
        super().__init__(clamp=clamp)
        check_whole("loss.reference_point_steps", steps, 1)
        # A buffer, so that it is saved: a resumed run must continue with the mean that it had.
        self.register_buffer("sums", torch.zeros(steps + 1, 2))

    def estimate(self, batch: Batch, ratios: Tensor, divergence: Tensor | None) -> Tensor:
        # Neither validation counts, nor a second call for the same batch without gradient (rewards under humanline).
        if self.training and torch.is_grad_enabled():
            self.sums[0] += all_sum(_sum_and_count(ratios[:, -1], batch.weights))
        total, count = self.sums[1:].sum(0).to(ratios).unbind()
        return total / count.where(count > 0, 1)

    def end_step(self) -> None:
        # A step with a non-finite loss is skipped, and must not spoil the mean.
        self.sums[0] = self.sums[0].where(self.sums[0].isfinite().all(), 0)
        self.sums.copy_(self.sums.roll(1, 0))
        self.sums[0] = 0


class PerPrompt(ReferencePoint):
    """For each y, the mean of r(x, y) over the other completions of its prompt in the micro-step; 0 if there is none.

    The leave-one-out baseline of RLOO (Ahmadian et al. 2024, arXiv 2402.14740), on the data's completions. All
    completions of a prompt are drawn together, as far as the batch allows. A completion without others has z₀ = 0, also
    in the metric ``z0``. Copies of an example do not count as its others.

    Bias: the mean is over completions of the data (with both labels), not of π_θ. But they answer the prompt, so r has
    the right scale. Variance: that of r(x, y) divided by the number of other completions, which is large for the usual
    one or two. Cost: no forward pass; the host waits for the device once a micro-step.
    """

    needs = Needs(reference=False, grouped=True, whole_micro_step=True)

    def estimate(self, batch: Batch, ratios: Tensor, divergence: Tensor | None) -> Tensor:
        names = [zlib.crc32(name.encode()) for name in batch.ids]
        numbers = torch.stack([ratios[:, 0], _weights(batch, ratios)]).tolist()
        # The other completions may be on other ranks.
        examples = all_gather_list(list(zip(batch.group.tolist(), names, *numbers, strict=True)))
        columns = [*zip(*examples, strict=True)]
        groups, ids = (batch.group.new_tensor(column) for column in columns[:2])
        values, weights = (ratios.new_tensor(column) for column in columns[2:])
        other = (batch.group[:, None] == groups) & (batch.group.new_tensor(names)[:, None] != ids)
        total, count = (other * weights) @ values, (other * weights).sum(1)
        return torch.where(count > 0, total / count.where(count > 0, 1), 0.0).to(ratios)


class TokenDivergence(ReferencePoint):
    """The mean over the micro-step of Σ_t KL(π_θ(·|x, y_<t) ‖ π_ref(·|x, y_<t)), exact at each prefix of the data's y.

    The sequential KL of TDPO (Zeng et al. 2024, arXiv 2404.11999), with the two models in the order of a KL penalty.

    Bias: the prefixes come from the data, not from samples of π_θ. The bias is small if both have the same kind of
    replies, and upwards if the policy has changed most at prefixes that it has learned to avoid. Variance: low, because
    no token is sampled. The estimate is never negative, so the clamp does nothing. Cost: a forward pass of the
    reference in each step (live, or the policy without its adapter), and the logits of both models once more.
    """

    needs = Needs(reference=False, divergence=True, whole_micro_step=True)

    def estimate(self, batch: Batch, ratios: Tensor, divergence: Tensor | None) -> Tensor:
        assert divergence is not None  # the class needs it
        return _mean(divergence[:, 0].sum(-1), batch.weights)


class PolicyKL(ReferencePoint):
    """KL(π_θ ‖ π_ref) itself, of replies that the policy sampled at most ``steps`` optimizer steps ago; 0 before.

    Every ``steps`` steps n replies y ~ π_θ(·|x) are drawn, and z₀ becomes the mean over them of
    Σ_t KL(π_θ(·|x, y_<t) ‖ π_ref(·|x, y_<t)), exact at each position. :class:`halos.training.PolicyPoint` does so.

    Bias: a lag, as the replies are (steps − 1) / 2 steps old on average; and truncated replies lack the divergence of
    their missing tokens. Variance: that of a reply's sum divided by n; an error lasts for ``steps`` steps. The estimate
    is never negative, so the clamp does nothing. Cost: none in most steps; every ``steps`` steps, n replies are decoded
    and both models have a forward pass over them. A cached reference's model is loaded each time.

    Args:
        clamp: see :class:`ReferencePoint`.
        steps: optimizer steps from one refresh to the next.

    Attributes:
        kl: the mean of the last refresh, a scalar.
    """

    needs = Needs(reference=False, samples=True)
    kl: Tensor

    def __init__(self, *, clamp: bool = True, steps: int = 32) -> None:
        super().__init__(clamp=clamp)
        check_whole("loss.reference_point_steps", steps, 1)
        self.steps = steps
        # A buffer, so that it is saved: a resumed run must continue with the value that it had.
        self.register_buffer("kl", torch.zeros(()))

    def estimate(self, batch: Batch, ratios: Tensor, divergence: Tensor | None) -> Tensor:
        return self.kl.to(ratios, copy=True)  # a refresh writes into the buffer

    def refresh(self, kl: float) -> None:
        """Replace the value, by the same number on all ranks."""
        self.kl.fill_(kl)


REFERENCE_POINTS: dict[str, type[ReferencePoint]] = {
    "mismatched": Mismatched,
    "zero": Zero,
    "running": Running,
    "per_prompt": PerPrompt,
    "token": TokenDivergence,
    "policy": PolicyKL,
}
"""The estimators, by their name in ``loss.reference_point``."""


def reference_point(name: str, *, clamp: bool = True, steps: int | None = None) -> ReferencePoint:
    """Make an estimator of z₀.

    Args:
        name: a key of :data:`REFERENCE_POINTS`.
        clamp: take the maximum with 0.
        steps: optimizer steps in the mean of ``running``, or between two refreshes of ``policy``; None: their default.

    Raises:
        ValueError: for another name, and for ``steps`` where they would have no effect.
    """
    check_choice("loss.reference_point", name, REFERENCE_POINTS)
    estimator = REFERENCE_POINTS[name]
    if steps is None:
        return estimator(clamp=clamp)
    if issubclass(estimator, Running | PolicyKL):
        return estimator(clamp=clamp, steps=steps)
    expected = f"expected null with loss.reference_point={name}, found {steps}"
    raise ValueError(f"loss.reference_point_steps: {expected}; only running and policy count steps")


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    # The mean over all ranks. Sum and count travel separately: ranks may hold different numbers of examples.
    total, count = all_sum(_sum_and_count(values, weights)).unbind()
    return total / count


def _sum_and_count(values: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return torch.stack([values.sum(), values.new_full((), len(values))])
    return torch.stack([(weights * values).sum(), weights.sum().to(values)])


def _weights(batch: Batch, like: Tensor) -> Tensor:
    return like.new_ones(len(batch)) if batch.weights is None else batch.weights.to(like)
