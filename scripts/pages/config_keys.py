"""The page of all configuration keys, from the comments of the YAML files in conf/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from halos.config.yaml_comments import Key, header, keys
from scripts.pages.text import page, table

CONF = Path(__file__).parents[2] / "conf"
GROUPS = {
    "loss": "What is trained: the objective and its parameters. Each loss has [a page](../losses/index.md).",
    "data": "Which feedback is read, and how it becomes batches.",
    "model": "The model to align and its reference, adapters, precision of the export.",
    "optim": "The optimizer and its schedule.",
    "trainer": "Lightning's Trainer.",
    "strategy": "How the run is divided over devices.",
    "sampling": "Replies that a training run samples.",
    "logger": "Where metrics go in addition to `metrics.csv`.",
    "callbacks": "Callbacks of Lightning, or [your own](../extend/callback.md), in addition to the run's.",
    "before": "A round of SFT before the run.",
    "judge": "Who judges replies, in rounds and in `evaluate` and `label`.",
}
"""The groups, each with its meaning. Sets of settings (experiment, tuned, feedback, world) repeat keys of these."""


def without_commands(text: str) -> str:
    """Return the sentences of a comment without its command lines and without what holds for all of them."""
    text = re.sub(r"python scripts/\S+( \[?[\w.]+=\S+)+ ", "", text)
    return re.sub(r" Not run at this size.*", "", text)


def config_page() -> str:
    """Return the page of the keys of the training command."""
    blocks: list[str | list[str]] = [
        "# Configuration keys",
        "<!-- written by `python scripts/write_docs.py` from the comments in conf/ -->",
        "A word `group=option` chooses a file of a group, such as `loss=dpo`. A word `key=value` sets a key, such as "
        "`loss.beta=0.3`. `null` means that nothing is set. `python scripts/train.py --help` lists the same keys, and "
        "the error for a misspelt key names its neighbours. [Combinations](combinations.md) that make no sense are "
        "refused before the run.",
        "## The run itself",
        _table(keys(CONF / "train.yaml")),
    ]
    for group, meaning in GROUPS.items():
        blocks += [f"## {group}", meaning, *_group(group)]
    return page(*blocks)


def _group(group: str) -> Iterator[str | list[str]]:
    files = sorted((CONF / group).glob("*.yaml"), key=lambda file: (file.stem != "default", file.stem))
    for file in files:
        yield f"### {group}={file.stem}" if file.stem != "default" else f"### Keys of every {group}"
        if text := header(file):
            yield re.sub(r"(?<!\w)_", r"\\_", text if text.endswith(".") else text + ".")
        # The name of an option repeats its heading.
        if rows := [key for key in keys(file, group) if key.name not in ("loss.name", "strategy.name")]:
            yield _table(rows)


def _table(rows: list[Key]) -> list[str]:
    return table(
        ("key", "default", "meaning"),
        [(f"`{row.name}`", f"`{row.default}`" if row.default else "", row.comment) for row in rows],
    )
