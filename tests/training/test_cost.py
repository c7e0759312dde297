"""The operations that tokens need, by hand."""

from __future__ import annotations

import pytest

from halos.training.cost import forward_operations
from tests import tiny


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_neox"])
def test_operations_by_hand(architecture: str) -> None:
    model = tiny.model(architecture)  # two layers, 16 wide, MLP of 24, two heads of 8 and one for keys
    neox = architecture == "gpt_neox"
    keys = 16 if neox else 8
    matrices = 2 * (16 * 16 + 2 * 16 * keys + 16 * 16 + (2 if neox else 3) * 16 * 24)
    products = 2 * (matrices + 16 * tiny.VOCABULARY)
    seen = 4 * 2 * 16 * 40 / 2
    assert forward_operations(model, 10, 40) == 10 * (products + seen)


def test_a_table_that_is_also_the_head_counts_once() -> None:
    tied, apart = tiny.model("llama", tie_word_embeddings=True), tiny.model("llama")
    assert forward_operations(tied, 10, 40) == forward_operations(apart, 10, 40)
