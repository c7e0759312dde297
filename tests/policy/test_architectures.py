"""Many architectures: training, LoRA and export give the log-probs and gradients of separate plain forwards."""

from pathlib import Path

import pytest

from tests import architectures

QUICK = ["mixtral", "deepseek_v3", "gpt_oss", "mamba"]
ALL = [
    pytest.param(name, marks=pytest.mark.long if name in QUICK else pytest.mark.slow)
    for name in architectures.ARCHITECTURES
]


@pytest.mark.parametrize("name", ALL)
def test_training_and_exports_are_those_of_plain_forwards(name: str, tmp_path: Path) -> None:
    architectures.check(name, tmp_path)


def test_the_page_has_a_line_for_each_architecture() -> None:
    text = architectures.PAGE.read_text(encoding="utf-8")
    assert [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")] == list(
        architectures.ARCHITECTURES
    )
