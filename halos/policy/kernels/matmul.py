"""Matrix products on CPUs.

PyTorch hands those in float32 to MKL, which does not use the AVX-512 units of AMD's processors; oneDNN, which PyTorch
brings along for bfloat16, does, and takes half the time there. Both add up in float32.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNELS = 32
"""Products that oneDNN keeps code for: more than a decoder layer has, which the next layer uses again."""
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's, and PyTorch's before it


def limit_kernel_caches() -> None:
    """Have oneDNN keep code for few products, unless the environment says how many; before the first one is computed.

    It writes code for every size of product, about 1 MB of it, and would keep 1,024 of them. Packed batches seldom
    have as many tokens as one before, so that each step would add to them and scatter them over the memory that
    tensors left: 100 MB a step of SmolLM2-135M at bfloat16.
    """
    for variable in CACHES:
        os.environ.setdefault(variable, str(KERNELS))


@cache
def onednn_is_faster() -> bool:
    """Whether this machine's processor is one that MKL runs at half speed: a fact of the machine, so that a resumed
    run computes as the one before."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    info = Path("/proc/cpuinfo")
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and info.exists() and "AuthenticAMD" in info.read_text()


def plain_float32(*tensors: Tensor) -> bool:
    """Whether all of these are float32 on a CPU, and no shards or other kinds of tensors."""
    return all(
        type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors
    )


def applies(*tensors: Tensor) -> bool:
    """Whether products of these tensors are computed by oneDNN."""
    return onednn_is_faster() and plain_float32(*tensors)


class Linear(nn.Linear):
    """A linear layer whose products, where that is faster, are oneDNN's."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def use_faster_products(model: nn.Module) -> None:
    """Make the model's plain linear layers :class:`Linear`, where that makes a difference."""
    for module in model.modules() if onednn_is_faster() else ():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """states [..., k] · weightᵀ [k, n] + bias [n]."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):  # compiled code chooses by itself
        return F.linear(states, weight, bias)
    if not applies(states, weight) or not states.numel():
        return F.linear(states, weight, bias)
    found: Tensor = _Linear.apply(states, weight, bias)
    return found


def affine(states: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """:func:`linear` of states [m, k], without gradient and outside of autocast; in the first m rows of ``out``
    [≥ m, n], if that is given and can be used."""
    if applies(states, weight) and states.numel() and weight.numel():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
        return found
    if out is None:
        return F.linear(states, weight, bias)
    if bias is None:
        return torch.mm(states, weight.t(), out=out[: len(states)])
    return torch.addmm(bias, states, weight.t(), out=out[: len(states)])


ROWS = 1024
"""Rows of a product that exist at a time on a CPU before they are added to the total: new memory for all of them, and
for a copy in the total's precision, can cost more than the product."""


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [m, n] += left [m, k] · right [k, n], without gradient; the total may be wider than the factors."""
    if total.dtype == left.dtype and not applies(left, right):
        total.addmm_(left, right)
        return
    size = ROWS if total.device.type == "cpu" else len(total)
    for part, rows in zip(total.split(size), left.split(size), strict=True):
        part += affine(rows, right.t())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states, weight)
        return affine(states, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        states, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_states = affine(flat, weight.t()).view_as(states) if ctx.needs_input_grad[0] else None
        of_weight = affine(flat.t(), states.reshape(-1, states.shape[-1]).t()) if ctx.needs_input_grad[1] else None
        return of_states, of_weight, flat.sum(0) if ctx.needs_input_grad[2] else None
