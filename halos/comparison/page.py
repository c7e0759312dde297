"""Renders a comparison as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from halos.comparison.claim_figure import claim_figure
from halos.comparison.claims import Verdict
from halos.comparison.figures import as_svg, curves, distributions, frontier
from halos.comparison.runs import Group
from halos.comparison.tables import Comparison, header, rows
from halos.safe_text import visible

MAX_PROMPTS = 8
"""Prompts whose samples are shown."""
MAX_COLUMNS = 5
"""Groups whose samples are shown."""


def page(
    title: str, groups: Sequence[Group], comparison: Comparison, unfinished: int, verdicts: Sequence[Verdict] = ()
) -> str:
    """Render the page.

    Args:
        title: the page's title.
        groups: the compared groups of runs.
        comparison: their table.
        unfinished: the number of unfinished runs, which are left out.
        verdicts: the verdicts on the claims of the runs' experiments.

    Returns:
        The page's HTML.
    """
    reward_against_kl = frontier(groups)
    sections = {
        "Reward against KL": {"": reward_against_kl} if reward_against_kl else {},
        "Learning curves (mean over seeds ± one standard deviation)": curves(groups),
        "Rewards of held-out completions": distributions(groups),
    }
    claim_figures = {verdict.claim.name: as_svg(*claim_figure(verdict)) for verdict in verdicts}
    sampled_runs, samples = _samples(groups)
    # Autoescape by hand: jinja2's default switches it on by the ending .html, and this file ends with .jinja.
    environment = Environment(
        loader=PackageLoader("halos.comparison", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_shown,
    )
    return environment.get_template("page.html.jinja").render(
        title=title,
        runs=sum(len(group.runs) for group in groups),
        groups=len(groups),
        unfinished=unfinished,
        claims=[verdict.sentence() for verdict in verdicts],
        claim_figures=_numbered(claim_figures, "claim"),
        # Here, as the template makes HTML of these names before they are shown.
        header=list(map(visible, header(comparison))),
        rows=rows(comparison),
        sections=[(name, _numbered(svgs, f"s{n}")) for n, (name, svgs) in enumerate(sections.items())],
        sampled_runs=sampled_runs,
        samples=samples,
    )


def _shown(value: object) -> object:
    # Not of the figures, whose type is a subclass of str that says that they are HTML already.
    return visible(value) if type(value) is str else value


def _numbered(svgs: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
    figures = enumerate(svgs.items())
    return [{"caption": name, "svg": _with_own_ids(svg, f"{prefix}f{n}-")} for n, (name, svg) in figures]


def _with_own_ids(svg: str, prefix: str) -> str:
    # matplotlib uses the same ids in every figure, and a page has one namespace: without a prefix, all figures but the
    # first would take their clip paths and glyphs from another figure.
    for start in ('id="', 'href="#', "url(#"):
        svg = svg.replace(start, start + prefix)
    return svg


def _samples(groups: Sequence[Group]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The labels of up to MAX_COLUMNS groups, and prompts that all of them have with the first completion of each."""
    # Samples of one seed are enough to read.
    by_label = {group.label: {row["prompt"]: row["completions"] for row in group.runs[0].samples} for group in groups}
    sampled = {label: answers for label, answers in by_label.items() if answers}
    labels = list(sampled)[:MAX_COLUMNS]
    if not labels:
        return [], []
    common = [prompt for prompt in sampled[labels[0]] if all(prompt in sampled[label] for label in labels)]
    return labels, [(prompt, [sampled[label][prompt][0] for label in labels]) for prompt in common[:MAX_PROMPTS]]
