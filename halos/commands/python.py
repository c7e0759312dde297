"""``halos.train(…)``: the ``halos train`` command as a function."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from halos.commands.rounds import run_rounds
from halos.commands.train import train as train_configured
from halos.config.errors import explain, require_plain_booleans
from halos.config.folder import config_folder, options_of
from halos.config.open_keys import OPEN
from halos.processes.launch import ranks_to_start, run_ranks


def train(
    *,
    loss: str = "kto",
    model: str | Path | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    output_dir: str | Path | None = None,
    overrides: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Train as ``halos train`` does, and return the summary.

    With several devices, each rank runs in its own process, so this works in a notebook too.

    Args:
        loss: an option of ``loss=``, such as ``kto`` or ``dpo``.
        model: an option of ``model=``, or a hub id, folder or GGUF file. None: the embedded toy model.
        data: an option of ``data=``, or one or several files in a format that ``data=json`` reads. None: the toy data.
        output_dir: the run's folder. None: a new one below ``out/``.
        overrides: other settings by key, such as ``{"loss.beta": 0.2, "strategy": "ddp", "trainer.devices": 2}``.

    Returns:
        The contents of ``summary.json``. With several rounds, the summary of the last round.

    Raises:
        ValueError: for a bad configuration, bad data or a bad model, before weights are loaded.
        halos.processes.errors.RunFailed: if the run has several processes and one of them failed.
    """
    cfg = compose(loss=loss, model=model, data=data, output_dir=output_dir, overrides=overrides)
    if cfg.rounds.count != 1 or cfg.get("before"):
        return _summary(run_rounds(cfg, _run))
    if ranks_to_start(cfg) > 1:
        _run(cfg)
        return _summary(Path(cfg.output_dir))
    return train_configured(cfg)


def compose(
    *,
    loss: str,
    model: str | Path | None,
    data: str | Path | Sequence[str | Path] | None,
    output_dir: str | Path | None,
    overrides: Mapping[str, object] | None,
) -> DictConfig:
    """Compose the configuration of a run from Python values. Raises ``ValueError`` if a value is invalid or missing."""
    groups, keys = {"loss": loss}, dict[str, object]()
    if model is not None:
        groups["model"] = str(model) if str(model) in options_of("model") else "hf"
        keys |= {} if groups["model"] == str(model) else {"model.path": str(model)}
    if data is not None:
        files = [data] if isinstance(data, str | Path) else list(data)
        is_option = len(files) == 1 and str(files[0]) in options_of("data")
        groups["data"] = str(files[0]) if is_option else "json"
        keys |= {} if is_option else {"data.train": [str(file) for file in files]}
    for key, value in (overrides or {}).items():
        target: dict[str, Any] = groups if options_of(key) else keys
        target[key] = str(value) if options_of(key) else value
    try:
        with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
            cfg = hydra.compose("train", [f"{group}={option}" for group, option in groups.items()])
        for key, value in keys.items():
            _set(cfg, key, value)
        cfg.output_dir = str(Path(output_dir or cfg.output_dir).absolute())
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from error
    if missing := sorted(str(key) for key in OmegaConf.missing_keys(cfg)):
        raise ValueError(f"{missing[0]}: expected a value, found none; set {missing[0]} in overrides")
    require_plain_booleans(OmegaConf.to_container(cfg))
    return cfg


def _set(cfg: DictConfig, key: str, value: object) -> None:
    # As on the command line, a + adds a key that the configuration does not have.
    if key.startswith(("+", OPEN)):
        with open_dict(cfg):
            OmegaConf.update(cfg, key.lstrip("+"), value, force_add=True)
    else:
        OmegaConf.update(cfg, key, value)


def _run(cfg: DictConfig) -> None:
    if (count := ranks_to_start(cfg)) > 1:
        run_ranks(cfg, count)
    else:
        train_configured(cfg)


def _summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary
