"""``model.liger``: RMSNorm and SwiGLU by Liger's Triton kernels, on CUDA.

Only these two: Liger's rotary embedding replaces a function for every model of the process, and the LM head is ours.
Modules take part of which a trial on the device gives their own output and gradients to rounding.
Liger's SwiGLU writes its gradients over the values that it kept, so one backward pass may follow a forward pass, as in
training.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor, nn

from halos.policy.kernels.elementwise import Changed, fitting

log = logging.getLogger(__name__)

DEVICE = "cuda"

WITHIN = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""How far output and gradients of a trial, of numbers around 1, may be from the model's own: rounding."""


class _Norm(Changed):
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not _applies(hidden_states, self.weight):
            own: Tensor = super().forward(hidden_states)
            return own
        from liger_kernel.ops import LigerRMSNormFunction

        # Not in place: the gradient that comes in may be another branch's too.
        found: Tensor = LigerRMSNormFunction.apply(
            hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False
        )
        return found


class _GatedLayer(Changed):
    def forward(self: Any, x: Tensor) -> Tensor:
        from liger_kernel.ops import LigerSiLUMulFunction

        gate, up = self.gate_proj(x), self.up_proj(x)
        product = LigerSiLUMulFunction.apply(gate, up) if _applies(gate, up) else self.act_fn(gate) * up
        found: Tensor = self.down_proj(product)
        return found


def _applies(one: Tensor, other: Tensor) -> bool:
    # Kernels for whole tensors of one precision; they compute in float32.
    plain = all(type(t) in (Tensor, nn.Parameter) and t.device.type == DEVICE for t in (one, other))
    return plain and one.dtype == other.dtype != torch.float64


def use_liger(model: nn.Module) -> None:
    """Have the model's RMSNorm and SwiGLU modules call Liger's kernels, where those give their own results.

    Raises ``ValueError`` if they do for none.
    """
    changed = list(fitting(model, _Norm, _GatedLayer, _agree, device=DEVICE, dtypes=WITHIN))
    if not changed:
        raise ValueError(
            "model.liger: expected a model with RMSNorm or SwiGLU layers as Llama has them, found "
            f"{type(model).__name__}, of which Liger's kernels give no layer's own results"
        )
    for module, kind in changed:
        module.__class__ = kind
    log.info("%s: %d modules by Liger's kernels", type(model).__name__, len(changed))


def _agree(own: list[Tensor], changed: list[Tensor]) -> bool:
    within = WITHIN[own[0].dtype]
    return all(torch.allclose(one, other, rtol=within, atol=within) for one, other in zip(own, changed, strict=True))


def check_liger(accelerator: str) -> None:
    """Raise ``ValueError`` unless Liger is installed and its kernels can run on this accelerator."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError("model.liger: expected liger-kernel; install the extra with pip install 'halos[liger]'")
    if accelerator == "cpu" or not torch.cuda.is_available():
        raise ValueError(f"model.liger: expected a CUDA device, found trainer.accelerator={accelerator} without one")
