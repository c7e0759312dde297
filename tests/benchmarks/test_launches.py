"""The counted kernels of a step."""

from __future__ import annotations

import pytest

from benchmarks.launches import step, totals

SIZES = {"examples": 4, "prompt": 12, "completion": 5}


@pytest.mark.slow
def test_kernels_grow_by_the_same_number_with_each_layer() -> None:
    counts = [step("sft", "pieces", layers, **SIZES).kernels.total() for layers in (1, 2, 3)]
    assert counts[1] - counts[0] == counts[2] - counts[1] > 30


@pytest.mark.slow
def test_one_call_does_all_pieces() -> None:
    forms = ("pieces", "flex", "varlen")
    works = {form: step("dpo", form, 2, examples=4, prompt=150, completion=40) for form in forms}
    calls = {form: work.kernels["_scaled_dot_product_flash_attention_for_cpu"] for form, work in works.items()}
    assert calls["flex"] == calls["varlen"] == 4  # two layers of policy and reference
    assert calls["pieces"] > 8
    assert max(works[form].kernels.total() for form in ("flex", "varlen")) < works["pieces"].kernels.total()
    assert [work.waits for work in works.values()] == [[], [], []]
    assert "| dpo | flex | " in totals({("dpo", "flex"): works["flex"]})
