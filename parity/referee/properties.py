"""The properties. Each takes a subject and returns what was found, with the smallest batch that shows a failure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from parity.referee.subject import Example, Findings, Setting, Subject, Verdict, examples

TOLERANCE = 1e-5
"""Absolute for numbers up to 1, relative above: float32 rounds sums of another order."""
HALF = 0.05
"""Tolerance for losses from a model in bfloat16, as in the conformance kit."""
Property = Callable[[Subject], Findings]
PROPERTIES: dict[str, Property] = {}


def check(name: str) -> Callable[[Property], Property]:
    """Register a property under the name that its column has."""

    def register(function: Property) -> Property:
        PROPERTIES[name] = function
        return function

    return register


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest number where that is above 1; ∞ for a NaN on one side."""
    size = max(1.0, float(other.abs().nan_to_num().max()))
    found = float((one - other).abs().max()) / size
    return math.inf if math.isnan(found) else found


def compared(pairs: list[tuple[str, Tensor, Tensor]], what: str) -> Findings:
    """Compare vectors, smallest batch first, and report the first pair that differs."""
    largest = 0.0
    for batch, one, other in pairs:
        found = difference(one, other)
        if found > TOLERANCE:
            numbers = f"loss {float(one[0]):.6g} against {float(other[0]):.6g}, largest difference {found:.2g}"
            return Findings("broken", f"{what}: {numbers}", batch)
        largest = max(largest, found)
    return Findings("kept", f"largest difference {largest:.1e}")


def described(batch: list[Example]) -> str:
    """Return a batch in words."""
    return f"{len(batch)} example{'s' * (len(batch) > 1)} ({'; '.join(map(str, batch))})"


@check("value at step 0")
def step_zero(subject: Subject) -> Findings:
    """Where the policy equals the reference, the loss is what its formula gives there."""
    if subject.at_step_0 is None:
        return Findings("none", "has no reference")
    for count in (2, 4):
        loss = float(subject.measure(examples(count), Setting(at_reference=True), **subject.changes)[0])
        if not abs(loss - subject.at_step_0) < TOLERANCE * max(1.0, subject.at_step_0):
            expected = f"{loss:.6g} instead of {subject.at_step_0:.6g}"
            return Findings("broken", expected, described(examples(count)))
    return Findings("kept", f"{subject.at_step_0:.6g}")


@check("padding")
def padding(subject: Subject) -> Findings:
    """More columns of padding, or another id for it, change neither loss nor gradient."""
    pairs = []
    for count in (1, 2, 4):
        batch = examples(count)
        expected = subject.measure(batch, Setting(), **subject.changes)
        wider = subject.measure(batch, Setting(padding=5), **subject.changes)
        other = subject.measure(batch, Setting(padding=5, pad_id=66), **subject.changes)
        pairs += [(described(batch), wider, expected), (described(batch), other, expected)]
    return compared(pairs, "with 5 more columns of padding")


@check("order")
def order(subject: Subject) -> Findings:
    """The order of the examples of a batch, each with its own y', changes nothing."""
    pairs = []
    for count in (2, 3, 4):
        batch = examples(count)
        expected = subject.measure(batch, Setting(), **subject.changes)
        pairs.append((described(batch), subject.measure(batch[::-1], Setting(), **subject.changes), expected))
    return compared(pairs, "in reverse order")


@check("other examples")
def independence(subject: Subject) -> Findings:
    """The loss of a batch is the mean of the losses of its examples alone: no prompt affects another's loss."""
    if subject.batchwise:
        return Findings("none", subject.batchwise)
    pairs = []
    for count in (2, 3):
        batch = examples(count)
        whole = subject.measure(batch, Setting(), **subject.changes)
        alone = torch.stack([subject.measure([one], Setting(), **subject.changes) for one in batch]).mean(0)
        pairs.append((described(batch), whole, alone))
    return compared(pairs, "against the mean of the examples alone")


@check("another prompt's y'")
def mismatch(subject: Subject) -> Findings:
    """Where a loss compares with another prompt's reply y', that reply is another prompt's."""
    base = examples(4)
    if subject.mismatched(base, 2) is None:
        return Findings("none", "has no y', or leaves it to the caller")
    one = [replace(base[0], prompt=base[1].prompt), *base[1:]]
    batches = {
        "3 examples in batches of 2: the last one is alone in its batch": (base[:3], 2),
        "2 examples of one prompt in a batch of 2": (one[:2], 2),
    }
    broken = []
    for words, (batch, size) in batches.items():
        found = subject.mismatched(batch, size)
        assert found is not None  # it has y'
        if any(y == example.completions[0] for example, y in zip(batch, found, strict=True)):
            broken.append(("an example is compared with its own reply", words))
        elif {(example.prompt, y) for example, y in zip(batch, found, strict=True)} & {
            (example.prompt, example.completions[0]) for example in batch
        }:
            broken.append(("an example is compared with a reply to its own prompt", words))
    if not broken:
        return Findings("kept")
    details, shown = zip(*broken, strict=True)
    return Findings("broken", "; ".join(details), "; ".join(shown))


@check("accumulation")
def accumulation(subject: Subject) -> Findings:
    """Two micro-batches of equal size give the gradient of one large batch."""
    two = examples(2)
    return _steps(subject, [*two, *two], "2 micro-batches of 2 against one of 4", size=2, accumulate=2)


@check("uneven accumulation")
def uneven(subject: Subject) -> Findings:
    """Micro-batches of 2 and 1 examples, as at the end of an epoch, give the gradient of one batch of 3."""
    return _steps(subject, examples(3), "micro-batches of 2 and 1 against one of 3", size=2, accumulate=2)


@check("ranks")
def ranks(subject: Subject) -> Findings:
    """Two ranks give the gradient of one with all examples."""
    two = examples(2)
    return _steps(subject, [*two, *two], "2 ranks of 2 against one batch of 4", size=2, ranks=2)


def _steps(subject: Subject, batch: list[Example], words: str, *, size: int, **split: int) -> Findings:
    found = subject.step(batch, size=size, **split)
    if found is None:
        return Findings("none", subject.stepless)
    whole = subject.step(batch, size=len(batch))
    assert whole is not None  # it has a trainer
    apart = difference(found, whole)
    if apart > TOLERANCE:
        return Findings("broken", f"the gradients differ by up to {apart:.2g} of {float(whole.abs().max()):.2g}", words)
    return Findings("kept", f"largest difference {apart:.1e}")


@check("half precision")
def half(subject: Subject) -> Findings:
    """From a model in bfloat16 the loss is finite and within 5 % of that of the same weights in float32."""
    largest = 0.0
    for count in (2, 4):
        batch = examples(count)
        low = float(subject.measure(batch, Setting(dtype=torch.bfloat16), **subject.changes)[0])
        exact = float(subject.measure(batch, Setting(rounded=True), **subject.changes)[0])
        if not abs(low - exact) <= HALF * (1 + abs(exact)):
            return Findings("broken", f"loss {low:.6g} instead of {exact:.6g}", described(batch))
        largest = max(largest, abs(low - exact))
    return Findings("kept", f"largest difference {largest:.1e}")


@check("one kind")
def one_sided(subject: Subject) -> Findings:
    """A batch of desirable completions alone, or of undesirable ones, has a finite loss and gradient."""
    if subject.view == "pairs":
        return Findings("none", "pairs have both kinds")
    for label in (True, False):
        batch = [replace(example, desirable=label) for example in examples(2)]
        if not subject.measure(batch, Setting(), **subject.changes).isfinite().all():
            return Findings("broken", "a number that is not finite", f"{described(batch)}, all {label}")
    return Findings("kept")


@check("parameters")
def parameters(subject: Subject) -> Findings:
    """Each numeric parameter of the loss has an effect on loss or gradient, or is refused."""
    batch = examples(4)
    plain = subject.measure(batch, Setting(), **subject.changes)
    ignored, scoped = [], True
    for name, values in subject.parameters.items():
        outcomes = [_outcome(subject, batch, {name: value}) for value in values]
        if all(outcome is not None and torch.equal(outcome, plain) for outcome in outcomes):
            scope = subject.documented.get(name)
            scoped = scoped and scope is not None
            ignored.append(f"`{name}`" + (f" ({scope})" if scope else ""))
    if ignored:
        verdict: Verdict = "documented" if scoped else "broken"
        return Findings(verdict, "accepted without effect: " + ", ".join(ignored), described(batch))
    return Findings("kept", ", ".join(f"`{name}`" for name in subject.parameters))


def _outcome(subject: Subject, batch: list[Example], changed: dict[str, object]) -> Tensor | None:
    # None if the value is refused.
    try:
        return subject.measure(batch, Setting(), **{**subject.changes, **changed})
    except (ValueError, TypeError, NotImplementedError):
        return None


@check("weights")
def weights(subject: Subject) -> Findings:
    """Weights of examples have an effect, or are refused."""
    return subject.weighted(examples(2))


@check("frozen reference")
def frozen(subject: Subject) -> Findings:
    """A training step leaves the reference as it is."""
    if subject.step(examples(2), size=2) is None:
        return Findings("none", subject.stepless)
    moved = subject.reference_moved(examples(2))
    return Findings("broken", "the reference's weights changed") if moved else Findings("kept")
