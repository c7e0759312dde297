"""The index of papers: the settings that use them, and what was reproduced here."""

from __future__ import annotations

from halos.config.yaml_comments import header
from scripts.pages.config_keys import CONF, without_commands
from scripts.pages.losses import notes, paper
from scripts.pages.text import page, table

CLAIMS = "[eight claims](../results/claims.md) on the toy world"
REPRODUCED = {
    "kto": CLAIMS,
    "step_kto": "nothing: the toy world has no labels of steps",
    "dpo": "one run on [real feedback](../results/real-feedback.md)",
}
OTHER = (
    (
        "HumanLine: clamped log-ratios",
        "https://arxiv.org/abs/2509.24207",
        "`humanline.enabled=true` with any loss that has a reference; the range is [−1, 1.5]",
    ),
    (
        "TR-DPO: a reference that moves towards the policy",
        "https://arxiv.org/abs/2404.09656",
        "`reference_sync.every=100 model.reference=live`",
    ),
    (
        "BEMA: a reference that is a bias-corrected average of the policy",
        "https://arxiv.org/abs/2508.00180",
        "`reference_sync.every=1 reference_sync.ema_power=0.5 reference_sync.bias_power=0.2 model.reference=live`",
    ),
    (
        "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
        "https://arxiv.org/abs/1506.02438",
        "`loss=ppo loss.gamma=1.0 loss.lam=0.95`",
    ),
)
RECIPES = ("zephyr_dpo", "zephyr_kto", "llama3_8b_kto", "pythia_kto")


def papers_page() -> str:
    """Return the index of papers."""
    by_paper: dict[tuple[str, str], list[str]] = {}
    for name in notes():
        if source := paper(name):
            by_paper.setdefault(source, []).append(name)
    rows = []
    for (title, address), names in by_paper.items():
        words = ", ".join(f"[`loss={name}`](../losses/{name}.md)" for name in names)
        done = next((REPRODUCED[name] for name in names if name in REPRODUCED), "runs of its loss on the toy world")
        rows.append((f"[{title}]({address})", words, done))
    others = [(f"[{title}]({address})", words) for title, address, words in OTHER]
    recipes = [
        (f"`experiment={name}`", without_commands(header(CONF / "experiment" / f"{name}.yaml"))) for name in RECIPES
    ]
    return page(
        "# Papers",
        "<!-- written by `python scripts/write_docs.py` -->",
        "This page lists the papers behind the code, with the settings that use them. The pages of the losses have the "
        "parameters with the papers' values. Each formula is tested against another derivation. Most losses and "
        "their gradients are compared with TRL's (`make parity`).",
        "## Losses",
        table(("paper", "setting", "reproduced here"), rows),
        "## What works with several losses",
        table(("paper", "setting"), others),
        "## Settings of whole runs",
        "None of them was run at its size: a test trains one step of each with a tiny model of the same architecture. "
        "[Recipes](../guides/recipes.md) says how to run them.",
        table(("recipe", "settings"), recipes),
    )
