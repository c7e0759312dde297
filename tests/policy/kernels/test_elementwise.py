"""RMSNorm and SwiGLU in few temporaries: the model's own results to the bit, its gradients to rounding."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from halos.policy.kernels.elementwise import Changed, RMSNorm, SwiGLU, use_fewer_temporaries
from tests import tiny

CHANGED = {"llama", "qwen2", "qwen3", "mistral"}


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def changed(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Changed)]


def gradients(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logits = model(input_ids=ids, use_cache=False).logits
    (logits * logits.detach().sin()).sum().backward()
    return logits.detach(), [parameter.grad for parameter in model.parameters()]


def test_rms_norm_has_the_gradients_of_float64() -> None:
    given = tensors((2, 5, 7), (7,))
    exact = [value.detach().double().requires_grad_() for value in given]
    found = RMSNorm.apply(*given, 0.1)
    x, weight = exact
    expected = x / (x.square().sum(-1, keepdim=True) / 7 + 0.1).sqrt() * weight
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    (found * found.detach().sin()).sum().backward()
    (expected * expected.detach().sin()).sum().backward()
    for one, other in zip(given, exact, strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=2e-6)


def test_swiglu_has_the_gradients_of_float64() -> None:
    given = tensors((2, 5, 7), (2, 5, 7))
    exact = [value.detach().double().requires_grad_() for value in given]
    found = SwiGLU.apply(*given)
    gate, up = exact
    expected = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    (found * found.detach().sin()).sum().backward()
    (expected * expected.detach().sin()).sum().backward()
    for one, other in zip(given, exact, strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=2e-6)


@pytest.mark.parametrize("formula", [RMSNorm, SwiGLU])
def test_what_needs_no_gradient_gets_none(formula: Any) -> None:
    one, other = tensors((3, 4), (4,) if formula is RMSNorm else (3, 4))
    rest = (1e-6,) if formula is RMSNorm else ()
    formula.apply(one.detach(), other, *rest).sum().backward()
    formula.apply(one, other.detach(), *rest).sum().backward()
    assert one.grad is not None
    assert other.grad is not None


def test_a_backward_pass_within_autocast_is_as_exact() -> None:
    given = tensors((4, 64), (64,))
    found = RMSNorm.apply(*given, 1e-6)
    outside = torch.autograd.grad(found.sin().sum(), given, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = torch.autograd.grad(found.sin().sum(), given)
    assert all(map(torch.equal, outside, within))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_every_architecture_stays_as_it_was(architecture: str, precision: str) -> None:
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    own = tiny.model(architecture, dtype=dtype).eval()
    other = copy.deepcopy(own)
    use_fewer_temporaries(other)
    assert bool(changed(other)) == (architecture in CHANGED)
    ids = torch.arange(1, 25).view(2, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
        expected, found = gradients(own, ids), gradients(other, ids)
    assert torch.equal(found[0], expected[0])
    within = 0.0 if precision in ("bf16-true", "64-true") else 1e-5 if precision == "32-true" else 0.02
    for (name, _), one, two in zip(own.named_parameters(), found[1], expected[1], strict=True):
        assert (one - two).abs().max() <= within * (1 + two.abs().max()), name


def test_names_and_weights_stay_and_nothing_random_is_drawn() -> None:
    model = tiny.model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [type(module).__name__ for module in model.modules()]
    state = torch.get_rng_state()
    use_fewer_temporaries(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(module).__name__ for module in model.modules()] == names
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_a_second_time_changes_nothing() -> None:
    model = tiny.model("llama")
    use_fewer_temporaries(model)
    classes = [type(module) for module in model.modules()]
    use_fewer_temporaries(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_alike(how: Any) -> None:
    model = tiny.model("llama").eval()
    use_fewer_temporaries(model)
    copied = how(model)
    assert [type(module) for module in copied.modules()] == [type(module) for module in model.modules()]
    ids = torch.arange(1, 9)[None]
    assert torch.equal(model(input_ids=ids).logits, copied(input_ids=ids).logits)


def test_models_without_memory_yet_are_changed_too() -> None:
    model = tiny.model("llama").to("meta")
    use_fewer_temporaries(model)
    assert changed(model)


class Doubled(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden_states)


def test_a_module_that_computes_something_else_keeps_it() -> None:
    model = nn.Sequential(Doubled(8), LlamaRMSNorm(8))
    use_fewer_temporaries(model)
    assert changed(model) == [model[1]]
    assert type(model[0]) is Doubled


def test_hooks_are_not_called_by_the_trial_and_stay() -> None:
    model = nn.Sequential(LlamaRMSNorm(8))
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    use_fewer_temporaries(model)
    assert calls == []
    model(torch.ones(2, 8))
    assert calls == [1]


def test_fewer_values_are_kept_for_the_backward_pass() -> None:
    def kept(model: Any) -> int:
        held: dict[int, torch.UntypedStorage] = {}  # each storage once

        def pack(value: torch.Tensor) -> torch.Tensor:
            held[value.untyped_storage().data_ptr()] = value.untyped_storage()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            model(input_ids=torch.arange(1, 33)[None], use_cache=False)
        return sum(storage.nbytes() for storage in held.values())

    own = tiny.model("llama").eval()
    other = copy.deepcopy(own)
    use_fewer_temporaries(other)
    assert kept(other) < kept(own)
