"""Step-KTO: KTO whose examples are the labelled steps of replies, and whole replies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from halos.data.batches.collate import collate, step_size
from halos.data.records.record import Completion, Record, Step
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.token_rows import Row
from halos.data.rows.tokenise import make_rows
from halos.data.views.derive import VIEWS
from halos.objectives import KTO
from halos.testing.examples import VOCABULARY, loss_of, make_objective
from tests import tiny

BETA, LAMBDA_D, LAMBDA_U = 0.7, 1.5, 0.8
STEP_KTO: Any = partial(KTO, step_labels=True, beta=BETA, desirable_weight=LAMBDA_D, undesirable_weight=LAMBDA_U)
TOKENIZER = tiny.word_tokenizer(tiny.CHATML)
assert len(TOKENIZER) <= VOCABULARY

# A word is a token. Steps and their labels, the label of the whole, and the weight of the record. Two or four steps
# have a label, as a batch has weights in float32.
REPLIES: list[tuple[str, list[tuple[str, bool | None]], bool | None, float]] = [
    ("hello", [("good world", True), (" bad", False), (" good", True), (" world", False)], False, 1.0),
    ("good", [("hello", True), (" bad bad", None), (" world", False)], None, 2.0),
    ("world", [("good bad", None)], True, 1.0),
]


def records() -> list[Record]:
    made = []
    for name, steps, label, weight in REPLIES:
        stops = [len("".join(text for text, _ in steps[: n + 1])) for n in range(len(steps))]
        judged = tuple(Step(stop, label) for stop, (_, label) in zip(stops, steps, strict=True))
        completion = Completion("".join(text for text, _ in steps), label, steps=judged)
        made.append(Record(name, name, (completion,), weight=weight))
    return made


def rows() -> tuple[list[Row], list[int]]:
    """The rows, and the place of each one's mismatched partner."""
    made = make_rows(VIEWS["steps"](records()).examples, ChatTokens(TOKENIZER, Limits(64)), mismatched_seed=0).table
    (table,) = made.views
    assert table.partners is not None
    return list(table), table.partners.tolist()


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def token_ratios(models: Sequence[Any], prompt: str, reply: str) -> Tensor:
    """log π_θ − log π_ref of each token of a reply and of the end of its turn, from one plain forward of each model."""
    before = ids(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
    after = ids(f"{reply}<|im_end|>")
    fed = torch.tensor([before + after])
    logps = [model(fed).logits[0, len(before) - 1 : -1].log_softmax(-1) for model in models]
    return (logps[0] - logps[1])[torch.arange(len(after)), after]


def examples_by_hand() -> list[tuple[str, str, slice, bool, float]]:
    """Of each example the prompt, the reply, its tokens, its label and its weight, in the order of the rows."""
    found = []
    for prompt, steps, label, weight in REPLIES:
        reply = "".join(text for text, _ in steps)
        if label is not None:
            found.append((prompt, reply, slice(None), label, weight))
        start, labelled = 0, sum(label is not None for _, label in steps)
        for n, (text, of_step) in enumerate(steps):
            stop = start + len(ids(text)) + (n + 1 == len(steps))  # the end of the turn is the last step's
            if of_step is not None:
                found.append((prompt, reply, slice(start, stop), of_step, weight / labelled))
            start = stop
    return found


def loss_by_hand(models: Sequence[Any], partners: Sequence[int]) -> Tensor:
    examples = examples_by_hand()
    r = [token_ratios(models, prompt, reply)[span].sum() for prompt, reply, span, _, _ in examples]
    # y' is the partner's reply or step, after its earlier steps and behind this example's prompt.
    other = [
        token_ratios(models, prompt, examples[partner][1])[examples[partner][2]].sum()
        for (prompt, *_), partner in zip(examples, partners, strict=True)
    ]
    weights = [weight for *_, weight in examples]
    mean = sum(w * float(value.detach()) for w, value in zip(weights, other, strict=True)) / math.fsum(weights)
    z0 = max(mean, 0.0)
    total = torch.zeros((), dtype=torch.float64)
    for value, (_, _, _, desirable, weight) in zip(r, examples, strict=True):
        share = 1 / (1 + torch.exp(-BETA * (value - z0) * (1 if desirable else -1)))
        total = total + weight * (LAMBDA_D if desirable else LAMBDA_U) * (1 - share)
    return total / math.fsum(weights)


TECHNIQUES: list[dict[str, Any]] = [
    *({}, {"chunks": 3}, {"packing": True}, {"packing": True, "share_prompts": False}),
    {"packing": True, "max_tokens": 20},
]


@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
@pytest.mark.parametrize("order", ["rows", "reversed"])
def test_loss_and_gradients_are_those_of_plain_forwards_of_whole_replies(technique: Any, order: str) -> None:
    objective = make_objective(STEP_KTO, moved=True)
    backbone: Any = objective.backbone
    for model in (backbone.policy, backbone.reference):
        tiny.exact(model)
    own, partners = rows()
    expected = loss_by_hand((backbone.policy, backbone.reference), partners)
    parameters = list(backbone.policy.parameters())
    expected_gradients = torch.autograd.grad(expected, parameters)
    batch = collate(own if order == "rows" else own[::-1], mismatched=True, **technique)
    output = objective.compute(batch, backbone.logprobs(batch), backbone.reference_logprobs(batch))
    assert float(loss_of(output).detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    for found, gradient in zip(torch.autograd.grad(loss_of(output), parameters), expected_gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-13)


def test_earlier_steps_and_prompts_are_computed_once_in_a_pack() -> None:
    own, _ = rows()
    (pack,) = collate(own, mismatched=False, packing=True).packs
    first = [row for row in own if row.group == 0]
    assert len(first) == 5
    whole = next(row for row in first if not row.context or not row.context[0])
    alone = collate([whole], packing=True).packs[0]
    together = collate(first, packing=True).packs[0]
    # Of the mismatched branches, which are trained here, too, each has its own tokens.
    others = {row.branches[1] for row in first}
    assert len(together.input_ids) <= len(alone.input_ids) + sum(map(len, others))
    assert len(pack.input_ids) < sum(len(row.prompt) + len(branch) for row in own for branch in row.branches)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_micro_batches_add_up_to_one_large_batch(cut: int) -> None:
    objective = make_objective(partial(STEP_KTO, reference_point="zero"), moved=True)
    backbone: Any = objective.backbone
    own, _ = rows()

    def loss(part: Sequence[Row]) -> float:
        batch = collate(part, step=step_size(own))
        return float(loss_of(objective.compute(batch, backbone.logprobs(batch), backbone.reference_logprobs(batch))))

    assert loss(own[:cut]) + loss(own[cut:]) == pytest.approx(loss(own), rel=1e-12)


def test_at_the_reference_every_reply_counts_one_for_its_outcome_and_one_for_its_steps() -> None:
    objective = make_objective(STEP_KTO)
    backbone: Any = objective.backbone
    own, _ = rows()
    batch = collate(own, mismatched=True)
    output = objective.compute(batch, backbone.logprobs(batch), backbone.reference_logprobs(batch))
    # λ/2 each: steps good (1/2), bad (1/2), outcome bad (1); steps good (1), bad (1); outcome good (1).
    expected = (LAMBDA_D * (1 / 2 + 1 + 1) + LAMBDA_U * (1 / 2 + 1 + 1)) / 2 / 5
    assert float(loss_of(output)) == pytest.approx(expected, rel=1e-12)
