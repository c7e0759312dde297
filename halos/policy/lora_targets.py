"""The layers that LoRA adapts: linear layers, and the experts of a mixture, which transformers keeps in one tensor."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from halos.policy.construction import is_multimodal, text_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "model.lora.target_modules"
ALL_LINEAR = "all-linear"
_ROUTER = re.compile(r"(Router|Gating|MoE\w*Gate)$")
"""Ends of the names of classes that choose experts."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Layers that get adapters.

    Attributes:
        layers: names of linear layers.
        experts: names of parameters [experts, …, …], each with one matrix of every expert of a layer.
    """

    layers: tuple[str, ...]
    experts: tuple[str, ...]


def check_pattern(wanted: str | Sequence[str] | None) -> None:
    """Raise ``ValueError`` for a string that is not a regular expression."""
    try:
        re.compile(wanted if isinstance(wanted, str) else "")
    except re.error as error:
        raise ValueError(f"{KEY}: expected names or a regular expression, found {wanted!r}: {error}") from error


def find_targets(model: PreTrainedModel, wanted: str | Sequence[str] | None) -> Targets:
    """Return the layers that ``model.lora.target_modules`` means in this model.

    ``all-linear`` (or None) means all linear layers and experts except the LM head and routers. Parts for images or
    sound are always left out: text does not pass through them, so they could not be trained.

    Args:
        model: a causal language model without adapters.
        wanted: names or endings of names, a regular expression of whole names, or ``all-linear``. The name of a module
            of experts stands for all its tensors.

    Raises:
        ValueError: a name matches nothing, or something other than linear layers and experts.
    """
    modules = _text_modules(model)
    layers, experts = _linear_layers(model, modules), _expert_tensors(modules)
    candidates = {*layers, *experts}
    if wanted is None or wanted == ALL_LINEAR:
        chosen = candidates - {name for name in layers if _is_head_or_router(model, name)}
    else:
        # An ending of names begins after a dot.
        patterns = {wanted: wanted} if isinstance(wanted, str) else {n: rf"(.*\.)?{re.escape(n)}" for n in wanted}
        chosen = set().union(*(_matching(modules, candidates, name, pattern) for name, pattern in patterns.items()))
    return Targets(tuple(filter(chosen.__contains__, layers)), tuple(filter(chosen.__contains__, experts)))


def _text_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    if not is_multimodal(model):
        return modules
    text = {id(module) for part in text_parts(model) for module in part.modules()}
    return {name: module for name, module in modules.items() if id(module) in text}


def _linear_layers(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    weights_read = {kind: _weights_read(kind) for kind in {type(module) for module in model.modules()}}
    names = []
    for name, module in modules.items():
        parent, _, own_name = name.rpartition(".")
        # Conv1D is GPT-2's linear layer, with its weight transposed. A router that is a linear layer itself returns
        # more than a product, which adapters cannot add to.
        kind = type(module).__name__
        is_linear = (isinstance(module, nn.Linear) or kind == "Conv1D") and not _ROUTER.search(kind)
        if is_linear and own_name not in weights_read[type(model.get_submodule(parent))]:
            names.append(name)
    return names


def _weights_read(kind: type) -> frozenset[str]:
    # The layers of a module whose weights its code reads itself, as Mamba does for its kernels. It does not call these
    # layers then, and their adapters would have no effect. (Bloom reads slices, in a mode that is never trained.)
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape)|\[)", source))


def _expert_tensors(modules: Mapping[str, nn.Module]) -> list[str]:
    return [
        f"{name}.{tensor}"
        for name, module in modules.items()
        if re.search("Experts|NaiveMoe", type(module).__name__)  # the latter in older versions
        for tensor, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


def _is_head_or_router(model: PreTrainedModel, name: str) -> bool:
    parent = model.get_submodule(name.rpartition(".")[0])
    is_router = _ROUTER.search(type(parent).__name__) is not None
    return is_router or model.get_submodule(name) is model.get_output_embeddings()


def _matching(modules: Mapping[str, nn.Module], candidates: set[str], wanted: str, pattern: str) -> set[str]:
    chosen = {name for name in candidates if re.fullmatch(pattern, name)}
    for name, module in modules.items():
        tensors = {f"{name}.{tensor}" for tensor, _ in module.named_parameters(recurse=False)}
        if name in chosen or not tensors or not re.fullmatch(pattern, name):
            continue
        if not tensors & candidates:
            raise ValueError(
                f"{KEY}: expected linear layers that the model calls, or experts, found {name}: {type(module).__name__}"
            )
        chosen |= tensors & candidates
    if not chosen:
        existing = ", ".join(sorted({name.rpartition(".")[2] for name in candidates}))
        raise ValueError(f"{KEY}: expected names of linear layers of this model ({existing}), found {wanted!r}")
    return chosen


# peft's names for them


def peft_targets(model: PreTrainedModel, targets: Targets) -> dict[str, list[str]]:
    """Return the options of peft's ``LoraConfig`` that mean these layers, in an adapter that others load too."""
    everything = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    # peft takes names such as gate_proj for those of experts in transformers 4, and adapts the experts in their place.
    # It leaves the names of parameters alone: a layer with such a name is adapted through its weight.
    own_names = {name: name.rpartition(".")[2] for name in targets.layers}
    renamed = {own_name for own_name in {*own_names.values()} if _is_renamed(model, own_name)}
    layers = [name for name in targets.layers if own_names[name] not in renamed]
    tensors = [*targets.experts, *(f"{name}.weight" for name in targets.layers if own_names[name] in renamed)]
    return {
        "target_modules": _shortened(layers, everything),
        "target_parameters": _shortened(tensors, everything),
    }


def _is_renamed(model: PreTrainedModel, name: str) -> bool:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # a name for a part of a tensor
        return True
    return set(config.target_modules or ()) != {name}


def _shortened(names: Sequence[str], everything: Iterable[str]) -> list[str]:
    # The endings of names after the layer's number, if they mean no other modules.
    endings = sorted({re.sub(r".*\.\d+\.", "", name) for name in names})
    meant = {name for name in everything if any(f".{name}".endswith(f".{ending}") for ending in endings)}
    return endings if meant == set(names) else list(names)


# What is left out


def describe(model: PreTrainedModel, targets: Targets) -> str:
    """Return a sentence about the layers with adapters, and the weights without, for the log."""
    adapted = sum(model.get_parameter(f"{name}.weight").numel() for name in targets.layers)
    adapted += sum(model.get_parameter(name).numel() for name in targets.experts)
    experts = f" and {len(targets.experts)} tensors of experts" if targets.experts else ""
    text = f"adapters on {len(targets.layers)} linear layers{experts} ({adapted:,} weights)"
    others = left_out(model, targets)
    if others:
        text += "; none on " + ", ".join(f"{kind} ({count:,} weights)" for kind, count in sorted(others.items()))
    return text


def left_out(model: PreTrainedModel, targets: Targets) -> dict[str, int]:
    """Return the numbers of weights in matrices without an adapter, by the class of their module.

    A linear layer has its own name. Embeddings, the LM head and vectors (norms, biases) are not counted.
    """
    adapted = {*targets.experts, *(f"{name}.weight" for name in targets.layers)}
    counts: Counter[str] = Counter()
    modules = _text_modules(model)
    for name, module in modules.items():
        if module is model.get_output_embeddings() or isinstance(module, nn.Embedding):
            continue
        kind = name.rpartition(".")[2] if type(module) is nn.Linear else type(module).__name__
        for tensor, parameter in module.named_parameters(recurse=False):
            matrix = sum(size > 1 for size in parameter.shape) > 1
            if matrix and f"{name}.{tensor}" not in adapted:
                counts[kind] += parameter.numel()
    text = {id(parameter) for module in modules.values() for parameter in module.parameters()}
    counts["other parts than text"] = sum(p.numel() for p in model.parameters() if id(p) not in text)
    return dict(+counts)
