"""Steps of building a model: parameters without memory, dropout and vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from halos.policy.export.tokenizer import unconditioned

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within this context, parameters that modules register get no memory.

    Buffers do get memory. Constructors compute those outside the state dict (rotary frequencies), and nothing would
    fill them in later; ``torch.device("meta")`` would leave them empty.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def forget_quantisation(model: PreTrainedModel) -> None:
    """Remove the marks of quantisation from a model whose weights came from a GGUF file.

    transformers has dequantised the weights by then, but refuses to cast or save a model with these marks.
    """
    for name, value in (("hf_quantizer", None), ("is_quantized", False)):
        setattr(model, name, value)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def set_dropout(config: PretrainedConfig, probability: float) -> None:
    """Set every dropout probability of the config. Architectures use different names for them.

    RWKV's rescaling is also switched off, which does not change the results. It divides weights in place in evaluation
    mode and multiplies them again in training mode, which breaks backward passes, adapters, and exports in between.
    """
    if getattr(config, "rescale_every", 0):
        config.rescale_every = 0
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, int | float):
            setattr(config, name, probability)


def silence_routers(model: PreTrainedModel) -> None:
    """Keep routers from adding noise in training mode, which would make the policy differ from its reference.

    The setting of the noise is not set to 0: PhiMoE's also decides how experts are weighted in evaluation mode.
    """
    for module in model.modules():
        if any(getattr(module, name, 0) for name in ("jitter_noise", "router_jitter_noise", "input_jitter_noise")):
            module.training = False


def freeze_outside_text(model: PreTrainedModel) -> None:
    """Freeze the weights of a multimodal model that text does not pass through, such as those of a vision tower.

    They get no gradient, for which DDP would wait. They are exported unchanged.
    """
    if is_multimodal(model):
        used = {id(parameter) for part in text_parts(model) for parameter in part.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in used:
                parameter.requires_grad_(False)


def is_multimodal(model: PreTrainedModel) -> bool:
    """Return whether the model has parts that text does not pass through."""
    return model.config.get_text_config() is not model.config


def text_parts(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Return the parts that text passes through: the decoder, and the embeddings of input and output."""
    return model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()


def grow_vocabulary(model: PreTrainedModel, size: int, new_tokens: Sequence[int]) -> None:
    """Grow the embeddings to at least ``size`` rows, and initialise the added rows and those of ``new_tokens``.

    Each of these rows starts as the mean of all rows before the first of them. On the meta device nothing is set.
    """
    rows = len(model.get_input_embeddings().get_parameter("weight"))
    if size > rows:
        model.resize_token_embeddings(size, mean_resizing=False)
    new_rows = sorted({*new_tokens, *range(rows, size)})
    if not new_rows:
        return
    with torch.no_grad():
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            for parameter in embedding.parameters(recurse=False):  # the weights, and a head's bias
                parameter[new_rows] = parameter[: new_rows[0]].mean(0)


def add_control_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[int]:
    """Make each non-empty text a single special token. Returns the ids that are new to the vocabulary."""
    before = len(tokenizer)
    controls = [text for text in texts if text]
    for text in controls:
        # If a policy was trained with this token already, its chat template ends with it.
        unconditioned(tokenizer, text)
    missing = [text for text in controls if tokenizer.convert_tokens_to_ids(text) in (None, tokenizer.unk_token_id)]
    tokenizer.add_tokens(missing, special_tokens=True)
    return list(range(before, len(tokenizer)))
