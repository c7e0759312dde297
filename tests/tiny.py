"""Tiny seeded models of several architectures, tokenizers made offline, and random token rows."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from halos.data.rows.token_rows import Row

VOCABULARY = 67
WINDOW = 4

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1},
    "gpt2": {"n_positions": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_neox": {},
    "qwen2": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "mistral": {"num_key_value_heads": 1, "sliding_window": WINDOW},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    # Soft caps within reach of the random logits; its layers alternate between a sliding window and full attention.
    "gemma2": {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 2.0,
        "attn_implementation": "eager",
    },
}
"""What each architecture needs beside the common sizes."""


def config(architecture: str, **overrides: Any) -> Any:
    """A config of two layers, 16 wide."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(architecture, **{**common, **ARCHITECTURES[architecture], **overrides})


def model(architecture: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """A causal language model in training mode, all weights (norms and biases too) shifted at random, so that no
    part of it is a no-op and its predictions are far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(config(architecture, **overrides)).double()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return made.to(dtype).train()


def exact(made: Any) -> Any:
    """The model with its RMSNorms in its own precision: transformers rounds their input to float32, in float64 too."""
    for module in made.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module)
    return made


def _rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    gemma = not hasattr(norm, "variance_epsilon")
    scale = (x.pow(2).mean(-1, keepdim=True) + (norm.eps if gemma else norm.variance_epsilon)).rsqrt()
    return x * scale * (1 + norm.weight if gemma else norm.weight)


def rows(count: int = 5, *, branches: int = 1, vocabulary: int = VOCABULARY, seed: int = 0) -> list[Row]:
    """Rows of random ids (0, which pads, often among them) and uneven lengths, longer than the sliding windows."""
    rng = random.Random(seed)
    weights = [vocabulary // 6, *[1] * (vocabulary - 1)]

    def ids(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(vocabulary), weights, k=rng.randint(least, most)))

    return [Row(f"r{n}", n, ids(1, 9), tuple(ids(1, 8) for _ in range(branches)), n % 2 == 0) for n in range(count)]


def conversation(*, branches: int = 1, seed: int = 0) -> list[Row]:
    """Judgements on three turns of one conversation and on another continuation of its first turn, the last one first:
    a prefix tree whose longest paths have three prompts."""
    first, second, third, other = rows(4, branches=max(branches, 2), seed=seed + 100)
    second = replace(second, prompt=first.prompt + first.branches[0] + second.prompt)
    third = replace(third, prompt=second.prompt + second.branches[0] + third.prompt)
    other = replace(other, prompt=first.prompt + first.branches[1] + other.prompt)
    # Its first completion begins as the conversation goes on.
    first = replace(first, branches=(first.branches[0] + second.prompt[-1:], *first.branches[1:]))
    listed = (third, first, other, second)
    return [
        replace(row, id=f"turn {n}", group=100 + n, branches=row.branches[:branches]) for n, row in enumerate(listed)
    ]


# Tokenizers

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
START, END, EOT, GOOD = "<|im_start|>", "<|im_end|>", "<|eot|>", "<|good|>"
SPECIAL = (BOS, EOS, PAD, UNK, START, END, EOT, GOOD)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Closes each turn with a token of its own and a line break."""

WITH_BOS = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
"""Writes BOS itself, and closes the assistant's turns with EOS."""

WITH_EOT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Writes BOS itself, and closes each turn with a token that is not EOS."""

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
"""Refuses a role."""

WORDS = ("hello", "world", "good", "bad", "user", "assistant", "system", ":", "a", "b", "c", "d")


def bpe_tokenizer(template: str | None = None, **options: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, so any text survives decoding; options as for :func:`wrap`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, hello again. good and bad worlds; user assistant"] * 3, trainer)
    return wrap(tokenizer, template, **options)


def word_tokenizer(template: str | None = None, **options: Any) -> PreTrainedTokenizerFast:
    """One id for each of :data:`WORDS`; options as for :func:`wrap`."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL))
    return wrap(tokenizer, template, **options)


def wrap(
    tokenizer: Tokenizer,
    template: str | None,
    *,
    bos: bool = False,
    eos: str | None = EOS,
    pad: str | None = EOS,
    named: Sequence[str] = (START, END, EOT, GOOD),
) -> PreTrainedTokenizerFast:
    """``bos``: whether plain text gets a BOS by itself; ``named``: the special tokens that the tokenizer's config
    lists (the others are special only in tokenizer.json)."""
    if bos:
        pair = (BOS, tokenizer.token_to_id(BOS))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[pair])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=list(named),
        chat_template=template,
    )


def save(folder: Path, architecture: str = "llama", *, max_shard_size: str = "1GB", **overrides: Any) -> Path:
    """A Hugging Face directory: a tiny model and a tokenizer with as many tokens."""
    tokenizer = word_tokenizer(CHATML)
    made = model(architecture, vocab_size=len(tokenizer), **overrides)
    made.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def save_gguf(file: Path, architecture: Any) -> Path:
    """The Llama ``architecture`` (a model) as a GGUF file in float32, with a byte-level tokenizer."""
    import gguf

    config, tokenizer = architecture.config, bpe_tokenizer()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    writer.add_token_types([3 if n < len(SPECIAL) else 1 for n in range(len(tokenizer))])  # 3: control token
    writer.add_token_merges([" ".join(pair) for pair in _merges(tokenizer)])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in architecture.state_dict().items():
        array = weight.float().numpy()
        for projection, count in heads.items():
            if projection in name:  # llama.cpp interleaves the two halves that rotary embeddings turn
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _merges(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
