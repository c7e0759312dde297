"""Standard tasks of lm-evaluation-harness, through its Python API."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    folder: str | None,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Evaluate a model on tasks.

    Args:
        model: the model, on its device.
        tokenizer: its tokenizer.
        tasks: names of tasks.
        folder: a folder with task files of the user's own.
        limit: the number of documents of each task, None for all.
        batch_size: documents in one forward.
        seed: of the few-shot examples.

    Returns:
        {task: {metric: value}}.

    Raises:
        ValueError: the harness is not installed, or has no such task.
    """
    check_installed()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder)
    available = set(manager.all_tasks)
    if missing := [task for task in tasks if task not in available]:
        raise ValueError(f"tasks: the harness knows no task {missing[0]!r}; for a file of your own set task_folder=DIR")
    # The loaded model is wrapped, not its path: the harness would load the weights a second time.
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    evaluated = simple_evaluate(
        wrapped, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=1000, log_samples=False, **seeds
    )
    # Results also hold names and settings; only numbers are metrics.
    return {
        task: {name: float(value) for name, value in results.items() if isinstance(value, int | float)}
        for task, results in evaluated["results"].items()
    }


def check_installed() -> None:
    """Raise ``ValueError`` unless lm-evaluation-harness is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("tasks: lm-evaluation-harness is not installed; pip install 'halos[eval]'")
