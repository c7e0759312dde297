"""``model.gradient_checkpointing``: the numbers of a model that keeps everything, and what each policy keeps."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from halos.data.batches.collate import collate
from halos.policy.backbone import Backbone
from halos.policy.checkpointing import FUNCTION, checkpoint_layers, checkpointed_layers
from halos.policy.kernels.cpu import use_cpu_kernels
from halos.policy.loading import ModelSpec
from halos.policy.logprobs.packed import can_pack
from halos.policy.lora import LoRA
from tests import architectures, tiny
from tests.host_memory import copies

POLICIES: list[bool | str] = [True, "selective", "offload"]
ROWS = tiny.rows(5, branches=2)
PACKED: dict[str, Any] = {"packing": True, "share_prompts": True}
LAYERS = 2


def found(model: Any, *, autocast: bool = False, **options: Any) -> list[Tensor]:
    """Log-probs, and the gradients of their sum over a part of the completions; the other part has none."""
    batch = collate(ROWS, mismatched=True, **(options or PACKED))
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logprobs = Backbone(model, with_reference=False, head_chunk=7).logprobs(batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [logprobs.tokens.detach(), *torch.autograd.grad(logprobs.sum[:, 0].sum(), trained)]


def assert_equal(mine: list[Tensor], others: list[Tensor]) -> None:
    assert len(mine) == len(others) > LAYERS
    for left, right in zip(mine, others, strict=True):
        assert torch.equal(left, right)


# Exactness: to the bit


@pytest.mark.parametrize("options", [PACKED, {"packing": False}], ids=["packed", "padded"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_policy_gives_the_numbers_of_a_model_that_keeps_everything(
    architecture: str, options: dict[str, Any]
) -> None:
    expected = found(tiny.model(architecture), **options)
    for policy in POLICIES:
        model = tiny.model(architecture)
        checkpoint_layers(model, policy)
        assert can_pack(model)
        with copies() as copied:
            assert_equal(found(model, **options), expected)
        assert bool(copied) == (policy == "offload")


@pytest.mark.parametrize("policy", POLICIES)
def test_adapters_with_dropout_get_the_same_gradients(policy: bool | str) -> None:
    pytest.importorskip("peft")

    def adapted() -> Any:
        model = tiny.model()
        torch.manual_seed(1)
        LoRA(enabled=True, rank=2, dropout=0.5).attach(model, base="some/model")
        # As if it had been trained: where B is zero, A has no gradient.
        architectures.shift(model, 0.3)
        return model

    expected = found(adapted())
    model = adapted()
    checkpoint_layers(model, policy)
    with copies():
        assert_equal(found(model), expected)
    # The random numbers do matter.
    model.eval()
    assert not torch.equal(found(model)[0], expected[0])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", ["autocast", "bfloat16", "kernels"])
def test_precisions_and_kernels_change_nothing(case: str, policy: bool | str) -> None:
    def model() -> Any:
        made = tiny.model(dtype=torch.bfloat16 if case == "bfloat16" else torch.float32)
        if case == "kernels":
            use_cpu_kernels(made)
        return made

    expected = found(model(), autocast=case == "autocast", **PACKED)
    made = model()
    checkpoint_layers(made, policy)
    with copies():
        assert_equal(found(made, autocast=case == "autocast", **PACKED), expected)


@pytest.mark.parametrize("policy", [True, "offload"])
def test_a_divided_micro_batch_gives_the_same_numbers(policy: bool | str) -> None:
    expected = found(tiny.model(), max_tokens=25, **PACKED)
    model = tiny.model()
    checkpoint_layers(model, policy)
    with copies():
        assert_equal(found(model, max_tokens=25, **PACKED), expected)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gemma3n_text", "jamba", "rwkv"])
def test_experts_and_other_layers_get_the_same_gradients(name: str) -> None:
    expected = found(architectures.model(name))
    for policy in POLICIES:
        model = architectures.model(name)
        checkpoint_layers(model, policy)
        with copies():
            assert_equal(found(model), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_copy_of_the_model_has_the_policy(policy: bool | str) -> None:
    model = tiny.model()
    checkpoint_layers(model, policy)
    with copies() as copied:
        assert_equal(found(copy.deepcopy(model)), found(tiny.model()))
    assert bool(copied) == (policy == "offload")


# What is kept


class Products(TorchDispatchMode):
    """Counts products and calls of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name in ("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"):
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def products(policy: bool | str, architecture: str = "llama") -> tuple[Counter[str], Counter[str]]:
    """Those of a forward pass and of its backward pass."""
    model = tiny.model(architecture)
    checkpoint_layers(model, policy)
    assert can_pack(model)  # by a trial, whose products do not count
    batch = collate(ROWS[:1], packing=True)
    with Products() as forward:
        loss = Backbone(model, with_reference=False).logprobs(batch).sum.sum()
    with Products() as backward:
        loss.backward()
    return forward.count, backward.count


def test_selective_computes_no_product_twice() -> None:
    forward, expected = products(False)
    assert products("selective") == (forward, expected)
    # true computes all products of a layer again but the last, whose result no gradient needs.
    _, repeated = products(True)
    assert repeated["mm"] == expected["mm"] + 6 * LAYERS
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert repeated[attention] == forward[attention] > expected[attention] == 0


def test_selective_keeps_no_scores() -> None:
    # Where scores are capped they are computed by a product: two in the forward pass of a layer, four in its backward
    # pass, and the two again.
    (forward, expected), (_, selective) = products(False, architecture="gemma2"), products("selective", "gemma2")
    assert forward["bmm"] == 2 * LAYERS
    assert selective["bmm"] == expected["bmm"] + forward["bmm"]
    assert selective["mm"] == expected["mm"]


def test_offload_copies_the_input_of_each_layer_and_nothing_else() -> None:
    model = tiny.model("gpt2")  # whose layers get masks by position, too
    checkpoint_layers(model, "offload")
    batch = collate(ROWS, packing=False)
    with copies() as copied:
        loss = Backbone(model, with_reference=False).logprobs(batch).sum.sum()
        sizes = Counter(tuple(made.shape) for made in (one() for one in copied) if made is not None)
        assert sizes == Counter({(*chunk.input_ids.shape, 16): LAYERS for chunk in batch.chunks})
        loss.backward()
    assert not any(one() is not None for one in copied)


@pytest.mark.parametrize("policy", [True, "offload"])
def test_the_input_of_a_layer_is_freed_once_it_is_copied(policy: bool | str) -> None:
    model = tiny.model()
    checkpoint_layers(model, policy)
    assert can_pack(model)
    inputs: list[ref[torch.UntypedStorage]] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(ref(args[0].untyped_storage())))
    with copies():
        loss = Backbone(model, with_reference=False).logprobs(collate(ROWS, packing=True)).sum.sum()
        alive = [storage() is not None for storage in inputs]
        assert alive == [policy is True] * LAYERS
        loss.backward()


def test_on_a_cpu_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Tensor) -> Tensor:
        raise AssertionError

    monkeypatch.setattr("halos.policy.checkpointing.pinned_like", fail)
    model = tiny.model()
    checkpoint_layers(model, "offload")
    assert_equal(found(model), found(tiny.model()))


# What is refused


@pytest.mark.parametrize("policy", ["on", "true", 1, None])
def test_an_unknown_policy_is_refused(policy: Any) -> None:
    expected = r"^model\.gradient_checkpointing: expected true, false, selective or offload, found "
    with pytest.raises(ValueError, match=expected):
        ModelSpec(path="x", gradient_checkpointing=policy)


@pytest.mark.parametrize("policy", [False, *POLICIES])
def test_a_loaded_model_has_the_policy(policy: bool | str, tmp_path: Path) -> None:
    tiny.config("llama").save_pretrained(tmp_path)
    model = ModelSpec(path=str(tmp_path), random_weights=True, gradient_checkpointing=policy).load()
    layers = checkpointed_layers(model)
    assert len(layers) >= (LAYERS if policy else 0)
    names = {getattr(layer.__dict__[FUNCTION].func, "__name__", "") for layer in layers}
    assert names == ({"_offloaded_checkpoint"} if policy == "offload" else {"checkpoint"} if policy else set())
    assert all(("context_fn" in layer.__dict__[FUNCTION].keywords) == (policy == "selective") for layer in layers)


def test_layers_that_change_their_products_are_refused() -> None:
    model = architectures.model("gpt_oss")  # adds biases of experts in place
    checkpoint_layers(model, "selective")
    with pytest.raises(ValueError, match=r"^model\.gradient_checkpointing: expected true or offload, found selective"):
        found(model)


@pytest.mark.parametrize("policy", ["selective", "offload"])
def test_code_of_an_older_format_is_refused(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    monkeypatch.setattr(type(model), "_set_gradient_checkpointing", lambda self, module, value=False: None)
    with pytest.raises(ValueError, match=r"^model\.gradient_checkpointing: expected true or false, found .* LlamaFor"):
        checkpoint_layers(model, policy)
