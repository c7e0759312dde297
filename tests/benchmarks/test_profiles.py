"""Seconds by stage and by operator."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.profiles import WATCHED, Stopwatch, WatchOptimizer, by_kind, kind_of, split_off_rest


def test_of_nested_functions_each_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch()

    def inner(seconds: float) -> float:
        now[0] += seconds
        return seconds

    def outer() -> float:
        now[0] += 1
        return watch.wrap("inner", inner)(5) + watch.wrap("inner", inner)(2)

    assert watch.wrap("outer", outer)() == 7
    assert watch.seconds == {"inner": 7, "outer": 1}


def test_what_comes_before_the_first_step_is_none_of_its_time() -> None:
    watch = Stopwatch()
    watch.wrap("forward", time.sleep)(0.01)  # the reference's pass
    WatchOptimizer(watch).on_train_start(SimpleNamespace(optimizers=[]), None)
    assert not watch.seconds


def test_what_is_watched_exists() -> None:
    assert all(callable(getattr(owner, function)) for owner, function, _ in WATCHED)


def test_the_rest_is_what_no_stage_took() -> None:
    seconds = {"forward": 3.0, "backward": 6.0, "optimizer": 1.0, "data": 0.25}
    found = split_off_rest(seconds, 10.5)
    assert found["rest"] == pytest.approx(0.25)
    assert found["overhead"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_ChunkedLogProbsBackward", "LM head"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("autograd::engine::evaluate_function: ScaledDotProductFlashAttentionForCpuBackward0", "attention"),
        ("aten::addmm", "matrix products"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::mul", None),
        ("Optimizer.step#AdamW.step", None),
    ],
)
def test_kinds_of_operators(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def test_an_operator_counts_within_the_outermost_one_that_has_a_kind() -> None:
    def event(name: str, total: float, own: float, parent: Any = None) -> Any:
        return SimpleNamespace(name=name, cpu_time_total=total, self_cpu_time_total=own, cpu_parent=parent)

    head = event("_ChunkedLogProbs", 9e6, 1e6)
    step = event("Optimizer.step#AdamW.step", 20e6, 1e6)
    inside = event("aten::linear", 8e6, 0, head)
    events = [head, inside, event("aten::mm", 8e6, 8e6, inside), step, event("aten::mul", 3e6, 2e6, step)]
    assert by_kind(events) == {"LM head": 9.0, "elementwise and other": 2.0}
