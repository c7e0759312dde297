"""What a loss needs, by hand."""

from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.flops import Needs, Shape, Work, needs, work_of
from halos.data.rows.token_rows import Row

A, B = (1, 2, 3), (7, 8)


def test_a_prompt_is_needed_once_and_the_last_token_never() -> None:
    # Prompt: 3 tokens, which see 1 + 2 + 3. Branches of 2 and 3 tokens: 1 and 2 are fed, which see 3 + 1 and
    # (3 + 1) + (3 + 2).
    assert work_of([(A, (4, 5)), (A, (4, 5, 6))]) == Work(tokens=6, seen=6 + 4 + 9, scored=5)
    assert work_of([(A, (4, 5)), (A, (4, 5))]) == Work(tokens=4, seen=10, scored=2)


def test_what_is_known_is_not_needed() -> None:
    assert work_of([(A, (4, 5)), (A, (9, 9))], known=[(A, (4, 5))]) == Work(tokens=1, seen=4, scored=2)
    assert work_of([(A, (4, 5))], known=[(A, (4, 5))]) == Work()


def test_an_epoch_of_kto() -> None:
    one = Row("1", 0, A, ((4, 5), (6,)), True)
    two = Row("2", 1, B, ((6,), (4, 5)), False)
    found = needs([[one], [two]], mismatched=True, reference=True)
    assert found.trained == work_of([(A, (4, 5))]) + work_of([(B, (6,))])
    assert found.read == Work(0, 0, 1) + Work(1, 3, 2)
    assert found.reference == found.trained + found.read
    assert needs([[one]], mismatched=True, reference=False).reference == Work()
    # A prompt in two steps is needed in each, but only once by the reference.
    assert needs([[one], [one]], mismatched=True, reference=True).trained.tokens == 8
    assert needs([[one], [one]], mismatched=True, reference=True).reference.tokens == 4


def test_operations() -> None:
    shape = Shape(weights=100, layers=2, width=8, head=50)
    # 2 · 100 · 6 + 4 · 2 · 8 · 19 + 2 · 50 · 5
    assert shape.forward(Work(6, 19, 5)) == 1200 + 1216 + 500
    assert Needs(Work(1), Work(1), Work(1)).operations(shape) == (3 + 1 + 1) * 200
    assert Needs(Work(1), Work(2), Work(3)).tokens == 6


@pytest.mark.parametrize("tied", [True, False])
def test_the_shape_of_a_model(tied: bool) -> None:
    sizes: dict[str, Any] = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=6, tie_word_embeddings=tied)
    )
    layer = 8 * 12 + 2 * 8 * 6 + 12 * 8 + 3 * 8 * 12  # queries, keys and values, output, SwiGLU
    assert Shape.of(model) == Shape(weights=3 * layer, layers=3, width=12, head=88)
