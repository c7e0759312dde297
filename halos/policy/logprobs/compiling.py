"""``model.compile``: compiles the decoder layers with torch.compile.

Each layer is compiled by itself. All layers share the code that is compiled for the first one, and FSDP2 gathers a
layer's weights outside of it. Shapes are dynamic, so micro-batches of other lengths need no new code. In a layer,
attention over packed rows is not compiled, because its pieces have other sizes in every micro-batch; the code before
and after it is. Generation, the LM head and exported models are not compiled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from halos.policy.kernels.layers import repeated_layers
from halos.policy.logprobs import attention
from halos.policy.logprobs.flex import keep_versions

MAX_LAYER_VERSIONS = 64
"""Versions of a layer's code that are kept: with and without gradient, adapter, sliding window, …"""


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer of the model, in place.

    Names, hooks and the state dict stay as they are, so checkpoints move between compiled and other runs.
    """
    import torch._dynamo

    options = keep_versions(MAX_LAYER_VERSIONS)
    # Switched off, because dynamo would cut each layer's graph where DDP's buckets end.
    torch._dynamo.config.optimize_ddp = False
    attention.leave_uncompiled()
    for layer in repeated_layers(model):
        # Of a checkpointed layer its children: the layer's own call is what runs again in the backward pass, and the
        # context that restores its attention (attention.py) has to stay outside of compiled code.
        checkpointed = getattr(layer, "gradient_checkpointing", False)
        for module in layer.children() if checkpointed else (layer,):
            # The method, not module.compile(): hooks stay outside, and uncompiled() can take it off again.
            module.forward = torch.compile(module.forward, dynamic=True, **options)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Within this context, the model is as it was before :func:`compile_layers`."""
    with ExitStack() as restored:
        for module in model.modules():
            if hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable"):
                restored.callback(setattr, module, "forward", module.__dict__.pop("forward"))
        yield


def check_compiler(accelerator: str) -> None:
    """Check that torch.compile can make code for this accelerator on this machine, by trying it out.

    Raises:
        ValueError: if it cannot, with the package that is missing.
    """
    # The rank's own GPU: a context on another one would take memory of another rank's.
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = "cpu" if accelerator == "cpu" or not torch.cuda.is_available() else gpu
    try:
        if device == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            # Asked for explicitly: torch.compile would load code that an earlier run left in its cache, and succeed
            # without a compiler.
            get_cpp_compiler()
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # torch raises whatever its compilers do
        needs = "a C++ compiler such as g++" if device == "cpu" else "Triton"
        first_line = next(iter(str(error).strip().splitlines()), "")
        problem = f"which needs {needs}, found {type(error).__name__}: {first_line}"
        raise ValueError(f"model.compile: expected torch.compile to work, {problem}") from error
