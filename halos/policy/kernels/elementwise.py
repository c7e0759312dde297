"""RMSNorm and SwiGLU on CPUs, where new memory costs more than arithmetic.

PyTorch writes each intermediate result of such a formula to new memory and keeps most of them for the backward pass.
Here one result is made and changed in place, and the backward pass starts from the inputs. Results are the model's own
to the bit, gradients to rounding. Modules that compute something else, other devices and precisions, and code that is
being compiled keep the model's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halos.policy.kernels.matmul import plain_float32


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


class Changed(nn.Module):
    """A module that computes what its own class does in another way: the first base of a class made by :func:`fitting`,
    whose second is the module's own."""

    def __reduce__(self) -> Any:  # pickle does not find classes that were made here
        return _blank, type(self).__bases__, self.__dict__


class _Norm(Changed):
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not _applies(hidden_states, self.weight):
            own: Tensor = super().forward(hidden_states)
            return own
        found: Tensor = RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        return found


class _GatedLayer(Changed):
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

    def agrees(own: list[Tensor], changed: list[Tensor]) -> bool:
        return torch.equal(own[0], changed[0])

    return fitting(model, _Norm, _GatedLayer, agrees)


def fitting(
    model: nn.Module,
    norm: type[Changed],
    gated: type[Changed],
    agrees: Callable[[list[Tensor], list[Tensor]], bool],
    *,
    device: str = "cpu",
    dtypes: Collection[torch.dtype] = (torch.float32,),
) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """The modules of the model that look like an RMSNorm or a SwiGLU layer, each with the class that it may get or has.

    Of each class one is tried out, on a copy with small weights of its own on the ``device``, in each of the
    ``dtypes``; ``agrees`` gets output and gradients of its own class, and of the changed one.
    """
    fits: dict[type[nn.Module], bool] = {}
    for module in model.modules():
        changed = _changed(module, norm, gated)
        if changed is None:
            continue
        if changed not in fits:
            trials = (_try_out(module, changed, device, dtype) for dtype in dtypes)
            fits[changed] = changed is type(module) or all(found is not None and agrees(*found) for found in trials)
        if fits[changed]:
            yield module, changed


def _changed(module: nn.Module, norm: Any, gated: Any) -> type[nn.Module] | None:
    """The class that the module would get, by the parts that it has."""
    theirs: Any = _own_class(module)
    if hasattr(module, "variance_epsilon") and set(module._parameters) == {"weight"} and not module._modules:
        return _subclass(norm, theirs)
    is_gated = set(module._modules) == {"gate_proj", "up_proj", "down_proj", "act_fn"} and not module._parameters
    return _subclass(gated, theirs) if is_gated else None


def _own_class(module: nn.Module) -> type[nn.Module]:
    return type(module).__bases__[1] if isinstance(module, Changed) else type(module)


@cache
def _subclass(ours: Any, theirs: Any) -> type[nn.Module]:
    return type(theirs.__name__, (ours, theirs), {})


def _blank(ours: Any, theirs: Any) -> nn.Module:
    made = _subclass(ours, theirs)
    return made.__new__(made)


def _try_out(
    module: nn.Module, changed: type[nn.Module], device: str, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]] | None:
    trial = copy.copy(module)
    with torch.device(device), torch.random.fork_rng([]):
        torch.manual_seed(0)
        inputs = torch.randn(3, 8, dtype=dtype, requires_grad=True)
        trial._parameters = {name: nn.Parameter(torch.randn(8, dtype=dtype)) for name in module._parameters}
        trial._modules = {
            name: nn.Linear(8, 8, dtype=dtype) if name.endswith("proj") else part
            for name, part in module._modules.items()
        }
    try:
        trial.__class__ = _own_class(module)
        own = _results(trial, inputs)
        trial.__class__ = changed
        return own, _results(trial, inputs)
    except Exception:  # whatever a model's own code raises when its parts have other widths
        return None


@torch.enable_grad()
def _results(trial: Any, inputs: Tensor) -> list[Tensor]:
    output = trial.forward(inputs)  # hooks are not called
    return [output.detach(), *torch.autograd.grad(output.sin().sum(), [inputs, *trial.parameters()])]
