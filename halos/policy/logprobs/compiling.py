"""``model.compile``: the decoder layers through torch.compile.

Layer by layer, because all layers share the code that is made for one, and because FSDP2 gathers a layer's weights
outside it. Shapes are dynamic, so micro-batches of other lengths need no new code. Attention over packed rows stays as
it is, between what is compiled before and behind it: its pieces are others in every micro-batch. Generation, the LM
head and what is exported are not compiled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from halos.policy.kernels.layers import repeated_layers
from halos.policy.logprobs import attention
from halos.policy.logprobs.flex import keep_versions

VARIANTS = 64
"""Versions of a layer's code that are kept: with and without gradient, adapter, sliding window, …"""


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer, in place; of a checkpointed one its parts, which the backward pass runs again.

    Names, hooks and the state dict stay as they are, so checkpoints move between compiled and other runs.
    """
    import torch._dynamo

    options = keep_versions(VARIANTS)
    torch._dynamo.config.optimize_ddp = False  # it would divide each layer's graph by DDP's buckets
    attention.leave_uncompiled()
    for layer in repeated_layers(model):
        checkpointed = getattr(layer, "gradient_checkpointing", False)
        for part in layer.children() if checkpointed else (layer,):
            part.forward = torch.compile(part.forward, dynamic=True, **options)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Within, the model is as it was before :func:`compile_layers`."""
    parts = [m for m in model.modules() if hasattr(m.__dict__.get("forward"), "_torchdynamo_orig_callable")]
    compiled = [part.__dict__.pop("forward") for part in parts]
    try:
        yield
    finally:
        for part, forward in zip(parts, compiled, strict=True):
            part.forward = forward


def check_compiler(accelerator: str) -> None:
    """Raise ``ValueError`` unless torch.compile can make code for this accelerator here, which is tried out."""
    # A rank's own GPU: its context would take memory of another's.
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = "cpu" if accelerator == "cpu" or not torch.cuda.is_available() else gpu
    try:
        if device == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()  # code that an earlier run has left would hide that there is none
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # torch raises whatever its compilers do
        needs = "a C++ compiler such as g++" if device == "cpu" else "Triton"
        said = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(
            f"model.compile: expected torch.compile to work, which needs {needs}, found {type(error).__name__}: {said}"
        ) from error
