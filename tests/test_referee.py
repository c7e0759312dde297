"""The referee finds each fault by the property that names it, and finds none in a loss without faults."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from parity.referee.properties import PROPERTIES
from parity.referee.report import markdown
from parity.referee.subject import PAD, VOCABULARY, Example, Findings, Setting, Subject, vector
from tests.docs.blocks import ROOT

REPORT = ROOT / "docs" / "results" / "referee.json"


class Bigrams(nn.Module):
    """A model whose next token depends on the last one alone."""

    def __init__(self, seed: int, setting: Setting) -> None:
        super().__init__()
        table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        table = table.bfloat16().float() if setting.rounded else table
        self.table = nn.Parameter(table.to(setting.dtype))

    def log_prob(self, prompt: Sequence[int], completion: Sequence[int], skipped: int | None) -> Tensor:
        ids = torch.tensor([*prompt, *completion])
        steps = self.table.float().log_softmax(-1)[ids[:-1], ids[1:]][len(prompt) - 1 :]
        return steps[ids[len(prompt) :] != skipped].sum()


class Loss(Subject):
    """DPO, or KTO with z₀ = 0, with a fault on demand."""

    name, library, version, package = "loss", "tests", "1", "halos"
    parameters = {"beta": (0.3,), "label_smoothing": (0.2,)}  # noqa: RUF012

    def __init__(self, fault: str = "", view: Literal["pairs", "labels"] = "pairs") -> None:
        self.fault, self.view = fault, view
        self.at_step_0 = math.log(2)

    def measure(  # type: ignore[override]  # of its parameters it takes these
        self, examples: Sequence[Example], setting: Setting, *, beta: float = 0.1, label_smoothing: float = 0.0
    ) -> Tensor:
        policy, reference = Bigrams(1 if setting.at_reference else 0, setting), Bigrams(1, setting)
        skipped = setting.pad_id if self.fault == "padding" else None
        ratios = torch.stack([
            torch.stack([
                policy.log_prob(example.prompt, y, skipped) - reference.log_prob(example.prompt, y, skipped).detach()
                for y in example.completions
            ])
            for example in examples
        ])  # fmt: skip
        margins = beta * (ratios[:, 0] - ratios[:, 1])
        if self.view == "labels":
            margins = beta * ratios[:, 0] * torch.tensor([1.0 if example.desirable else -1.0 for example in examples])
        smoothing = 0.0 if self.fault == "parameters" else label_smoothing
        losses = -nn.functional.logsigmoid((1 - 2 * smoothing) * margins)
        if self.fault == "order":
            losses = losses * torch.arange(1, len(losses) + 1)
        if self.fault == "other examples":
            losses = losses * (1 + margins.detach().std(correction=0))
        if self.fault == "value at step 0":
            losses = losses + 0.1
        if self.fault == "half precision" and setting.dtype == torch.bfloat16:
            losses = losses * 1.5
        if self.fault == "one kind" and len({example.desirable for example in examples}) == 1:
            losses = losses * math.nan
        return vector(losses.mean(), policy)

    def step(self, examples: Sequence[Example], *, size: int, accumulate: int = 1, ranks: int = 1) -> Tensor:
        parts = [examples[n : n + size] for n in range(0, len(examples), size)]
        shares = [len(part) / len(examples) for part in parts]
        if self.fault == "uneven accumulation":
            shares = [1 / len(parts) for _ in parts]
        if (self.fault == "accumulation" and accumulate > 1) or (self.fault == "ranks" and ranks > 1):
            shares = [1.0 for _ in parts]
        found = [share * self.measure(part, Setting())[1:] for share, part in zip(shares, parts, strict=True)]
        return torch.stack(found).sum(0)

    def reference_moved(self, examples: Sequence[Example]) -> bool:
        return self.fault == "frozen reference"

    def mismatched(self, examples: Sequence[Example], size: int) -> list[tuple[int, ...]]:
        own = self.fault == "another prompt's y'"
        return [example.completions[0] if own else (PAD, PAD, PAD) for example in examples]

    def weighted(self, examples: Sequence[Example]) -> Findings:
        return Findings("broken" if self.fault == "weights" else "kept")


def broken(subject: Subject) -> dict[str, Findings]:
    found = {name: check(subject) for name, check in PROPERTIES.items()}
    return {name: findings for name, findings in found.items() if findings.verdict not in ("kept", "none")}


@pytest.mark.parametrize("view", ["pairs", "labels"])
def test_nothing_is_found_in_a_loss_without_faults(view: Literal["pairs", "labels"]) -> None:
    assert broken(Loss(view=view)) == {}


@pytest.mark.parametrize("fault", PROPERTIES)
def test_each_fault_is_found_by_the_property_that_names_it(fault: str) -> None:
    found = broken(Loss(fault, view="labels" if fault == "one kind" else "pairs"))
    assert fault in found
    assert found[fault].verdict == "broken"


def test_an_ignored_parameter_is_named_and_may_be_documented() -> None:
    subject: Any = Loss("parameters")
    assert broken(subject)["parameters"].detail == "accepted without effect: `label_smoothing`"
    subject.documented = {"label_smoothing": "for others"}
    found = broken(subject)["parameters"]
    assert (found.verdict, found.detail) == ("documented", "accepted without effect: `label_smoothing` (for others)")


def test_the_page_is_that_of_the_last_run() -> None:
    rows = json.loads(REPORT.read_text(encoding="utf-8"))
    assert REPORT.with_suffix(".md").read_text(encoding="utf-8") == markdown(rows)
