"""What changes nothing: order, padding, sharing of prompts, and how a step is divided."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from halos.data.batches.collate import collate, step_size
from halos.data.rows.token_rows import Row
from halos.testing.examples import Answer, Make, ask, loss_of, make_inputs, make_objective
from halos.testing.promises import NotApplicable, agree, agree_on_gradients, promise, same_means
from halos.testing.ranks import on_ranks


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
        whole = objective.needs.last_hidden
        batch = collate(rows, mismatched=objective.needs.mismatched, packing=packing, whole=whole)
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
    if objective.needs.whole_step:
        raise NotApplicable("declares that its steps cannot be accumulated")
    twins = [_renamed(row) for row in rows]
    _parts_make_the_whole(make, [rows, twins] if objective.needs.whole_micro_step else [rows, _longer(twins)])


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


# Ways to divide a step


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
    twins = probe.needs.whole_micro_step
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
