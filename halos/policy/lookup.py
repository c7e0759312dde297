"""Find the model that a command works on: a run's folder, a hub id, a directory or a .gguf file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

from torch import nn

from halos.config.devices import DTYPES, choice, device_of
from halos.config.runs import TrainedRun, read_run
from halos.policy.loading import ModelSpec
from halos.policy.lora import LoRA

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


class Template(TypedDict):
    """The keys of ``model`` that change a tokenizer's chat template."""

    chat_template: str | None
    chat_template_kwargs: Mapping[str, object]


@dataclass(frozen=True)
class Policy:
    """A model, under the name that the user gave it.

    Args:
        name: the user's name for it.
        spec: how to load its weights.
        run: the run that trained it, if known.
        exported: where its tokenizer and chat template are, if not with the weights: next to an exported adapter.
    """

    name: str
    spec: ModelSpec
    run: TrainedRun | None = None
    exported: ModelSpec | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return (self.exported or self.spec).tokenizer()

    @property
    def control(self) -> str:
        """The control token that prompts must end with. Empty if there is none, or if the chat template writes it."""
        if self.run is None or self.tokenizer.chat_template is not None:
            return ""
        return self.run.control

    @property
    def beta(self) -> float | None:
        """β of the loss that trained the model, if known."""
        return None if self.run is None else self.run.beta

    @property
    def is_classifier(self) -> bool:
        """Whether it is a reward model: a sequence classifier, which scores and does not generate."""
        file = Path(self.spec.path).expanduser() / "config.json"
        if not file.is_file():
            return False
        names = json.loads(file.read_text(encoding="utf-8")).get("architectures") or ()
        return any(name.endswith("ForSequenceClassification") for name in names)

    def load(self, *, device: str, precision: str, vocabulary: int = 0) -> PreTrainedModel:
        """Load the model in evaluation mode.

        Args:
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            precision: ``32-true`` or ``bf16-true``.
            vocabulary: least number of embedding rows.
        """
        model = self.spec.load(dtype=choice("precision", precision, DTYPES), vocabulary=vocabulary)
        # transformers wraps ``to`` with a decorator that loses its signature.
        nn.Module.to(model, device_of(device)).eval()
        return model


def find_policy(
    key: str,
    where: object,
    *,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, object] | None = None,
    lora: LoRA | None = None,
) -> Policy:
    """Find a model, and check that it can be loaded. Does not contact the hub.

    Args:
        key: the configuration's key, for error messages.
        where: its value: a run's folder, a hub id, a directory or a .gguf file.
        chat_template: replaces the tokenizer's chat template.
        chat_template_kwargs: values of the chat template's variables.
        lora: an adapter to load with the model.

    Raises:
        ValueError: the run has not finished, or the model cannot be loaded.
    """
    if not isinstance(where, str) or not where:
        raise ValueError(f"{key}: expected a run's folder, a hub id or a model's directory, found {where!r}")
    template: Template = {"chat_template": chat_template, "chat_template_kwargs": chat_template_kwargs or {}}
    return _naming(key, lambda: _find(key, where, template, lora or LoRA()))


def _find(key: str, where: str, template: Template, lora: LoRA) -> Policy:
    folder = Path(where).expanduser()
    if not (folder / "config.yaml").is_file():
        spec = ModelSpec(path=where, **template, lora=lora)
        spec.check()
        return Policy(where, spec)
    run, model = read_run(folder), folder / "model"
    if not (folder / "summary.json").is_file() or not model.is_dir():
        raise ValueError(f"{key}: the run in {where} has not finished: expected summary.json and model/ in it")
    spec, exported = ModelSpec(path=str(model), **template, lora=lora), None
    if (model / "adapter_config.json").is_file():
        spec, exported = _with_adapter(key, where, run, model), spec
    spec.check()
    return Policy(where, spec, run, exported)


def _with_adapter(key: str, where: str, run: TrainedRun, adapter: Path) -> ModelSpec:
    # The base is loaded in full precision even if the run held it in 4 bits (QLoRA): so is that of the reference.
    if run.random_weights:
        raise ValueError(
            f"{key}: the run {where} exported an adapter for random weights, which nobody has kept; expected a run "
            "with model.lora.export=merged"
        )
    return ModelSpec(path=run.model_path, lora=LoRA(enabled=True, path=str(adapter)))


def check_tokenizer(key: str, policy: Policy) -> None:
    """Raise ``ValueError`` that names the key if the model's tokenizer cannot be loaded."""
    _naming(key, lambda: policy.tokenizer)


def reference_of(policy: Policy, where: str | None) -> Policy | None:
    """Find the model that rewards and KL are measured against.

    Args:
        policy: the evaluated model.
        where: the reference that the user named. None: the reference of the run that trained the policy, which is
            ``model.reference_path`` or the model that the run started from, with the adapter that it continued.

    Returns:
        The reference, or None if the user named none and the policy's run is unknown.
    """
    if where is not None:
        return find_policy("reference", where)
    run = policy.run
    if run is None:
        return None
    if run.random_weights:
        raise ValueError(f"reference: the run {policy.name} started from random weights; expected reference=MODEL")
    lora = LoRA(enabled=run.adapter is not None, path=run.adapter)
    return find_policy(
        "reference",
        run.reference_path or run.model_path,
        chat_template=run.chat_template,
        chat_template_kwargs=None if run.reference_path else run.chat_template_kwargs,
        lora=lora,
    )


def _naming(key: str, job: Callable[[], T]) -> T:
    # The loader's errors name model.path, its key in a training run. Here the model stands under another key.
    try:
        return job()
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", key)) from error
