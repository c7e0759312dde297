"""Run folders of strangers in evaluate, sample and compare: nothing of them runs or shows a secret of the reader."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

from halos.commands.compare import compare
from halos.commands.evaluate import evaluate
from halos.commands.reference_points import reference_points
from halos.commands.rounds import run_rounds
from halos.commands.sample import sample
from halos.config.nodes import plain
from halos.toy.model import REFERENCE_DIR
from tests.commands.test_compare import run as comparable_run
from tests.commands.test_evaluate import compose
from tests.configs import compose as compose_training

QUICK = ("size=2", "max_new_tokens=4", "progress=false", "batch_size=2")
SOURCE = """
import pathlib
from halos.toy import ToySource
pathlib.Path(__file__).with_name('imported').touch()
class MySource(ToySource): pass
"""


class Command:
    """Runs a shell command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def shared_run(folder: Path, **changes: object) -> Path:
    """A finished run on the toy data whose configuration a stranger has changed."""
    shutil.copytree(REFERENCE_DIR, folder / "model")
    words = ("data=toy", "data.source.size=12", "data.source.val_size=4", f"output_dir={folder}")
    config = compose_training("loss=kto", "model=toy", *words)
    config = cast("DictConfig", OmegaConf.create(OmegaConf.to_yaml(config, resolve=True)))
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value, merge=False, force_add=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    (folder / "summary.json").write_text("{}")
    return folder


def in_both_commands(folder: Path, output: Path, *words: str) -> None:
    evaluate(compose("evaluate", f"policy={folder}", f"output={output}", *QUICK, *words))
    sample(compose("sample", f"policy={folder}", f"output={output}/s.jsonl", *QUICK, *words))


@pytest.mark.parametrize("place", ["data__select", "data__source", "data__columns", "data__source__size"])
def test_a_callable_in_the_data_of_a_run_is_not_called(place: str, tmp_path: Path) -> None:
    marker, file = tmp_path / "ran", tmp_path / "p.npy"
    np.save(file, np.array([Command(marker)], dtype=object), allow_pickle=True)
    folder = shared_run(
        tmp_path / "run", **{place: {"_target_": "numpy.load", "file": str(file), "allow_pickle": True}}
    )
    key = place.replace("__", ".")
    for command, output in ((evaluate, tmp_path / "out"), (sample, tmp_path / "out.jsonl")):
        cfg = compose(command.__name__, f"policy={folder}", f"output={output}", *QUICK)
        with pytest.raises(ValueError, match=rf"^{key}\._target_: expected .*, found numpy\.load; .* trust=\[numpy\]"):
            command(cfg)
    assert not marker.exists()


def test_loggers_losses_and_callbacks_of_a_run_are_not_built(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    payload = {"_target_": "subprocess.check_call", "args": ["touch", str(marker)]}
    changes = dict.fromkeys(("logger", "callbacks", "strategy__trainer", "optim", "judge", "loss__x"), payload)
    folder = shared_run(tmp_path / "run", **changes)
    in_both_commands(folder, tmp_path / "out")
    assert not marker.exists()


def test_the_users_own_source_is_built_if_he_names_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mylab_of_shared_runs.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    folder = shared_run(tmp_path / "run", data__source___target_="mylab_of_shared_runs.MySource")
    with pytest.raises(ValueError, match=r"trust=\[mylab_of_shared_runs\]"):
        in_both_commands(folder, tmp_path / "out")
    assert not (tmp_path / "imported").exists()
    in_both_commands(folder, tmp_path / "out", "trust=[mylab_of_shared_runs]")
    assert (tmp_path / "out" / "evaluation.json").is_file()


def test_an_environment_variable_of_the_reader_stands_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    for name in ("a", "b"):
        comparable_run(tmp_path / "runs" / name, name, 0, 0.5)
    file = tmp_path / "runs" / "a" / "config.yaml"
    file.write_text(file.read_text().replace("name: a", "name: ${oc.env:OPENAI_API_KEY}"))
    keys = {"runs": str(tmp_path / "runs"), "metrics": None, "baseline": None, "title": "t"}
    with pytest.raises(ValueError, match=r"a/config.yaml: .*an interpolation in line \d+") as refused:
        compare(OmegaConf.create({**keys, "output": str(tmp_path / "out")}))
    assert "sk-mine" not in str(refused.value) + capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_settings_of_rounds_are_plain_data_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    words = ("data=toy", "judge=truth", "rounds.count=2", "resume=auto", f"output_dir={tmp_path}")
    cfg = compose_training("loss=kto", "model=toy", *words)
    (tmp_path / "rounds.yaml").write_text("loss.beta: ${oc.env:OPENAI_API_KEY}\n")
    with pytest.raises(ValueError, match=r"rounds.yaml: .*an interpolation in line 1") as refused:
        run_rounds(cfg, lambda cfg: plain(cfg))
    assert "sk-mine" not in str(refused.value)


@pytest.mark.parametrize(
    ("command", "config", "name"),
    [(evaluate, "evaluate", "evaluation"), (reference_points, "reference_points", "reference_points")],
)
def test_results_are_not_written_through_a_link_in_the_run(
    command: Callable[[DictConfig], object], config: str, name: str, tmp_path: Path
) -> None:
    folder = shared_run(tmp_path / "run")
    mine = tmp_path / "mine"
    mine.mkdir()
    (folder / name).symlink_to(mine)
    with pytest.raises(ValueError, match=rf"^output: expected a folder of the run, found a link, .*{name} → "):
        command(compose(config, f"policy={folder}", *(QUICK if command is evaluate else ())))
    assert list(mine.iterdir()) == []
