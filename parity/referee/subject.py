"""What a loss under test looks like, and the tiny model and examples that it is tested with."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, PAD, EOS = 67, 0, 1


Verdict = Literal["kept", "broken", "documented", "raised", "none"]


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with (chosen, rejected) for a loss of pairs, or (y, y') and a label for one of labels; in token ids."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], tuple[int, ...]]
    desirable: bool = True

    def __str__(self) -> str:
        lengths = " and ".join(str(len(completion)) for completion in self.completions)
        return f"prompt of {len(self.prompt)} tokens, completions of {lengths}"


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found about one property.

    Attributes:
        verdict: ``kept``, ``broken``, ``documented`` (broken, as the documentation says), ``raised`` (an error) or
            ``none`` (does not apply).
        detail: numbers or messages that show it, in a sentence.
        batch: the smallest batch that shows a failure.
    """

    verdict: Verdict
    detail: str = ""
    batch: str = ""


class Subject:
    """A loss of a library. An adapter overrides what its library has.

    Attributes:
        name: as the documentation calls it.
        library, version: where it is from.
        package: the distribution, from which the version is read.
        view: whether it takes pairs, or completions with labels.
        at_step_0: the loss where policy and reference agree; None for a loss without a reference.
        parameters: numeric parameters of the loss and other values for each.
        documented: for parameters that the documentation restricts to other settings, what it says.
        changes: parameters that one run of the loss must have.
        batchwise: why the loss is no mean over examples, by its definition.
        stepless: why its training steps are not run, where :meth:`step` returns None.
    """

    name: str
    library: str
    version: str
    package: str
    view: Literal["pairs", "labels"]
    at_step_0: float | None = None
    parameters: Mapping[str, Sequence[Any]] = {}
    documented: Mapping[str, str] = {}
    changes: Mapping[str, Any] = {}
    batchwise: str = ""
    stepless: str = "a loss without a trainer: the division of a step is the caller's"

    def measure(self, examples: Sequence[Example], setting: Setting, **parameters: Any) -> Tensor:
        """Return the loss of a batch and its gradient by each weight of the policy, as one vector [1 + P].

        Args:
            examples: the batch.
            setting: how the models and the batch are made.
            parameters: of the loss, where they differ from its defaults.
        """
        raise NotImplementedError

    def step(self, examples: Sequence[Example], *, size: int, accumulate: int = 1, ranks: int = 1) -> Tensor | None:
        """Return the gradient of a training step, [P]; None where :attr:`stepless` says why.

        Args:
            examples: all examples of the step.
            size: examples of a micro-batch on a rank.
            accumulate: micro-batches of a step on a rank.
            ranks: processes.
        """
        return None

    def reference_moved(self, examples: Sequence[Example]) -> bool:
        """Whether a training step changes the reference."""
        raise NotImplementedError

    def mismatched(self, examples: Sequence[Example], size: int) -> list[tuple[int, ...]] | None:
        """Return the y' that the library's data preparation gives each example; None if it has none."""
        return None

    def weighted(self, examples: Sequence[Example]) -> Findings:
        """Say what happens to weights of examples."""
        return Findings("none", "it takes no weights of examples")


@dataclass(frozen=True, slots=True)
class Setting:
    """How a batch is made.

    Attributes:
        at_reference: whether the policy equals the reference.
        padding: columns of padding to add.
        pad_id: the id of the padding.
        dtype: of both models; their weights are those of float32, rounded.
        rounded: whether float32 weights are rounded to bfloat16.
    """

    at_reference: bool = False
    padding: int = 0
    pad_id: int = PAD
    dtype: torch.dtype = field(default=torch.float32)
    rounded: bool = False


def models(setting: Setting | None = None) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """Return the policy and its reference: two tiny Llamas with random weights, equal if ``at_reference``."""
    setting = setting or Setting()
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD, tie_word_embeddings=False,
    )  # fmt: skip
    made = []
    for seed in (1 if setting.at_reference else 0, 1):
        torch.manual_seed(1)
        model = LlamaForCausalLM(config)
        shift(model, seed=1, size=0.2)
        if seed == 0:
            shift(model, seed=38, size=0.1)  # of the seeds, one where z₀ is above 0
        if setting.rounded:
            model = model.bfloat16().float()
        nn.Module.to(model, dtype=setting.dtype)  # whose types mypy reads, other than the model's own
        made.append(model.train())
    made[1].requires_grad_(False)
    return made[0], made[1]


def shift(model: nn.Module, *, seed: int, size: float) -> None:
    """Move all weights at random, so that no part is a no-op and predictions are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=generator))


def examples(count: int, *, seed: int = 0) -> list[Example]:
    """Return examples of uneven lengths, the padding's id often among their tokens; labels alternate."""
    draw = random.Random(seed)
    ids = [PAD] * 10 + list(range(2, VOCABULARY))

    def text(most: int) -> tuple[int, ...]:
        return tuple(draw.choice(ids) for _ in range(draw.randint(1, most)))

    return [Example(text(6), (text(8), text(8)), n % 2 == 0) for n in range(count)]


def padded(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], setting: Setting, *, ignored: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, attention mask and labels [B, T] of prompts with completions; all labels but theirs are ignored."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows) + setting.padding
    ids = torch.full((len(rows), width), setting.pad_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, ignored)
    for n, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[n, :end] = torch.tensor([*prompt, *completion])
        mask[n, :end] = 1
        labels[n, len(prompt) : end] = torch.tensor(completion)
    return ids, mask, labels


def flat(model: nn.Module) -> Tensor:
    """Return all weights as one vector."""
    return torch.cat([weight.detach().flatten().double() for weight in model.parameters()])


def vector(loss: Tensor, model: nn.Module) -> Tensor:
    """Return the loss and its gradient by each weight of a model, as one vector [1 + P] in float64."""
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([loss.detach().reshape(1), *(gradient.flatten() for gradient in gradients)]).double()
