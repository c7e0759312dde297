"""``model.lora``: train low-rank adapters instead of all weights (Hu et al. 2021, arXiv 2106.09685), through peft."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from halos.checks import check_whole
from halos.files import in_home
from halos.policy.adapters import POLICY, REFERENCE, adapter_layers
from halos.policy.checks import check_safetensors
from halos.policy.lora_targets import KEY, check_pattern, describe, find_targets, peft_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

RANK = 16
INITS: dict[str, bool | str] = {"kaiming": True, "gaussian": "gaussian"}
"""peft's names of the initialisations, by ours."""
# Keys of a stored adapter's config: those that LoRA's computation depends on, and those that change nothing here.
# Any other key with a value of its own means a variant (DoRA, biases, …) that this project does not compute.
_READ = {"r", "lora_alpha", "target_modules", "target_parameters", "exclude_modules", "use_rslora"}
_READ |= {"rank_pattern", "alpha_pattern", "fan_in_fan_out", "layers_to_transform", "layers_pattern"}
_WITHOUT_EFFECT = {"peft_version", "base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping"}
_WITHOUT_EFFECT |= {"lora_dropout", "init_lora_weights", "runtime_config"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """Low-rank adapters: W + (alpha / rank) · B·A in place of W. A [rank, in] and B [out, rank] alone are trained.

    B starts at zero, so that the policy starts exactly at the reference.

    Args:
        enabled: train adapters. False: train the whole model.
        rank: the rank of B·A. None: 16, or the rank of the adapter in ``path``.
        alpha: the scale's numerator. None: 2 · rank, or the value of the adapter in ``path``.
        target_modules: names of linear layers and of tensors of experts, a regular expression, or ``all-linear`` for
            all except the LM head and routers. None: ``all-linear``, or the layers of the adapter in ``path``.
        dropout: probability of the dropout on A's inputs. It must be 0 with adapters on experts.
        init: initialisation of A: ``kaiming`` or ``gaussian``.
        path: a folder with an adapter in peft's format, for example from SFT. The policy starts from it, and the
            reference is the base model with this adapter as it was.
        export: ``merged``: a whole model with the adapter in its weights. ``adapter``: the adapter in peft's format.
        quantize: ``4bit`` stores the frozen weights as NF4 (QLoRA, arXiv 2305.14314). CUDA only.
    """

    enabled: bool = False
    rank: int | None = None
    alpha: float | None = None
    target_modules: str | Sequence[str] | None = None
    dropout: float = 0.0
    init: str = "kaiming"
    path: str | None = None
    export: str = "merged"
    quantize: str | None = None

    def __post_init__(self) -> None:
        check_whole("model.lora.rank", self.rank, 1, null=True)
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"model.lora.alpha: expected a number above 0, found {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.lora.dropout: expected a probability in [0, 1), found {self.dropout}")
        if self.init not in INITS:
            raise ValueError(
                f"model.lora.init: expected one of {', '.join(INITS)}; found {self.init!r}. With others the policy "
                "would not start at its reference"
            )
        if self.export not in ("merged", "adapter"):
            raise ValueError(f"model.lora.export: expected merged or adapter, found {self.export!r}")
        if self.quantize not in (None, "4bit"):
            raise ValueError(f"model.lora.quantize: expected 4bit or null, found {self.quantize!r}")
        if self.path is not None and not isinstance(self.path, str):
            raise ValueError(f"model.lora.path: expected a folder or null, found {self.path!r}")
        for name in ("path", "quantize"):
            if getattr(self, name) is not None and not self.enabled:
                raise ValueError(f"model.lora.{name}: expected model.lora.enabled=true with it, found false")
        if self.quantize and self.export == "merged":
            raise ValueError(
                "model.lora.export: expected adapter with model.lora.quantize=4bit, found merged: weights that were "
                "rounded to 4 bits cannot take the adapter in"
            )
        if self.target_modules is not None and not self.target_modules:
            raise ValueError(f"{KEY}: expected names or null, found none")
        check_pattern(self.target_modules)
        explicit = [name for name in ("rank", "alpha", "target_modules") if getattr(self, name) is not None]
        if self.path is not None and explicit:
            raise ValueError(
                f"model.lora.{explicit[0]}: expected null with model.lora.path={self.path}, whose adapter determines "
                f"it, found {getattr(self, explicit[0])!r}"
            )

    def check(self) -> None:
        """Check that the adapters can be trained here. Reads headers only.

        Raises:
            ValueError: a package or device is missing, or the adapter in ``path`` cannot be continued.
        """
        if not self.enabled:
            return
        if importlib.util.find_spec("peft") is None:
            raise ValueError("model.lora.enabled: peft is missing; install the extra with pip install 'halos[lora]'")
        if self.quantize:
            check_quantization()
        if self.path is not None:
            self._stored_config(in_home(self.path))

    def attach(
        self,
        model: PreTrainedModel,
        *,
        base: str,
        new_tokens: Sequence[int] = (),
        keep_start: bool = False,
        logged: bool = True,
    ) -> None:
        """Add adapters to the model, in place, and freeze the rest.

        Adapters have memory and values on the CPU even if the model's weights are on the meta device.

        Args:
            model: the model.
            base: name of the base model in the exported adapter's config.
            new_tokens: rows of the embeddings and of the LM head to train as well.
            keep_start: keep the adapter in ``path`` as it is, next to the trained one, as part of the reference.
            logged: log which layers get adapters.

        Raises:
            ValueError: ``target_modules`` or the adapter in ``path`` does not fit the model.
        """
        from peft import LoraConfig, inject_adapter_in_model

        if self.path is None:
            options: dict[str, Any] = {
                "r": self.rank or RANK,
                "lora_alpha": self.alpha or 2 * (self.rank or RANK),
                "init_lora_weights": INITS[self.init],
                "trainable_token_indices": _trained_rows(model, new_tokens),
                **self._peft_targets(model, logged=logged),
            }
        else:
            options = self._stored_config(in_home(self.path))
        if self.dropout and (tensors := options.get("target_parameters")):
            raise ValueError(
                f"model.lora.dropout: expected 0 with adapters on experts ({tensors[0]}), found {self.dropout}; set it "
                f"to 0, or name other layers in {KEY}"
            )
        options |= {"lora_dropout": self.dropout, "base_model_name_or_path": base, "task_type": "CAUSAL_LM"}
        for name in (POLICY, REFERENCE) if self.path is not None and keep_start else (POLICY,):
            try:
                inject_adapter_in_model(LoraConfig(**options), model, name)
            except ValueError as error:
                raise ValueError(f"{KEY}: {error}") from error
            except Exception as error:  # whatever peft makes of a stored config that may hold anything
                if self.path is None:
                    raise
                raise ValueError(f"model.lora.path: the config of {self.path} is damaged: {error!r}") from error
            draw_start(model, name, INITS[self.init])
            if self.path is not None:
                self._load(model, in_home(self.path), name)
        if self.path is not None:
            # peft activates the adapter that was added last, which is the reference's.
            for layer in adapter_layers(model).values():
                layer.set_adapter(POLICY)
        for name, parameter in model.named_parameters():
            # peft trains every adapter that it adds.
            parameter.requires_grad_(f".{POLICY}." in name + ".")
        _check_targets(model)

    def _peft_targets(self, model: PreTrainedModel, *, logged: bool) -> dict[str, list[str]]:
        targets = find_targets(model, self.target_modules)
        if logged:
            log.info("model.lora: %s", describe(model, targets))
        names = peft_targets(model, targets)
        wrapped = names["target_parameters"]
        if self.quantize and len(wrapped) > len(targets.experts):
            raise ValueError(
                f"model.lora.quantize: expected null for a model whose layers peft adapts through their weights "
                f"({wrapped[-1]}), found {self.quantize}; set it to null, or name other layers in {KEY}"
            )
        return names

    def _stored_config(self, folder: Path) -> dict[str, Any]:
        from peft import LoraConfig

        file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        for path in (file, weights):
            if not path.is_file():
                raise ValueError(f"model.lora.path: expected {path.name} in {folder}, found none")
        tensors = check_safetensors(weights, key="model.lora.path")
        try:
            stored = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"model.lora.path: expected an adapter's config in {file}, found {error}") from error
        if stored.pop("peft_type", None) != "LORA":
            raise ValueError(f"model.lora.path: expected a LoRA adapter in {folder}, found another kind")
        defaults: dict[str, Any] = LoraConfig().to_dict()
        unsupported = [
            f"{name}={value}"
            for name, value in stored.items()
            if name not in _READ | _WITHOUT_EFFECT and value and value != defaults.get(name)
        ]
        if unsupported:
            raise ValueError(
                f"model.lora.path: the adapter in {folder} is more than plain LoRA ({', '.join(unsupported)}); merge "
                "it into its base and set model.path to that"
            )
        patterns = stored.get("rank_pattern") or {}
        largest = max((max(entry.get("shape") or [0]) for entry in tensors.values()), default=0)
        for rank in (stored.get("r", 8), *(patterns.values() if isinstance(patterns, dict) else ())):
            # Its factors would be made before the weights are found to be others.
            if type(rank) is not int or not 1 <= rank <= largest:
                raise ValueError(f"model.lora.path: expected a rank that fits {weights}, found {rank!r} in {file.name}")
        return {name: value for name, value in stored.items() if name in _READ}

    def _load(self, model: PreTrainedModel, folder: Path, name: str) -> None:
        from peft import set_peft_model_state_dict

        result: Any  # a namedtuple of PyTorch's without annotations
        try:
            result = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"), name)
        except RuntimeError as error:  # other shapes
            raise ValueError(f"model.lora.path: the adapter in {folder} is not of this model: {error}") from error
        missing = [key for key in result.missing_keys if f".{name}." in key]
        if missing or result.unexpected_keys:
            raise ValueError(
                f"model.lora.path: the adapter in {folder} is not of this model: it lacks {missing[:3]} and has "
                f"{list(result.unexpected_keys)[:3]} in addition"
            )


def draw_start(model: nn.Module, name: str, init: bool | str) -> None:
    """Draw the initial weights of an adapter.

    They depend only on the seed and the order of the layers, not on random numbers that were drawn before, which differ
    for a model on the meta device or a quantised one. So the initial weights are the same under all strategies.

    Args:
        model: the model with the adapter.
        name: the adapter's name.
        init: peft's name of the initialisation.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        for layer in adapter_layers(model).values():
            if name in getattr(layer, "lora_A", ()):
                for factor in (layer.lora_A[name], layer.lora_B[name]):
                    if factor.weight.is_meta:
                        factor.to_empty(device="cpu")
                layer.reset_lora_parameters(name, init)


def _trained_rows(model: PreTrainedModel, tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """Return the rows to train of the embeddings and of an LM head that does not share them, by the modules' names."""
    if not tokens:
        return None
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(
            f"model.lora.enabled: the base has no trained rows for {len(tokens)} tokens, and peft cannot train rows of "
            "its LM head, which has a bias; resize the base to its tokenizer and train it first"
        )
    layers = [embeddings] if head.weight is embeddings.weight else [embeddings, head]
    return {name: list(tokens) for name, module in model.named_modules() if any(module is layer for layer in layers)}


def _check_targets(model: PreTrainedModel) -> None:
    for name, layer in adapter_layers(model).items():
        base = layer.get_base_layer() if hasattr(layer, "lora_A") else None
        linear = base is None or isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D"
        if not linear and not hasattr(layer, "parameter_name"):  # peft's wrapper of a parameter has this attribute
            raise ValueError(f"{KEY}: expected linear layers, found {name}: {type(base).__name__}")
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if hasattr(head, "lora_A") and head.base_layer.weight is embeddings.weight:
        # An exported model with tied weights could not hold the change of the head alone.
        raise ValueError(f"{KEY}: this model's LM head shares its weights with the embeddings; choose others")


def check_quantization() -> None:
    """Raise ``ValueError`` unless this machine can store weights in 4 bits."""
    if any(importlib.util.find_spec(name) is None for name in ("bitsandbytes", "accelerate")):
        raise ValueError("model.lora.quantize: bitsandbytes is missing; install it with pip install 'halos[qlora]'")
    if not torch.cuda.is_available():
        raise ValueError("model.lora.quantize: 4bit needs a CUDA device, found none")


def quantization() -> dict[str, Any]:
    """Return options of transformers' ``from_pretrained`` that store weights as NF4 and compute in bf16."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}
