"""The trainers of the HALOs repository (github.com/ContextualAI/HALOs), from a checkout.

Its losses, its forward passes and the loop of its ``train()`` are run; its data loaders, which need a tokenizer with a
chat template, are not.
"""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import torch
from torch import Tensor

from parity.referee.subject import Example, Findings, Setting, Subject, flat, models, padded, vector

BETA = 0.1
LABELS_IGNORED = -100
OPTIONAL = ("wandb", "openai", "omegaconf", "hydra")
"""What its modules import and its losses do not use: stand-ins are enough where they are not installed."""


class Repository(Subject):
    """A loss of the repository; ``parameters`` and ``changes`` are keys of its ``config/loss``."""

    stepless = "its data loader makes full micro-batches alone, and its training on ranks was not run"

    def __init__(self, trainers: ModuleType, version: str, name: str, defaults: dict[str, float]) -> None:
        self.name, self.library, self.version, self.defaults = name, "HALOs", version, defaults
        self.trainer_class = getattr(trainers, name)
        self.view = "labels" if name == "KTOTrainer" else "pairs"
        self.parameters = {key: (value * 0.5 + 0.03, value * 1.5 + 0.05) for key, value in defaults.items()}

    def trainer(self, setting: Setting, **parameters: Any) -> Any:
        """Make a trainer without its constructor, which starts a run."""
        from accelerate import Accelerator

        trainer = self.trainer_class.__new__(self.trainer_class)
        trainer.policy, trainer.reference_model = models(setting)
        if not getattr(self.trainer_class, "use_reference_model", True):
            trainer.reference_model = None
        trainer.policy_dtype = setting.dtype
        trainer.accelerator = Accelerator(cpu=True)
        loss = SimpleNamespace(sync_reference=False, **{**self.defaults, **parameters})
        trainer.config = SimpleNamespace(loss=loss, humanline=False, cache_reference_logprobs=False)
        return trainer

    def measure(self, examples: Sequence[Example], setting: Setting, **parameters: Any) -> Tensor:
        trainer = self.trainer(setting, **parameters)
        loss, _ = trainer.get_batch_metrics(batch_of(examples, self.view, setting))
        return vector(loss, trainer.policy)

    def step(self, examples: Sequence[Example], *, size: int, accumulate: int = 1, ranks: int = 1) -> Tensor | None:
        if ranks > 1 or len(examples) % size:
            return None
        return self.trained(examples, size)[0]

    def trained(self, examples: Sequence[Example], size: int) -> tuple[Tensor, bool]:
        """Train one step by its ``train()``; return the gradient [P], and whether the reference moved."""
        trainer = self.trainer(Setting())
        parts = [examples[n : n + size] for n in range(0, len(examples), size)]
        trainer.train_iterator = [batch_of(part, self.view, Setting()) for part in parts]
        numbers = {"batch_size": len(examples), "gradient_accumulation_steps": len(parts), "max_grad_norm": math.inf}
        vars(trainer.config).update(
            optimizer="SGD", lr=1.0, eval_every=1, do_first_eval=False, minimum_log_interval_secs=0,
            model=SimpleNamespace(**numbers), wandb=SimpleNamespace(enabled=False), debug=True,
        )  # fmt: skip
        trainer.example_counter = trainer.batch_counter = 0
        trainer.eval = lambda: {"results": {}}
        trainer.optimizer = torch.optim.SGD(trainer.policy.parameters(), lr=1.0)
        trainer.scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, factor=1.0)
        before, reference = flat(trainer.policy), trainer.reference_model and flat(trainer.reference_model)
        trainer.train()
        moved = reference is not None and not torch.equal(flat(trainer.reference_model), reference)
        return before - flat(trainer.policy), moved

    def weighted(self, examples: Sequence[Example]) -> Findings:
        return Findings("none", "its data have no weights of examples")

    def reference_moved(self, examples: Sequence[Example]) -> bool:
        return self.trained(examples, len(examples))[1]


def batch_of(examples: Sequence[Example], view: str, setting: Setting) -> dict[str, Any]:
    """Return a batch with the keys that its data loaders give it."""
    names = ("target", "KL") if view == "labels" else ("chosen", "rejected")
    batch: dict[str, Any] = {"status": ["chosen" if example.desirable else "rejected" for example in examples]}
    for name, branch in zip(names, (0, 1), strict=True):
        rows = [(example.prompt, example.completions[branch]) for example in examples]
        keys = (f"{name}_combined_input_ids", f"{name}_combined_attention_mask", f"{name}_labels")
        batch |= dict(zip(keys, padded(rows, setting, ignored=LABELS_IGNORED), strict=True))
    return batch


def subjects(checkout: Path) -> list[Subject]:
    """Return the losses of a checkout whose folder has a package ``train``."""
    for name in OPTIONAL:
        if find_spec(name) is None:
            stand_in = ModuleType(name)
            stand_in.__getattr__ = lambda attribute: object  # type: ignore[method-assign]
            sys.modules[name] = stand_in
    if not hasattr(huggingface_hub, "HfFolder"):  # imported for uploads; later versions of the hub have none
        huggingface_hub.HfFolder = object
    sys.path.insert(0, str(checkout))
    trainers = importlib.import_module("train.trainers")
    commit = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    version = f"commit {commit}" if commit else "a checkout"
    made = [
        Repository(trainers, version, name, defaults)
        for name, defaults in {
            "KTOTrainer": {"beta": BETA, "desirable_weight": 1.0, "undesirable_weight": 1.0},
            "DPOTrainer": {"beta": BETA},
            "CDPOTrainer": {"beta": BETA, "epsilon": 0.1},
            "IPOTrainer": {"tau": BETA},
            "SimPOTrainer": {"beta": 2.0, "gamma_beta_ratio": 0.25},
            "SLiCTrainer": {"beta": 1.0, "lambda_coef": 0.1},
        }.items()
    ]
    for subject, value in zip(made, (0.5, math.log(2), math.log(2), 1 / (2 * BETA) ** 2, None, None), strict=True):
        subject.at_step_0 = value
    made[0].batchwise = "z₀ is a mean over the batch, by the definition of the loss"
    return [*made]
