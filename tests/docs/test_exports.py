"""The commands and the code of docs/exports.md run as they are written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests import tiny

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "exports.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path) -> None:
    offline = [block for block in blocks("bash") if "hub.push" not in block]
    commands = [line.split() for block in offline for line in block.splitlines()]
    assert len(commands) == 5
    for python, script, *words in commands:
        assert python == "python"
        subprocess.run([sys.executable, ROOT / script, *words], cwd=tmp_path, check=True, capture_output=True)
    for folder in ("exports/model_step_40", "step_20"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / folder)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_code_resizes_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "path-or-id")
    tokenizer = tiny.word_tokenizer()
    tokenizer.add_tokens(["<|one|>", "<|two|>"])
    tokenizer.save_pretrained(tmp_path / "path-or-id")
    (code,) = blocks("python")
    exec(code, {})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "resized").config.vocab_size == 22
