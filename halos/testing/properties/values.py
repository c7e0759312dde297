"""Promises about what an objective computes: shapes, values, signs, gradients and precision."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from halos.data.rows.token_rows import Row
from halos.loop.policy_weights import PolicyWeights
from halos.loop.reference_point import ReferencePoint
from halos.objectives.base import Objective
from halos.testing.examples import Make, evaluate, loss_of, make_inputs, make_objective, tiny_rows
from halos.testing.promises import EXACT, NotApplicable, Violation, agree, finite, promise

T = TypeVar("T")


@promise("shapes", 1, 2, 3, 4, 6)
def shapes(make: Make, rows: Sequence[Row]) -> None:
    """Loss terms are sums with the count of the whole step, and rewards have one row for each example."""
    objective = make_objective(make)
    inputs = make_inputs(objective, rows)
    output = objective.compute(inputs.batch, inputs.policy, inputs.reference)
    if not output.loss:
        raise Violation("expected at least one loss term, found none")
    for name, term in output.loss.items():
        if not isinstance(term.total, Tensor) or term.total.ndim:
            raise Violation(f"loss term {name!r}: expected a scalar tensor, found {term.total!r}")
        if not term.step_count:
            raise Violation(f"loss term {name!r}: expected the count of the whole step, found {term.step_count!r}")
    if output.rewards is not None:
        agree("number of rows of rewards [B, K]", len(inputs.batch.view(output.view)), len(output.rewards))
        agree("dimensions of rewards [B, K]", 2, output.rewards.ndim)


@promise("step 0", 1, 2, 4)
def step_zero(make: Make, rows: Sequence[Row]) -> None:
    """Where the policy equals the reference, rewards are 0, and the loss is finite and continuous."""
    objective = make_objective(make)
    result = evaluate(objective, make_inputs(objective, rows, at_reference=True))
    if objective.needs.reference and result.output.rewards is not None and objective.needs.moves != (0, 0):
        agree("rewards", torch.zeros(result.output.rewards.shape), result.output.rewards.detach(), tolerance=EXACT)
    finite(result)
    # A loss that divides by a deviation may be finite at 0 and jump next to it.
    nearby = evaluate(make_objective(make), make_inputs(objective, rows, at_reference=True, shift=1e-9))
    agree("loss with log-ratios of 1e-9, against exactly 0", result.loss, nearby.loss, tolerance=1e-6)


@promise("signs", 2, 4, 6)
def signs(make: Make, rows: Sequence[Row]) -> None:
    """The first step raises log π of desirable completions and lowers that of undesirable ones (or as declared)."""
    objective = make_objective(make)
    if objective.needs.moves == (0, 0):
        raise NotApplicable("declares that it does not move log-probs")
    result = evaluate(objective, make_inputs(objective, rows, at_reference=True))
    slopes: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        sides = (True, False) if "pairs" in objective.view else (row.desirable is not False,)
        for side, gradient in zip(sides, result.gradients[row.id], strict=False):
            # A step follows the negative gradient.
            slopes[side].append(-float(gradient.sum()))
    desirable, undesirable = objective.needs.moves
    for side, direction, word in ((True, desirable, "desirable"), (False, undesirable, "undesirable")):
        if direction is None:
            continue
        wrong = [s for s in slopes[side] if abs(s - direction * abs(s)) > EXACT]
        if wrong or (direction and slopes[side] and not any(slopes[side])):
            expected = {1: "above 0", -1: "below 0", 0: "of 0"}[direction]
            raise Violation(f"log π of {word} completions: expected a push {expected}, found {slopes[side]}")


@promise("gradient", 1, 2, 4)
def gradient(make: Make, rows: Sequence[Row]) -> None:
    """The gradient equals finite differences of the loss in float64, and is 0 for mismatched completions."""
    # In eval mode running statistics, such as BCO's δ, stay fixed between the many evaluations below.
    objective = make_objective(make).eval()
    if objective.needs.moves == (0, 0):
        raise NotApplicable("declares that it does not move log-probs")
    # Nor do reference points and weights by the policy move, as no gradient flows into them.
    for module in objective.modules():
        if isinstance(module, ReferencePoint | PolicyWeights):
            module.forward = _fixed(module.forward)  # type: ignore[method-assign, assignment]
    inputs = make_inputs(objective, rows)
    tokens, row = inputs.policy.tokens.detach(), rows[0]
    trained = len(row.branches) - (row.mismatched if row.views else objective.needs.mismatched)
    mismatched = tokens[:, trained:]

    def loss(trained_tokens: Tensor) -> Tensor:
        inputs.policy.tokens = torch.cat([trained_tokens, mismatched], dim=1)
        return loss_of(objective.compute(inputs.batch, inputs.policy, inputs.reference))

    trained_tokens = tokens[:, :trained].clone().requires_grad_()
    value = loss(trained_tokens)
    if not value.requires_grad:
        raise Violation("expected a loss that depends on the policy's log-probs, found one that does not")
    (analytic,) = torch.autograd.grad(value, [trained_tokens])
    for index in inputs.batch.mask[:, :trained].nonzero():
        place = tuple(index.tolist())
        high, low = trained_tokens.detach().clone(), trained_tokens.detach().clone()
        high[place] += 1e-6
        low[place] -= 1e-6
        numeric = (loss(high) - loss(low)) / 2e-6
        agree(f"gradient of {rows[place[0]].id}, token {place[1:]}", numeric, analytic[place], tolerance=1e-6)
    if objective.needs.mismatched:
        full = evaluate(make_objective(make), make_inputs(objective, rows)).gradients
        sizes = torch.stack([gradients[trained:].abs().sum() for gradients in full.values()])
        agree("gradient of mismatched completions", torch.zeros(len(rows)), sizes, tolerance=EXACT)


def _fixed(function: Callable[..., T]) -> Callable[..., T]:
    # Returns the result of its first call in every call.
    results: list[T] = []

    def first_result(*args: object) -> T:
        if not results:
            results.append(function(*args))
        return results[0]

    return first_result


def _one_sided(objective: Objective) -> list[list[Row]]:
    return [tiny_rows(objective, size, labels=[label] * size) for size in (1, 3) for label in (True, False)]


@promise("one-sided batches", batches=_one_sided)
def one_sided(make: Make, rows: Sequence[Row]) -> None:
    """A batch with one kind of completion, or with one example, has finite loss, gradient and metrics."""
    objective = make_objective(make)
    finite(evaluate(objective, make_inputs(objective, rows)))


@promise("precision", 1, 4)
def precision(make: Make, rows: Sequence[Row]) -> None:
    """The loss from float32 log-probs is that from float64; from half-precision ones it is finite and close."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        objective = make_objective(make)
        rounded = make_inputs(objective, rows, dtype=dtype)
        # Rounding the inputs is not the objective's fault: the float64 loss is that of the rounded log-probs.
        exact = make_inputs(objective, rows)
        for double, low in ((exact.policy, rounded.policy), (exact.reference, rounded.reference)):
            if double is not None and low is not None:
                double.tokens = low.tokens.detach().double()
        expected = loss_of(objective.compute(exact.batch, exact.policy, exact.reference))
        actual = loss_of(make_objective(make, dtype=dtype).compute(rounded.batch, rounded.policy, rounded.reference))
        agree(f"loss from {dtype} log-probs", expected.detach(), actual.detach(), tolerance=tolerance)
