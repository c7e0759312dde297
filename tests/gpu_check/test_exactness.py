"""The comparisons agree on a CPU, and notice what is not exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halos.gpu_check import device_choices, exactness, optimizers
from halos.gpu_check.part import Numbers, Setting, Skipped
from halos.policy.logprobs import attention
from halos.policy.logprobs.attention_choice import Heads
from halos.policy.logprobs.flex import ScoreOptions

SETTING = Setting(device="cpu", devices=1, model=None, folder=Path())


def errors(numbers: Numbers) -> list[float]:
    return [float(numbers[name]) for name in (exactness.LOGPROBS, exactness.GRADIENTS)]


@pytest.mark.parametrize(
    "check", [exactness.pieces, exactness.padded, exactness.head_chunks, exactness.selective, exactness.lora]
)
def test_float32_is_exact_to_rounding(check: Callable[[Setting], Numbers]) -> None:
    assert all(0 < error < 1e-4 for error in errors(check(SETTING)))


def test_bf16_is_exact_to_its_rounding() -> None:
    assert all(error > 1e-4 for error in errors(exactness.bf16(SETTING)))


def test_the_optimizer_moves_weights_as_in_float64() -> None:
    assert 0 < float(optimizers.adamw(SETTING)["relative error of the move"]) < 1e-4


@pytest.mark.parametrize(
    "check",
    [exactness.flex, exactness.varlen, exactness.liger, exactness.offload, exactness.qlora, optimizers.adamw_8bit],
)
def test_what_needs_a_gpu_is_skipped_with_a_reason(check: Callable[[Setting], Numbers]) -> None:
    with pytest.raises(Skipped, match="there is no CUDA device"):
        check(SETTING)


def test_what_a_device_chooses_is_reported_and_exact() -> None:
    numbers = {**device_choices.attention(SETTING)}
    names = [str(numbers.pop(dtype)) for dtype in ("float32", "bf16")]
    assert names == ["pieces (others are tried on CUDA only)"] * 2
    assert 0 < float(numbers["relative error of gradients (float32)"]) < 1e-4
    assert float(numbers["relative error of gradients (bf16)"]) > 1e-4
    rows = {**device_choices.head_rows(SETTING)}
    assert (rows.pop("scored tokens of a chunk"), rows.pop("vocabulary")) == (512, 512)
    assert all(0 < error < 1e-4 for error in errors(rows))


def test_the_kernel_is_tried_with_the_models_heads() -> None:
    heads = device_choices.heads_of(SETTING, torch.bfloat16)
    assert heads == Heads(torch.device("cpu"), torch.bfloat16, 4, 2, 32, ScoreOptions())
    assert device_choices.chosen(heads).startswith("pieces (not flex: ")
    assert ", not varlen: NotImplementedError" in device_choices.chosen(heads)


def test_a_wrong_scale_of_scores_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention.attend

    def sharper(query: Tensor, key: Tensor, value: Tensor, mask: Any, options: ScoreOptions) -> Tensor:
        return attend(1.001 * query, key, value, mask, options)

    monkeypatch.setattr(attention, "attend", sharper)
    with pytest.raises(ValueError, match=r"expected (log-probs|gradients) within"):
        exactness.pieces(SETTING)
