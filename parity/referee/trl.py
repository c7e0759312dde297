"""TRL's ``KTOTrainer`` and ``DPOTrainer``: their data preparation, collators, losses and training steps."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models as token_models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, PrinterCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from parity.referee.subject import (
    EOS,
    PAD,
    VOCABULARY,
    Example,
    Findings,
    Setting,
    Subject,
    examples as made_up,
    flat,
    models,
    vector,
)

BETA, EPSILON = 0.1, 0.1
TWICE = 2 * math.log(2)
AT_STEP_0 = {
    "sigmoid": math.log(2),
    "hinge": 1.0,
    "ipo": 1 / (2 * BETA) ** 2,
    "exo_pair": (-TWICE - math.log(1 - EPSILON) - math.log(EPSILON)) / 2,
    "nca_pair": TWICE,
    "robust": math.log(2),
    "bco_pair": TWICE,
    "sppo_hard": 2 * (0.5 / BETA) ** 2,
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": (math.log(2) + 1) / 2,
    "sigmoid_norm": math.log(2),
}
"""The losses of ``DPOConfig.loss_type``, without the ``sft`` term, and their values where all log-ratios are 0."""
disable_progress_bars()
PLAIN = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"}
STEPPED = ("kto", "sigmoid")
"""Losses whose training steps are run; those of the others are the same code."""


class TRL(Subject):
    """What both trainers have in common."""

    package = "trl"
    stepless = "the training step is the same code as that of this trainer's first loss"
    trainer_class: Any
    config_class: Any
    trainers: dict[str, Any]

    def __init__(self, loss_type: str) -> None:
        self.loss_type, self.trainers = loss_type, {}
        self.name = f"{self.trainer_class.__name__}, {loss_type}"

    def feature(self, example: Example) -> dict[str, Any]:
        """Return an example as the collator takes it."""
        raise NotImplementedError

    def record(self, example: Example) -> dict[str, Any]:
        """Return an example as the trainer takes it, in text."""
        raise NotImplementedError

    def trainer(self, examples: Sequence[Example], setting: Setting, columns: Mapping[str, Any], **options: Any) -> Any:
        """Make a trainer on examples, with further columns of the data set."""
        policy, reference = models(setting)
        records = [self.record(example) for example in examples]
        data = Dataset.from_list(records)
        for name, values in columns.items():
            data = data.add_column(name, values)
        options = {"loss_type": self.loss_type, **self.changes, **options}
        args = self.config_class(tempfile.mkdtemp(), **PLAIN, **options)
        return self.trainer_class(
            model=policy, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer()
        )

    def measure(self, examples: Sequence[Example], setting: Setting, **parameters: Any) -> Tensor:
        models_of = replace(setting, padding=0, pad_id=PAD)
        key = repr((models_of, parameters))
        if key not in self.trainers:
            # What is measured never comes from the trainer's own data.
            self.trainers[key] = self.trainer(made_up(2), models_of, {}, **parameters)
        trainer = self.trainers[key]
        collator = trainer.data_collator
        collator.pad_token_id = setting.pad_id
        longest = max(len(e.prompt) + max(map(len, e.completions)) for e in examples)
        collator.pad_to_multiple_of = longest + setting.padding
        inputs = collator([self.feature(example) for example in examples])
        trainer.model.train()
        return vector(trainer.compute_loss(trainer.model, inputs), trainer.model)

    def step(self, examples: Sequence[Example], *, size: int, accumulate: int = 1, ranks: int = 1) -> Tensor | None:
        if self.loss_type not in STEPPED:
            return None
        if ranks > 1:
            return on_ranks(self, examples, size, ranks)
        return self.trained(examples, size=size, accumulate=accumulate)[0]

    def trained(
        self, examples: Sequence[Example], *, size: int, accumulate: int = 1, **columns: Any
    ) -> tuple[Tensor, bool, list[str]]:
        """Train one step; return its gradient [P], whether the reference moved, and the warnings."""
        with messages() as found:
            trainer = self.trainer(
                examples, Setting(), columns, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate,
                max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0,
                weight_decay=0.0, logging_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            before, reference = flat(trainer.model), flat(trainer.ref_model)
            trainer.train()
        after = trainer.accelerator.unwrap_model(trainer.model)
        return before - flat(after), not torch.equal(flat(trainer.ref_model), reference), found

    def reference_moved(self, examples: Sequence[Example]) -> bool:
        return self.trained(examples, size=len(examples))[1]

    def weighted(self, examples: Sequence[Example]) -> Findings:
        if self.loss_type not in STEPPED:
            return Findings("none", self.stepless)
        size = len(examples)
        plain, *_ = self.trained(examples, size=size)
        found, _, said = self.trained(examples, size=size, weight=[1.0, 5.0])
        if not torch.equal(plain, found):
            return Findings("kept")
        warned = [text for text in said if "weight" in text.split()]
        words = "a column `weight` has no effect, and " + (warned[0] if warned else "no warning says so")
        return Findings("broken", f"{words}; weights of examples are not documented either", "weights 1 and 5")


class KTO(TRL):
    """The losses of ``KTOTrainer``."""

    view = "labels"
    trainer_class, config_class = KTOTrainer, KTOConfig
    at_step_0 = 0.5
    parameters: Mapping[str, Sequence[Any]] = {"beta": (0.3,), "desirable_weight": (1.5,), "undesirable_weight": (1.5,)}

    def __init__(self, loss_type: str) -> None:
        super().__init__(loss_type)
        if loss_type == "kto":
            self.batchwise = "z₀ is a mean over the batch, by the definition of the loss"

    def feature(self, example: Example) -> dict[str, Any]:
        own, other = map(list, example.completions)
        ids = {"prompt_ids": list(example.prompt), "completion_ids": own, "label": example.desirable}
        return ids | ({"KL_completion_ids": other} if self.loss_type == "kto" else {})

    def record(self, example: Example) -> dict[str, Any]:
        return {
            "prompt": text(example.prompt), "completion": text(example.completions[0]), "label": example.desirable,
        }  # fmt: skip

    def mismatched(self, examples: Sequence[Example], size: int) -> list[tuple[int, ...]] | None:
        if self.loss_type != "kto":
            return None
        rows = self.trainer(examples, Setting(), {}, per_device_train_batch_size=size).train_dataset
        return [tuple(ids[:-1]) for ids in rows["KL_completion_ids"]]  # without the token that TRL ends them by


class DPO(TRL):
    """The losses of ``DPOTrainer``."""

    view = "pairs"
    trainer_class, config_class = DPOTrainer, DPOConfig
    parameters: Mapping[str, Sequence[Any]] = {
        "beta": (0.3,), "label_smoothing": (0.3,), "ld_alpha": (0.3,), "loss_weights": ([0.5],),
        "discopop_tau": (0.2,), "f_alpha_divergence_coef": (0.2,),
    }  # fmt: skip
    documented: Mapping[str, str] = {
        "label_smoothing": "for Robust DPO and EXO",
        "discopop_tau": "for `discopop`",
        "f_alpha_divergence_coef": "for `f_divergence_type='alpha_divergence'`",
    }

    def __init__(self, loss_type: str) -> None:
        super().__init__(loss_type)
        self.at_step_0 = AT_STEP_0[loss_type]
        self.changes = {"label_smoothing": EPSILON} if loss_type in ("exo_pair", "robust") else {}
        if loss_type in ("aot", "aot_unpaired"):
            self.batchwise = "the loss sorts the batch, by its definition"

    def feature(self, example: Example) -> dict[str, Any]:
        chosen, rejected = map(list, example.completions)
        return {"prompt_ids": list(example.prompt), "chosen_ids": chosen, "rejected_ids": rejected}

    def record(self, example: Example) -> dict[str, Any]:
        chosen, rejected = map(text, example.completions)
        return {"prompt": text(example.prompt), "chosen": chosen, "rejected": rejected}


def subjects() -> list[Subject]:
    """Return the losses of both trainers."""
    return [KTO("kto"), KTO("apo_zero_unpaired"), *map(DPO, AT_STEP_0)]


def text(ids: Sequence[int]) -> str:
    """Return a text that the tokenizer splits into these ids."""
    return "".join(f" w{n}" for n in ids)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are ids."""
    vocabulary = {"<eos>" if n == EOS else f"w{n}": n for n in range(VOCABULARY)}
    made = Tokenizer(token_models.WordLevel(vocabulary, unk_token="w2"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token=f"w{PAD}")


@contextmanager
def messages() -> Iterator[list[str]]:
    """Collect warnings, of Python's and of logging's kind."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in (None, "transformers", "trl", "accelerate", "datasets")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield found
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            found += [str(warning.message) for warning in caught]


def on_ranks(subject: TRL, examples: Sequence[Example], size: int, ranks: int) -> Tensor:
    """Return the gradient of a training step of several processes."""
    context = get_context("spawn")
    results = context.SimpleQueue()
    port = 29000 + os.getpid() % 2000
    made = [
        context.Process(
            target=_rank, args=(rank, ranks, port, type(subject), subject.loss_type, examples, size, results)
        )
        for rank in range(ranks)
    ]
    for process in made:
        process.start()
    found = torch.tensor(results.get(), dtype=torch.float64)
    for process in made:
        process.join()
    return found


def _rank(
    rank: int,
    ranks: int,
    port: int,
    kind: type[TRL],
    loss_type: str,
    examples: Sequence[Example],
    size: int,
    results: Any,
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    gradient = kind(loss_type).trained(examples, size=size)[0]
    if rank == 0:
        results.put(gradient.tolist())
