"""RMSNorm and SwiGLU on CPUs with few allocations, because new memory costs more there than arithmetic.

PyTorch writes each intermediate result of such a formula to new memory and keeps most of them for the backward pass.
Here one result is allocated and changed in place, and the backward pass starts from the inputs. Results equal the
model's own bit for bit, gradients up to rounding. The model's own code still runs for modules that compute something
else, on other devices, in other precisions and under torch.compile.

This file and :mod:`halos.policy.kernels.liger` replace a module in the same way. If a module has the parts of an
RMSNorm or of a SwiGLU layer, a subclass of its class is tried out. If the trial agrees with the module's own code, the
module gets this subclass (``module.__class__``). Names would not be enough: Gemma's RMSNorm looks like Llama's but
multiplies by 1 + w.
"""

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
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        products = (grad_output * x).reshape(-1, x.shape[-1])
        grad_x = grad_weight = None
        with torch.autocast("cpu", enabled=False):  # it would round the two products with vectors
            if ctx.needs_input_grad[0]:
                # g w r − x · r³ · mean(g w x)
                shared = products.mv(weight).view_as(r) * r.pow(3) / x.shape[-1]
                grad_x = (grad_output * weight).mul_(r).addcmul_(x, shared, value=-1)
            if ctx.needs_input_grad[1]:
                grad_weight = products.t().mv(r.reshape(-1))
        return grad_x, grad_weight, None


class SwiGLU(torch.autograd.Function):
    """gate, up [..., F] → silu(gate) · up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad_output) if ctx.needs_input_grad[1] else None
        grad_gate = torch.ops.aten.silu_backward(grad_output * up, gate) if ctx.needs_input_grad[0] else None
        return grad_gate, grad_up


rms_norm: Callable[[Tensor, Tensor, float], Tensor] = RMSNorm.apply
swiglu: Callable[[Tensor, Tensor], Tensor] = SwiGLU.apply


def _applies(*tensors: Tensor) -> bool:
    return not torch.compiler.is_compiling() and plain_float32(*tensors)


class Changed(nn.Module):
    """Base of a class made by :func:`fitting`: the changed forward first, the module's own class second."""

    def __reduce__(self) -> tuple[object, ...]:  # pickle looks classes up by name, and does not find those made here
        return _blank, type(self).__bases__, self.__dict__


class Norm(Changed):
    """The parts of an RMSNorm, by the names that Llama and its relatives have for them."""

    weight: Tensor
    variance_epsilon: float


class _Norm(Norm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if _applies(hidden_states, self.weight):
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        output: Tensor = super().forward(hidden_states)
        return output


class GatedLayer(Changed):
    """The parts of a SwiGLU layer."""

    gate_proj: Callable[[Tensor], Tensor]
    up_proj: Callable[[Tensor], Tensor]
    down_proj: Callable[[Tensor], Tensor]
    act_fn: Callable[[Tensor], Tensor]


class _GatedLayer(GatedLayer):
    def forward(self, x: Tensor) -> Tensor:
        if not _applies(x):
            output: Tensor = super().forward(x)
            return output
        gate, up = self.gate_proj(x), self.up_proj(x)
        # LoRA can give the two projections different precisions.
        return self.down_proj(swiglu(gate, up) if gate.dtype == up.dtype else self.act_fn(gate) * up)


def use_fewer_temporaries(model: nn.Module) -> None:
    """Let the model's RMSNorm and SwiGLU modules compute as this file does, if that gives their own results.

    A module takes part if it has the parts of such a module, and if a trial of its class agrees bit for bit. Names,
    weights and hooks stay.
    """
    for module, changed in list(lean_modules(model)):
        module.__class__ = changed


def lean_modules(model: nn.Module) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """Yield the modules of the model that take part, each with the class that it gets or has."""
    return fitting(model, _Norm, _GatedLayer, lambda original, changed: torch.equal(original[0], changed[0]))


def fitting(
    model: nn.Module,
    norm: type[Changed],
    gated: type[Changed],
    agrees: Callable[[list[Tensor], list[Tensor]], bool],
    *,
    device: str = "cpu",
    dtypes: Collection[torch.dtype] = (torch.float32,),
) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """Yield the modules that are an RMSNorm or a SwiGLU layer, each with the class that it may get or already has.

    One module of each class is tried out, as a copy with small weights of its own.

    Args:
        model: the model; it is not changed.
        norm: the changed forward of an RMSNorm.
        gated: the changed forward of a SwiGLU layer.
        agrees: compares output and gradients of the module's own class with those of the changed class.
        device: the device of the trial.
        dtypes: the precisions of the trial; the classes have to agree in all of them.
    """
    fits: dict[type[nn.Module], bool] = {}
    for module in model.modules():
        changed = _changed_class(module, norm, gated)
        if changed is None:
            continue
        if changed not in fits:
            trials = (_try_out(module, changed, device, dtype) for dtype in dtypes)
            fits[changed] = changed is type(module) or all(trial is not None and agrees(*trial) for trial in trials)
        if fits[changed]:
            yield module, changed


def _changed_class(module: nn.Module, norm: type[Changed], gated: type[Changed]) -> type[nn.Module] | None:
    """The class that the module would get, by the parts that it has."""
    if hasattr(module, "variance_epsilon") and set(module._parameters) == {"weight"} and not module._modules:
        return _subclass(norm, _own_class(module))
    is_gated = set(module._modules) == {"gate_proj", "up_proj", "down_proj", "act_fn"} and not module._parameters
    return _subclass(gated, _own_class(module)) if is_gated else None


def _own_class(module: nn.Module) -> type[nn.Module]:
    return type(module).__bases__[1] if isinstance(module, Changed) else type(module)


# The same class each time, so that code that compares types (a trial here, FSDP) sees that layers are alike.
_subclass: Callable[[type[Changed], type[nn.Module]], type[nn.Module]] = cache(  # type: ignore[assignment]
    lambda changed, original: type(original.__name__, (changed, original), {})
)


def _blank(changed: type[Changed], original: type[nn.Module]) -> nn.Module:
    subclass = _subclass(changed, original)
    return subclass.__new__(subclass)


def _try_out(
    module: nn.Module, changed: type[nn.Module], device: str, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Output and gradients by the module's own class and by the changed one, or None if its code fails."""
    # The module's own weights may be large, sharded or without memory (meta device): the trial has small ones.
    trial = copy.copy(module)
    with torch.device(device), torch.random.fork_rng([]):
        torch.manual_seed(0)
        inputs = torch.randn(3, 8, dtype=dtype, requires_grad=True)
        trial._parameters = {name: nn.Parameter(torch.randn(8, dtype=dtype)) for name in module._parameters}
        trial._modules = {
            name: nn.Linear(8, 8, dtype=dtype) if name.endswith("proj") else child
            for name, child in module._modules.items()
        }
    try:
        trial.__class__ = _own_class(module)
        original_results = _results(trial, inputs)
        trial.__class__ = changed
        return original_results, _results(trial, inputs)
    except Exception:  # whatever a model's own code raises when its parts have other widths
        return None


@torch.enable_grad()
def _results(trial: nn.Module, inputs: Tensor) -> list[Tensor]:
    output = trial.forward(inputs)  # not called: hooks of the module would run
    return [output.detach(), *torch.autograd.grad(output.sin().sum(), [inputs, *trial.parameters()])]
