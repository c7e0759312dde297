"""``scripts/plot_values.py``: draws value functions, and prints for each loss whether it is a HALO."""

from collections.abc import Sequence
from pathlib import Path

import hydra

from halos.commands.builders import objective_maker
from halos.config.folder import config_folder
from halos.testing.examples import Make
from halos.theory.definition import is_halo
from halos.theory.plot import plot_values

DEFAULTS = {"loss": "kto,dpo,slic", "output": "values.png"}


def run(words: Sequence[str]) -> None:
    """Draw the value functions and print a verdict for each loss.

    Raises:
        ValueError: for an unknown word.
    """
    settings = [word for word in words if word.startswith("loss.")]
    options = DEFAULTS | dict(_split(word) for word in words if word not in settings)
    makes = {name: _maker(name, settings) for name in options["loss"].split(",")}
    for name, make in makes.items():
        print(f"{name}: {is_halo(make)}")
    plot_values(makes, Path(options["output"]))
    print(f"value functions: {options['output']}")


def _split(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or key not in DEFAULTS:
        raise ValueError(f"expected loss=NAME,NAME,…, loss.KEY=VALUE for all of these, and output=FILE; found {word}")
    return key, value


def _maker(name: str, settings: Sequence[str]) -> Make:
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        return objective_maker(hydra.compose("train", [f"loss={name}", *settings]).loss)
