"""Standard tasks of lm-evaluation-harness, through its Python API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from halos.evaluation.plan import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> dict[str, dict[str, float]]:
    """Evaluate a model on tasks.

    Args:
        model: the model, on its device.
        tokenizer: its tokenizer.
        settings: the tasks, the number of documents, and the seed of the few-shot examples.

    Returns:
        {task: {metric: value}}.

    Raises:
        ValueError: the harness has no such task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=settings.task_folder)
    available = set(manager.all_tasks)
    if missing := [task for task in settings.tasks if task not in available]:
        raise ValueError(f"tasks: the harness knows no task {missing[0]!r}; for a file of your own set task_folder=DIR")
    # The loaded model is wrapped, not its path: the harness would load the weights a second time.
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size)
    names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    options = {**dict.fromkeys(names, settings.seed), "limit": settings.task_limit, "bootstrap_iters": 1000}
    evaluated = simple_evaluate(wrapped, tasks=list(settings.tasks), task_manager=manager, log_samples=False, **options)
    # Results also hold names and settings; only numbers are metrics.
    return {
        task: {name: float(value) for name, value in results.items() if isinstance(value, int | float)}
        for task, results in evaluated["results"].items()
    }
