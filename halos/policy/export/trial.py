"""A dry export before the first step, so that no run fails after its last one."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from halos.policy.export.base_model import BaseModel
from halos.policy.export.generation import mend, stop_at
from halos.policy.export.tokenizer import conditioned, save_tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def try_export(
    config: PretrainedConfig,
    generation: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    base: BaseModel,
    *,
    end_of_turn: int,
    control: str = "",
    trust_remote_code: bool = False,
) -> None:
    """Write config, generation config and tokenizer to a temporary folder as the export will, and load them from it.

    Args:
        config, generation: of the base model.
        tokenizer, end_of_turn, control: see :func:`halos.policy.export.language_model.export_policy`.
        base: what the export takes over from the base.
        trust_remote_code: whether the user allows the model's own code.

    Raises:
        ValueError: something cannot be written, or differs when it is loaded again.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    exported = conditioned(tokenizer, control)
    with TemporaryDirectory(prefix="halos-export-") as name:
        folder = Path(name)
        try:
            _mend(generation)
            stop_at(generation, end_of_turn, tokenizer.pad_token_id)
            config.save_pretrained(folder)
            generation.save_pretrained(folder)
            save_tokenizer(exported, folder, base.tokenizer_files)
            AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            GenerationConfig.from_pretrained(folder)
            loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # transformers raises many kinds
            raise ValueError(f"model.path: the trained model could not be exported: {error}") from error
    if loaded.get_vocab() != tokenizer.get_vocab() or loaded.chat_template != exported.chat_template:
        raise ValueError(
            "model.path: the tokenizer that would be exported differs, when it is loaded again, from the one that "
            "training uses; save the tokenizer with its save_pretrained, and use that folder"
        )


def _mend(generation: GenerationConfig) -> None:
    try:
        unset = mend(generation)
    except ValueError as error:
        raise ValueError(f"correct generation_config.json in a local copy of the base: {error}") from error
    if unset:
        log.warning(
            "the base's generation_config.json has %d settings without effect, which transformers refuses to save; "
            "the export leaves them out: %s",
            *(len(unset), ", ".join(unset)),
        )
