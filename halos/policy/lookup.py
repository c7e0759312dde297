"""Finds the model that a command is about: a run's folder, a hub id, a directory or a .gguf file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from halos.config.devices import DTYPES, choice, device_of
from halos.config.run_config import RunConfig, read_run_config
from halos.policy.kernels.matmul import limit_kernel_caches
from halos.policy.loading import ModelSpec
from halos.policy.lora import LoRA

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Policy:
    """A model by the name that the user gave it.

    Attributes:
        name: the run's folder, hub id, directory or file.
        spec: how its weights are loaded.
        run: the configuration of the run that trained it, where the name is a run's folder.
        exported: where its tokenizer and chat template are, if not with the weights of ``spec``.
    """

    name: str
    spec: ModelSpec
    run: RunConfig | None = None
    exported: ModelSpec | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return cast("PreTrainedTokenizerBase", (self.exported or self.spec).tokenizer())

    @property
    def control(self) -> str:
        """The control token that prompts end with (CSFT's desirable one), where no chat template writes it."""
        if self.run is None or self.tokenizer.chat_template is not None:
            return ""
        return str(self.run.loss.get("desirable_token") or "")

    @property
    def beta(self) -> float | None:
        """β of the loss that trained it; of a mixture, that of the first loss that has one."""
        if self.run is None:
            return None
        # A mixture (halos.objectives.Mix) has no β of its own; its losses are in ``parts``.
        losses = (self.run.loss, *(self.run.loss.get("parts") or {}).values())
        return next((float(loss["beta"]) for loss in losses if loss.get("beta") is not None), None)

    @property
    def is_classifier(self) -> bool:
        """Whether it is a reward model: a sequence classifier, which scores and does not generate."""
        # Read from config.json without loading; a hub id is not looked up and counts as a language model.
        file = Path(self.spec.path).expanduser() / "config.json"
        if not file.is_file():
            return False
        names = json.loads(file.read_text(encoding="utf-8")).get("architectures") or ()
        return any(name.endswith("ForSequenceClassification") for name in names)

    def load(self, *, device: str, precision: str, vocabulary: int = 0) -> PreTrainedModel:
        """Load the model onto a device, in evaluation mode.

        Args:
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            precision: ``32-true`` or ``bf16-true``.
            vocabulary: the minimum number of embeddings, see :meth:`ModelSpec.load`.
        """
        dtype = choice("precision", precision, DTYPES)
        limit_kernel_caches()
        model = self.spec.load(dtype=dtype, vocabulary=vocabulary)
        return cast("PreTrainedModel", model.to(device_of(device)).eval())


def find_policy(key: str, where: object, *, chat_template: str | None = None, lora: LoRA | None = None) -> Policy:
    """Find a model by its name. Hub ids are not contacted.

    Args:
        key: the configuration key of the name, for error messages.
        where: a run's folder, a hub id, a directory or a .gguf file.
        chat_template: see :class:`ModelSpec`.
        lora: see :class:`ModelSpec`.

    Raises:
        ValueError: the run has not finished, or the model cannot be loaded.
    """
    if not isinstance(where, str) or not where:
        raise ValueError(f"{key}: expected a run's folder, a hub id or a model's directory, found {where!r}")
    with _errors_name(key):
        folder, path, run = Path(where).expanduser(), where, None
        if (folder / "config.yaml").is_file():
            run, path = read_run_config(folder), str(folder / "model")
            if not (folder / "summary.json").is_file() or not Path(path).is_dir():
                raise ValueError(f"{key}: the run in {where} has not finished: expected summary.json and model/ in it")
        spec, exported = ModelSpec(path=path, chat_template=chat_template, lora=lora or LoRA()), None
        if run is not None and (Path(path) / "adapter_config.json").is_file():
            spec, exported = _with_adapter(key, where, run, path), spec
        spec.check()
    return Policy(where, spec, run, exported)


def _with_adapter(key: str, where: str, run: RunConfig, adapter: str) -> ModelSpec:
    """The model that a run started from, with the adapter that the run exported.

    The base is not quantised to 4 bits where the run did (QLoRA), and neither is that of the reference.
    """
    if run.model.get("random_weights"):
        raise ValueError(
            f"{key}: the run {where} exported an adapter for random weights, which nobody has kept; expected a run "
            "with model.lora.export=merged"
        )
    return ModelSpec(path=str(run.model["path"]), lora=LoRA(enabled=True, path=adapter))


def check_tokenizer(key: str, policy: Policy) -> None:
    """Raise ``ValueError`` that names the key if the model has no tokenizer, such as a hub id that does not exist."""
    with _errors_name(key):
        _ = policy.tokenizer


def reference_of(policy: Policy, where: str | None) -> Policy | None:
    """Find the model that rewards and KL are measured against.

    Args:
        policy: the policy.
        where: the name of the reference. None takes that of the policy's run: the model that it named as its
            reference, or the one that it started from, with the adapter that it continued.

    Returns:
        The reference, None if ``where`` is None and the policy is not a run's.

    Raises:
        ValueError: the model cannot be loaded, or the run started from random weights.
    """
    if where is not None:
        return find_policy("reference", where)
    if policy.run is None:
        return None
    model = policy.run.model
    if model.get("random_weights"):
        raise ValueError(f"reference: the run {policy.name} started from random weights; expected reference=MODEL")
    path = str(model.get("reference_path") or model["path"])
    adapter = (model.get("lora") or {}).get("path")
    lora = LoRA() if adapter is None else LoRA(enabled=True, path=adapter)
    return find_policy("reference", path, chat_template=model.get("chat_template"), lora=lora)


@contextmanager
def _errors_name(key: str) -> Iterator[None]:
    # The loader's messages name model.path, which is its key in a training run.
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", key)) from error
