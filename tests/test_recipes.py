"""Recipes: one step of each as configured, with a tiny model of its architecture and data in its data set's schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halos.commands.train import train
from halos.objectives.kto import KTO
from tests import tiny
from tests.configs import compose
from tests.data.test_golden import message, shp, write


def ultrafeedback(n: int) -> dict[str, Any]:
    asked = {"role": "user", "content": f"hello {'a ' * n}"}
    sides = {
        side: [asked, {"role": "assistant", "content": side.replace("chosen", "good")}]
        for side in ("chosen", "rejected")
    }
    scores = {"score_chosen": 8.5, "score_rejected": 2.0}
    return {"prompt": asked["content"], "prompt_id": f"h{n}", **sides, "messages": sides["chosen"], **scores}


def hh(n: int) -> dict[str, Any]:
    start = f"\n\nHuman: hello {n}\n\nAssistant:"
    return {"chosen": f"{start} good", "rejected": f"{start} bad"}


def binarized(folder: Path) -> list[str]:
    for split, first in (("train", 0), ("val", 8)):
        write(folder / f"{split}.jsonl", [ultrafeedback(n) for n in range(first, first + 8)])
    return [f"data.{split}={folder / split}.jsonl" for split in ("train", "val")]


def mixed(folder: Path) -> list[str]:
    tree = [
        [
            message(f"q{n}", None, "prompter"),
            message(f"g{n}", f"q{n}", "assistant", rank=0),
            message(f"b{n}", f"q{n}", "assistant", rank=1),
        ]
        for n in range(4)
    ]
    rows = {
        "hh": [hh(n) for n in range(8)],
        "shp": [shp(n, n % 2, 3.0) for n in range(8)],
        "oasst": [row for rows in tree for row in rows],
    }
    return [f"data.mix.{name}.train={write(folder / f'{name}.jsonl', some)}" for name, some in rows.items()] + [
        "data.val_size=2"
    ]


RECIPES = {
    "zephyr_dpo": ("mistral", binarized),
    "zephyr_kto": ("mistral", binarized),
    "llama3_8b_kto": ("llama", binarized),
    "pythia_kto": ("gpt_neox", mixed),
}


@pytest.mark.runs
@pytest.mark.parametrize(
    "recipe", [name if name == "zephyr_kto" else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_a_recipe_trains_a_step(recipe: str, tmp_path: Path) -> None:
    architecture, data = RECIPES[recipe]
    path = tiny.save(tmp_path / "model", architecture, max_position_embeddings=2048)
    if recipe == "pythia_kto":  # as the base models: without a template of their own
        (path / "chat_template.jinja").unlink()
    cfg = compose(
        f"experiment={recipe}",
        f"model.path={path}",
        *data(tmp_path),
        "strategy=auto",
        "trainer.devices=1",
        "trainer.accelerator=cpu",
        "trainer.max_steps=1",
        "trainer.enable_progress_bar=false",
        "sampling.prompts=0",
        "logger=none",
        f"output_dir={tmp_path / 'run'}",
        f"cache_dir={tmp_path / 'cache'}",
    )
    assert cfg.strategy.name == "auto"
    summary = train(cfg)
    assert summary["steps"] == 1
    start = 0.5 if "kto" in recipe else 0.6931
    # A cached reference differs from the policy by bfloat16's rounding.
    assert summary["train_loss"][0] == pytest.approx(start, abs=0.02)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("recipe", "examples"), [("zephyr_dpo", 128), ("zephyr_kto", 32), ("llama3_8b_kto", 32), ("pythia_kto", 32)]
)
def test_a_step_of_a_recipe_has_the_published_number_of_examples(recipe: str, examples: int) -> None:
    cfg = compose(f"experiment={recipe}")
    assert cfg.data.batch_size * cfg.trainer.devices * cfg.trainer.accumulate_grad_batches == examples
    assert cfg.strategy.name == "fsdp"
    assert (cfg.loss._target_ == f"halos.objectives.{KTO.__name__}") == ("kto" in recipe)
