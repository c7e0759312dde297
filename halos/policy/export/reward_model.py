"""Export a reward model as a sequence classifier that plain ``transformers`` loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from halos.policy.export.base_model import NO_BASE, BaseModel, round_weights
from halos.policy.export.card import ModelCard, Usage
from halos.policy.export.folder import model_folder
from halos.policy.export.tokenizer import conditioned, save_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def require_classifier(config: PretrainedConfig) -> None:
    """Raise ``ValueError`` unless transformers has a sequence classifier with one linear score for this model."""
    try:
        # On the meta device: only the kind of the head matters, and a whole model would take memory.
        with torch.device("meta"):
            score = getattr(_classifier(config), "score", None)
    except ValueError:
        score = None
    if not isinstance(score, nn.Linear) or score.bias is not None or score.out_features != 1:
        raise ValueError(
            f"model.path: a reward model is exported as transformers' sequence classifier, and {config.model_type} has "
            "none with a linear score; choose another architecture (llama, qwen2, mistral, gemma, gpt2, …)"
        )


def _classifier(config: PretrainedConfig) -> PreTrainedModel:
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(config)
    config.num_labels = 1
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model


def export_reward_model(
    policy: PreTrainedModel,
    score: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    end_of_turn: int,
    card: ModelCard,
    base: BaseModel = NO_BASE,
) -> None:
    """Write the classifier's weights, config, tokenizer and model card. The folder is complete or not there at all.

    Args:
        policy: the causal language model whose last hidden states are scored.
        score: weight of the reward head, [1, H].
        tokenizer: its tokenizer.
        folder: the folder to create or replace.
        end_of_turn: id of the token at which a completion is scored.
        card: what the model card states about the run.
        base: what is taken over from the base model.
    """
    tokenizer = conditioned(tokenizer, "")
    model = _classifier(policy.config)
    nn.Module.to(model, policy.dtype)
    model.base_model.load_state_dict(policy.base_model.state_dict())
    model.get_submodule("score").get_parameter("weight").data.copy_(score)
    # transformers scores the last token that is not padding, so padding must not look like the end of a turn.
    model.config.pad_token_id = tokenizer.pad_token_id = padding_token(tokenizer, end_of_turn)
    if len(tokenizer) > len(model.get_input_embeddings().get_parameter("weight")):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    end = str(tokenizer.convert_ids_to_tokens(end_of_turn))
    usage = Usage(chat=tokenizer.chat_template is not None, end_of_turn=end)
    round_weights(model, base.dtype)
    with model_folder(folder) as partial:
        model.save_pretrained(partial)
        save_tokenizer(tokenizer, partial, base.tokenizer_files)
        (partial / "README.md").write_text(card.render(usage), encoding="utf-8", errors="replace")


def padding_token(tokenizer: PreTrainedTokenizerBase, end_of_turn: int) -> int:
    """Return the id of a token that never ends a completion. One is added to the tokenizer if it has none."""
    ends = {end_of_turn, tokenizer.eos_token_id}
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id):
        if token is not None and token not in ends:
            return int(token)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return int(tokenizer.pad_token_id)
