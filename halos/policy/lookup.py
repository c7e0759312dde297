"""Find the model that a command works on: a run's folder, a hub id, a directory or a .gguf file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from halos.config.devices import DTYPES, choice, device_of
from halos.config.runs import TrainedRun, read_run
from halos.policy.loading import LoadOptions, ModelSpec
from halos.policy.lora import LoRA

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        return "" if self.run is None or self.tokenizer.chat_template is not None else self.run.control

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
        model = self.spec.load(LoadOptions(dtype=choice("precision", precision, DTYPES), vocabulary=vocabulary))
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
    values = chat_template_kwargs or {}
    spec_of = partial(ModelSpec, chat_template=chat_template, chat_template_kwargs=values, lora=lora or LoRA())
    folder = Path(where).expanduser()
    with _naming(key):
        is_run = (folder / "config.yaml").is_file()
        policy = _trained(key, where, folder, spec_of) if is_run else Policy(where, spec_of(path=where))
        policy.spec.check()
    return policy


def _trained(key: str, where: str, folder: Path, spec_of: Callable[..., ModelSpec]) -> Policy:
    run, model = read_run(folder), folder / "model"
    if not (folder / "summary.json").is_file() or not model.is_dir():
        raise ValueError(f"{key}: the run in {where} has not finished: expected summary.json and model/ in it")
    exported = spec_of(path=str(model))
    if not (model / "adapter_config.json").is_file():
        return Policy(where, exported, run)
    if run.model.get("random_weights"):
        expected = "expected a run with model.lora.export=merged"
        raise ValueError(f"{key}: the run {where} exported an adapter for random weights, which are lost; {expected}")
    # The base is loaded in full precision even if the run held it in 4 bits (QLoRA): so is that of the reference.
    return Policy(where, ModelSpec(path=run.model["path"], lora=LoRA(enabled=True, path=str(model))), run, exported)


def check_tokenizer(key: str, policy: Policy) -> None:
    """Raise ``ValueError`` that names the key if the model's tokenizer cannot be loaded."""
    with _naming(key):
        _ = policy.tokenizer


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
    if (run := policy.run) is None:
        return None
    if run.model.get("random_weights"):
        raise ValueError(f"reference: the run {policy.name} started from random weights; expected reference=MODEL")
    model, adapter = run.model, (run.model.get("lora") or {}).get("path")
    path = model.get("reference_path") or model["path"]
    lora = LoRA(enabled=adapter is not None, path=adapter)
    # Another model as reference need not have the variables of the policy's template.
    values = None if model.get("reference_path") else model.get("chat_template_kwargs")
    return find_policy(
        "reference", path, chat_template=model.get("chat_template"), chat_template_kwargs=values, lora=lora
    )


@contextmanager
def _naming(key: str) -> Iterator[None]:
    # The loader's errors name model.path, its key in a training run. Here the model stands under another key.
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", key, 1)) from error
