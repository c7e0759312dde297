"""A comparison as one self-contained HTML page: no scripts, no fonts or pictures from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from halos.comparison.claim_figure import claim_figure
from halos.comparison.claims import Verdict
from halos.comparison.figures import as_svg, curves, distributions, frontier
from halos.comparison.runs import Group
from halos.comparison.tables import Comparison, shown

SAMPLES = 8
"""Prompts whose samples are shown."""
MOST_COLUMNS = 5

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; background: #fff; max-width: 1180px; margin: 2rem auto;
       padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } p { color: #555; }
table { border-collapse: collapse; font-size: 13.5px; } th, td { padding: .35rem .7rem; text-align: right; }
th { border-bottom: 1.5px solid #1c1e21; font-weight: 600; vertical-align: bottom; }
td { border-bottom: 1px solid #e4e6e9; white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; } .figures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; } figcaption { font-size: 13px; font-weight: 600; text-align: center; }
svg { max-width: 100%; height: auto; } .samples th, .samples td { text-align: left; vertical-align: top;
       min-width: 11rem; white-space: normal; }
"""


def page(
    title: str, groups: Sequence[Group], comparison: Comparison, unfinished: int, verdicts: Sequence[Verdict] = ()
) -> str:
    """The page's text."""
    runs = sum(len(group.runs) for group in groups)
    left_out = f" {unfinished} unfinished ones are left out." if unfinished else ""
    figure = frontier(groups)
    parts = [
        f"<h1>{escape(title)}</h1><p>{runs} runs in {len(groups)} groups.{left_out} Numbers are means over seeds ± "
        "half of the 95 % interval (Student's t).</p>",
        _section("Claims", _claims(verdicts)),
        _section("Results", _table(comparison)),
        _section("Reward against KL", figure and _figures({"": figure})),
        _section("Learning curves (mean over seeds ± one standard deviation)", _figures(curves(groups))),
        _section("Rewards of held-out completions", _figures(distributions(groups))),
        _section("Samples", _samples(groups)),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}{view}</head><body>\n{body}\n</body></html>\n'


def _section(title: str, body: str | None) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}" if body else ""


def _claims(verdicts: Sequence[Verdict]) -> str:
    figures = _figures({v.claim.name: as_svg(*claim_figure(v)) for v in verdicts}, "c")
    return "".join(f"<p>{escape(v.sentence())}</p>" for v in verdicts) + figures


def _table(comparison: Comparison) -> str:
    names = (escape(name).replace("/", "/<wbr>") for name in ("run", "seeds", *comparison.metrics))
    header = "".join(f"<th>{name}</th>" for name in names)
    rows = []
    for label, cells in zip(comparison.labels, comparison.cells, strict=True):
        seeds = max((cell.n for cell in cells if cell is not None), default=0)
        values = "".join(f"<td>{escape(text)}</td>" for text in (label, str(seeds), *map(shown, cells)))
        rows.append(f"<tr>{values}</tr>")
    return f'<div class="scroll"><table><tr>{header}</tr>{"".join(rows)}</table></div>'


def _figures(figures: Mapping[str, str], kind: str = "f") -> str:
    made = [
        f"<figure>{f'<figcaption>{escape(name)}</figcaption>' if name else ''}{_unique(svg, f'{kind}{n}')}</figure>"
        for n, (name, svg) in enumerate(figures.items())
    ]
    return f'<div class="figures">{"".join(made)}</div>' if made else ""


def _unique(svg: str, name: str) -> str:
    # Ids must differ between the pictures of a page, or one would use the other's clip paths.
    tag = f"{name}n{len(svg)}-"
    for before in ('id="', 'href="#', "url(#"):
        svg = svg.replace(before, before + tag)
    return svg


def _samples(groups: Sequence[Group]) -> str:
    told = [(group.label, {row["prompt"]: row for row in run.samples}) for group in groups for run in group.runs[:1]]
    told = [(label, rows) for label, rows in told if rows][:MOST_COLUMNS]
    if not told:
        return "<p>None yet: scripts/evaluate.py leaves samples and rewards in a run's folder.</p>"
    common = [prompt for prompt in told[0][1] if all(prompt in rows for _, rows in told)][:SAMPLES]
    header = "".join(f"<th>{escape(name)}</th>" for name in ("prompt", *(label for label, _ in told)))
    rows = (
        "".join(f"<td>{escape(text)}</td>" for text in (prompt, *(said[prompt]["completions"][0] for _, said in told)))
        for prompt in common
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table class="samples"><tr>{header}</tr>{body}</table></div>'
