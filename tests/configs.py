"""The configurations of the training command, for other tests."""

import re
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import hydra
from omegaconf import DictConfig

from halos.config.folder import config_folder

CONF = Path(config_folder())


FOLDER = re.compile(r"(output_dir|cache_dir)=(/[\w./-]+)")


def compose(*overrides: str) -> DictConfig:
    """The configuration of ``scripts/train.py`` with these words behind it.

    What is asked for again is copied; folders of its own, which each test has, are written into the copy.
    """
    folders = [match for word in overrides if (match := FOLDER.fullmatch(word))]
    made = deepcopy(_composed(*(word for word in overrides if not FOLDER.fullmatch(word))))
    for match in folders:
        made[match[1]] = match[2]
    return made


@lru_cache(maxsize=512)
def _composed(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        return hydra.compose("train", list(overrides))


VARIANTS = {
    "alphapo": ["alpha"],
    "cdpo": ["label_smoothing"],
    "dpo_norm": ["beta", "length_normalised"],
    "halo_dpo": ["value", "view"],
    "halo_kto": ["value"],
    "halo_kto_concave": ["value"],
    "halo_kto_risk_neutral": ["value"],
    "kto_balanced": ["desirable_weight"],
    "kto_reference_free": ["reference_free"],
    "kto_zero": ["reference_point"],
    "ld_dpo": ["tail_weight"],
    "r_dpo": ["length_penalty"],
    "step_kto": ["step_labels"],
    "wpo": ["policy_weights"],
}
"""Losses that are another with these parameters set."""
MIXTURES = ["cpo_simpo", "irpo", "mix", "mpo"]


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))
