"""Every shell and Python block of README and docs/ runs, but for those that tests/docs/blocks.py lists.

The blocks of a page run in one folder, in their order. It holds the files that pages take for granted: `path-or-id` is
a tiny model that knows all bytes, and `train.jsonl`, `val.jsonl` and `pairs.jsonl` have pairs. Training commands
get two steps and few samples. Commands of halos are forked from a process that has imported everything, as importing
takes most of the time of so short a run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tests import tiny
from tests.docs.blocks import PAGES, ROOT, Block, blocks

SHORT = (
    "trainer.max_steps=2",
    "trainer.val_check_interval=1.0",
    "trainer.enable_progress_bar=false",
    "sampling.size=4",
    "sampling.prompts=0",
)
TRAINED = ("scripts/train.py", "scripts/cache_reference.py")
LINKED = ("scripts", "benchmarks", "docs", "conf", "halos")
EXISTING = {"exports.md": "tests/docs/test_exports.py"}
"""Pages whose blocks another test runs."""
RUN = [page for page in PAGES if page.name not in EXISTING and any(not block.why_not_run for block in blocks(page))]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["halos.commands.train", "halos.commands.evaluate", "halos.commands.python"])


def write_files(folder: Path) -> None:
    """Write what the pages take for granted."""
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    tokenizer = tiny.bpe_tokenizer(tiny.CHATML)
    tiny.model(vocab_size=len(tokenizer)).save_pretrained(folder / "path-or-id")
    tokenizer.save_pretrained(folder / "path-or-id")
    things, verbs = ("watch", "radio", "jacket", "lamp"), ("bought", "ordered", "lost", "returned")
    times = ("yesterday", "last month", "on tuesday", "in may")
    for name in ("train", "val", "pairs"):
        rows = [
            {
                "prompt": f"i {verb} a {thing} {time}. {name}?",
                "chosen": f"thanks for asking. we will check the {thing}. best wishes.",
                "rejected": f"we will check the payment of the {thing}.",
            }
            for thing, verb, time in product(things, verbs, times)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "bin").mkdir()
    short = f'case "$1" in {"|".join(TRAINED)}) exec {sys.executable} "$@" {" ".join(SHORT)};; esac'
    for name, line in (("python", short), ("pytest", f'exec {sys.executable} -m pytest "$@"')):
        file = folder / "bin" / name
        file.write_text(f'#!/bin/sh\n{line}\nexec {sys.executable} "$@"\n', encoding="utf-8")
        file.chmod(0o755)


def run_lines(block: Block, folder: Path) -> None:
    """Run the lines of a shell block."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        plain = words[:1] == ["python"] and not any(sign in line for sign in (";", "&&", "$"))
        if plain and words[1].startswith("scripts/"):
            words = [*words[1:], *(SHORT if words[1] in TRAINED else ())]
            forked(words, folder, str(block))
        elif words:
            paths = {"PYTHONPATH": f"{ROOT}:{folder}", "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
            command = ["bash", "-euo", "pipefail", "-c", line]
            done = subprocess.run(command, cwd=folder, env=os.environ | paths, capture_output=True, text=True)
            assert done.returncode == 0, f"{block}: {line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def forked(words: list[str], folder: Path, where: str) -> None:
    """Run a script with its words in a process that has imported halos already."""
    process = _context.Process(target=_run_script, args=(words, folder))
    process.start()
    process.join()
    log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    assert process.exitcode == 0, f"{where}: {' '.join(words)}\n{log[-3000:]}"


def _run_script(words: list[str], folder: Path) -> None:
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = f"{ROOT}:{folder}"  # of processes that this one starts
    sys.path.insert(0, str(folder))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def save_files(page: Path, folder: Path) -> None:
    """Save the Python blocks of a page of which it says so."""
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.code, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    write_files(tmp_path)
    save_files(page, tmp_path)
    chosen = [block for block in blocks(page) if not block.why_not_run]
    # One program: later blocks use the names of earlier ones.
    if python := [block for block in chosen if block.language == "python"]:
        program = [f"exec(compile({block.code!r}, {str(block)!r}, 'exec'))" for block in python]
        (tmp_path / "blocks.py").write_text("\n".join(program), encoding="utf-8")
        forked(["blocks.py"], tmp_path, str(page))
    for block in chosen:
        if block.language == "bash":
            run_lines(block, tmp_path)


def test_other_tests_run_the_other_pages() -> None:
    for page, test in EXISTING.items():
        assert page in (ROOT / test).read_text(encoding="utf-8")
