"""Shows a value function that was fitted to people's answers: on the terminal, as JSON, and as the YAML of a loss."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from halos import terminal
from halos.evaluation.statistics import Estimate
from halos.evaluation.value_fit import ValueFit
from halos.formulas.value import DEFAULTS

ROWS = {
    "expectation": ("e", "the reward, at the mean length, that is neither gain nor loss"),
    "curvature": ("α", "a gain g has the value g^α"),
    "loss_aversion": ("λ", "a loss counts λ times as much as a gain"),
    "noise": ("s", "scale of the logistic noise, in units of value"),
    "length_bias": ("b", "the reward that another {unit} is worth"),
}
"""The symbol of each parameter, and what it is."""
KEYS = {"curvature": "alpha", "loss_aversion": "loss_aversion"}
"""The parameters that ``loss=halo`` has, and its keys."""
FEW = 20.0
"""The number of answers against the value below which intervals are rough."""


def show(fit: ValueFit, answers: str, unit: str) -> None:
    """Print the parameters with their intervals, and the limits of the fit.

    Args:
        fit: the fit.
        answers: a description of the answers and rewards that it was fitted to.
        unit: the unit of lengths, ``token`` or ``word``.
    """
    table = Table("parameter", "", "value", "95 % interval", "meaning", box=box.SIMPLE_HEAD, title=answers)
    for name, (symbol, meaning) in ROWS.items():
        estimate = fit.estimates.get(name)
        value = fit.fixed[name] if estimate is None else estimate.value
        table.add_row(name, symbol, f"{value:.4g}", _interval(estimate), meaning.format(unit=unit))
    terminal.console.print(table)
    for line in remarks(fit):
        terminal.say(line)


def remarks(fit: ValueFit) -> Iterator[str]:
    """Yield remarks on what the numbers say, and on what they do not say."""
    yield "unit        that of the rewards: answers do not determine it, and α and λ do not depend on it"
    if fit.p_linear is not None:
        yield f"value       against a straight line (α = λ = 1): p = {fit.p_linear:.2g} by the likelihood ratio"
    yield f"noise       an answer differs from what the value says with probability {fit.share_wrong:.3g}"
    count = next(iter(fit.estimates.values())).n
    if fit.share_wrong * count < FEW:
        yield f"caution     only about {fit.share_wrong * count:.0f} of {count} answers do: the intervals are rough"
    for name, estimate in fit.estimates.items():
        if not fit.is_determined(name):
            side = " from above" if estimate.low is not None else " from below" if estimate.high is not None else ""
            yield f"caution     these answers do not bound {name}{side}"
    bias = fit.estimates.get("length_bias")
    if bias is not None and ((bias.low or 0) > 0 or (bias.high or 0) < 0):
        liked = "longer" if bias.value > 0 else "shorter"
        yield f"length      people prefer {liked} replies of equal reward; losses that read lengths: loss=r_dpo, ld_dpo"


def loss_settings(fit: ValueFit) -> tuple[dict[str, float], list[str]]:
    """Return the keys of ``loss=halo`` that the fit sets, and the reasons why it does not set others."""
    settings, reasons = dict[str, float](), list[str]()
    for name, key in KEYS.items():
        if name in fit.fixed:
            settings[key] = fit.fixed[name]
        elif fit.is_determined(name):
            settings[key] = fit.estimates[name].value
        else:
            reasons.append(f"{key}: its default, as the answers do not bound it")
    if settings.get("alpha", 0.0) > 1:
        reasons.append(f"alpha: 1 in place of {settings['alpha']:.4g}, with which the value is flat at u = 0")
        settings["alpha"] = 1.0
    wrong, aversion = fit.share_wrong, settings.get("loss_aversion", DEFAULTS["loss_aversion"])
    if wrong * aversion < (1 - wrong) / 2:
        settings["noise"] = wrong
    else:
        share = f"a share of {wrong:.3g} wrong labels with λ = {aversion:.3g}"
        reasons.append(f"noise: null, as {share} would take over half of the slope of gains")
    return settings, [*reasons, "no key for expectation, whose place z₀ takes, and for length_bias"]


def loss_yaml(name: str, fit: ValueFit, answers: str) -> str:
    """Return the YAML of a loss with the fitted value function.

    Args:
        name: the name of the loss.
        fit: the fit.
        answers: a description of the answers and rewards that it was fitted to.
    """
    settings, reasons = loss_settings(fit)
    intervals = [f"{n} {e.value:.4g} ({_interval(e)})" for n, e in fit.estimates.items()]
    fixed = [f"{n} {value:.4g} (given)" for n, value in fit.fixed.items()]
    comments = [f"The value function fitted to {' '.join(answers.split())}", *intervals, *fixed, *reasons]
    lines = [*(f"# {line}" for line in comments), "defaults:", "  - halo", "  - _self_", f"name: {name}"]
    lines += ["value: kahneman_tversky", *(f"{key}: {value:.4g}" for key, value in settings.items())]
    return "\n".join(lines) + "\n"


def as_json(fit: ValueFit) -> dict[str, object]:
    """Return the fit as plain values."""
    return {
        "estimates": {name: estimate.as_json() for name, estimate in fit.estimates.items()},
        "fixed": fit.fixed,
        "log_likelihood": fit.log_likelihood,
        "p_linear": fit.p_linear,
        "share_wrong": fit.share_wrong,
        "loss": loss_settings(fit)[0],
    }


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return "given"
    low, high = ("not bounded" if end is None else f"{end:.4g}" for end in (estimate.low, estimate.high))
    return f"{low} … {high}"
