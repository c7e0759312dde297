"""Exports are the same models in transformers 4, if HALOS_TRANSFORMERS_4 names a python that has it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos.policy.backbone import Backbone
from tests import tiny

PYTHON = os.environ.get("HALOS_TRANSFORMERS_4", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="HALOS_TRANSFORMERS_4 is not set")]

READ = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False)
print(json.dumps({
    "logits": model(input_ids=torch.arange(6, 14)[None]).logits.float().tolist(),
    "chat": chat,
    "ids": tokenizer(chat, add_special_tokens=False)["input_ids"],
    "vocabulary": tokenizer.get_vocab(),
    "special": sorted(tokenizer.all_special_ids),
    "stops": model.generation_config.eos_token_id,
}))
"""


def read(folder: Path) -> dict[str, Any]:
    """What this process reads from a model's folder, by the names of READ."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "hello"}]
    chat: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return {
        "logits": model(input_ids=torch.arange(6, 14)[None]).logits.float().tolist(),
        "chat": chat,
        "ids": tokenizer(chat, add_special_tokens=False)["input_ids"],
        "vocabulary": tokenizer.get_vocab(),
        "special": sorted(tokenizer.all_special_ids),
        "stops": model.generation_config.eos_token_id,
    }


def base(folder: Path, case: str) -> Path:
    tiny.save(folder, "mistral" if case == "mistral" else "llama")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if case == "named templates":
        tokenizer.chat_template = {"default": tiny.CHATML, "tool_use": tiny.WITH_EOT}
        tokenizer.save_pretrained(folder)
    if case == "generation":
        values = {"do_sample": False, "temperature": 0.9, "eos_token_id": [1, 7]}
        (folder / "generation_config.json").write_text(json.dumps(values))
    if case == "bfloat16":
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "case", ["llama", "mistral", "bfloat16", "template", "named templates", "generation", "new token", "token"]
)
def test_transformers_4_reads_the_same(case: str, tmp_path: Path) -> None:
    template = tiny.WITH_EOT if case == "template" else None
    backbone = Backbone.from_pretrained(base(tmp_path / "base", case), chat_template=template)
    if case in ("new token", "token", "named templates"):
        backbone.control = "<|new|>" if case == "new token" else tiny.GOOD
        backbone.add_control_tokens([backbone.control])
    backbone.save_pretrained(tmp_path / "out")
    # Without this process's paths: the other environment has its own packages.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [PYTHON, "-c", READ, str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    expected = read(tmp_path / "out")
    assert json.loads(result.stdout.splitlines()[-1]) == expected
