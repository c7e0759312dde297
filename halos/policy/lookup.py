"""Which model a command is about: a run's folder, a hub id, a directory or a .gguf file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from halos.config.devices import DTYPES, choice, device_of
from halos.policy.kernels.matmul import limit_kernel_caches
from halos.policy.loading import ModelSpec
from halos.policy.lora import LoRA

T = TypeVar("T")


@dataclass(frozen=True)
class Policy:
    """A model by the name that the user gave it; ``run`` is the configuration of the run that trained it, if known.

    ``exported``: where its tokenizer and chat template are, if not with the weights in ``spec``.
    """

    name: str
    spec: ModelSpec
    run: DictConfig | None = None
    exported: ModelSpec | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return (self.exported or self.spec).tokenizer()

    @property
    def control(self) -> str:
        """The control token that prompts end with (CSFT's desirable one), where no chat template writes it."""
        if self.run is None or self.tokenizer.chat_template is not None:
            return ""
        return str(self.run.loss.get("desirable_token") or "")

    @property
    def beta(self) -> float | None:
        """β of the loss that trained it; of a mixture, that of the first part that has one."""
        if self.run is None:
            return None
        losses = (self.run.loss, *(self.run.loss.get("parts") or {}).values())
        return next((float(loss.beta) for loss in losses if loss.get("beta") is not None), None)

    @property
    def is_classifier(self) -> bool:
        """Whether it is a reward model: a sequence classifier, which scores and does not generate."""
        file = Path(self.spec.path).expanduser() / "config.json"
        if not file.is_file():
            return False
        names = json.loads(file.read_text(encoding="utf-8")).get("architectures") or ()
        return any(name.endswith("ForSequenceClassification") for name in names)

    def load(self, *, device: str, precision: str, vocabulary: int = 0) -> Any:
        """The model on its device, ready to be asked; ``vocabulary``: see :meth:`ModelSpec.load`."""
        dtype = choice("precision", precision, DTYPES)
        limit_kernel_caches()
        return self.spec.load(dtype=dtype, vocabulary=vocabulary).to(device_of(device)).eval()


def find_policy(key: str, where: Any, **options: Any) -> Policy:
    """The policy at ``where``, given under ``key``; ``options``: what else its :class:`ModelSpec` is made with.

    Raises ``ValueError`` for an unfinished run and for a model that cannot be loaded; hub ids are not contacted.
    """
    if not isinstance(where, str) or not where:
        raise ValueError(f"{key}: expected a run's folder, a hub id or a model's directory, found {where!r}")
    return _named(key, lambda: _find(key, where, options))


def _find(key: str, where: str, options: Mapping[str, Any]) -> Policy:
    folder = Path(where).expanduser()
    run = None
    path = where
    if (folder / "config.yaml").is_file():
        run, path = run_config(folder), str(folder / "model")
        if not (folder / "summary.json").is_file() or not Path(path).is_dir():
            raise ValueError(f"{key}: the run in {where} has not finished: expected summary.json and model/ in it")
    spec, exported = ModelSpec(path=path, **options), None
    if run is not None and (Path(path) / "adapter_config.json").is_file():
        spec, exported = _adapted(key, where, run, path), spec
    spec.check()
    return Policy(where, spec, run, exported)


def _adapted(key: str, where: str, run: DictConfig, adapter: str) -> ModelSpec:
    """The model that a run started from with the adapter that the run exported.

    The base is not held in 4 bits where the run did (QLoRA): neither is that of the reference.
    """
    if run.model.get("random_weights"):
        raise ValueError(
            f"{key}: the run {where} exported an adapter for random weights, which nobody has kept; expected a run "
            "with model.lora.export=merged"
        )
    return ModelSpec(path=str(run.model.path), lora=LoRA(enabled=True, path=adapter))


def run_config(folder: Path) -> DictConfig:
    """The resolved configuration of a run. Raises ``ValueError`` if it is not one of ours."""
    try:
        config = OmegaConf.load(folder / "config.yaml")
    except Exception as error:  # YAML's and OmegaConf's own kinds
        raise ValueError(f"{folder / 'config.yaml'}: expected a run's configuration, found {error}") from error
    if not isinstance(config, DictConfig) or not {"loss", "data", "model"} <= set(config):
        raise ValueError(f"{folder / 'config.yaml'}: expected a run's configuration with loss, data and model")
    return config


def check_tokenizer(key: str, policy: Policy) -> None:
    """Raise ``ValueError`` that names the key if the model has no tokenizer, as a hub id that is none has not."""
    _named(key, lambda: policy.tokenizer)


def reference_of(policy: Policy, where: str | None) -> Policy | None:
    """The model that rewards and KL are measured against: the one given, else the run's reference, which is the model
    that it started from (with the adapter that it continued, if any) unless it named another."""
    if where is not None:
        return find_policy("reference", where)
    if policy.run is None:
        return None
    model = policy.run.model
    if model.get("random_weights"):
        raise ValueError(f"reference: the run {policy.name} started from random weights; expected reference=MODEL")
    path = str(model.get("reference_path") or model.path)
    adapter = (model.get("lora") or {}).get("path")
    lora = LoRA() if adapter is None else LoRA(enabled=True, path=adapter)
    return find_policy("reference", path, chat_template=model.get("chat_template"), lora=lora)


def _named(key: str, job: Callable[[], T]) -> T:
    # The loader speaks of model.path, its key in a training run.
    try:
        return job()
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", key)) from error
