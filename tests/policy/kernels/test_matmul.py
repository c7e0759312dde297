"""float32 products by oneDNN: the numbers of PyTorch's own, but for rounding."""

from __future__ import annotations

import copy
import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from halos.judges.reward_model import RewardModel
from halos.policy.kernels import matmul as products
from halos.policy.kernels.matmul import (
    CACHES,
    MAX_KERNELS,
    Linear,
    add_product,
    affine,
    limit_kernel_caches,
    linear,
    use_faster_products,
)
from halos.policy.loading import ModelSpec
from halos.policy.lookup import Policy
from halos.toy.model import REFERENCE_DIR
from tests.fork import run_ranks


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("leading", [(7,), (2, 5)])
def test_values_and_gradients_are_those_in_float64(leading: tuple[int, ...], with_bias: bool) -> None:
    given = tensors((*leading, 12), (9, 12), (9,))[: 2 + with_bias]
    exact = [value.detach().double().requires_grad_() for value in given]
    found, expected = linear(*given), nn.functional.linear(*exact)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    (found * found.detach().sin()).sum().backward()
    (expected * expected.detach().sin()).sum().backward()
    for one, other in zip(given, exact, strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=1e-4)


def test_what_needs_no_gradient_gets_none() -> None:
    states, weight = tensors((3, 4), (5, 4))
    linear(states.detach(), weight).sum().backward()
    assert weight.grad is not None
    frozen = weight.detach()
    linear(states, frozen).sum().backward()
    assert states.grad is not None
    assert frozen.grad is None


def test_transposed_operands_are_read_as_they_lie() -> None:
    a, b = (value.detach() for value in tensors((6, 4), (6, 5)))
    torch.testing.assert_close(affine(a.T, b.T), a.T @ b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [4, 7, 100])
def test_a_product_is_added_some_rows_at_a_time(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    own = products.affine

    def watched(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(len(states))
        return own(states, weight)

    monkeypatch.setattr(products, "CPU_SUM_ROWS", rows)
    monkeypatch.setattr(products, "affine", watched)
    left, right, total = (value.detach() for value in tensors((11, 4), (4, 5), (11, 5)))
    left, right = left.to(dtype), right.to(dtype)
    total = total.to(torch.promote_types(dtype, torch.float32))
    expected = total.double() + left.double() @ right.double()
    add_product(total, left, right)
    within = {torch.float32: 1e-5, torch.float64: 1e-14, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=within)
    assert not seen if dtype == torch.float64 else (sum(seen) == 11 and max(seen) == min(rows, 11))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_left_to_pytorch(dtype: torch.dtype) -> None:
    given = tensors((3, 4), (5, 4), dtype=dtype)
    assert torch.equal(linear(*given), nn.functional.linear(*given))
    assert not products.applies(*given)


def test_autocast_is_left_to_pytorch() -> None:
    given = tensors((3, 4), (5, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(*given).dtype == torch.bfloat16


def test_no_states_give_no_numbers() -> None:
    states, weight = tensors((0, 4), (5, 4))
    assert linear(states, weight).shape == (0, 5)


class Own(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input


def test_a_model_keeps_its_weights_names_and_special_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Own(5, 2))
    before: dict[str, Any] = dict(model.state_dict())
    use_faster_products(model)
    assert [type(layer) for layer in model] == [Linear, nn.Tanh, Own]
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert next(model.parameters()).any()


def test_nothing_changes_where_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    model = nn.Sequential(nn.Linear(4, 5))
    use_faster_products(model)
    assert type(model[0]) is nn.Linear
    assert not products.applies(*tensors((1, 1)))


class Mallinfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``: ten counts, of which the eighth is the bytes in use."""

    _fields_ = (("counts", ctypes.c_size_t * 10),)


def growth(limited: bool) -> int:
    """Bytes in use that are more after 64 sizes of a product, once 64 others are known."""
    for variable in CACHES:
        os.environ.pop(variable, None)
    if limited:
        limit_kernel_caches()
    count = ctypes.CDLL(None).mallinfo2
    count.restype = Mallinfo
    states, weight = torch.ones(4 * MAX_KERNELS, 64), torch.ones(96, 64)
    before = 0
    for size in range(1, len(states) + 1):
        torch.ops.mkldnn._linear_pointwise(states[:size], weight, None, "none", [], "")
        if size == 2 * MAX_KERNELS:
            before = count().counts[7]
    return int(count().counts[7]) - before


@pytest.mark.ranks
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library is not glibc from 2.33 on")
def test_products_of_ever_new_sizes_take_no_more_memory() -> None:
    [limited], [usual] = (run_ranks(partial(growth, limited), 1) for limited in (True, False))
    assert limited < usual / 4


def ways_to_load() -> dict[str, Callable[[], Any]]:
    spec = ModelSpec(path=str(REFERENCE_DIR))
    return {
        "trained": spec.load,
        "evaluated": lambda: Policy("toy", spec).load(device="cpu", precision="bf16-true"),
        "judging": lambda: RewardModel(path=spec.path)._loaded[0],
    }


@pytest.mark.parametrize("name", ways_to_load())
def test_a_model_limits_what_is_kept_for_products_unless_the_environment_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHES[0], "7")
    monkeypatch.setenv(CACHES[1], "7")
    monkeypatch.delenv(CACHES[1])
    with suppress(ValueError):  # the toy model is no judge, which is said once it is read
        ways_to_load()[name]()
    assert [os.environ[name] for name in CACHES] == ["7", str(MAX_KERNELS)]


def test_small_products_are_left_to_mkl_while_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def record(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows.append(len(states))
        return nn.functional.linear(states, weight, bias)

    monkeypatch.setattr(products, "applies", lambda *_: True)
    monkeypatch.setattr(products, "affine", record)
    weight = torch.randn(1024, 64)
    with torch.no_grad():
        with products.small_products_by_mkl():
            outputs = [products.linear(torch.ones(count, 64), weight) for count in (15, 16)]  # 16 · 64 · 1024 = 2^20
        assert rows == [16]
        products.linear(torch.ones(15, 64), weight)
    assert rows == [16, 15]
    assert torch.allclose(outputs[0][0], weight.sum(1), atol=1e-4)
