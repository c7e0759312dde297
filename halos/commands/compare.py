"""``compare(cfg)``: many runs as a table and one HTML page."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from halos import terminal
from halos.comparison import tables
from halos.comparison.claim_figure import claim_figure
from halos.comparison.claims import as_markdown, decide
from halos.comparison.page import page
from halos.comparison.runs import group, read_runs
from halos.files import write_atomically


def compare(cfg: DictConfig) -> Path:
    """Read the runs in and below ``cfg.runs`` and write the comparison into ``cfg.output``; of experiments that claim
    something, also the verdicts and their figures.

    Raises ``ValueError`` for folders without finished runs, for metrics that no run has and for claims that the runs
    cannot decide.
    """
    terminal.set_up_logging()
    roots = [cfg.runs] if isinstance(cfg.runs, str) else list(cfg.runs)
    runs, unfinished = read_runs(roots)
    groups = group(runs)
    comparison = tables.compare_groups(groups, cfg.metrics, cfg.baseline)
    verdicts = decide(runs)
    output = Path(cfg.output)
    output.mkdir(parents=True, exist_ok=True)
    files = {
        "comparison.csv": tables.as_csv(comparison),
        "comparison.md": tables.markdown(comparison),
        "comparison.tex": tables.latex(comparison),
        "comparison.html": page(cfg.title, groups, comparison, len(unfinished), verdicts),
        **({"verdicts.md": as_markdown(verdicts)} if verdicts else {}),
    }
    for name, text in files.items():
        write_atomically(output / name, text)
    for verdict in verdicts:
        claim_figure(verdict)[0].savefig(output / f"claim_{verdict.claim.name}.png", dpi=100)
    terminal.console.print(tables.terminal(comparison))
    for folder in unfinished:
        terminal.say(f"left out, as it has not finished: {folder}")
    for verdict in verdicts:
        terminal.say(verdict.sentence())
    terminal.say(f"comparison: {output / 'comparison.html'}")
    return output
