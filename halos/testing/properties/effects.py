"""Promises about the effects of a step, of the constructor's parameters and of restored state."""

import inspect
import io
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from halos.checks import is_number
from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.objectives.base import Objective
from halos.testing.examples import Inputs, Make, Result, evaluate, loss_of, make_inputs, make_objective
from halos.testing.promises import EXACT, NotApplicable, Violation, agree, agree_on_gradients, agree_on_means, promise


@promise("frozen reference", 2)
def frozen_reference(make: Make, rows: Sequence[Row]) -> None:
    """A training step leaves the reference unchanged and without gradient."""
    objective = make_objective(make, moved=True)
    if not objective.needs.reference:
        raise NotApplicable("has no reference")
    reference = objective.trained.reference
    assert reference is not None  # the kit's backbone has one
    before = [weight.clone() for weight in reference.parameters()]
    # All parameters, also those that the loop would leave out: a reference among them must get no gradient.
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    output, _ = objective.compute_batch(collate(rows, mismatched=objective.needs.mismatched))
    torch.autograd.backward(loss_of(output))
    optimizer.step()
    for (name, weight), old in zip(reference.named_parameters(), before, strict=True):
        if weight.grad is not None or weight.requires_grad:
            raise Violation(f"reference weight {name}: expected no gradient, found one")
        agree(f"reference weight {name} after a step", old, weight, tolerance=0.0)


@promise("inputs untouched", 2)
def inputs_untouched(make: Make, rows: Sequence[Row]) -> None:
    """An objective changes neither the batch nor the log-probs."""
    objective = make_objective(make)
    inputs = make_inputs(objective, rows)
    before = {name: (value, value.detach().clone()) for name, value in _tensors(inputs).items()}
    evaluate(objective, inputs)
    for name, value in _tensors(inputs).items():
        original, old = before[name]
        if value is not original:
            raise Violation(f"{name}: expected the tensor that was passed, found another in its place")
        agree(name, old, value.detach(), tolerance=0.0)


@promise("parameters", 4)
def parameters(make: Make, rows: Sequence[Row]) -> None:
    """Each numeric parameter of the constructor changes the loss or its gradient."""
    objective = make_objective(make)
    plain = _fingerprint(make, rows)
    shared = inspect.signature(Objective.__init__).parameters
    changed = make.keywords if isinstance(make, partial) else {}
    for parameter in inspect.signature(type(objective).__init__).parameters.values():
        value = changed.get(parameter.name, parameter.default)
        if is_number(value) and parameter.name not in shared:
            fingerprints = [_fingerprint(make, rows, **{parameter.name: other}) for other in _nudged(value)]
            if all(fingerprint in (None, plain) for fingerprint in fingerprints):
                raise Violation(f"{parameter.name} = {value}: expected an effect on loss or gradient, found none")


@promise("margins", 2, 4)
def margins(make: Make, rows: Sequence[Row]) -> None:
    """Each pair's margin counts for its own loss, by ``margin_weight``: more costs more, 0 and no weight are alike."""
    objective = make_objective(make)
    if "margin_weight" not in inspect.signature(type(objective).__init__).parameters:
        raise NotApplicable("takes no margins")

    def loss(margins: Sequence[float | None], weight: float, *, at_reference: bool = False) -> Result:
        changed = [replace(row, margin=margin) for row, margin in zip(rows, margins, strict=True)]
        loss_objective = make_objective(make, margin_weight=weight)
        return evaluate(loss_objective, make_inputs(loss_objective, changed, at_reference=at_reference))

    row_margins = [1.0 if row.margin is None else row.margin for row in rows]
    plain, weighted = loss([None] * len(rows), 0.0), loss(row_margins, 0.5)
    agree("loss with margins of weight 0", plain.loss, loss(row_margins, 0.0).loss, tolerance=EXACT)
    agree("loss with margins of 0", plain.loss, loss([0.0] * len(rows), 0.5).loss, tolerance=EXACT)
    agree(
        "loss with margins twice as large of half the weight",
        weighted.loss,
        loss([2 * m for m in row_margins], 0.25).loss,
    )
    rest = loss([0.0, *row_margins[1:]], 0.5)
    del rest.gradients[rows[0].id]
    agree_on_gradients("another pair without its margin", weighted, rest)
    low, high = (loss(margins, 0.5, at_reference=True).loss for margins in ([0.0] * len(rows), row_margins))
    if not low < high:
        raise Violation(f"loss with margins above 0: expected more than {low:.12g}, found {high:.12g}")


@promise("state", 2)
def state(make: Make, rows: Sequence[Row]) -> None:
    """What an objective remembers between steps is in its state dict, which loads without pickle."""
    objective = make_objective(make)
    for shift in (0.1, -0.2):
        evaluate(objective, make_inputs(objective, rows, at_reference=True, shift=shift))
    # Through a file, like a checkpoint: this shows state that is not a tensor, or that only pickle can restore.
    buffer = io.BytesIO()
    torch.save(objective.state_dict(), buffer)
    buffer.seek(0)
    restored = make_objective(make)
    restored.load_state_dict(torch.load(buffer, weights_only=True))  # noqa: TID251 (written above)
    expected = evaluate(objective, make_inputs(objective, rows))
    actual = evaluate(restored, make_inputs(objective, rows))
    agree("loss after restoring", expected.loss, actual.loss, tolerance=0.0)
    agree_on_means(expected, [actual])


# What an objective does, seen from outside


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    tensors = {
        "batch.mask": inputs.batch.mask,
        "batch.group": inputs.batch.group,
        "batch.desirable": inputs.batch.desirable,
        "policy.tokens": inputs.policy.tokens,
        "policy.hidden": inputs.policy.hidden,
        "reference.tokens": None if inputs.reference is None else inputs.reference.tokens,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _nudged(value: float) -> list[float]:
    # In both directions, as one may be out of the parameter's range; the constant moves a 0.
    if isinstance(value, int):
        return [value + 1, value - 1]
    return [value * 1.3 + 0.07, value * 0.7, value - 0.07]


def _fingerprint(make: Make, rows: Sequence[Row], **changed: float) -> str | None:
    # None if the constructor refuses the value.
    try:
        objective = make_objective(make, moved=False, dtype=torch.float64, **changed)
    except ValueError:
        return None
    inputs = [make_inputs(objective, rows, at_reference=at_reference) for at_reference in (False, True)]
    results = [evaluate(objective, each) for each in inputs]
    numbers = [(float(r.loss), [g.tolist() for g in r.gradients.values()], r.means) for r in results]
    return repr((numbers, objective.own_clip))
