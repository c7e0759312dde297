"""The table of sampled tokens a second."""

from __future__ import annotations

import pytest
import torch

from benchmarks.decoding import generate, products_seconds, report
from halos.sampling.generate import sample
from tests import tiny


def test_the_first_round_of_each_way_is_not_measured() -> None:
    calls: list[str] = []

    def way(name: str) -> list[list[int]]:
        calls.append(name)
        return [[1, 2, 3], [4]]

    row = report({"a": lambda: way("a"), "b": lambda: way("b")}, 2).splitlines()[2].split(" | ")
    assert calls == ["a", "b"] * 3
    assert row[:3] == ["| a", "4", "3"]
    assert len(row[4].split(",")) == 2


def test_the_other_side_samples_the_same_distribution() -> None:
    model, asked = tiny.model("llama").eval(), [[5, 6, 7], [8]] * 1000
    torch.manual_seed(0)
    theirs = torch.tensor(generate(model, asked, end_of_turn=1, pad=0, max_new_tokens=1))
    ours = torch.tensor(sample(model, asked, end_of_turn=1, pad=0, max_new_tokens=1))
    for start in (0, 1):
        counts = [said[start::2, 0].bincount(minlength=tiny.VOCABULARY) / 1000 for said in (theirs, ours)]
        assert float((counts[0] - counts[1]).abs().sum() / 2) < 0.2
    assert float((theirs[::2, 0].bincount(minlength=67) - theirs[1::2, 0].bincount(minlength=67)).abs().sum()) > 600


@pytest.mark.parametrize("rows", [1, 4])
def test_products_are_those_of_all_linear_layers(rows: int) -> None:
    model, seen = tiny.model("llama"), []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda layer, args, _: seen.append((layer, len(args[0]))))
    assert products_seconds(model, rows) > 0
    assert len(seen) == 5 * (2 * 7 + 1)
    assert {count for _, count in seen} == {rows}
