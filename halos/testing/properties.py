"""What every objective promises, each promise a function that raises :class:`Violation` where it is broken."""

from __future__ import annotations

import inspect
import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from halos.data.batches import collate, step_size
from halos.data.rows import Row
from halos.objectives.base import Objective
from halos.testing.examples import Answer, Inputs, Make, ask, loss_of, make_inputs, make_objective, tiny_rows
from halos.testing.promises import (
    EXACT,
    NotApplicable,
    Violation,
    agree,
    agree_on_gradients,
    finite,
    promise,
    same_means,
)
from halos.testing.ranks import on_ranks


def _one_sided(objective: Objective) -> list[list[Row]]:
    return [tiny_rows(objective, size, labels=[label] * size) for size in (1, 3) for label in (True, False)]


@promise("shapes", 1, 2, 3, 4, 6)
def shapes(make: Make, rows: Sequence[Row]) -> None:
    """Loss terms are sums over examples or tokens with the count of the whole step; rewards have one row an example."""
    objective = make_objective(make)
    output = ask(objective, make_inputs(objective, rows)).output
    if not output.loss:
        raise Violation("expected at least one loss term, found none")
    for name, term in output.loss.items():
        if not isinstance(term.total, Tensor) or term.total.ndim:
            raise Violation(f"loss term {name!r}: expected a scalar tensor, found {term.total!r}")
        if not term.step_count:
            raise Violation(f"loss term {name!r}: expected the count of the whole step, found {term.step_count!r}")
    if output.rewards is not None:
        agree("number of rows of rewards [B, K]", len(rows), len(output.rewards))
        agree("dimensions of rewards [B, K]", 2, output.rewards.ndim)


@promise("step 0", 1, 2, 4)
def step_zero(make: Make, rows: Sequence[Row]) -> None:
    """Where policy and reference agree, rewards are 0, and loss and gradient are finite and continuous."""
    objective = make_objective(make)
    answer = ask(objective, make_inputs(objective, rows, at_reference=True))
    if objective.needs_reference and answer.output.rewards is not None and objective.moves != (0, 0):
        agree("rewards", torch.zeros(answer.output.rewards.shape), answer.output.rewards.detach(), tolerance=EXACT)
    finite(answer)
    beside = ask(make_objective(make), make_inputs(objective, rows, at_reference=True, shift=1e-9))
    agree("loss with log-ratios of 1e-9, against exactly 0", answer.loss, beside.loss, tolerance=1e-6)


@promise("signs", 2, 4, 6)
def signs(make: Make, rows: Sequence[Row]) -> None:
    """The first step raises log π of desirable completions and lowers that of undesirable ones (or as declared)."""
    objective = make_objective(make)
    if objective.moves == (0, 0):
        raise NotApplicable("declares that it does not move log-probs")
    answer = ask(objective, make_inputs(objective, rows, at_reference=True))
    slopes: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        sides = (True, False) if objective.view == "pairs" else (row.desirable is not False,)
        for side, gradient in zip(sides, answer.gradients[row.id], strict=False):
            slopes[side].append(-float(gradient.sum()))
    for side, direction, word in ((True, objective.moves[0], "desirable"), (False, objective.moves[1], "undesirable")):
        wrong = [s for s in slopes[side] if abs(s - direction * abs(s)) > EXACT]
        if wrong or (direction and slopes[side] and not any(slopes[side])):
            expected = {1: "above 0", -1: "below 0", 0: "of 0"}[direction]
            raise Violation(f"log π of {word} completions: expected a push {expected}, found {slopes[side]}")


@promise("gradient", 1, 2, 4)
def gradient(make: Make, rows: Sequence[Row]) -> None:
    """In float64 the gradient is that of the loss, by finite differences; none flows into mismatched completions."""
    objective = make_objective(make).eval()
    if objective.moves == (0, 0):
        raise NotApplicable("declares that it does not move log-probs")
    inputs = make_inputs(objective, rows)
    tokens, trained = inputs.leaves[0].detach(), len(rows[0].branches) - objective.mismatched
    rest = tokens[:, trained:]

    def loss(own: Tensor) -> Tensor:
        inputs.policy.tokens = torch.cat([own, rest], dim=1)
        return loss_of(objective.compute(inputs.batch, inputs.policy, inputs.reference))

    own = tokens[:, :trained].clone().requires_grad_()
    value = loss(own)
    if not value.requires_grad:
        raise Violation("expected a loss that depends on the policy's log-probs, found one that does not")
    (analytic,) = torch.autograd.grad(value, [own])
    for index in inputs.batch.mask[:, :trained].nonzero():
        place = tuple(index.tolist())
        high, low = own.detach().clone(), own.detach().clone()
        high[place] += 1e-6
        low[place] -= 1e-6
        numeric = (loss(high) - loss(low)) / 2e-6
        agree(f"gradient of {rows[place[0]].id}, token {place[1:]}", numeric, analytic[place], tolerance=1e-6)
    if objective.mismatched:
        full = ask(make_objective(make), make_inputs(objective, rows)).gradients
        found = torch.stack([gradients[trained:].abs().sum() for gradients in full.values()])
        agree("gradient of mismatched completions", torch.zeros(len(rows)), found, tolerance=EXACT)


@promise("row order", 2, 3, 4, 6)
def row_order(make: Make, rows: Sequence[Row]) -> None:
    """The order of examples in a batch changes nothing."""
    objective = make_objective(make)
    expected = ask(objective, make_inputs(objective, rows))
    for order in (list(reversed(rows)), [*rows[1:], rows[0]]):
        found = ask(make_objective(make), make_inputs(objective, order))
        agree("loss", expected.loss, found.loss)
        agree_on_gradients("other order", expected, found)
        same_means(expected, [found])


@promise("padding", 1, 2, 4)
def padding(make: Make, rows: Sequence[Row]) -> None:
    """Padding changes nothing, wherever log-probs are."""
    objective = make_objective(make)
    for at_reference in (False, True):
        expected = ask(make_objective(make), make_inputs(objective, rows, at_reference=at_reference))
        wide = make_inputs(objective, rows, at_reference=at_reference, wider=3)
        found = ask(make_objective(make), wide)
        agree("loss with 3 more columns of padding", expected.loss, found.loss)
        agree_on_gradients("3 more columns of padding", expected, found)
        same_means(expected, [found])


@promise("prompt sharing", 2, 4)
def prompt_sharing(make: Make, rows: Sequence[Row]) -> None:
    """Through a model: packed rows that share prompts give the loss and gradients of separate ones."""
    answers: list[tuple[Tensor, dict[str, Any]]] = []
    for packing in (False, True):
        objective = make_objective(make, moved=True)
        whole = objective.needs_last_hidden
        batch = collate(rows, mismatched=objective.mismatched, packing=packing, whole=whole)
        output, _ = objective._evaluate(batch)
        loss = loss_of(output)
        loss.backward()
        answers.append((loss.detach(), {name: p.grad for name, p in objective.named_parameters()}))
    (loss, gradients), (other, others) = answers
    agree("loss", loss, other)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values() if gradient is not None)
    for name, gradient in gradients.items():
        if gradient is not None:
            # Not tighter: transformers computes norms in float32, whatever the model's precision.
            agree(f"gradient of {name}", gradient / largest, others[name] / largest, tolerance=1e-6)


@promise("accumulation", 1, 2, 4)
def accumulation(make: Make, rows: Sequence[Row]) -> None:
    """Accumulated micro-batches give the gradient of one large batch."""
    objective = make_objective(make)
    if objective.couples_step:
        raise NotApplicable("declares that its steps cannot be accumulated")
    twins = [_renamed(row) for row in rows]
    _parts_make_the_whole(make, [rows, twins] if objective.couples_micro_step else [rows, _longer(twins)])


@promise("ranks", 2, 4)
def ranks(make: Make, rows: Sequence[Row]) -> None:
    """Two ranks give the gradient of one device with all examples."""
    whole, parts = _on_two_ranks(make, rows)
    agree("sum of the ranks' losses", whole.loss, sum(part.loss for part in parts))
    for part in parts:
        agree_on_gradients("one of the ranks", whole, part)


@promise("metrics", 2, 4)
def metrics(make: Make, rows: Sequence[Row]) -> None:
    """Sums and counts of metrics add up over ranks to those of one device."""
    whole, parts = _on_two_ranks(make, rows)
    same_means(whole, parts)


@promise("one-sided batches", batches=_one_sided)
def one_sided(make: Make, rows: Sequence[Row]) -> None:
    """A batch with only one kind of completion, or with one example, has finite loss, gradient and metrics."""
    objective = make_objective(make)
    finite(ask(objective, make_inputs(objective, rows)))


@promise("precision", 1, 4)
def precision(make: Make, rows: Sequence[Row]) -> None:
    """float32 log-probs give the loss of float64 ones; with half-precision ones it stays finite and near."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        objective = make_objective(make)
        exact = make_inputs(objective, rows, dtype=dtype)
        rounded = make_inputs(objective, rows)
        for parts in ((rounded.policy, exact.policy), (rounded.reference, exact.reference)):
            if parts[0] is not None and parts[1] is not None:
                parts[0].tokens = parts[1].tokens.detach().double()
        expected = loss_of(objective.compute(rounded.batch, rounded.policy, rounded.reference))
        low = make_objective(make).to(dtype)
        found = loss_of(low.compute(exact.batch, exact.policy, exact.reference))
        agree(f"loss from {dtype} log-probs", expected.detach(), found.detach(), tolerance=tolerance)


@promise("frozen reference", 2)
def frozen_reference(make: Make, rows: Sequence[Row]) -> None:
    """A training step changes the policy, and leaves the reference without gradient as it was."""
    objective = make_objective(make, moved=True)
    if not objective.needs_reference:
        raise NotApplicable("has no reference")
    reference: Any = objective.trained.reference
    before = [weight.clone() for weight in reference.parameters()]
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    output, _ = objective._evaluate(collate(rows, mismatched=objective.mismatched))
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


# Ways to divide a step, and to look at an objective from outside


def _renamed(row: Row) -> Row:
    return Row(f"{row.id} again", row.group + 1000, row.prompt, row.branches, row.desirable, row.score)


def _longer(rows: Sequence[Row]) -> list[Row]:
    # Other lengths than the first micro-batch: a mean over a micro-batch's own tokens shows only then.
    return [
        Row(row.id, row.group, row.prompt, tuple((*b, 1, 2, 3) for b in row.branches), row.desirable, row.score)
        for row in rows
    ]


def _parts_make_the_whole(make: Make, parts: Sequence[Sequence[Row]]) -> None:
    probe = make_objective(make)
    all_rows = [row for part in parts for row in part]
    step = step_size(all_rows)
    twins = probe.couples_micro_step
    whole = _ask_as(make, all_rows, step, twins)
    found = [_ask_as(make, part, step, twins) for part in parts]
    agree("sum of the micro-batches' losses", whole.loss, sum(part.loss for part in found))
    for part in found:
        agree_on_gradients("one of the micro-batches", whole, part)


def _ask_as(make: Make, rows: Sequence[Row], step: Any, twins: bool) -> Answer:
    # With ``twins`` a row and its renamed copy have the same log-probs.
    objective = make_objective(make)
    inputs = make_inputs(objective, rows, step=step)
    if twins:
        plain = [Row(r.id.removesuffix(" again"), r.group, r.prompt, r.branches, r.desirable, r.score) for r in rows]
        inputs = make_inputs(objective, plain, step=step)
        inputs.rows = rows
    return ask(objective, inputs)


def _on_two_ranks(make: Make, rows: Sequence[Row]) -> tuple[Answer, list[Answer]]:
    step = step_size(rows)
    objective = make_objective(make)
    whole = ask(objective, make_inputs(objective, rows, step=step))
    half = len(rows) // 2
    prepared = []
    for part in (rows[:half], rows[half:]):
        own = make_objective(make)
        prepared.append(partial(ask, own, make_inputs(own, part, step=step)))
    return whole, on_ranks(prepared)


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
    if isinstance(value, int) and not isinstance(value, bool):
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
