"""Liger's kernels, of which PyTorch's own operations stand in for those that need CUDA."""

from __future__ import annotations

import copy
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halos.policy.checkpointing import checkpoint_layers
from halos.policy.kernels import liger
from halos.policy.kernels.cpu import use_cpu_kernels
from halos.policy.kernels.liger import check_liger, use_liger
from halos.policy.loading import ModelSpec
from tests import tiny
from tests.policy.kernels.test_elementwise import CHANGED, gradients

CALLS: list[str] = []


class LigerRMSNormFunction:
    @staticmethod
    def apply(x: Tensor, weight: Tensor, eps: float, offset: float, casting_mode: str, in_place: bool) -> Tensor:
        CALLS.append("norm")
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return nn.functional.rms_norm(x, weight.shape, weight, eps)


class LigerSiLUMulFunction:
    @staticmethod
    def apply(gate: Tensor, up: Tensor) -> Tensor:
        CALLS.append("gated")
        return gate * gate.sigmoid() * up


@pytest.fixture(autouse=True)
def ops(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in for ``liger_kernel.ops``, on the CPU."""
    made: Any = ModuleType("liger_kernel.ops")
    made.LigerRMSNormFunction, made.LigerSiLUMulFunction = LigerRMSNormFunction, LigerSiLUMulFunction
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", made)
    monkeypatch.setattr(liger, "DEVICE", "cpu")
    CALLS.clear()
    return made


@pytest.mark.parametrize("architecture", sorted(CHANGED))
@pytest.mark.parametrize("lean", [False, True])
def test_models_compute_by_the_kernels_what_they_did(architecture: str, lean: bool) -> None:
    own = tiny.model(architecture).eval()
    other = copy.deepcopy(own)
    if lean:
        use_cpu_kernels(other)
    names = list(other.state_dict())
    use_liger(other)
    assert list(other.state_dict()) == names
    ids = torch.arange(1, 25).view(2, 12)
    expected = gradients(own, ids)
    CALLS.clear()
    found = gradients(other, ids)
    layers = own.config.num_hidden_layers
    assert CALLS.count("gated") == layers
    assert CALLS.count("norm") >= 2 * layers + 1
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    for left, right in zip(found[1], expected[1], strict=True):
        # Next to the largest, as elements and sums whose large terms cancel keep the rounding of these.
        assert (left - right).abs().max() <= 1e-5 + 2e-6 * right.abs().max()


@pytest.mark.parametrize("policy", [True, "selective", "offload"])
def test_checkpointed_layers_run_the_kernels_again(policy: bool | str) -> None:
    def found(policy: bool | str) -> tuple[Any, int]:
        model = tiny.model("llama")
        use_liger(model)
        checkpoint_layers(model, policy)
        CALLS.clear()
        return gradients(model, torch.arange(1, 25).view(2, 12)), len(CALLS)

    (expected, once), (again, calls) = found(False), found(policy)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
    assert calls == 2 * once - 1  # the norm after the last layer runs once


def test_float64_keeps_the_models_own() -> None:
    model = tiny.model("llama", dtype=torch.float64)
    use_liger(model)
    CALLS.clear()
    model(input_ids=torch.arange(1, 9)[None])
    assert CALLS == []


def test_a_kernel_that_is_wrong_in_bfloat16_is_not_used(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(LigerRMSNormFunction):
        @staticmethod
        def apply(x: Tensor, *others: Any) -> Tensor:
            return LigerRMSNormFunction.apply(x, *others) * (1.2 if x.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(ops, "LigerRMSNormFunction", Wrong)
    model = tiny.model("llama")
    use_liger(model)
    assert not isinstance(model.model.norm, liger._Norm)
    assert isinstance(model.model.layers[0].mlp, liger._GatedLayer)


def test_a_kernel_with_another_gradient_is_not_used(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
            ctx.save_for_backward(gate, up)
            return nn.functional.silu(gate) * up

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            gate, up = ctx.saved_tensors
            return gradient * up, gradient * nn.functional.silu(gate)

    monkeypatch.setattr(ops, "LigerSiLUMulFunction", Wrong)
    model = tiny.model("llama")
    before = type(model.model.layers[0].mlp)
    use_liger(model)
    assert type(model.model.layers[0].mlp) is before
    assert isinstance(model.model.norm, liger._Norm)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model\.liger: expected a model with RMSNorm or SwiGLU .* found GPT2LMHead"):
        use_liger(tiny.model("gpt2"))


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = [None, object()]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found.pop(0))
    with pytest.raises(ValueError, match=r"^model\.liger: .*pip install 'halos\[liger\]'"):
        check_liger("gpu")
    with pytest.raises(ValueError, match=r"^model\.liger: expected a CUDA device, found trainer\.accelerator=cpu"):
        check_liger("cpu")


def test_compiled_layers_are_no_place_for_it() -> None:
    with pytest.raises(ValueError, match=r"^model\.liger: expected false with model\.compile=true"):
        ModelSpec(path="x", liger=True, compile=True)
