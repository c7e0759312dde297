"""Command lines of README and docs/ compose, Python blocks import what exists, and most blocks are run by a test."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

from halos.cli import COMMANDS
from halos.config.combinations import check_combinations, values_of
from halos.config.folder import config_folder
from halos.config.open_keys import opened
from halos.config.shorthand import implied_groups, own_source
from halos.config.words import check_words
from halos.config.yaml_comments import keys
from scripts.pages.config_keys import CONF
from tests.docs.blocks import NOT_RUN, PAGES, ROOT, Block, blocks, commands

ALL = [block for page in PAGES for block in blocks(page)]
WITH_BLOCKS = [page for page in PAGES if blocks(page)]
KEY = re.compile(r"(?<![\w./=-])([a-z_]+(?:\.[A-Za-z_0-9]+)+)=(?!=)")
OPEN = ("hydra.", "before.", "loss.parts.", "loss.weights.", "model.chat_template_kwargs.", "data.roles.")
OPTIONS = ("loss._target_", "loss.delta", "loss.margin", "judge._target_", "data.source._target_", "data.source.KEY")
"""Keys that a configuration takes without listing them."""


def overrides(words: list[str]) -> tuple[str, list[str]] | None:
    """The configuration and the overrides of a command of halos; None for another command."""
    if words[0] == "python" and (match := re.fullmatch(r"scripts/(\w+)\.py", words[1])):
        name, rest = match[1].replace("_", "-"), words[2:]
    elif words[0] == "halos":
        name, rest = words[1], words[2:]
    else:
        return None
    if name not in COMMANDS or "--help" in rest or "--config-dir" in rest:
        return None
    sweep = "-m" in rest
    # Of a sweep the first job; the launcher's own keys exist where its package is installed.
    rest = [word for word in rest if word != "-m" and not word.startswith("hydra")]
    return name, [re.sub(r"=([\w.]+),[\w.,]+$", r"=\1", word) if sweep else word for word in rest]


def composes(words: list[str]) -> None:
    """Raise an error for a command line that the command would refuse."""
    if (found := overrides(words)) is None:
        return
    name, rest = found
    rest = opened(rest)
    check_words(rest)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        train = COMMANDS[name].config == "train"
        cfg = hydra.compose(COMMANDS[name].config, [*(implied_groups(rest) if train else ()), *own_source(rest), *rest])
    if train:
        check_combinations(values_of(cfg) | {"trainer.accelerator": "cpu"})


def marked(page: Path) -> object:
    # The pages of losses are generated and alike.
    alike = page.parent.name == "losses" and page.stem not in ("kto", "halo")
    return pytest.param(page, marks=pytest.mark.slow if alike else (), id=str(page.relative_to(ROOT)))


@pytest.mark.parametrize("page", [marked(page) for page in WITH_BLOCKS])
def test_command_lines_compose(page: Path) -> None:
    for block in blocks(page):
        for words in commands(block) if block.language == "bash" else ():
            try:
                composes(words)
            except Exception as error:
                pytest.fail(f"{block}: {' '.join(words)}: {error}")


@pytest.mark.parametrize("words", ["loss=ktoo", "loss.betta=1", "precision=16-mixed", "data.select.min_margn=1"])
def test_a_wrong_command_line_is_noticed(words: str) -> None:
    with pytest.raises(Exception, match=r"16-mixed|ktoo|betta|min_margn"):
        composes(["python", "scripts/train.py", words])


def test_commands_are_found_in_shell_blocks() -> None:
    code = "A=1 python scripts/train.py \\\n    a=b  # c\nfor x in y; do halos train 'c={d: e}'; done && ls | wc -l\n"
    found = list(commands(Block(PAGES[0], 1, "bash", code)))
    assert found[0] == ["python", "scripts/train.py", "a=b"]
    assert ["halos", "train", "c={d: e}"] in found
    assert found[-2:] == [["ls"], ["wc", "-l"]]


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "python"], ids=str)
def test_a_python_block_imports_what_exists(block: Block) -> None:
    own = {Path(other.file).stem for other in blocks(block.page) if other.file}
    for node in ast.walk(ast.parse(block.code)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert [module for module in modules if module not in own and find_spec(module) is None] == []


def known_keys() -> set[str]:
    """All keys of the files in conf/, by their full names."""
    files = list(CONF.rglob("*.yaml"))
    found = {key.name for file in files for key in keys(file, "" if file.parent == CONF else file.parent.name)}
    return found | {".".join(key.split(".")[:n]) for key in found for n in range(1, key.count(".") + 1)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_keys_in_texts_exist(page: Path) -> None:
    known = known_keys()
    code = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    named = {key for text in code for key in KEY.findall(text)}
    assert sorted(key for key in named - known if not key.startswith(OPEN) and key not in OPTIONS) == []


def test_at_most_one_block_in_ten_is_not_run() -> None:
    left_out = [block for block in ALL if block.why_not_run]
    assert len(left_out) <= len(ALL) / 10
    assert [start for start in NOT_RUN if not any(block.code.startswith(start) for block in ALL)] == []


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paragraphs_are_short(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    paragraphs = [part for part in re.split(r"\n\s*\n|\n(?=[-|\d])", text) if not part.startswith(("|", "    "))]
    assert [" ".join(part.split()[:8]) for part in paragraphs if len(part.split()) > 120] == []
