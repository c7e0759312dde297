"""Export the trained policy as a Hugging Face model folder that plain ``transformers`` loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from halos.files import atomic_folder
from halos.policy.adapters import adapter_layers, save_adapter
from halos.policy.export.base_model import NO_BASE, BaseModel, copy_files, round_weights
from halos.policy.export.card import ModelCard, Usage
from halos.policy.export.generation import mend, stop_at
from halos.policy.export.tokenizer import conditioned, save_tokenizer

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
    base: BaseModel = NO_BASE,
) -> None:
    """Write weights (safetensors), config, tokenizer and model card. The folder is complete or not there at all.

    Args:
        policy: the model. Its weights are converted to ``base.dtype`` in place. If it has a LoRA adapter, only the
            adapter is written, in peft's format and as it was trained.
        tokenizer: its tokenizer.
        folder: the folder to create or replace.
        end_of_turn: id of the token at which generation stops.
        control: the control token that replies are conditioned on. The exported chat template ends with it, so that
            every program that samples from the model conditions on it.
        card: what the model card states about the run.
        base: what is taken over from the base model.
    """
    if policy.generation_config is not None:
        mend(policy.generation_config)
        # A program that serves the model reads these ids, and not the tokenizer's, which often has another EOS token.
        stop_at(policy.generation_config, end_of_turn, tokenizer.pad_token_id)
    is_adapter = bool(adapter_layers(policy))
    usage = Usage(chat=tokenizer.chat_template is not None, control=control, adapter=is_adapter)
    with atomic_folder(folder) as partial:
        if is_adapter:
            save_adapter(policy, partial)
        else:
            round_weights(policy, base.dtype)
            policy.save_pretrained(partial)
            copy_files(base.processor_files, partial)
        save_tokenizer(conditioned(tokenizer, control), partial, base.tokenizer_files)
        (partial / "README.md").write_text(card.render(usage), encoding="utf-8", errors="replace")
