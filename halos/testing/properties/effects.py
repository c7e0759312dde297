"""What a step leaves behind, and what parameters and saved state do."""

from __future__ import annotations

import inspect
import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.objectives.base import Objective
from halos.testing.examples import Inputs, Make, ask, loss_of, make_inputs, make_objective
from halos.testing.promises import NotApplicable, Violation, agree, promise, same_means


@promise("frozen reference", 2)
def frozen_reference(make: Make, rows: Sequence[Row]) -> None:
    """A training step changes the policy, and leaves the reference without gradient as it was."""
    objective = make_objective(make, moved=True)
    if not objective.needs.reference:
        raise NotApplicable("has no reference")
    reference: Any = objective.trained.reference
    before = [weight.clone() for weight in reference.parameters()]
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    output, _ = objective._evaluate(collate(rows, mismatched=objective.needs.mismatched))
    loss_of(output).backward()
    optimizer.step()
    for (name, weight), old in zip(reference.named_parameters(), before, strict=True):
        if weight.grad is not None or weight.requires_grad:
            raise Violation(
                f"reference weight {name}: expected no gradient, found requires_grad={weight.requires_grad}"
            )
        agree(f"reference weight {name} after a step", old, weight, tolerance=0.0)


@promise("inputs untouched", 2)
def inputs_untouched(make: Make, rows: Sequence[Row]) -> None:
    """The batch and the log-probs are as they were."""
    objective = make_objective(make)
    inputs = make_inputs(objective, rows)
    before = {name: (value, value.detach().clone()) for name, value in _tensors(inputs).items()}
    ask(objective, inputs)
    for name, value in _tensors(inputs).items():
        same, old = before[name]
        if value is not same:
            raise Violation(f"{name}: expected the batch's own tensor, found another in its place")
        agree(name, old, value.detach(), tolerance=0.0)


@promise("parameters", 4)
def parameters(make: Make, rows: Sequence[Row]) -> None:
    """Each numeric parameter of the constructor has an effect."""
    objective = make_objective(make)
    plain = _fingerprint(make, rows)
    shared = inspect.signature(Objective.__init__).parameters
    for parameter in inspect.signature(type(objective).__init__).parameters.values():
        value = _current(make, parameter)
        if isinstance(value, int | float) and parameter.name not in shared:
            fingerprints = [_fingerprint(make, rows, **{parameter.name: other}) for other in _nudged(value)]
            if all(found in (None, plain) for found in fingerprints):
                raise Violation(f"{parameter.name} = {value}: expected an effect on loss or gradient, found none")


@promise("state", 2)
def state(make: Make, rows: Sequence[Row]) -> None:
    """What an objective remembers between steps is in its state dict, which needs no pickle."""
    objective = make_objective(make)
    for shift in (0.1, -0.2):
        ask(objective, make_inputs(objective, rows, at_reference=True, shift=shift))
    buffer = io.BytesIO()
    torch.save(objective.state_dict(), buffer)
    buffer.seek(0)
    restored = make_objective(make)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    expected = ask(objective, make_inputs(objective, rows))
    found = ask(restored, make_inputs(objective, rows))
    agree("loss after restoring", expected.loss, found.loss, tolerance=0.0)
    same_means(expected, [found])


# Ways to look at an objective from outside


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    found = {"batch.mask": inputs.batch.mask, "batch.group": inputs.batch.group, "policy.tokens": inputs.policy.tokens}
    if inputs.batch.desirable is not None:
        found["batch.desirable"] = inputs.batch.desirable
    if inputs.reference is not None:
        found["reference.tokens"] = inputs.reference.tokens
    if inputs.policy.hidden is not None:
        found["policy.hidden"] = inputs.policy.hidden
    return found


def _current(make: Make, parameter: inspect.Parameter) -> Any:
    given = make.keywords.get(parameter.name, parameter.default) if isinstance(make, partial) else parameter.default
    return None if isinstance(given, bool) else given


def _nudged(value: float) -> list[float]:
    if isinstance(value, int):
        return [value + 1, value - 1]
    return [value * 1.3 + 0.07, value * 0.7, value - 0.07]


def _fingerprint(make: Make, rows: Sequence[Row], **changed: Any) -> Any:
    # None where the parameter's own check refuses the value.
    try:
        objective = make_objective(make, **changed)
    except ValueError:
        return None
    answers = [
        ask(objective, make_inputs(objective, rows, at_reference=at_reference)) for at_reference in (False, True)
    ]
    numbers = [(float(a.loss), [g.tolist() for g in a.gradients.values()], a.means) for a in answers]
    return repr((numbers, objective.own_clip))
