"""``halos.train(…)``: the ``halos train`` command as a function."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from halos.commands.rounds import run_rounds
from halos.commands.train import train as train_configured
from halos.config.errors import check_complete, explain
from halos.config.folder import config_folder, options_of
from halos.config.open_keys import OPEN
from halos.data.sources.file_source import Files
from halos.processes.launch import on_devices
from halos.processes.provenance import called_by

StrPath = str | Path


def train(
    *,
    loss: str = "kto",
    model: StrPath | None = None,
    data: Files | None = None,
    output_dir: StrPath | None = None,
    overrides: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Train as ``halos train`` does, and return the summary.

    With several devices, each rank runs in its own process, so this also works in a notebook.

    Args:
        loss: an option of ``loss=``, such as ``kto`` or ``dpo``.
        model: an option of ``model=``, or a hub id, folder or GGUF file. None: the embedded toy model.
        data: an option of ``data=``, or one or several files in a format that ``data=files`` reads. None: the toy data.
        output_dir: the run's folder. None: a new one below ``out/``.
        overrides: other settings by key, such as ``{"loss.beta": 0.2, "strategy": "ddp", "trainer.devices": 2}``.

    Returns:
        The contents of ``summary.json``. With several rounds, the summary of the last round.

    Raises:
        ValueError: as :func:`halos.commands.train.train` raises it.
        halos.processes.errors.RunFailed: if the run has several processes and one of them failed.
    """
    arguments = {"loss": loss, "model": model, "data": data, "output_dir": output_dir, "overrides": overrides}
    cfg = compose(loss, model, data, output_dir, overrides or {})
    folder, summary = Path(cfg.output_dir), None
    with called_by(_call(arguments)):
        if cfg.rounds.count != 1 or cfg.get("before"):
            folder = run_rounds(cfg, partial(on_devices, job=train_configured))
        else:
            summary = on_devices(cfg, train_configured)
    return summary or dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))


def _call(arguments: Mapping[str, object]) -> str:
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
    return f"halos.train({', '.join(f'{name}={value!r}' for name, value in shown.items() if value is not None)})"


def compose(
    loss: str, model: StrPath | None, data: Files | None, output_dir: StrPath | None, overrides: Mapping[str, object]
) -> DictConfig:
    """Compose the configuration of a run from Python values. Raises ``ValueError`` if a value is invalid or missing."""
    groups: dict[str, Any] = {"loss": loss}
    keys: dict[str, Any] = {}
    if model is not None:
        groups["model"] = str(model) if str(model) in options_of("model") else "hf"
        if groups["model"] != str(model):
            keys["model.path"] = str(model)
    if data is not None:
        files = [data] if isinstance(data, str | Path) else list(data)
        is_option = len(files) == 1 and str(files[0]) in options_of("data")
        groups["data"] = str(files[0]) if is_option else "files"
        if not is_option:
            keys["data.train"] = [str(file) for file in files]
    groups |= {key: value for key, value in overrides.items() if options_of(key)}
    keys |= {key: value for key, value in overrides.items() if key not in groups}
    try:
        with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
            cfg = hydra.compose("train", [f"{group}={option}" for group, option in groups.items()])
        for key, value in keys.items():
            # As on the command line, a + adds a key that the configuration does not have.
            OmegaConf.update(cfg, key.removeprefix("+"), value, force_add=key.startswith(("+", *OPEN)))
        cfg.output_dir = str(Path(output_dir or cfg.output_dir).absolute())
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from error
    check_complete(cfg)
    return cfg
