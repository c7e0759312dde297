"""The model card (README.md) of an exported model, as the Hugging Face hub reads it.

Everything on the card comes from a stranger's configuration: names, paths, tokens, templates. The front matter is
therefore written by PyYAML. The text shows such values as inline code, where neither Markdown nor HTML is interpreted,
and the Python code as string literals.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from halos.safe_text import visible

PACKAGES = ("halos", "torch", "transformers", "lightning")
"""Packages whose versions the card states."""
LONGEST = 80
"""Characters of a value in a table; what is longer (a chat template) is cut."""


def installed_versions() -> dict[str, str]:
    """Return the versions of :data:`PACKAGES`, halos' own only if it is installed and not run from its sources."""
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the card's example code depends on.

    Args:
        chat: the tokenizer has a chat template.
        control: the control token that the policy is conditioned on (CSFT), or an empty string.
        adapter: the folder contains a LoRA adapter, not a whole model.
        end_of_turn: text of the token that ends a scored completion. Set for reward models only.
    """

    chat: bool
    control: str = ""
    adapter: bool = False
    end_of_turn: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What a model card states about a training run.

    Args:
        loss: name of the loss, if known.
        base: the model that training started from, if known: a hub id or a path.
        paper: title and link of the loss's paper.
        data: hub ids or paths of the training data.
        hyperparameters: the run's settings, by key.
        metrics: the run's results, by name, rounded on the card to four significant digits.
        remote_code: whether the run was allowed to run code that came with the base.
        command: the command line or the call in Python that started the run.
        commit: of the repository in which it was called.
        versions: versions of the packages that trained the model, by name.
        date: day of the export (UTC).
    """

    loss: str | None = None
    base: str | None = None
    paper: tuple[str, str] | None = None
    data: Sequence[str] = ()
    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    remote_code: bool = False
    command: str | None = None
    commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=installed_versions)
    date: str = field(default_factory=lambda: datetime.now(UTC).date().isoformat())

    def render(self, usage: Usage) -> str:
        """Return the card as Markdown with YAML front matter."""
        front_matter = yaml.safe_dump(self._front_matter(usage), sort_keys=False, allow_unicode=True)
        return _template().render(card=self, usage=usage, front_matter=front_matter)

    def _front_matter(self, usage: Usage) -> dict[str, object]:
        is_reward_model = usage.end_of_turn is not None
        fields: dict[str, object] = {
            "library_name": "peft" if usage.adapter else "transformers",
            "pipeline_tag": "text-classification" if is_reward_model else "text-generation",
            "tags": ["alignment", "halos", *filter(None, [self.loss, "reward-model" if is_reward_model else None])],
        }
        # The hub refuses a card that names anything but its own repositories here.
        if self.base is not None and _is_hub_model(self.base):
            fields["base_model"] = self.base
        datasets = {dataset: None for name in self.data if (dataset := _hub_dataset(name))}
        if datasets:
            fields["datasets"] = list(datasets)
        return fields


def _is_hub_model(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None and not Path(name).exists()


def _hub_dataset(name: str) -> str | None:
    # owner/name, which a subset and a split may follow. A path looks alike, but its folder exists.
    match = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(/[\w.-]+)?(:[^/]*)?", name)
    return match[1] if match and not Path(name).parent.exists() else None


def inline_code(value: object) -> str:
    """Return the value as Markdown's inline code, in one line, delimited by more backticks than it contains."""
    text = " ".join(visible(str(value)).split())
    longest_run = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest_run + 1)
    space = " " if not text or "`" in (text[0], text[-1]) else ""
    return f"{fence}{space}{text}{space}{fence}"


def table_cell(value: object) -> str:
    """Return the value as inline code for a table: cut to :data:`LONGEST` characters, and without column separators."""
    text = str(value)
    if len(text) > LONGEST:
        text = text[: LONGEST - 1] + "…"
    # A backslash before a separator would itself be escaped by the one that escapes the separator.
    return re.sub(r"(?<=\\)\|", " |", inline_code(text)).replace("|", r"\|")


def rounded(value: float) -> str:
    """Return the number with four significant digits: 0.26140938 → 0.2614, 12345.6 → 12350."""
    return f"{float(f'{value:.4g}'):g}"


def link(title: str, url: str) -> str:
    """Return a Markdown link whose title and address are escaped."""
    text = re.sub(r"([\\`*_\[\]<>&])", r"\\\1", " ".join(title.split()))
    return f"[{text}](<{quote(url, safe=':/?#@!$&+,;=%~.-')}>)"


@cache
def _template() -> Template:
    # No autoescape: it is for HTML. The filters below escape for Markdown.
    environment = Environment(  # noqa: S701 (see above)
        loader=PackageLoader("halos.policy.export", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": inline_code, "cell": table_cell, "rounded": rounded, "literal": repr}
    environment.globals["link"] = link
    return environment.get_template("card.md.jinja")
