"""Many architectures: training, LoRA and export give the log-probs and gradients of separate plain forwards."""

from pathlib import Path
from typing import Any

import pytest
import torch

from halos.policy.loading import ModelSpec
from tests import architectures, tiny

QUICK = ["mixtral", "deepseek_v3", "gpt_oss", "mamba"]
ALL = [
    pytest.param(name, marks=pytest.mark.long if name in QUICK else pytest.mark.slow)
    for name in architectures.ARCHITECTURES
]


@pytest.mark.parametrize("name", ALL)
def test_training_and_exports_are_those_of_plain_forwards(name: str, tmp_path: Path) -> None:
    architectures.check(name, tmp_path)


def test_the_page_is_that_of_these_architectures() -> None:
    text = architectures.PAGE.read_text(encoding="utf-8")
    names = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert names == list(architectures.ARCHITECTURES)
    around = [line for line in text.splitlines() if not line.startswith("| `")]
    assert [line for line in around if "`transformers`" not in line] == [
        line for line in architectures.page([]).splitlines() if "`transformers`" not in line
    ]


# What differs between training and evaluation


def load(name: str, folder: Path, **options: Any) -> Any:
    architectures.model(name, **options).save_pretrained(folder)
    tiny.word_tokenizer().save_pretrained(folder)
    return ModelSpec(path=str(folder)).load()


def test_routers_add_no_noise_in_training(tmp_path: Path) -> None:
    model = load("phimoe", tmp_path, router_jitter_noise=0.5)
    assert model.training
    with torch.no_grad():
        training, again = architectures.plain_logprobs(model), architectures.plain_logprobs(model)
        evaluation = architectures.plain_logprobs(model.eval())
    for mine, same, other in zip(training, again, evaluation, strict=True):
        assert torch.equal(mine, same)
        assert torch.equal(mine, other)
    # The exported model still has its noise, on which its weighting of experts in evaluation depends.
    assert model.config.router_jitter_noise == 0.5


def test_evaluation_does_not_rescale_weights(tmp_path: Path) -> None:
    model = load("rwkv", tmp_path, rescale_every=1)
    weight = model.rwkv.blocks[1].attention.output.weight
    before = weight.clone()
    with torch.no_grad():
        training = architectures.plain_logprobs(model)
        evaluation = architectures.plain_logprobs(model.eval())
    assert torch.equal(weight, before)
    for mine, other in zip(training, evaluation, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
