"""What a run with ``loss=halo`` prints about its loss: the formula, the verdict and the weight of the gradient."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from halos.commands.builders import objective_maker
from halos.formulas.interpreter import SMOOTHED
from halos.objectives.halo import HALO
from halos.terminal import say
from halos.theory.definition import is_halo

GAINS = (-5.0, -1.0, 0.0, 1.0, 5.0)
"""Gains u in nats at which the weight of the gradient is printed."""
REWARDS = {
    "log_ratio": "log π_θ(y|x) − log π_ref(y|x)",
    "mean_log_ratio": "(log π_θ(y|x) − log π_ref(y|x)) / tokens of y",
    "log_prob": "log π_θ(y|x)",
    "mean_log_prob": "log π_θ(y|x) / tokens of y",
}


def show_value(objective: HALO, node: DictConfig) -> None:
    """Print the loss in the paper's symbols, whether it is a HALO, and the weight of its gradient.

    Args:
        objective: the run's objective.
        node: the ``loss`` node that it was built from.
    """
    # All ranks compute the verdict: its estimates of z₀ are collective.
    verdict = is_halo(objective_maker(node))
    for label, text in (*formula(objective), ("definition", str(verdict)), *weights(objective)):
        say(f"{label:<12}{text}")
    say("")


def formula(objective: HALO) -> list[tuple[str, str]]:
    """Return lines about the loss's formula, each with its label."""
    value = objective.value
    numbers = {{"beta": "β", "alpha": "α", "loss_aversion": "λ"}[name]: n for name, n in value.parameters.items()}
    parameters_text = "".join(f", {symbol} = {number:g}" for symbol, number in numbers.items())
    if objective.view == "pairs":
        signed, factor, kinds, gain = "v(u)", "", "", "r_w − r_l"
    else:
        scored = objective.view == "scored"
        signed, factor = "v(±u)", "|s − τ| λ_y " if scored else "λ_y "
        kinds = f", + for {'s > τ' if scored else 'desirable y'}"
        gain = f"r − z₀, z₀ by loss.reference_point={objective.point_name}"
    loss = f"{factor}({value.constant:g} − {signed})" if value.constant else f"−{factor}{signed}"
    if objective.wrong:
        kinds += f"; {objective.right:.4g} of it, and {objective.wrong:.4g} of the loss of the opposite label"
    smoothing = f"powers below 1 are parabolas within ε = {SMOOTHED:g} of 0" if value.smoothed else "none is needed"
    return [
        ("loss", loss + kinds),
        ("value", f"v(u) = {value.symbols}{parameters_text}"),
        ("gain", f"u = {gain}, r = {REWARDS[objective.reward]}"),
        ("smoothing", smoothing),
    ]


def weights(objective: HALO) -> list[tuple[str, str]]:
    """Return lines about the weight of ∇log π_θ(y|x) in the gradient at :data:`GAINS`, each with its label."""
    at = ", ".join(f"{u:g}" for u in GAINS)
    lines = [("gradient", f"weight at u = {at} nats")]
    for side, good in (
        (("chosen", True),) if objective.view == "pairs" else (("desirable", True), ("undesirable", False))
    ):
        u = torch.tensor(GAINS, dtype=torch.float64, requires_grad=True)
        (slopes,) = torch.autograd.grad(objective.losses(u, torch.full(u.shape, good)).sum(), [u])
        # Upwards for desirable and downwards for undesirable completions; + 0 makes −0 a 0.
        pushes = (-slopes if good else slopes) + 0.0
        lines.append(("", f"{', '.join(f'{push:.4g}' for push in pushes.tolist())} ({side})"))
        if not pushes[2]:
            lines.append(("", f"0 at u = 0, where a policy that equals its reference starts: it never moves ({side})"))
    return [(label, text.replace("-", "−")) for label, text in lines]
