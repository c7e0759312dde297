"""The HTML page of a comparison: everything that comes from a run is escaped, and figures do not share ids."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

from halos.comparison.claims import decide
from halos.comparison.page import MAX_COLUMNS, MAX_PROMPTS, page
from halos.comparison.runs import Group, Run
from halos.comparison.tables import compare_groups

EVIL = "<script>alert(1)</script>"
CLAIM = {
    "name": EVIL,
    "states": EVIL,
    "metric": "samples/policy_reward",
    "measure": EVIL,
    "figure": {"x": "x", "label": EVIL, "lines": ["loss.name"]},
    "contrasts": [{"at": EVIL, "of": {"loss.name": EVIL}, "against": {"loss.name": "b"}}],
}


class Elements(HTMLParser):
    """Collects the names of all elements, and the texts of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.cells: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("td", "th"):
            self.cells.append("")
        if tag != "wbr":
            self._open = tag
        self.names.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("td", "th"):
            self.cells[-1] += data


def run(label: str, seed: int, samples: list[dict[str, Any]], rewards: bool = True) -> Run:
    numbers = {"samples/policy_reward": 0.5 + seed / 10, "samples/kl": 1.0, f"samples/{EVIL}": 1.0}
    return Run(
        Path(label),
        seed,
        {"loss.name": label, "x": 1.0},
        numbers,
        curves=[{"step": 0.0, "val/loss": 1.0}, {"step": 1.0, "val/loss": 0.5 + seed}],
        rewards=[{"reward": 0.5, "desirable": True}, {"reward": -0.5, "desirable": False}] if rewards else [],
        samples=samples,
        claim=CLAIM,
    )


def groups(*labels: str, prompts: int = 1) -> list[Group]:
    samples: list[dict[str, Any]] = [{"prompt": f"{EVIL}{n}", "completions": [f"{EVIL} says"]} for n in range(prompts)]
    return [Group(label, [run(label, seed, samples) for seed in (0, 1)]) for label in labels]


def test_names_and_texts_of_runs_are_escaped_wherever_they_are_shown() -> None:
    compared = groups(EVIL, "b")
    table = compare_groups(compared, ["samples/policy_reward", f"samples/{EVIL}"], EVIL)
    verdicts = decide([one for group in compared for one in group.runs])
    text = page(EVIL, compared, table, 0, verdicts)
    assert "<script" not in text
    elements = Elements(text)
    assert "script" not in elements.names
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt;"
    assert f"<title>{escaped}</title>" in text
    assert f"<h1>{escaped}</h1>" in text
    assert f"<p>“{escaped}” is undecided here." in text or f"<p>“{escaped}” did not hold here." in text
    assert f"<figcaption>{escaped}</figcaption>" in text  # of the claim, and of the reward distributions
    # Cells hold the very texts: the metric's column and its difference, the row's label, prompt and completion.
    assert {EVIL, f"samples/{EVIL}", f"Δ samples/{EVIL}", f"{EVIL}0", f"{EVIL} says"} <= set(elements.cells)
    assert elements.names.count("svg") == 5  # one claim, the frontier, one curve, two distributions


def test_figures_of_a_page_do_not_share_ids_and_refer_to_their_own() -> None:
    text = page("t", groups("a", "b", "c"), compare_groups(groups("a", "b", "c"), None, None), 0)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 100
    references = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert references <= set(ids)


def test_sections_without_content_are_left_out_and_unfinished_runs_are_counted() -> None:
    group = Group("a", [Run(Path("a"), 0, {"loss.name": "a"}, {"val/loss": 1.0})])
    text = page("t", [group], compare_groups([group], None, None), 2)
    assert re.findall("<h2>(.*?)</h2>", text) == ["Results", "Samples"]
    assert "1 runs in 1 groups. 2 unfinished ones are left out." in " ".join(text.split())
    assert "None yet: scripts/evaluate.py" in text
    assert "unfinished" not in page("t", [group], compare_groups([group], None, None), 0)


def test_samples_of_the_first_groups_are_shown_for_prompts_that_all_have() -> None:
    compared = groups(*"abcdefg", prompts=MAX_PROMPTS + 3)
    other = run("b", 0, [{"prompt": f"{EVIL}{n}", "completions": ["x"]} for n in range(1, 20)])
    compared[1] = Group("b", [other])
    text = page("t", compared, compare_groups(compared, None, None), 0)
    samples = Elements(text[text.index("<h2>Samples") :]).cells
    assert samples[: MAX_COLUMNS + 1] == ["prompt", *"abcde"]
    prompts = samples[MAX_COLUMNS + 1 :: MAX_COLUMNS + 1]
    assert prompts == [f"{EVIL}{n}" for n in range(1, MAX_PROMPTS + 1)]


def test_the_template_lies_in_the_package() -> None:
    assert files("halos.comparison").joinpath("page.html.jinja").is_file()
