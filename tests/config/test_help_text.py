"""``--help``: every command, group and key, with what the YAML files say of it."""

import sys

import pytest
from omegaconf import OmegaConf

from halos import cli
from halos.config.help_text import WIDTH, command_help
from halos.config.nodes import flatten
from tests.configs import compose


def help_of(name: str, *words: str) -> str:
    command = cli.COMMANDS[name]
    return command_help(name, command.meaning, command.config, words)


@pytest.mark.parametrize("words", [(), ("loss=simpo", "data=hh", "model=hf", "strategy=fsdp")])
def test_every_key_of_the_configuration_is_listed(words: tuple[str, ...]) -> None:
    text = help_of("train", *words)
    listed = {line.split("=")[0].strip() for line in text.splitlines() if line.startswith("  ") and "=" in line}
    config = OmegaConf.to_container(compose(*words), resolve=False)
    # The command sets what a source is given; the keys above it are the user's.
    keys = {key for key in flatten(config) if "_target_" not in key and not key.startswith(("data.source.", "before"))}
    empty = {key for key in keys if any(other.startswith(f"{key}.") for other in listed)}
    assert keys - listed - empty == set()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_of_each_command_fits_the_width(name: str) -> None:
    lines = help_of(name).splitlines()
    assert lines[0] == f"usage: halos {name} [group=option …] [key=value …]"
    assert max(map(len, lines)) <= WIDTH
    assert sum(line.startswith("  ") and "=" in line for line in lines) > 3


def test_options_that_are_chosen_have_their_own_keys() -> None:
    assert "loss.desirable_weight=1.0" in help_of("train")
    chosen = help_of("train", "loss=simpo")
    assert "loss.gamma" in chosen
    assert "loss.desirable_weight" not in chosen
    assert "  loss=simpo" in chosen


def test_halos_alone_lists_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"]):
        monkeypatch.setattr(sys, "argv", ["halos", *words])
        cli.main()
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[2:-2]] == list(cli.COMMANDS)
        assert max(map(len, lines)) <= WIDTH
