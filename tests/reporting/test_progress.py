"""The progress bar's few short names."""

from types import SimpleNamespace
from typing import Any

from halos.reporting.progress import Progress


def shown(**metrics: float) -> dict[str, Any]:
    named = {f"train/{name.replace('__', '/')}": value for name, value in metrics.items()}
    trainer: Any = SimpleNamespace(progress_bar_metrics=named, callback_metrics={"val/kl": 2.0} if metrics else {})
    return Progress().get_metrics(trainer, None)


def test_loss_margin_kl_and_speed_are_shown_under_short_names() -> None:
    metrics = {
        "loss": 0.5,
        "rewards__margins": 1.0,
        "examples_per_second": 3.0,
        "lr": 1e-5,
        "grad_norm": 4.0,
    }
    assert shown(**metrics) == {"loss": 0.5, "margin": 1.0, "examples/s": 3.0, "KL": 2.0}


def test_what_an_objective_lacks_is_left_out() -> None:
    assert shown(loss=0.5) == {"loss": 0.5, "KL": 2.0}
    assert shown() == {}
