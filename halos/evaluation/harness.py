"""Standard tasks by lm-evaluation-harness, through its Python API."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: str | None,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of the model on tasks of the harness, or of task files in ``folder``.

    Raises ``ValueError`` if the harness is not installed, and for a task that it does not know.
    """
    check_installed()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder)
    known = set(manager.all_tasks)
    if missing := [task for task in tasks if task not in known]:
        raise ValueError(f"tasks: the harness knows no task {missing[0]!r}; for a file of your own set task_folder=DIR")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    found = simple_evaluate(
        wrapped, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=1000, log_samples=False, **seeds
    )
    return {
        task: {name: float(value) for name, value in results.items() if isinstance(value, int | float)}
        for task, results in found["results"].items()
    }


def check_installed() -> None:
    """Raise ``ValueError`` unless lm-evaluation-harness is there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("tasks: lm-evaluation-harness is not installed; pip install 'halos[eval]'")
