"""The documentation names what exists, and its generated pages are up to date."""

import re
from pathlib import Path

import pytest

import halos
from scripts.pages.losses import notes
from scripts.write_docs import DOCS, written_pages
from tests.configs import options
from tests.docs.blocks import PAGES, ROOT

LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w./-])(?:halos|conf|scripts|docs|tests|parity|benchmarks)/[\w./-]*\w")
MODULE = re.compile(r"(?:from|import) (halos(?:\.\w+)*)")
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
NAME = re.compile(r"(?<![\w/.])halos\.([A-Za-z]\w*)\(")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_links(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    missing = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    return missing


def missing_paths(text: str) -> list[str]:
    """The paths of this repository that a text names and that do not exist."""
    named = LINK.sub("]", text)  # links are relative to their page
    named = re.sub(r"https?://\S+", "", named)
    return [path for path in PATH.findall(named) if not (ROOT / path).exists()]


def unknown_names(text: str) -> list[str]:
    """The modules and public names of halos that a text uses and that do not exist."""
    modules = [module for module in MODULE.findall(text) if not _is_module(module)]
    # `halos.train(…)`, `halos.AdamW(…)`
    return modules + [f"halos.{name}" for name in NAME.findall(text) if name not in dir(halos)]


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert missing_links(page) == []
    assert missing_paths(text) == []
    assert unknown_names(text) == []
    for block in PYTHON.findall(text):
        compile(block, str(page), "exec")


def test_what_does_not_exist_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One heading\n[a](gone.md) [b](#one-heading) [c](#gone) [d](https://e.org/gone.py) [e](page.md)")
    assert missing_links(page) == ["gone.md", "#gone"]
    text = "halos/cli.py, `halos/gone.py`, /halos/gone.py, https://e.org/halos/gone.py, conf/gone"
    assert missing_paths(text) == ["halos/gone.py", "conf/gone"]
    text = "from halos.gone import a; import halos.data; halos.KTO(1); halos.Gone(1)"
    assert unknown_names(text) == ["halos.gone", "halos.Gone"]


def test_generated_pages_are_up_to_date() -> None:
    written = written_pages()
    stale = [file.name for file, text in written.items() if file.read_text(encoding="utf-8") != text]
    assert stale == [], "run python scripts/write_docs.py"


def test_each_loss_has_a_page_and_each_page_a_place_in_the_site() -> None:
    assert sorted(notes()) == options("loss")
    assert {file.stem for file in (DOCS / "losses").glob("*.md")} == {*notes(), "index"}
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert [page for page in pages if not re.search(rf"[ :]{re.escape(page)}\n", site)] == []


def test_the_glossary_has_a_line_for_each_term_in_order() -> None:
    lines = (ROOT / "docs" / "reference" / "glossary.md").read_text(encoding="utf-8").splitlines()
    terms = [re.fullmatch(r"- \*\*(.+?)\*\*.*: .+\.", line) for line in lines if line.startswith("- ")]
    names = [term[1].casefold() for term in terms if term is not None]
    assert len(names) == len(terms) > 60
    assert names == sorted(names)
