"""The operations that a model needs for its tokens, whatever a program actually computes. MFU is measured by them.

A weight takes two operations for each token, and attention 4·layers·width for each pair of tokens that see each other.
A backward pass takes twice as many as a forward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def forward_operations(model: PreTrainedModel, tokens: float, length: float) -> float:
    """Return the floating-point operations of a forward pass in which the LM head reads every token.

    Args:
        model: a decoder, whose parameters may be on the meta device.
        tokens: the number of tokens in all sequences.
        length: the mean number of tokens of a sequence.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    head = model.get_output_embeddings().weight
    # Embeddings and the head may share their weight. Neither is one of the layers' matrices.
    tables = {id(model.get_input_embeddings().weight), id(head)}
    linear = {id(module.weight): module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)}
    matrices = sum(size for key, size in linear.items() if key not in tables)
    # Attention is causal: a token sees half of its sequence on average.
    attention = 4 * config.num_hidden_layers * width * length / 2
    return float(tokens * (2 * (matrices + head.numel()) + attention))
