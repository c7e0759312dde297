"""Optimizers on the device, against float64 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from halos.gpu_check.part import Numbers, Setting, expect, need_gpu, need_package
from halos.optim import AdamW, BitsAndBytesAdamW


def adamw(setting: Setting) -> Numbers:
    """Ten steps of the fused AdamW on the device, against the loop over weights in float64."""
    error = _error(AdamW(lr=1e-3), setting)
    expect(error < 1e-4, "weights that move as in float64 to 1e-4", error)
    return {"relative error of the move": error}


def adamw_8bit(setting: Setting) -> Numbers:
    """Ten steps of bitsandbytes' 8-bit AdamW, against AdamW in float64."""
    need_gpu(setting, "8-bit optimizers are for CUDA")
    need_package("bitsandbytes", "bnb")
    error = _error(BitsAndBytesAdamW(lr=1e-3, bits=8), setting)
    expect(error < 0.1, "weights that move as by AdamW to 10 %", error)
    return {"relative error of the move": error}


def _error(optim: AdamW, setting: Setting) -> float:
    """The error of the move of a weight, relative to its move by AdamW in float64 on the CPU."""
    change, wanted = _steps(optim, setting, torch.float32), _steps(AdamW(lr=1e-3), None, torch.float64)
    return float((change - wanted).norm() / wanted.norm())


def _steps(optim: AdamW, setting: Setting | None, dtype: torch.dtype) -> Tensor:
    # Gradients that are the same numbers everywhere; enough weights that bitsandbytes uses 8 bits for them.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(128, 64, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.nn.Parameter(start.to(setting.device if setting else "cpu", copy=True))
    stepper, schedule = optim.build([weight], 10, fused=setting is not None)
    for _ in range(10):
        weight.grad = torch.randn(128, 64, generator=generator, dtype=torch.float64).to(weight)
        stepper.step()
        schedule.step()
    return weight.detach().double().cpu() - start.double()
