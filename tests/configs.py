"""The configurations of the training command, for other tests."""

from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import hydra
from omegaconf import DictConfig

from halos.cli import config_folder

CONF = Path(config_folder())


def compose(*overrides: str) -> DictConfig:
    """The configuration of ``scripts/train.py`` with these words behind it, each of which is composed once."""
    return deepcopy(_composed(*overrides))


@lru_cache(maxsize=256)
def _composed(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        return hydra.compose("train", list(overrides))


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))
