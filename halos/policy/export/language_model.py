"""Export the trained policy as a Hugging Face model folder that plain ``transformers`` loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from halos.policy.adapters import adapter_layers, save_adapter
from halos.policy.export.card import ModelCard, Usage
from halos.policy.export.folder import model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export_policy(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    end_of_turn: int,
    control: str = "",
    card: ModelCard,
) -> None:
    """Write weights (safetensors), config, tokenizer and model card. The folder is complete or not there at all.

    Args:
        policy: the model. If it has a LoRA adapter, only the adapter is written, in peft's format.
        tokenizer: its tokenizer.
        folder: the folder to create or replace.
        end_of_turn: id of the token at which generation stops.
        control: the control token that replies are conditioned on. The exported chat template ends with it, so that
            every program that samples from the model conditions on it.
        card: what the model card states about the run.
    """
    # A program that serves the model reads these ids, and not the tokenizer's, which often has another EOS token.
    if policy.generation_config is not None:
        policy.generation_config.eos_token_id = end_of_turn
        policy.generation_config.pad_token_id = tokenizer.pad_token_id
    is_adapter = bool(adapter_layers(policy))
    usage = Usage(chat=tokenizer.chat_template is not None, control=control, adapter=is_adapter)
    with model_folder(folder) as partial:
        if is_adapter:
            save_adapter(policy, partial)
        else:
            policy.save_pretrained(partial)
        conditioned(tokenizer, control).save_pretrained(partial)
        (partial / "README.md").write_text(card.render(usage), encoding="utf-8", errors="replace")


def conditioned(tokenizer: PreTrainedTokenizerBase, control: str) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer whose generation prompt ends with the control token exactly once."""
    tokenizer = copy.deepcopy(tokenizer)
    if control and tokenizer.chat_template is not None:
        unconditioned(tokenizer, control)
        tokenizer.chat_template += _ending(control)
    return tokenizer


def unconditioned(tokenizer: PreTrainedTokenizerBase, control: str) -> None:
    """Remove the control token from the end of a chat template that :func:`conditioned` extended, in place."""
    if control and tokenizer.chat_template is not None:
        tokenizer.chat_template = tokenizer.chat_template.removesuffix(_ending(control))


def _ending(control: str) -> str:
    return f"{{% if add_generation_prompt %}}{control}{{% endif %}}"
