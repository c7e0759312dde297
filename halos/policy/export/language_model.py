"""The trained policy as a Hugging Face model folder that plain ``transformers`` loads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos.files import atomic_folder
from halos.policy.adapters import adapter_layers, save_adapter

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [alignment, halos, {loss}]
---

# {title}

{base} aligned with human feedback by **{loss}** ([halos](https://arxiv.org/abs/2402.01306)).

{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = {prompt}
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```
"""

_CHAT_PROMPT = """tokenizer.apply_chat_template(
    [{"role": "user", "content": "..."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""


def export_policy(
    policy: Any,
    tokenizer: Any,
    folder: Path,
    *,
    end_of_turn: int,
    control: str = "",
    card: Mapping[str, Any],
) -> None:
    """Write weights (safetensors), config, tokenizer and a model card; the folder appears whole or not at all.

    Of a policy that still has a LoRA adapter only that is written, as peft does it.
    ``control`` is the control token that replies are conditioned on: the exported chat template ends with it, so that
    every sampling path conditions on it by itself. ``card`` needs ``loss`` and ``base``; the rest goes into its table.
    """
    policy.generation_config.eos_token_id = end_of_turn
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    with atomic_folder(folder) as part:
        if adapter_layers(policy):
            save_adapter(policy, part)
        else:
            policy.save_pretrained(part)
        conditioned(tokenizer, control).save_pretrained(part)
        (part / "README.md").write_text(_card(card, tokenizer, control), encoding="utf-8")


def conditioned(tokenizer: Any, control: str) -> Any:
    """A copy of the tokenizer whose generation prompt ends with the control token (once, whatever it ended with)."""
    tokenizer = copy.deepcopy(tokenizer)
    if control and tokenizer.chat_template is not None:
        unconditioned(tokenizer, control)
        tokenizer.chat_template += _ending(control)
    return tokenizer


def unconditioned(tokenizer: Any, control: str) -> None:
    """Take the control token off the end of a chat template that :func:`conditioned` made, in place."""
    if control and tokenizer.chat_template is not None:
        tokenizer.chat_template = tokenizer.chat_template.removesuffix(_ending(control))


def _ending(control: str) -> str:
    return f"{{% if add_generation_prompt %}}{control}{{% endif %}}"


def results_table(card: Mapping[str, Any]) -> str:
    """The card's results as a Markdown table, empty if there are none."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in card.items() if name not in ("loss", "base"))
    return f"| | |\n|---|---|\n{rows}" if rows else ""


def _card(card: Mapping[str, Any], tokenizer: Any, control: str) -> str:
    title = f"{card['base']} aligned by {card['loss']}"
    # Without a chat template nothing writes the control token for whoever asks.
    plain = f'tokenizer("...{control}", return_tensors="pt")'
    prompt = plain if tokenizer.chat_template is None else _CHAT_PROMPT
    return _CARD.format(title=title, base=card["base"], loss=card["loss"], table=results_table(card), prompt=prompt)
