"""The table of contents of the losses names each file once."""

from __future__ import annotations

import re

from tests.docs.blocks import ROOT

FOLDER = ROOT / "halos" / "objectives"


def test_each_loss_has_one_place_in_the_order() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| .+ \|$", text, re.MULTILINE)
    files = {file.name for file in FOLDER.glob("*.py")} - {"__init__.py", "base.py"}
    assert sorted(listed) == sorted(files)


def test_its_links_lead_somewhere() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [link for link in re.findall(r"\]\(([^)]+)\)", text) if not (FOLDER / link).exists()] == []
