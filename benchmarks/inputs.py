"""The model folder and the file of pairs that every contestant gets: given ones, or synthetic ones of chosen size."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EOS = "</s>"


def model_folder(path: str, folder: Path) -> str:
    """A Hugging Face directory with the model at ``path``; GGUF files are converted, once, into ``folder``."""
    from halos.policy.loading import ModelSpec

    spec = ModelSpec(path=path)
    spec.check()
    if not path.endswith(".gguf"):
        return path
    made = folder / "model"
    if not (made / "tokenizer_config.json").exists():  # written last
        model = spec.load()
        model.save_pretrained(made)
        spec.tokenizer().save_pretrained(made)
    return str(made)


def pairs_file(path: str, folder: Path, *, source: str, count: int, seed: int = 0) -> str:
    """``count`` pairs of the file, drawn with the seed, in a new file.

    Raises ``ValueError`` if the file has fewer.
    """
    from halos.data.sources.feedback_files import FeedbackFiles
    from halos.data.sources.hh import HHSource
    from halos.data.views.derive import VIEWS

    read = HHSource(path) if source == "hh" else FeedbackFiles(path)
    pairs = VIEWS["pairs"](read.train().records).examples
    if len(pairs) < count:
        raise ValueError(f"--data: expected at least {count} pairs (--pairs) in {path}, found {len(pairs)}")
    rows = [_row(pair) for pair in random.Random(seed).sample(pairs, count)]
    return _write(folder / f"pairs-{count}.jsonl", rows)


def _row(pair: Any) -> dict[str, Any]:
    prompt = pair.prompt
    if not isinstance(prompt, str):
        prompt = [{"role": message.role, "content": message.content} for message in prompt]
    return {"prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def synthetic_model(folder: Path, *, hidden: int, layers: int, vocabulary: int) -> str:
    """A random Llama with tied embeddings and a tokenizer of ``vocabulary`` words ``w0 w1 …``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    made = folder / f"llama-{hidden}-{layers}-{vocabulary}"
    if (made / "tokenizer_config.json").exists():
        return str(made)
    words = {EOS: 0, "<unk>": 1} | {f"w{n}": n for n in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    set_seed(0)
    LlamaForCausalLM(llama(hidden=hidden, layers=layers, vocabulary=vocabulary)).save_pretrained(made)
    options: Mapping[str, str] = {"eos_token": EOS, "pad_token": EOS, "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(made)
    return str(made)


def llama(*, hidden: int, layers: int, vocabulary: int) -> Any:
    """The config of a Llama with heads of 64 numbers."""
    from transformers import LlamaConfig

    heads = max(1, hidden // 64)
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def synthetic_pairs(folder: Path, *, count: int, prompt: int, completion: int, vocabulary: int) -> str:
    """Pairs of random words: prompts of ``prompt`` tokens, completions of ``completion``, their ends included."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(2, vocabulary)}" for _ in range(length))

    rows = [
        {"prompt": text(prompt), "chosen": text(completion - 1), "rejected": text(completion - 1)} for _ in range(count)
    ]
    return _write(folder / f"pairs-{count}-{prompt}-{completion}-{vocabulary}.jsonl", rows)


def _write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)
