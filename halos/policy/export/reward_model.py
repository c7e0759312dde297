"""The head of a reward model, and its export as a sequence classifier that plain ``transformers`` loads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halos.files import atomic_folder
from halos.policy.export.language_model import results_table

_CARD = """---
library_name: transformers
pipeline_tag: text-classification
tags: [alignment, reward-model, halos, {loss}]
---

# {title}

A reward model: {base} with a scalar head, trained by **{loss}** (halos). The score of a completion is read at its
last token, the end of the turn.

{table}

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "..."}}], add_generation_prompt=True, tokenize=False
)
inputs = tokenizer(prompt + completion + {end!r}, add_special_tokens=False, return_tensors="pt")
print(model(**inputs).logits[0, 0])
```
"""


def require_classifier(config: Any) -> None:
    """Raise ``ValueError`` unless transformers has a sequence classifier with one linear score for this model."""
    try:
        with torch.device("meta"):
            score = getattr(_classifier(config), "score", None)
    except ValueError:
        score = None
    if not isinstance(score, nn.Linear) or score.bias is not None or score.out_features != 1:
        raise ValueError(
            f"model.path: a reward model is exported as transformers' sequence classifier, and {config.model_type} has "
            "none with a linear score; choose another architecture (llama, qwen2, mistral, gemma, gpt2, …)"
        )


def _classifier(config: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(config)
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config)


def export_reward_model(
    policy: Any,
    score: Tensor,
    tokenizer: Any,
    folder: Path,
    *,
    end_of_turn: int,
    card: Mapping[str, Any],
) -> None:
    """Write the classifier's weights, its config, the tokenizer and a card; the folder appears whole or not at all.

    ``score``: the reward head's weight [1, H].

    transformers finds a sequence's end by its padding, so the exported padding token is never the end of a turn.
    """
    tokenizer = copy.deepcopy(tokenizer)
    model = _classifier(policy.config).to(policy.dtype)
    getattr(model, model.base_model_prefix).load_state_dict(policy.base_model.state_dict())
    model.score.weight.data.copy_(score)
    model.config.pad_token_id = tokenizer.pad_token_id = padding_token(tokenizer, end_of_turn)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with atomic_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        end = tokenizer.convert_ids_to_tokens(end_of_turn)
        title = f"A reward model from {card['base']}"
        text = _CARD.format(title=title, base=card["base"], loss=card["loss"], table=results_table(card), end=end)
        (part / "README.md").write_text(text, encoding="utf-8")


def padding_token(tokenizer: Any, end_of_turn: int) -> int:
    """A token that pads without ever ending a completion; added to the tokenizer if it has none."""
    ends = {end_of_turn, tokenizer.eos_token_id}
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id):
        if token is not None and token not in ends:
            return int(token)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return int(tokenizer.pad_token_id)
