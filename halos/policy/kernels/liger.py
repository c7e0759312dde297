"""``model.liger``: RMSNorm and SwiGLU by Liger's Triton kernels, on CUDA.

Liger's other kernels are not used: its rotary embedding would replace a function for every model of the process, and
this project has its own LM head. A module takes part if a trial on the device gives its own output and gradients up to
rounding.
"""

import importlib.util
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from halos.policy.kernels.elementwise import GatedLayer, Norm, fitting

log = logging.getLogger(__name__)

DEVICE = "cuda"

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Tolerance for rounding between the output and gradients of a trial, numbers around 1, and the model's own."""


class _Norm(Norm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _applies(hidden_states, self.weight):
            output: Tensor = super().forward(hidden_states)
            return output
        from liger_kernel.ops import LigerRMSNormFunction

        norm: Callable[..., Tensor] = LigerRMSNormFunction.apply
        # The last argument, in_place, is off: the incoming gradient may be another branch's too, as where a residual
        # connection leaves, and in place the kernel would overwrite it.
        return norm(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False)


class _GatedLayer(GatedLayer):
    def forward(self, x: Tensor) -> Tensor:
        from liger_kernel.ops import LigerSiLUMulFunction

        # Its gradients are written over the values that it kept, so one backward pass may follow a forward pass, as in
        # training; a second one would read gradients as values.
        multiply: Callable[..., Tensor] = LigerSiLUMulFunction.apply
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(multiply(gate, up) if _applies(gate, up) else self.act_fn(gate) * up)


def _applies(one: Tensor, other: Tensor) -> bool:
    # The kernels take unsharded tensors of one precision, and compute in float32, which is not enough for float64.
    plain = all(type(t) in (Tensor, nn.Parameter) and t.device.type == DEVICE for t in (one, other))
    return plain and one.dtype == other.dtype != torch.float64


def use_liger(model: nn.Module) -> None:
    """Let the model's RMSNorm and SwiGLU modules call Liger's kernels, if those give the modules' own results.

    Raises:
        ValueError: if there is no such module.
    """
    changed = list(fitting(model, _Norm, _GatedLayer, _agree, device=DEVICE, dtypes=TOLERANCE))
    if not changed:
        expected = "a model with RMSNorm or SwiGLU layers that Liger's kernels reproduce"
        raise ValueError(f"model.liger: expected {expected}, found {type(model).__name__}; set model.liger=false")
    for module, changed_class in changed:
        module.__class__ = changed_class
    log.info("%s: %d modules by Liger's kernels", type(model).__name__, len(changed))


def _agree(original: list[Tensor], changed: list[Tensor]) -> bool:
    tolerance = TOLERANCE[original[0].dtype]
    pairs = zip(original, changed, strict=True)
    return all(torch.allclose(one, other, rtol=tolerance, atol=tolerance) for one, other in pairs)


def check_liger(accelerator: str) -> None:
    """Check that Liger is installed and that its kernels can run on this accelerator.

    Raises:
        ValueError: if it is missing, or there is no CUDA device.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError("model.liger: expected liger-kernel; install the extra with pip install 'halos[liger]'")
    if accelerator == "cpu" or not torch.cuda.is_available():
        raise ValueError(f"model.liger: expected a CUDA device, found trainer.accelerator={accelerator} without one")
