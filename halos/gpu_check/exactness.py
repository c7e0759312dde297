"""Log-probs and gradients of every way to compute them on the device, against float64 on the CPU.

The expected numbers come from plain forwards of transformers, one sequence at a time, without any code of this project.
Errors are in nats for log-probs, and relative to the gradient's norm for gradients.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.gpu_check.part import Numbers, Setting, expect, need_gpu, need_package
from halos.policy.backbone import Backbone
from halos.policy.checkpointing import checkpoint_layers
from halos.policy.kernels.liger import use_liger
from halos.policy.loading import LoadOptions, ModelSpec
from halos.policy.logprobs.attention_choice import FLEX, VARLEN
from halos.policy.logprobs.packed import attend_by
from halos.policy.lora import LoRA, quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIMITS = {torch.float32: (2e-4, 1e-4), torch.bfloat16: (0.2, 0.05)}
"""The largest errors of log-probs and of gradients that rounding explains, for models of a few billion weights."""
LOGPROBS, GRADIENTS = "error of log-probs, nats", "relative error of gradients"
PROMPT, COMPLETIONS = 150, (60, 37)
"""Tokens of a prompt, longer than a block of FlexAttention, and of its completions."""


def small_model() -> PreTrainedModel:
    """A random Llama of four layers with grouped heads, the same on every machine, in float64 on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,  # attention that is far from uniform, so that errors in scores show
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).double()


def model_of(setting: Setting) -> PreTrainedModel:
    """The user's model, or the small one, in float64 on the CPU."""
    if setting.model is None:
        return small_model()
    return ModelSpec(path=setting.model, cpu_kernels=False).load(LoadOptions(dtype=torch.float64))


def rows(vocabulary: int, count: int = 4) -> list[Row]:
    """Pairs of random tokens; two prompts of one conversation among them."""
    draw = random.Random(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(length))

    made = [Row(str(n), n, ids(PROMPT - 7 * n), (ids(COMPLETIONS[0] - n), ids(COMPLETIONS[1]))) for n in range(count)]
    first = made[0]
    return [*made, Row("later", count, first.prompt + first.branches[0] + ids(9), (ids(20), ids(11)))]


@dataclass(frozen=True, slots=True)
class Results:
    """Log-probs of the completions [B, K], and the gradients of a weighted sum of them, in float64 on the CPU."""

    logprobs: Tensor
    gradients: dict[str, Tensor]


def _weights(count: int) -> Tensor:
    # As DPO's: chosen completions up, rejected ones down, each example by its own weight.
    return torch.linspace(0.5, 1.5, count, dtype=torch.float64)[:, None] * torch.tensor([1.0, -1.0]) / count


def expected(model: PreTrainedModel, examples: list[Row]) -> Results:
    """By plain forwards, sequence by sequence."""

    def logprob(prompt: tuple[int, ...], branch: tuple[int, ...]) -> Tensor:
        ids = torch.tensor([prompt + branch])
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum()

    logprobs = torch.stack([torch.stack([logprob(row.prompt, branch) for branch in row.branches]) for row in examples])
    return _results(model, logprobs, (logprobs * _weights(len(examples))).sum())


def found(
    backbone: Backbone, examples: list[Row], setting: Setting, *, packing: bool = True, autocast: bool = False
) -> Results:
    """By this project, on the device."""
    batch = collate(examples, packing=packing, chunks=2).to(setting.device)
    with torch.autocast(setting.device, torch.bfloat16) if autocast else nullcontext():
        logprobs = backbone.logprobs(batch).sum
        loss = (logprobs.double() * _weights(len(examples)).to(logprobs.device)).sum()
    return _results(backbone.policy, logprobs, loss)


def _results(model: PreTrainedModel, logprobs: Tensor, loss: Tensor) -> Results:
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return Results(logprobs.detach().double().cpu(), gradients)


def compared(actual: Results, wanted: Results, dtype: torch.dtype) -> Numbers:
    """The errors. Raises ``ValueError`` where they are larger than rounding explains."""
    expect(
        actual.gradients.keys() == wanted.gradients.keys(), f"{len(wanted.gradients)} gradients", len(actual.gradients)
    )
    logprob_error = float((actual.logprobs - wanted.logprobs).abs().max())
    differences = [actual.gradients[name] - wanted.gradients[name] for name in wanted.gradients]
    size = torch.nn.utils.get_total_norm(list(wanted.gradients.values()))
    gradient_error = float(torch.nn.utils.get_total_norm(differences) / size)
    most_logprob, most_gradient = LIMITS[dtype]
    most_logprob *= max(1.0, float(wanted.logprobs.abs().max()) / 100)
    expect(logprob_error <= most_logprob, f"log-probs within {most_logprob:.2g} nats", f"{logprob_error:.3g}")
    expect(gradient_error <= most_gradient, f"gradients within {most_gradient:.2g}", f"{gradient_error:.3g}")
    return {LOGPROBS: logprob_error, "nats allowed": most_logprob, GRADIENTS: gradient_error, "allowed": most_gradient}


Change = Callable[["PreTrainedModel"], object]
"""Changes a model in place, once it is on the device."""


def check(
    setting: Setting,
    *,
    change: Change | None = None,
    head_chunk: int | str | None = None,
    bf16: bool = False,
    packing: bool = True,
) -> Numbers:
    """Compare the model on the device, changed as asked, with plain forwards in float64."""
    model = model_of(setting)
    examples = rows(model.config.get_text_config().vocab_size)
    wanted = expected(model, examples)
    policy = model.float().to(setting.device)
    if change is not None:
        change(policy)
    backbone = Backbone(policy, with_reference=False, head_chunk=head_chunk)
    actual = found(backbone, examples, setting, packing=packing, autocast=bf16)
    return compared(actual, wanted, torch.bfloat16 if bf16 else torch.float32)


def pieces(setting: Setting) -> Numbers:
    """Packed rows, attended to piece by piece."""
    return check(setting)


def padded(setting: Setting) -> Numbers:
    """Padded rows."""
    return check(setting, packing=False)


def flex(setting: Setting) -> Numbers:
    """Packed rows by FlexAttention, which is compiled."""
    need_gpu(setting, "FlexAttention has no backward pass on CPUs")
    return check(setting, change=partial(attend_by, kernel=FLEX))


def varlen(setting: Setting) -> Numbers:
    """Packed rows by PyTorch's variable-length attention, in bf16."""
    need_gpu(setting, "variable-length attention is for CUDA")
    return check(setting, change=partial(attend_by, kernel=VARLEN), bf16=True)


def head_chunks(setting: Setting) -> Numbers:
    """The LM head in chunks of 64 tokens."""
    return check(setting, head_chunk=64)


def bf16(setting: Setting) -> Numbers:
    """bf16-mixed, packed, with the head in chunks."""
    return check(setting, head_chunk=64, bf16=True)


def liger(setting: Setting) -> Numbers:
    """RMSNorm and SwiGLU by Liger's kernels."""
    need_gpu(setting, "Liger's kernels are for CUDA")
    need_package("liger_kernel", "liger")
    return check(setting, change=use_liger)


def selective(setting: Setting) -> Numbers:
    """Layers that keep their products (``model.gradient_checkpointing=selective``)."""
    return check(setting, change=partial(checkpoint_layers, policy="selective"))


def offload(setting: Setting) -> Numbers:
    """Layers whose inputs wait in the host's memory (``model.gradient_checkpointing=offload``)."""
    need_gpu(setting, "on a CPU the inputs of layers are in the host's memory")
    return check(setting, change=partial(checkpoint_layers, policy="offload"))


def lora(setting: Setting) -> Numbers:
    """LoRA: the adapters' gradients, against the same adapters in float64."""
    need_package("peft", "lora")
    model = model_of(setting)
    LoRA(enabled=True, rank=4).attach(model, base="a/model", logged=False)
    _move_adapters(model.double())
    examples = rows(model.config.get_text_config().vocab_size)
    wanted = expected(model, examples)
    backbone = Backbone(model.float().to(setting.device), with_reference=False, adapter_reference=True)
    return compared(found(backbone, examples, setting), wanted, torch.float32)


def qlora(setting: Setting) -> Numbers:
    """4-bit weights, against the same weights in float64."""
    need_gpu(setting, "4-bit weights are for CUDA")
    need_package("peft", "qlora")
    need_package("bitsandbytes", "qlora")
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    folder = setting.folder / "qlora_base"
    model_of(setting).float().save_pretrained(folder)
    quantised = AutoModelForCausalLM.from_pretrained(folder, **quantization())
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    states = {name: p for name, p in quantised.named_parameters() if hasattr(p, "quant_state")}
    expect(bool(states), "4-bit weights", "none")
    with torch.no_grad():
        for name, p in plain.named_parameters():
            held = states.get(name)
            p.copy_(dequantize_4bit(held.data, held.quant_state) if held is not None else p)
    for model in (quantised, plain):
        LoRA(enabled=True, rank=4).attach(model, base="a/model", logged=False)
    _move_adapters(plain.double())
    _move_adapters(quantised)
    examples = rows(plain.config.vocab_size)
    wanted = expected(plain, examples)
    backbone = Backbone(quantised, with_reference=False, adapter_reference=True)
    return compared(found(backbone, examples, setting, autocast=True), wanted, torch.bfloat16)


def _move_adapters(model: PreTrainedModel) -> None:
    # Away from zero, at which LoRA's B starts; the same numbers on every device.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
            p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
