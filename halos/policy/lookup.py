"""Finds the model that a command works on: a run's folder, a hub id, a directory or a .gguf file."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from halos.config.devices import DTYPES, choice, device_of
from halos.config.runs import CONFIG, TrainedRun, read_run
from halos.files import in_home
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
        exported: where its tokenizer and chat template are if they are not with the weights, but with an adapter.
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
        file = in_home(self.spec.path) / "config.json"
        if not file.is_file():
            return False
        names = json.loads(file.read_text(encoding="utf-8")).get("architectures")
        return isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)

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
    revision: str | None = None,
    trusted: Collection[str] = (),
) -> Policy:
    """Find a model, and check that it can be loaded. Does not contact the hub.

    Args:
        key: the configuration's key, for error messages.
        where: its value: a run's folder, a hub id, a directory or a .gguf file.
        chat_template: replaces the tokenizer's chat template.
        chat_template_kwargs: values of the chat template's variables.
        lora: an adapter to load with the model.
        revision: of a hub id: a commit, a tag or a branch.
        trusted: models whose own code may run, by the names in the user's command; see :class:`ModelSpec`.

    Raises:
        ValueError: the run has not finished, or the model cannot be loaded.
    """
    if not isinstance(where, str) or not where:
        raise ValueError(f"{key}: expected a run's folder, a hub id or a model's directory, found {where!r}")
    values = chat_template_kwargs or {}
    spec_of = partial(ModelSpec, chat_template=chat_template, chat_template_kwargs=values, lora=lora or LoRA())
    spec_of = partial(spec_of, trust_remote_code=where in trusted)
    folder = in_home(where)
    with _naming(key):
        if (folder / CONFIG).is_file():
            policy = _trained(key, where, folder, spec_of, trusted)
        else:
            policy = Policy(where, spec_of(path=where, revision=revision))
        policy.spec.check()
    return policy


def _trained(key: str, where: str, folder: Path, spec_of: Callable[..., ModelSpec], trusted: Collection[str]) -> Policy:
    run, model = read_run(folder), folder / "model"
    if not (folder / "summary.json").is_file() or not model.is_dir():
        raise ValueError(f"{key}: the run in {where} has not finished: expected summary.json and model/ in it")
    exported = spec_of(path=str(model))
    if not (model / "adapter_config.json").is_file():
        return Policy(where, exported, run)
    if run.model.get("random_weights"):
        expected = "expected a run with model.lora.export=merged"
        raise ValueError(f"{key}: the run {where} exported an adapter for random weights, which are lost; {expected}")
    # The base is loaded in full precision, as the reference's is, even if the run held it in 4 bits (QLoRA).
    lora, base = LoRA(enabled=True, path=str(model)), str(run.model.get("path") or "")
    # Only the run names the base, so the base's own code runs only if the user also names it.
    spec = ModelSpec(path=base, revision=run.model.get("revision"), lora=lora, trust_remote_code=base in trusted)
    return Policy(where, spec, run, exported)


def check_tokenizer(key: str, policy: Policy) -> None:
    """Raise ``ValueError`` that names the key if the model's tokenizer cannot be loaded."""
    with _naming(key):
        _ = policy.tokenizer


def reference_of(policy: Policy, where: str | None, trusted: Collection[str] = ()) -> Policy | None:
    """Find the model that rewards and KL are measured against.

    Args:
        policy: the evaluated model.
        where: the reference that the user named. None: the reference of the run that trained the policy, which is
            ``model.reference_path`` or the model that the run started from, with the adapter that it continued.
        trusted: see :func:`find_policy`; a model that only the run names has to be among them too.

    Returns:
        The reference, or None if the user named none and the policy's run is unknown.
    """
    if where is not None:
        return find_policy("reference", where, trusted=trusted)
    if (run := policy.run) is None:
        return None
    if run.model.get("random_weights"):
        raise ValueError(f"reference: the run {policy.name} started from random weights; expected reference=MODEL")
    model, adapter = run.model, (run.model.get("lora") or {}).get("path")
    path, revision, values = model.get("path"), model.get("revision"), model.get("chat_template_kwargs")
    if other := model.get("reference_path"):
        # Another model need not have the variables of the policy's template.
        path, revision, values = other, None, None
    return find_policy(
        "reference",
        path,
        chat_template=model.get("chat_template"),
        chat_template_kwargs=values,
        lora=LoRA(enabled=adapter is not None, path=adapter),
        revision=revision,
        trusted=trusted,
    )


@contextmanager
def _naming(key: str) -> Iterator[None]:
    # The loader's errors name model.path, its key in a training run. Here the model stands under another key.
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", key, 1)) from error
