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
def test_flex_has_one_call_for_all_pieces() -> None:
    works = {form: step("dpo", form, 2, examples=4, prompt=150, completion=40) for form in ("pieces", "flex")}
    calls = {form: work.kernels["_scaled_dot_product_flash_attention_for_cpu"] for form, work in works.items()}
    assert calls["flex"] == 4  # two layers of policy and reference
    assert calls["pieces"] > 8
    assert works["flex"].kernels.total() < works["pieces"].kernels.total()
    assert works["flex"].waits == works["pieces"].waits == []
    assert "| dpo | flex | " in totals({("dpo", "flex"): works["flex"]})
