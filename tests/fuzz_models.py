"""Mutated model folders: each loads or is refused in one line; nothing runs, hangs, or takes much memory.

python -m tests.fuzz_models [COUNT] [SEED]    (from the repository; 10,000 take about an hour)
"""

from __future__ import annotations

import json
import random
import resource
import shutil
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from halos.judges import RewardModel
from halos.policy.lookup import find_policy
from halos.policy.lora import LoRA
from halos.toy.model import REFERENCE_DIR
from tests.campaign import attempt, main

SECONDS = 20
"""The limit of a folder; most take less than one."""
ALLOWANCE = 200 * 10**6
"""Bytes beyond what the process had at the start; twice the files of a folder are a megabyte."""
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 0.5, 1e9, 10**5, 10**9, 2**31, 2**63, 10**30, float("nan"), float("inf"), "", "x",
    "\x1b]0;t\x07\u202e", "\0", "\ud800", [], {}, [[]], {"a": {}}, [0], ["x", "y"], [None] * 100, "/etc/passwd",
    "../..", "x" * 100_000, [[[[[[]]]]]],
)  # fmt: skip
ADDED: dict[str, dict[str, tuple[Any, ...]]] = {
    "config.json": {
        "auto_map": ({"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]},),
        "model_type": ("qwen2", "gpt2", "mixtral", "t5", "own", "bert", "mamba", "gemma3", "deepseek_v3", "whisper"),
        "architectures": (["GPT2LMHeadModel"], ["LlamaForSequenceClassification"], ["own.Own"], "LlamaForCausalLM"),
        "_attn_implementation": ("own/kernel", "flash_attention_2", "x", "eager", "own/kernel:own"),
        "attn_implementation": ("own/kernel", "flash_attention_2", "x"),
        "dtype": ("load", "hub", "float8_e4m3fn", "int8", "bfloat16", "nn.Module", "complex64"),
        "quantization_config": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "x"}, {}),
        "num_hidden_layers": (10**4, 10**6, 10**9, 0, 1, 3),
        "vocab_size": (10**9, 2**62, 1, 158, 160),
        "rope_parameters": ({"rope_type": "yarn", "factor": 1e9}, {"rope_theta": 0, "partial_rotary_factor": 1e9}),
        "num_labels": (10**9, 1, 2), "id2label": ({"0": "a"}, {"x": 3}), "base_model_tp_plan": ({"a": "b"},),
        "text_config": ({"model_type": "llama"}, {"vocab_size": 10**9}), "is_encoder_decoder": (True,),
        "tie_word_embeddings": (True,), "transformers_weights": ("own.bin", "../x.safetensors"),
    },
    "generation_config.json": {
        "auto_map": ({"GenerationConfig": "own.Own"},), "custom_generate": ("own", "."), "eos_token_id": ([10**9], []),
        "max_length": (-1, 10**30), "stop_strings": (["x"], "x"), "cache_implementation": ("own", "static"),
        "assistant_model": ("own",), "watermarking_config": ({"a": 1}, 3), "do_sample": ("x", True),
    },
    "tokenizer_config.json": {
        "auto_map": ({"AutoTokenizer": ["own.Own", "own.Own"]},), "tokenizer_file": ("/etc/passwd", "../x"),
        "tokenizer_class": ("OwnTokenizer", "PreTrainedTokenizerFast", "GPT2Tokenizer", "T5Tokenizer", "os.system"),
        "backend": ("own", "sentencepiece", "mistral-common"), "chat_template": ("{{ x", "{% for i in x %}", 3, {}),
        "added_tokens_decoder": ({"5": {"content": "y"}}, {"x": {}}, {"9999999": {"content": "z", "special": True}}),
        "extra_special_tokens": ({"a": "b"}, ["c"] * 100, 3), "model_max_length": (-1, 10**30), "pad_token": (3, {}),
    },
    "tokenizer.json": {
        "truncation": ({"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 9},),
        "pre_tokenizer": ({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed", "invert": False},),
        "normalizer": ({"type": "Replace", "pattern": {"String": ""}, "content": "x" * 1000}, {"type": "x"}),
    },
    "adapter_config.json": {
        "r": (10**6, 10**9, 2**40, 3, 0, -1), "rank_pattern": ({"q_proj": 10**9}, {"(": 1}), "target_modules": ("(",),
        "peft_type": ("PROMPT_TUNING", "own"), "auto_mapping": ({"base_model_class": "own", "parent_library": "own"},),
        "layers_pattern": ("(",), "lora_alpha": (float("inf"), -1), "base_model_name_or_path": ("own/own", "/etc"),
        "modules_to_save": (["lm_head"],), "init_lora_weights": ("loftq", "pissa"), "megatron_core": ("own",),
        "megatron_config": ({},), "runtime_config": ({"ephemeral_gpu_offload": True},), "eva_config": ({"x": 1},),
    },
    "model.safetensors.index.json": {
        "weight_map": ({"model.norm.weight": "../x.safetensors"}, {"a": "/etc/passwd"}, [], {"a": "own.bin"}),
        "metadata": ({"total_size": 10**30},),
    },
}  # fmt: skip
"""Keys with values that mean something, by file."""
CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nclass Own: pass\n"


def template(folder: Path, marker: Path) -> Path:
    """Three folders: ``model``, the same model in ``parts`` with an index, and an ``adapter`` of it."""
    model = shutil.copytree(REFERENCE_DIR, folder / "model")
    parts = shutil.copytree(model, folder / "parts")
    (parts / "model.safetensors").rename(parts / "model-1.safetensors")
    names = AutoModelForCausalLM.from_pretrained(model).state_dict()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter = folder / "adapter"
    adapter.mkdir()
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    values |= {"base_model_name_or_path": "x", "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False}
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.zeros(shape)
        for layer in (0, 1)
        for side, shape in (("A", (2, 64)), ("B", (64, 2)))
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    for path in (model, parts, adapter):
        (path / "own.py").write_text(CODE.format(marker=str(marker)))
    return folder


def mutate(file: str, value: dict[str, Any], draw: random.Random) -> None:
    """Change one place of a file's values; those near the top as often as those deep inside."""
    if draw.random() < 0.4:
        added = draw.choice(list(ADDED[file]))
        value[added] = deepcopy(draw.choice(ADDED[file][added]))
        return
    parent: Any = value
    while True:
        keys: list[Any] = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        if not keys:
            return
        key = draw.choice(keys)
        if not isinstance(parent[key], dict | list) or draw.random() < 0.3:
            break
        parent = parent[key]
    if draw.random() < 0.15:
        del parent[key]
    else:
        parent[key] = deepcopy(draw.choice(ODD_VALUES))


def write_mutated(folder: Path, draw: random.Random) -> str:
    """Mutate one or two JSON files of a copy of the template, and return which one was first."""
    names = draw.sample(list(ADDED), draw.choice((1, 1, 2)))
    for name in names:
        place = {"adapter_config.json": "adapter", "model.safetensors.index.json": "parts"}.get(name, "model")
        file = folder / place / name
        value = json.loads(file.read_text())
        for _ in range(draw.choice((1, 1, 2))):
            mutate(name, value, draw)
        text = json.dumps(value)
        if draw.random() < 0.05:
            text = draw.choice(("", "[]", "[" * 100_000, text[:-5], text + "}", "\0", text.replace(":", ": -", 1)))
        file.write_text(text)
    return names[0]


def read(folder: Path, first: str) -> str:
    """Load what was mutated, as the commands do. Returns how far it came."""
    stage = "checked"
    try:
        if first == "adapter_config.json":
            lora = LoRA(enabled=True, path=str(folder / "adapter"))
            policy = find_policy("policy", str(folder / "model"), lora=lora)
        else:
            policy = find_policy("policy", str(folder / ("parts" if "index" in first else "model")))
        stage = "read"
        tokenizer = policy.tokenizer
        tokenizer("some text")
        if tokenizer.chat_template is not None:
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True)
        _ = policy.is_classifier
        stage = "loaded"
        model = policy.load(device="cpu", precision="32-true")
        base = policy.spec.base()
        policy.spec.try_export(tokenizer, base, end_of_turn=2)
        del model
        if first == "config.json":
            RewardModel(str(folder / "model"), device="cpu").check()
    except ValueError as error:
        message = str(error).splitlines()
        assert message, "an error without a message"
        return f"{stage}, then refused"
    return "done"


def memory() -> int:
    """The most bytes that the process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(count: int, seed: int, folder: Path) -> Counter[str]:
    """Read ``count`` mutated models. Returns how far they came."""
    marker = folder / "ran"
    outcomes: Counter[str] = Counter()
    base = template(folder / "base", marker)
    for kind in ("config.json", "adapter_config.json", "model.safetensors.index.json"):
        assert read(base, kind) in ("done", "loaded, then refused")  # what is imported later takes no part
    before = memory()
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        mutated = folder / "mutated"
        shutil.copytree(base, mutated)
        first = write_mutated(mutated, draw)
        with attempt(f"model {number} ({first})", seed, marker, SECONDS):
            outcomes[read(mutated, first)] += 1
        assert memory() - before < ALLOWANCE, f"model {number} ({first})"
        shutil.rmtree(mutated)
    return outcomes


if __name__ == "__main__":
    main(fuzz)
