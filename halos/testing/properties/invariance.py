"""Promises about what must not change the result: order, padding, shared prompts and the split of a step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from halos.data.batches.batch import StepSize
from halos.data.batches.collate import collate, step_size
from halos.data.rows.token_rows import Row
from halos.testing.examples import Make, Result, evaluate, loss_of, make_inputs, make_objective, mapped
from halos.testing.promises import NotApplicable, agree, agree_on_gradients, agree_on_means, promise
from halos.testing.ranks import on_ranks

REPEATED = 1e-10
"""Tolerance for weights against repeated examples."""


@promise("row order", 2, 3, 4, 6)
def row_order(make: Make, rows: Sequence[Row]) -> None:
    """The order of examples in a batch changes nothing."""
    objective = make_objective(make)
    expected = evaluate(objective, make_inputs(objective, rows))
    # A rotation too: reversing leaves the middle of an odd batch in place, and neighbours next to each other.
    for order in (list(reversed(rows)), [*rows[1:], rows[0]]):
        actual = evaluate(make_objective(make), make_inputs(objective, order))
        agree("loss", expected.loss, actual.loss)
        agree_on_gradients("other order", expected, actual)
        agree_on_means(expected, [actual])


@promise("padding", 1, 2, 4)
def padding(make: Make, rows: Sequence[Row]) -> None:
    """Padding changes nothing, with the policy at the reference and away from it."""
    objective = make_objective(make)
    for at_reference in (False, True):
        expected = evaluate(make_objective(make), make_inputs(objective, rows, at_reference=at_reference))
        wide = make_inputs(objective, rows, at_reference=at_reference, wider=3)
        actual = evaluate(make_objective(make), wide)
        agree("loss with 3 more columns of padding", expected.loss, actual.loss)
        agree_on_gradients("3 more columns of padding", expected, actual)
        agree_on_means(expected, [actual])


@promise("prompt sharing", 2, 4)
def prompt_sharing(make: Make, rows: Sequence[Row]) -> None:
    """Packed rows that share prompts give the loss and the model's gradients of separate rows."""
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    for packing in (False, True):
        objective = make_objective(make, moved=True)
        needs = objective.needs
        batch = collate(rows, mismatched=needs.mismatched, packing=packing, last_hidden=needs.last_hidden)
        loss = loss_of(objective.compute_batch(batch)[0])
        torch.autograd.backward(loss)
        gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    (expected_loss, expected), (packed_loss, packed) = results
    agree("loss", expected_loss, packed_loss)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        # The tolerance is that of float32, in which transformers computes norms whatever the model's precision.
        agree(f"gradient of {name}", gradient / largest, packed[name] / largest, tolerance=1e-6)


@promise("accumulation", 1, 2, 4)
def accumulation(make: Make, rows: Sequence[Row]) -> None:
    """Accumulated micro-batches give the gradient of one large batch."""
    objective = make_objective(make)
    if objective.needs.whole_step:
        raise NotApplicable("declares that its steps cannot be accumulated")
    # A statistic of the micro-batch, such as z₀, equals that of the whole step only if both halves are alike.
    # A mean over the micro-batch's tokens in place of the step's only shows if the micro-batches differ in length.
    twins = objective.needs.whole_micro_step
    copies = [mapped(row, lambda one: replace(one, id=f"{one.id} again", group=one.group + 1000)) for row in rows]
    parts = [rows, copies if twins else [mapped(row, _longer) for row in copies]]
    step = step_size([*parts[0], *parts[1]])
    step_result = _evaluate_as(make, [*parts[0], *parts[1]], step, twins)
    results = [_evaluate_as(make, part, step, twins) for part in parts]
    agree("sum of the micro-batches' losses", step_result.loss, _total_loss(results))
    for result in results:
        agree_on_gradients("one of the micro-batches", step_result, result)


@promise("ranks", 2, 4)
def ranks(make: Make, rows: Sequence[Row]) -> None:
    """Two ranks give the loss and gradient of one device with all examples."""
    one_device, parts = _on_two_ranks(make, rows)
    agree("sum of the ranks' losses", one_device.loss, _total_loss(parts))
    for part in parts:
        agree_on_gradients("one of the ranks", one_device, part)


@promise("metrics", 2, 4)
def metrics(make: Make, rows: Sequence[Row]) -> None:
    """Sums and counts of metrics add up over ranks to those of one device."""
    one_device, parts = _on_two_ranks(make, rows)
    agree_on_means(one_device, parts)


@promise("weights", 2, 4)
def weights(make: Make, rows: Sequence[Row]) -> None:
    """Whole-number weights give the loss, gradients and metrics of examples repeated that often, their y' with them."""
    weighted = [_weighing(row, float(weight)) for row, weight in zip(rows, cycle((2, 1, 3)), strict=False)]
    step, repeated_step = step_size(weighted), step_size(_repeated(weighted))
    half = len(rows) // 2
    halves = [weighted[:half], weighted[half:]]
    splits = {"one micro-batch": ([weighted], _in_turn), "two ranks": (halves, on_ranks)}
    if not make_objective(make).needs.whole_step:
        splits["accumulated micro-batches"] = (halves, _in_turn)
    for name, (parts, run) in splits.items():
        expected = _evaluate_parts(make, [_repeated(part) for part in parts], repeated_step, run)
        actual = _evaluate_parts(make, parts, step, run)
        for part, repeated, one in zip(parts, expected, actual, strict=True):
            agree(f"loss of {name} with weights", repeated.loss, one.loss, tolerance=REPEATED)
            # The copies of an example have the same gradient each.
            repeated.gradients = {row.id: row.weight * repeated.gradients[row.id] for row in part}
            agree_on_gradients(f"{name} with weights", repeated, one, tolerance=REPEATED)
            agree_on_means(repeated, [one])


# Ways to split a step


def _repeated(rows: Sequence[Row]) -> list[Row]:
    return [_weighing(row, 1.0) for row in rows for _ in range(int(row.weight))]


def _weighing(row: Row, weight: float) -> Row:
    return mapped(row, partial(replace, weight=weight))


def _in_turn(functions: Sequence[Callable[[], Result]]) -> list[Result]:
    return [function() for function in functions]


def _evaluate_parts(
    make: Make, parts: Sequence[Sequence[Row]], step: StepSize, run: Callable[..., list[Result]]
) -> list[Result]:
    shared = make_objective(make)
    prepared = []
    for part in parts:
        # Ranks have an objective each, as in a run: running statistics of one must not reach the other but by
        # collectives. Micro-batches share one, whose running statistics go on from part to part.
        objective = shared if run is _in_turn else make_objective(make)
        prepared.append(partial(evaluate, objective, make_inputs(objective, part, step=step)))
    return run(prepared)


def _total_loss(parts: Sequence[Result]) -> Tensor:
    return torch.stack([part.loss for part in parts]).sum()


def _longer(row: Row) -> Row:
    return replace(row, branches=tuple((*branch, 1, 2, 3) for branch in row.branches))


def _evaluate_as(make: Make, rows: Sequence[Row], step: StepSize, twins: bool) -> Result:
    # With ``twins`` a row and its renamed copy have the same log-probs.
    objective = make_objective(make)
    plain = [mapped(row, lambda one: replace(one, id=one.id.removesuffix(" again"))) for row in rows] if twins else rows
    inputs = make_inputs(objective, plain, step=step)
    inputs.rows = rows
    return evaluate(objective, inputs)


def _on_two_ranks(make: Make, rows: Sequence[Row]) -> tuple[Result, list[Result]]:
    step = step_size(rows)
    objective = make_objective(make)
    one_device = evaluate(objective, make_inputs(objective, rows, step=step))
    half = len(rows) // 2
    return one_device, _evaluate_parts(make, [rows[:half], rows[half:]], step, on_ranks)
