"""Which classes a saved configuration may name at which key, because it may come from a stranger.

The user's own command line and YAML may name any class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig

from halos.config.nodes import Node, class_of, plain

TARGET = "_target_"
_FLAGS = ("_args_", "_partial_", "_recursive_", "_convert_")
"""Other keys that Hydra acts on. The only one that a run saves is ``_partial_: true``, in the parts of a mixture."""
PACKAGE = "halos"
NODE_CLASSES = {
    "loss": "halos.objectives.Objective",
    "loss.parts.*": "halos.objectives.Objective",
    "optim": "halos.optim.Optim",
    "data": "halos.data.PreferenceDataModule",
    "data.source": "halos.data.Source",
    "data.source.annotator": "halos.toy.Annotator",
    "data.source.world": "halos.data.Source",
    "data.source.world.annotator": "halos.toy.Annotator",
    "data.select": "halos.data.Selection",
    "model": "halos.policy.ModelSpec",
    "model.lora": "halos.policy.LoRA",
    "judge": "halos.judges.CompletionJudge",
}
"""For the key of a node, its role: the class that it must name, or a subclass of it.

Roles are names, because the classes belong to higher layers. Keys of ``before`` have the same roles. A node at any
other place must name something in a module that the user trusts."""
NEVER_BUILT = ("logger", "strategy", "trainer", "callbacks")
"""Nodes of a run's configuration that only the run itself builds; other commands ignore them."""


def check_trust(trust: object) -> tuple[str, ...]:
    """Return the modules in the key ``trust``. Raises ``ValueError`` for anything but a list of module names."""
    names: Sequence[object] = (trust,) if isinstance(trust, str) else ()
    if isinstance(trust, list | tuple | ListConfig):
        names = trust
    elif trust is not None and not names:
        names = (trust,)
    modules = tuple(name for name in names if isinstance(name, str) and _is_dotted(name))
    if len(modules) < len(names):
        raise ValueError(f"trust: expected a list of modules, such as [mylab], found {trust!r}")
    return modules


def check_trusted_models(models: object) -> tuple[str, ...]:
    """Return the models in the key ``trust_remote_code``. Raises ``ValueError`` for anything but a list of names."""
    names = tuple(models) if isinstance(models, list | tuple | ListConfig) else (models,)
    if not all(isinstance(name, str) and name for name in names):
        hint = "name each model whose own code may run, such as [lab/model]"
        raise ValueError(f"trust_remote_code: expected a list of models, found {models!r}; {hint}")
    return names


def check_roles(node: object, key: str = "", trust: Sequence[str] = ()) -> None:
    """Check what a saved node names, before anything of it is built.

    Args:
        node: plain containers.
        key: the node's key in the configuration of its run.
        trust: modules whose classes it may name, in addition to this package's.

    Raises:
        ValueError: a class of a module that is not trusted (the error says how to trust it), or of another role.
    """
    for place, built in _built_nodes(node, key):
        target = built.get(TARGET)
        if flags := [name for name in built if name in _FLAGS and not isinstance(built[name], bool)]:
            raise ValueError(f"{place}.{flags[0]}: expected no such key in a saved configuration, found one")
        if target is None:
            continue
        where = f"{place}.{TARGET}".lstrip(".")
        if not isinstance(target, str) or not _is_dotted(target):
            raise ValueError(f"{where}: expected the name of a class, found {target!r}")
        role = _role(place)
        # A node without a role may belong to the user's own class.
        modules = trust if role is None else (PACKAGE, *trust)
        if not any(target.startswith(f"{module}.") for module in modules):
            raise ValueError(
                f"{where}: expected {_expected(role)}, found {target}; a saved configuration can name any code: if you "
                f"know what this module does, name it in your own command, trust=[{target.partition('.')[0]}]"
            )
        if role is not None:
            class_of(place, target, get_class(role))


def without_never_built(config: Node) -> Node:
    """Return a run's configuration without the classes that only the run itself builds."""
    return {key: _without_targets(value) if key in NEVER_BUILT else value for key, value in config.items()}


def trusted_node(node: DictConfig, key: str, trust: object) -> DictConfig:
    """Return a node of a saved configuration after :func:`check_roles`."""
    check_roles(plain(node), key, check_trust(trust))
    return node


def _built_nodes(node: object, key: str) -> Iterator[tuple[str, Node]]:
    if isinstance(node, dict):
        if any(name in node for name in (TARGET, *_FLAGS)):
            yield key, node
        for name, value in node.items():
            yield from _built_nodes(value, f"{key}.{name}".lstrip("."))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _built_nodes(value, f"{key}[{number}]")


def _role(place: str) -> str | None:
    place = place.removeprefix("before.")
    for key, role in NODE_CLASSES.items():
        if re.fullmatch(re.escape(key).replace(r"\*", r"[^.\[]+"), place):
            return role
    return None


def _expected(role: str | None) -> str:
    return "no class here" if role is None else f"a subclass of {role.rpartition('.')[2]} in {PACKAGE}"


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() and not part.startswith("__") for part in name.split("."))


def _without_targets(node: object) -> object:
    if isinstance(node, dict):
        return {key: _without_targets(value) for key, value in node.items() if key != TARGET}
    return [_without_targets(value) for value in node] if isinstance(node, list) else node
