"""A tiny multimodal model (Gemma 3) that tests use as a language model."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from halos.policy.loading import ModelSpec

PROCESSOR = '{"image_processor_type": "Gemma3ImageProcessor"}\n'


def model(vocabulary: int) -> Any:
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "sliding_window": 16,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    options = {"mm_tokens_per_image": 4, "image_token_index": 0, "boi_token_index": 0, "eoi_token_index": 0}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def save(folder: Path) -> Path:
    """A model's directory with the toy world's tokenizer and the files of a processor."""
    toy = ModelSpec(path="pkg://halos.toy/reference").local
    tokenizer = AutoTokenizer.from_pretrained(toy)
    model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(PROCESSOR)
    return folder
