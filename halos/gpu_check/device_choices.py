"""Checks of the settings that depend on the device: the kernel of attention, and the rows of the LM head's chunks."""

from __future__ import annotations

from functools import partial

import torch

from halos.gpu_check.exactness import check, model_of
from halos.gpu_check.part import Numbers, Setting, expect
from halos.policy.logprobs.attention_choice import AUTO, CANDIDATES, Heads, first_exact
from halos.policy.logprobs.flex import ScoreOptions
from halos.policy.logprobs.head_rows import chunk_rows
from halos.policy.logprobs.packed import attend_by


def attention(setting: Setting) -> Numbers:
    """The kernel that model.packed_attention=auto chooses, and its errors."""
    numbers: dict[str, float | str] = {}
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bf16")):
        numbers[name] = chosen(heads_of(setting, dtype)) if setting.on_gpu else "pieces (others are tried on CUDA only)"
        errors = check(setting, change=partial(attend_by, kernel=AUTO), bf16=dtype == torch.bfloat16)
        numbers |= {f"{error} ({name})": number for error, number in errors.items()}
    return numbers


def heads_of(setting: Setting, dtype: torch.dtype) -> Heads:
    """The model's attention heads, by its config."""
    config = model_of(setting).config.get_text_config()
    number = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // number
    device = torch.device(setting.device)
    return Heads(device, dtype, number, getattr(config, "num_key_value_heads", None) or number, width, ScoreOptions())


def chosen(heads: Heads) -> str:
    """The chosen kernel, with the reasons against those before it."""
    name, refused = first_exact(CANDIDATES, heads)
    reasons = ", ".join(f"not {other}: {reason}" for other, reason in refused.items())
    return f"{name} ({reasons})" if reasons else name


def head_rows(setting: Setting) -> Numbers:
    """The LM head in chunks of as many tokens as model.head_chunk=auto takes."""
    weight = model_of(setting).get_output_embeddings().weight.float().to(setting.device)
    rows = chunk_rows("auto", weight, len(weight))
    expect(rows is not None, "a number of rows", rows)
    return {"scored tokens of a chunk": rows or 0, "vocabulary": len(weight), **check(setting, head_chunk="auto")}
