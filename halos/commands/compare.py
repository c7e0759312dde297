"""``compare(cfg)``: many runs as a table and one HTML page.

It imports neither torch nor Lightning, which would take longer than reading a few tables.
"""

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
    """Compare the runs in and below ``cfg.runs``. If their experiments make claims, also decide these.

    Returns:
        The folder ``cfg.output``, with the table as CSV, Markdown, LaTeX and HTML, and the verdicts with their figures.

    Raises:
        ValueError: a folder has no finished runs, no run has a metric, or the runs cannot decide a claim.
    """
    terminal.set_up_logging(models=False)
    runs, unfinished = read_runs([cfg.runs] if isinstance(cfg.runs, str) else list(cfg.runs))
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
    }
    if verdicts:
        files["verdicts.md"] = as_markdown(verdicts)
    for name, text in files.items():
        write_atomically(output / name, text)
    # The page has the same figures as SVG, but Markdown renderers such as GitHub's show only images from files.
    for verdict in verdicts:
        claim_figure(verdict)[0].savefig(output / verdict.claim.image, dpi=100)
    for table in tables.terminal(comparison, terminal.console):
        terminal.console.print(table)
    terminal.say("mean ± half of the 95 % interval over seeds (Student's t)")
    for folder in unfinished:
        terminal.say(f"left out, as it has not finished: {folder}")
    for verdict in verdicts:
        terminal.say(verdict.sentence())
    terminal.say(f"comparison: {output / 'comparison.html'}")
    return output
