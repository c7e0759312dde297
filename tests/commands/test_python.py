"""``halos.train(…)``: the command as a function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import halos
from halos.commands.python import compose
from halos.commands.train import train
from tests.configs import compose as compose_words

QUICK: dict[str, object] = {
    "trainer.max_steps": 2,
    "trainer.enable_progress_bar": False,
    "data.batch_size": 4,
    "data.source.size": 12,
    "data.source.val_size": 4,
    "sampling.size": 0,
    "sampling.prompts": 0,
    "logger": "none",
}


def composed(**values: Any) -> Any:
    return compose(**{"loss": "kto", "model": None, "data": None, "output_dir": None, "overrides": {}, **values})


@pytest.mark.runs
def test_it_is_the_command_and_may_be_called_again(tmp_path: Path) -> None:
    first = halos.train(loss="dpo", output_dir=tmp_path / "a", overrides=QUICK | {"data.source.feedback": "pairs"})
    again = halos.train(loss="kto", output_dir=tmp_path / "b", overrides=QUICK | {"loss.beta": 0.2})
    words = [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in QUICK.items()]
    told = train(compose_words("loss=kto", "loss.beta=0.2", *words, f"output_dir={tmp_path / 'c'}"))
    assert (first["loss"], again["loss"]) == ("dpo", "kto")
    assert again["train_loss"] == told["train_loss"]
    assert json.loads((tmp_path / "b" / "summary.json").read_text()) == again
    assert again["command"].startswith(f"halos.train(loss='kto', output_dir='{tmp_path}/b', overrides={{'trainer.max_")
    assert told["command"] is None


@pytest.mark.runs
@pytest.mark.slow
def test_several_devices_have_processes_of_their_own(tmp_path: Path) -> None:
    one = halos.train(output_dir=tmp_path / "one", overrides=QUICK)
    halves = {"strategy": "ddp", "trainer.devices": 2, "trainer.accelerator": "cpu", "data.batch_size": 2}
    two = halos.train(output_dir=tmp_path / "two", overrides=QUICK | halves)
    assert two["world_size"] == 2
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)


def test_names_are_options_and_everything_else_is_a_path(tmp_path: Path) -> None:
    cfg = composed(model="org/model", data=["a.jsonl", "b.jsonl"], output_dir=tmp_path)
    assert (cfg.model.path, list(cfg.data.train), cfg.data.source._target_) == (
        "org/model",
        ["a.jsonl", "b.jsonl"],
        "halos.data.FeedbackFiles",
    )
    cfg = composed(loss="ppo", model="toy", data="hh", output_dir=tmp_path)
    assert (cfg.loss.name, cfg.data.source._target_) == ("ppo", "halos.data.HHSource")


def test_overrides_set_keys_and_groups(tmp_path: Path) -> None:
    overrides = {"strategy": "fsdp", "loss.beta": 0.2, "optim.betas": [0.8, 0.9], "resume": None}
    more = {"+loss.margin": 1.5, "model.chat_template_kwargs.mood": "calm"}
    cfg = composed(overrides={**overrides, **more}, output_dir=tmp_path)
    assert cfg.model.chat_template_kwargs == {"mood": "calm"}
    assert (cfg.strategy.name, cfg.loss.beta, list(cfg.optim.betas), cfg.loss.margin) == ("fsdp", 0.2, [0.8, 0.9], 1.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "kdo"}, r"loss=kdo: no such option.*did you mean kto"),
        ({"overrides": {"loss.betta": 1}}, r"loss\.betta: no such key.*did you mean beta"),
        ({"overrides": {"strategy": "dpp"}}, r"strategy=dpp: no such option"),
        ({"overrides": {"overwrite": "no"}}, r"overwrite: expected true or false, found 'no'"),
    ],
)
def test_mistakes_are_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        composed(**values)
