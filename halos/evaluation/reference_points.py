"""Measures the estimators of KTO's reference point for one policy, next to the true KL(π_θ ‖ π_ref).

    samples of the policy      → exact divergence at each position, summed → the true KL, with its error
    completions of the data    → log-ratios and divergences of y and y'    → steps of training → each estimator's z₀

The estimators are those of training (:mod:`halos.loop.reference_point`); the policy does not change in the meantime.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from halos.checks import check_whole
from halos.data.batches.batch import Batch, StepSize
from halos.data.batches.collate import collate
from halos.data.batches.order import Division, TrainingOrder
from halos.data.rows.token_rows import Row
from halos.evaluation.statistics import Bootstrap, Estimate
from halos.loop.reference_point import REFERENCE_POINTS, PolicyKL, ReferencePoint, Running, reference_point
from halos.policy.logprobs.completions import LogProbs, completion_logprobs
from halos.policy.logprobs.divergence import ROWS, check_divergence, completion_divergence, divergence_reader
from halos.policy.logprobs.head import HeadOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Track = Callable[[Sequence[int]], Iterable[int]]
"""Iterates over the first rows of batches and shows progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """The steps whose z₀ are measured.

    Attributes:
        steps: how many there are.
        batch_size: examples in each.
        seed: the seed of their order.
        point_steps: the steps in the mean of ``running``, and from one refresh of ``policy`` to the next.
        refresh_size: the replies of a refresh.
    """

    steps: int = 200
    batch_size: int = 8
    seed: int = 0
    point_steps: int = 32
    refresh_size: int = 64

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "point_steps", "refresh_size"):
            check_whole(name, getattr(self, name), 1)
        check_whole("seed", self.seed, 0)


@dataclass(frozen=True, slots=True)
class BranchScores:
    """What the two models say of n rows with K branches.

    Attributes:
        ratios: log π_θ − log π_ref of each branch, [n, K].
        divergence: the divergence at each position, summed over the branch, [n, K].
        policy_seconds, reference_seconds, divergence_seconds: the time that each part took.
    """

    ratios: Tensor
    divergence: Tensor
    policy_seconds: float
    reference_seconds: float
    divergence_seconds: float


@dataclass(frozen=True, slots=True)
class Replies:
    """Replies of the policy, drawn apart from those of the true KL.

    Attributes:
        divergence: the divergence summed over each, [n].
        seconds: the time that sampling and scoring them took.
    """

    divergence: Tensor
    seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """One estimator at one batch size.

    Attributes:
        name: of the estimator.
        z0: the mean of z₀, over examples and steps.
        raw: the mean before the clamp at 0.
        bias: ``z0`` less the true KL.
        deviation: the standard deviation of z₀ over examples and steps.
        error: the root of the mean squared difference from the true KL.
        positive: the share of examples whose z₀ is above 0.
        seconds: what a step pays for it, besides its other work.
    """

    name: str
    z0: float
    raw: float
    bias: float
    deviation: float
    error: float
    positive: float
    seconds: float


@torch.no_grad()
def score_rows(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    rows: Sequence[Row],
    *,
    batch_size: int = 32,
    track: Track = iter,
) -> BranchScores:
    """Compute log-ratios and exact divergences of all branches of the rows, by the code that trains.

    Args:
        policy: π_θ.
        reference: π_ref.
        rows: tokens of prompts and completions.
        batch_size: rows in one forward.
        track: iterates over the batches.
    """
    for model in (policy, reference):
        check_divergence(model)
    options, clock = HeadOptions(chunk_rows=ROWS, with_states=True), np.zeros(3)
    parts: list[tuple[Tensor, Tensor]] = []
    for start in track(range(0, len(rows), batch_size)):
        batch = collate(rows[start : start + batch_size]).to(policy.device)
        times = [_now(policy.device)]
        ours = completion_logprobs(policy, batch, options)
        times.append(_now(policy.device))
        theirs = completion_logprobs(reference, batch, options)
        times.append(_now(policy.device))
        policy_reader = divergence_reader(policy, ours)
        reference_reader = divergence_reader(reference, theirs)
        divergence = completion_divergence(ours.mask, policy_reader, reference_reader).sum(-1)
        parts.append(((ours.sum - theirs.sum).cpu(), divergence.cpu()))
        times.append(_now(policy.device))
        clock += np.diff(times)
    ratios, divergences = (torch.cat(column).double() for column in zip(*parts, strict=True))
    return BranchScores(ratios, divergences, *clock.tolist())


def _now(device: torch.device) -> float:
    if device.type == "cuda":  # kernels run on after the call that started them has returned
        torch.cuda.synchronize(device)
    return time.perf_counter()


def true_kl(scored: BranchScores, groups: Sequence[int], bootstrap: Bootstrap) -> Estimate:
    """KL(π_θ ‖ π_ref) in nats per completion, from rows whose branch is a sample of the policy."""
    return bootstrap.mean(scored.divergence[:, 0].numpy(), groups)


def measure(
    scored: BranchScores, rows: Sequence[Row], replies: Replies, kl: float, simulation: Simulation
) -> list[Measured]:
    """Measure every estimator on steps of training.

    Args:
        scored: of the rows; y is branch 0, y' branch 1.
        rows: their ids and groups.
        replies: of which each refresh of ``policy`` takes some.
        kl: the true KL.
        simulation: the steps.
    """
    # A step of training computes y under both models anyway: only what comes on top of it counts.
    share = simulation.batch_size / len(rows)
    mismatched = share * scored.policy_seconds / 2
    token_seconds = share * (scored.reference_seconds + scored.divergence_seconds) / 2
    refresh = replies.seconds * simulation.refresh_size / len(replies.divergence)
    seconds = {"mismatched": mismatched, "running": mismatched, "token": token_seconds}
    seconds["policy"] = refresh / simulation.point_steps
    measured = []
    for name in REFERENCE_POINTS:
        raw = _points(name, scored, rows, simulation, replies)
        clamped = raw.clamp(min=0)
        error = math.sqrt(float(((clamped - kl) ** 2).mean()))
        z0 = float(clamped.mean())
        spread = float(clamped.std(correction=0)), error, float((clamped > 0).double().mean())
        measured.append(Measured(name, z0, float(raw.mean()), z0 - kl, *spread, seconds.get(name, 0.0)))
    return measured


def _points(name: str, scored: BranchScores, rows: Sequence[Row], simulation: Simulation, replies: Replies) -> Tensor:
    # z₀ of every example of every step before the clamp, [steps × batch_size].
    counts_steps = issubclass(REFERENCE_POINTS[name], Running | PolicyKL)
    point = reference_point(name, clamp=False, steps=simulation.point_steps if counts_steps else None).double()
    # The running mean is measured once it is full.
    warm_up = simulation.point_steps if isinstance(point, Running) else 0
    division = Division(batch_size=simulation.batch_size, steps=simulation.steps + warm_up, seed=simulation.seed)
    together = None if point.needs.grouped else 2
    order = TrainingOrder(len(rows), division, groups=np.array([row.group for row in rows]), together=together)
    generator, steps = torch.Generator().manual_seed(simulation.seed), []
    for micro in order:
        if isinstance(point, PolicyKL):
            # The policy stands still, so it is refreshed in each step: its spread is that over refreshes.
            drawn = torch.randint(len(replies.divergence), (simulation.refresh_size,), generator=generator)
            point.refresh(float(replies.divergence[drawn].mean()))
        steps.append(_step(point, scored, rows, micro.rows))
    return torch.cat(steps[warm_up:])


def _step(point: ReferencePoint, scored: BranchScores, rows: Sequence[Row], chosen: Sequence[int]) -> Tensor:
    chosen_rows, size = [rows[index] for index in chosen], len(chosen)
    group, index = torch.tensor([row.group for row in chosen_rows]), torch.tensor(chosen)
    # Each branch is written as one token, as only sums are read.
    ratios, divergence = scored.ratios[index][..., None], scored.divergence[index][..., None]
    mask = torch.ones_like(ratios, dtype=torch.bool)
    batch = Batch(tuple(row.id for row in chosen_rows), mask, group, StepSize(size, (size, size)))
    z0, _ = point(batch, LogProbs(ratios, mask, divergence=divergence), torch.zeros(size, 2).double())
    point.end_step()
    return torch.as_tensor(z0).expand(size)
