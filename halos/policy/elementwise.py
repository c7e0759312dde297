"""RMSNorm and SwiGLU on CPUs, where new memory costs more than arithmetic.

PyTorch writes each intermediate result of such a formula to new memory and keeps most of them for the backward pass.
Here one result is made and changed in place, and the backward pass starts from the inputs. Results are the model's own
to the bit, gradients to rounding. Modules that compute something else, other devices and precisions, and code that is
being compiled keep the model's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halos.policy.products import plain_float32


class RMSNorm(torch.autograd.Function):
    """x [..., H], w [H] → x · r · w with r = 1 / √(mean x² + ε)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, r = ctx.saved_tensors
        products = (gradient * x).reshape(-1, x.shape[-1])
        of_x = of_weight = None
        with torch.autocast("cpu", enabled=False):  # it would round the two products with vectors
            if ctx.needs_input_grad[0]:
                # g w r − x · r³ · mean(g w x)
                shared = products.mv(weight).view_as(r) * r.pow(3) / x.shape[-1]
                of_x = (gradient * weight).mul_(r).addcmul_(x, shared, value=-1)
            if ctx.needs_input_grad[1]:
                of_weight = products.t().mv(r.reshape(-1))
        return of_x, of_weight, None


class SwiGLU(torch.autograd.Function):
    """gate, up [..., F] → silu(gate) · up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        of_up = F.silu(gate).mul_(gradient) if ctx.needs_input_grad[1] else None
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate) if ctx.needs_input_grad[0] else None
        return of_gate, of_up


def _applies(*tensors: Tensor) -> bool:
    return not torch.compiler.is_compiling() and plain_float32(*tensors)


class _Changed(nn.Module):
    def __reduce__(self) -> Any:  # pickle does not find classes that were made here
        return _blank, type(self).__bases__, self.__dict__


class _Norm(_Changed):
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not _applies(hidden_states, self.weight):
            own: Tensor = super().forward(hidden_states)
            return own
        found: Tensor = RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        return found


class _GatedLayer(_Changed):
    def forward(self: Any, x: Tensor) -> Tensor:
        if not _applies(x):
            own: Tensor = super().forward(x)
            return own
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = SwiGLU.apply(gate, up) if gate.dtype == up.dtype else self.act_fn(gate) * up
        found: Tensor = self.down_proj(product)
        return found


def use_fewer_temporaries(model: nn.Module) -> None:
    """Have the model's RMSNorm and SwiGLU modules compute as this file does, where that gives their own results.

    A module takes part if it has the parts of one and a trial of its class agrees to the bit. Names, weights and hooks
    stay.
    """
    for module, changed in list(lean_modules(model)):
        module.__class__ = changed


def lean_modules(model: nn.Module) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """The modules of the model that take part, each with the class that it gets or has."""
    agreed: dict[type[nn.Module], bool] = {}
    for module in model.modules():
        if isinstance(module, _Changed):
            yield module, type(module)
        elif changed := _changed(module):
            if changed not in agreed:
                agreed[changed] = _agrees(module, changed)
            if agreed[changed]:
                yield module, changed


def _changed(module: nn.Module) -> type[nn.Module] | None:
    """The class that the module would get, by the parts that it has."""
    theirs: Any = type(module)
    if hasattr(module, "variance_epsilon") and set(module._parameters) == {"weight"} and not module._modules:
        return _subclass(_Norm, theirs)
    gated = set(module._modules) == {"gate_proj", "up_proj", "down_proj", "act_fn"} and not module._parameters
    return _subclass(_GatedLayer, theirs) if gated else None


@cache
def _subclass(ours: Any, theirs: Any) -> type[nn.Module]:
    return type(theirs.__name__, (ours, theirs), {})


def _blank(ours: Any, theirs: Any) -> nn.Module:
    made = _subclass(ours, theirs)
    return made.__new__(made)


@torch.no_grad()
def _agrees(module: nn.Module, changed: type[nn.Module]) -> bool:
    """Whether the two classes give the same numbers, tried on a copy with small weights of its own."""
    trial = copy.copy(module)
    parts = module._modules.items()
    with torch.device("cpu"), torch.random.fork_rng([]):
        torch.manual_seed(0)
        inputs = torch.randn(3, 8)
        trial._parameters = {name: nn.Parameter(torch.randn(8)) for name in module._parameters}
        trial._modules = {name: nn.Linear(8, 8) if name.endswith("proj") else part for name, part in parts}
    try:
        expected = trial.forward(inputs)
        trial.__class__ = changed
        return torch.equal(trial.forward(inputs), expected)
    except Exception:  # whatever a model's own code raises when its parts have other widths
        return False
