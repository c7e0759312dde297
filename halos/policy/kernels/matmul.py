"""Matrix products on CPUs.

PyTorch computes float32 products with MKL, which does not use the AVX-512 units of AMD's processors. oneDNN, which
PyTorch ships for bfloat16, uses them and takes half the time there. Both accumulate in float32.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halos.policy.kernels.device_types import device_type

MAX_KERNELS = 32
"""Products for which oneDNN keeps code: more than a decoder layer has, so that the next layer can use them again."""
SMALL = 2**20
"""Multiplications of a product for which MKL takes about as long as oneDNN."""
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's, and PyTorch's in front of it


def limit_kernel_caches() -> None:
    """Let oneDNN keep code for only a few products, unless the environment sets the limit.

    This must be called before the first product, because the limits are read only once.
    """
    # oneDNN writes code for every size of product, about 1 MB each, and keeps 1,024 of them by default. Packed batches
    # seldom have as many tokens as an earlier one. Each step would therefore add code, scattered over the memory that
    # tensors have freed, which then cannot be returned: 100 MB a step for SmolLM2-135M in bfloat16.
    for variable in CACHES:
        os.environ.setdefault(variable, str(MAX_KERNELS))


@cache
def onednn_is_faster() -> bool:
    """Return whether MKL runs at half speed on this machine's processor."""
    # Decided by the processor's name, not by a measurement, so that a resumed run computes in the same way.
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    info = Path("/proc/cpuinfo")
    # The operator is private to PyTorch and absent from builds without oneDNN.
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and info.exists() and "AuthenticAMD" in info.read_text()


def plain_float32(*tensors: Tensor) -> bool:
    """Return whether all tensors are float32 on a CPU, and none is a shard or another subclass."""
    return all(
        type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and device_type(t) == "cpu" for t in tensors
    )


def applies(*tensors: Tensor) -> bool:
    """Return whether products of these tensors are computed by oneDNN."""
    return onednn_is_faster() and plain_float32(*tensors)


_least_multiplications = 0


@contextmanager
def small_products_by_mkl() -> Iterator[None]:
    """Within, linear layers leave products of fewer than :data:`SMALL` multiplications to MKL."""
    # oneDNN takes about 10 µs for a call, and milliseconds for the code of each new number of rows. Not in training,
    # where the result of a product would then depend on how many tokens a micro-batch has.
    global _least_multiplications
    before, _least_multiplications = _least_multiplications, SMALL
    try:
        yield
    finally:
        _least_multiplications = before


class Linear(nn.Linear):
    """A linear layer that computes its products with oneDNN where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def use_faster_products(model: nn.Module) -> None:
    """Turn the model's plain linear layers into :class:`Linear` where oneDNN is faster."""
    for module in model.modules() if onednn_is_faster() else ():
        if type(module) is nn.Linear:  # subclasses may compute something else
            module.__class__ = Linear


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """states [..., k] · weightᵀ [k, n] + bias [n] → [..., n]."""
    # torch.compile chooses its own kernels, autocast its own precision; oneDNN refuses a product without rows.
    compiled = torch.compiler.is_compiling()
    if compiled or torch.is_autocast_enabled("cpu") or not applies(states, weight) or not states.numel():
        return F.linear(states, weight, bias)
    if states.numel() * len(weight) < _least_multiplications:
        return F.linear(states, weight, bias)
    return _linear(states, weight, bias) if torch.is_grad_enabled() else affine(states, weight, bias)


def affine(states: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """:func:`linear` of states [m, k] without gradient, outside of autocast.

    Args:
        states: [m, k].
        weight: [n, k]; a transposed view is read as it lies, without a copy.
        bias: [n].
        out: memory [≥ m, n] for the result. oneDNN cannot write into it and returns new memory, so a caller that
            wants only one result alive has to drop the one before first.
    """
    if applies(states, weight) and states.numel() and weight.numel():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
        return product
    if out is None:
        return F.linear(states, weight, bias)
    if bias is None:
        return torch.mm(states, weight.t(), out=out[: len(states)])
    return torch.addmm(bias, states, weight.t(), out=out[: len(states)])


CPU_SUM_ROWS = 1024
"""Rows of a product that exist at a time on a CPU before they are added to the total."""


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [m, n] += left [m, k] · right [k, n], without gradient; the total may be wider than the factors."""
    if total.dtype == left.dtype and not applies(left, right):
        total.addmm_(left, right)  # adds in place: no memory for the product
        return
    # oneDNN has no sum into a tensor, and addmm_ none in another precision. On a CPU, new memory for the whole product
    # and for its copy in the total's precision can cost more than the product itself.
    size = CPU_SUM_ROWS if device_type(total) == "cpu" else len(total)
    for total_rows, left_rows in zip(torch.split(total, size), torch.split(left, size), strict=True):
        total_rows += affine(left_rows, right.t())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states, weight)
        return affine(states, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad
        grad_rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_states = affine(grad_rows, weight.t()).view_as(states) if needs_states else None
        grad_weight = affine(grad_rows.t(), states.reshape(-1, states.shape[-1]).t()) if needs_weight else None
        return grad_states, grad_weight, grad_rows.sum(0) if needs_bias else None


_linear: Callable[..., Tensor] = _Linear.apply
