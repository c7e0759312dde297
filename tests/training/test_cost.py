"""What a run needs: by hand, and against what small runs keep."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.policy.backbone import Backbone
from halos.policy.kernels.cpu import use_cpu_kernels
from halos.training.cost import Example, Setting, Shape, memory, operations
from tests import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
SMALL = Shape(parameters=1000, matrices=600, layers=3, hidden=8, attention=8, keys=4, mlp=12, gated=True, vocabulary=50)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_neox"])
def test_the_shape_of_a_model(architecture: str) -> None:
    model = tiny.model(architecture)  # 16 wide, MLP of 24, two heads of 8 and one for keys
    shape = Shape.of(model)
    neox = architecture == "gpt_neox"
    keys = 16 if neox else 8
    matrices = 2 * (16 * 16 + 2 * 16 * keys + 16 * 16 + (2 if neox else 3) * 16 * 24)
    assert (shape.layers, shape.hidden, shape.attention, shape.keys, shape.mlp) == (2, 16, 16, keys, 24)
    assert (shape.matrices, shape.gated, shape.vocabulary) == (matrices, not neox, tiny.VOCABULARY)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_tied_tables_count_once_and_are_no_matrices_of_layers() -> None:
    tied = Shape.of(tiny.model("llama", tie_word_embeddings=True))
    apart = Shape.of(tiny.model("llama"))
    assert apart.parameters - tied.parameters == 16 * tiny.VOCABULARY
    assert apart.matrices == tied.matrices


@pytest.mark.parametrize("cpu", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.skipif(not hasattr(PreTrainedModel, "activation_checkpointing_enable"), reason="of newer transformers")
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_neox"])
def test_activations_are_what_the_backward_pass_keeps(
    architecture: str, packing: bool, checkpointing: bool, cpu: bool
) -> None:
    grouped: dict[str, Any] = {} if architecture == "gpt_neox" else {"num_key_value_heads": 2}
    model = tiny.model(architecture, **SIZES, **grouped)
    if cpu:  # without kernels the model keeps what it does on accelerators
        use_cpu_kernels(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    rng = random.Random(0)
    rows = [
        Row(f"r{n}", n, tuple(rng.choices(range(500), k=60)), (tuple(rng.choices(range(500), k=41)),), True)
        for n in range(8)
    ]
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, Any]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Backbone(model, with_reference=False).logprobs(collate(rows, packing=packing))
    shape, tokens = Shape.of(model), 8 * 100
    expected = memory(shape, Setting(checkpointing=checkpointing, cpu=cpu), tokens=tokens)["activations"]
    if checkpointing:  # the layer that is computed again exists in the backward pass only
        expected -= tokens * 4 * shape.layer(lean=cpu and shape.lean)
    assert expected == pytest.approx(sum(size for size, _ in kept.values()), rel=0.15 if checkpointing else 0.07)


def test_memory_by_hand() -> None:
    plain = memory(SMALL, Setting(), tokens=10)
    layer = 9 * 8 + 2 * 4 + 4 * 12
    assert plain == {
        "weights": 4000,
        "gradients": 4000,
        "optimizer": 8000,
        "reference": 0,
        "compute copies": 0,
        "activations": 10 * 4 * (3 * layer + 3 * 8),
        "logits": 3 * 4 * 10 * 50,
    }
    mixed = Setting(precision="bf16-mixed", divided=4, live_reference=True, checkpointing=True, head_chunk=4)
    divided = memory(SMALL, mixed, tokens=10)
    assert [divided[part] for part in ("weights", "gradients", "optimizer", "reference")] == [1000, 1000, 2000, 1000]
    assert divided["compute copies"] == 2 * (400 + 2 * 200)
    assert divided["activations"] == 10 * 2 * (3 * 8 + 3 * 8 + layer)
    assert divided["logits"] == 3 * 4 * 4 * 50
    assert memory(SMALL, Setting(precision="bf16-mixed"), tokens=1)["compute copies"] == 2000
    assert memory(SMALL, Setting(precision="bf16-true"), tokens=1)["weights"] == 2000


def test_tokens_of_an_example() -> None:
    pair = Example.of(30, 10, branches=2, mismatched=False, shared=True)
    assert (pair.trained, pair.read, pair.length) == (50, 0, 40)
    assert Example.of(30, 10, branches=2, mismatched=False, shared=False).trained == 80
    one = Example.of(30, 10, branches=1, mismatched=True, shared=True)
    assert (one.trained, one.read) == (40, 10)
    assert Example.of(30, 10, branches=1, mismatched=True, shared=False).read == 40


def test_operations_by_hand() -> None:
    # 2 · (600 + 50 · 8) a token, and 4 · 3 · 8 · 40 / 2 for what it sees.
    each = 2000 + 1920
    assert SMALL.forward(10, 40) == 10 * each
    example = Example(trained=40, read=10, length=40)
    cached = Setting()
    assert operations(SMALL, example, cached, reference=True, epochs=3) == each * (3 * (3 * 40 + 10) + 50)
    assert operations(SMALL, example, cached, reference=False, epochs=3) == each * 3 * (3 * 40 + 10)
    live = Setting(live_reference=True, checkpointing=True)
    assert operations(SMALL, example, live, reference=True, epochs=3) == each * (3 * (4 * 40 + 10) + 3 * 50)
