"""The configurations of the training command, for other tests."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from halos.cli import config_folder

CONF = Path(config_folder())


def compose(*overrides: str) -> DictConfig:
    """The configuration of ``scripts/train.py`` with these words behind it."""
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        return hydra.compose("train", list(overrides))


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))
