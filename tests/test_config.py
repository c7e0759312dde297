"""Every YAML composes, and its keys are exactly the parameters of what it makes."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import ConfigCompositionException
from hydra.utils import get_class
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from halos import objectives
from halos.config.nodes import SOURCE_KEYS, build
from halos.data import StreamingDataModule
from halos.objectives import Humanline, Objective
from halos.training.reference_sync import ReferenceSync
from tests.configs import CONF, MIXTURES, VARIANTS, compose, options


def parameters(target: Any) -> set[str]:
    """Names that the constructor takes, those that it passes on to its base class included."""
    names: set[str] = set()
    for kind in inspect.getmro(target):
        if "__init__" not in vars(kind):
            continue
        found = list(inspect.signature(kind.__init__).parameters.values())[1:]  # type: ignore[misc]
        names |= {parameter.name for parameter in found if parameter.kind is not parameter.VAR_KEYWORD}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in found):
            break
    return names


def keys(node: DictConfig, *without: str) -> set[str]:
    return set(map(str, node)) - {"_target_", *without}


@pytest.mark.parametrize(
    ("group", "option"),
    [
        (group.name, option)
        for group in sorted(CONF.iterdir())
        if group.is_dir() and group.name != "judge"
        for option in options(group.name)
    ],
)
def test_every_option_composes_and_resolves(group: str, option: str) -> None:
    if option == "claims_tune":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    if option != "default":
        cfg = compose(f"{group}={option}", "output_dir=/out")
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("option", options("loss"))
def test_the_keys_of_a_loss_are_its_parameters(option: str) -> None:
    node = compose(f"loss={option}").loss
    common = {"backbone", "optim", "seed", "humanline", "non_finite"}
    # A loss of one's own takes the place of sft's target alone, and does not know its parameter.
    unlisted = {"average"} if option == "sft" else set()
    assert keys(node, "name") == parameters(get_class(node._target_)) - common - unlisted
    assert node.name == option


@pytest.mark.parametrize("option", sorted({*options("loss")} - {*MIXTURES}))
def test_a_loss_has_the_defaults_of_its_class(option: str) -> None:
    node = compose(f"loss={option}", "model=hf").loss  # the toy model has settings of its own for some losses
    signature = inspect.signature(get_class(node._target_).__init__).parameters  # type: ignore[misc]
    changed = [key for key in keys(node, "name") if node[key] != signature[key].default]
    assert sorted(changed) == VARIANTS.get(option, [])


@pytest.mark.parametrize("option", sorted({*options("loss")} - VARIANTS.keys() - {*MIXTURES}))
def test_a_pure_function_has_the_defaults_of_its_class(option: str) -> None:
    kind = get_class(compose(f"loss={option}").loss._target_)
    of_class = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    functions = [f for f in vars(inspect.getmodule(kind)).values() if inspect.isfunction(f)]
    for function in (f for f in functions if f.__module__ == kind.__module__ and f.__name__.endswith("_loss")):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not parameter.empty and name in of_class:
                assert parameter.default == of_class[name].default, (function.__name__, name)


def test_the_parts_of_a_mixture_have_the_defaults_of_their_classes() -> None:
    node = compose("loss=mix").loss
    for part in node.parts.values():
        signature = inspect.signature(get_class(part._target_).__init__).parameters  # type: ignore[misc]
        assert all(part[key] == signature[key].default for key in keys(part, "_partial_"))
    assert set(node.weights) == set(node.parts)


def test_every_objective_has_a_yaml() -> None:
    made = {get_class(compose(f"loss={option}").loss._target_) for option in options("loss")}
    exported = [kind for kind in (getattr(objectives, name) for name in dir(objectives)) if isinstance(kind, type)]
    assert made == {kind for kind in exported if issubclass(kind, Objective) and kind is not Objective}


def test_the_keys_of_humanline_and_of_reference_sync_are_their_parameters() -> None:
    cfg = compose()
    assert keys(cfg.humanline, "enabled") == parameters(Humanline)
    assert keys(cfg.reference_sync) == parameters(ReferenceSync)
    assert not cfg.humanline.enabled
    assert cfg.reference_sync.every == 0


@pytest.mark.parametrize("option", options("optim"))
def test_the_keys_of_an_optimizer_are_its_parameters(option: str) -> None:
    node = compose(f"optim={option}").optim
    assert keys(node) == parameters(get_class(node._target_))
    assert build(node).lr == node.lr


@pytest.mark.parametrize("option", sorted({*options("model")} - {"default"}))
def test_the_keys_of_a_model_are_its_parameters(option: str) -> None:
    node = compose(f"model={option}", "model.path=somewhere").model
    assert keys(node) == parameters(get_class(node._target_))
    assert build(node).path == "somewhere"


@pytest.mark.parametrize("option", sorted({*options("data")} - {"default", "file_source"}))
def test_the_keys_of_data_are_the_parameters_of_the_module_and_of_its_source(option: str) -> None:
    node = compose(f"data={option}").data
    files = {*SOURCE_KEYS} & keys(node)
    # Streams have a module of their own; a source has its own validation files.
    streams = {"streaming", "shuffle_buffer"}
    of_the_run = {"seed", "cache_dir", "cache_key_file", "val"}
    assert keys(node, *files, *streams) == parameters(get_class(node._target_)) - of_the_run
    assert {"shuffle_buffer"} <= parameters(StreamingDataModule)
    assert keys(node.source) == parameters(get_class(node.source._target_))
    assert all(node.source[name] == node[name] for name in files)


@pytest.mark.parametrize("option", options("logger"))
def test_the_keys_of_a_logger_are_parameters_of_it(option: str) -> None:
    node = compose(f"logger={option}").logger
    if node._target_ is not None:
        assert keys(node) <= parameters(get_class(node._target_))


@pytest.mark.parametrize("option", options("strategy"))
def test_the_keys_of_a_strategy_are_parameters_of_it(option: str) -> None:
    node = compose(f"strategy={option}").strategy
    assert node.name == option
    within_reach = keys(node) - {"name", "trainer"}
    if isinstance(node.trainer, str):
        assert not within_reach
    else:
        assert keys(node.trainer) <= parameters(get_class(node.trainer._target_))
        assert all(node.trainer[name] == node[name] for name in within_reach)


def test_the_keys_of_the_trainer_are_arguments_of_lightnings() -> None:
    assert keys(compose().trainer) <= set(inspect.signature(Trainer.__init__).parameters)


def test_a_loss_in_the_users_own_folder_is_an_option_like_the_others(tmp_path: Path) -> None:
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text("_target_: mylab.losses.Mine\nname: mine\ntemperature: 2.0\n")
    cfg = compose(f"hydra.searchpath=[file://{tmp_path}]", "loss=mine", "loss.temperature=3")
    assert cfg.loss == {"_target_": "mylab.losses.Mine", "name": "mine", "temperature": 3}


def test_keys_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigCompositionException):
        compose("loss.betta=0.1")


def test_the_toy_model_brings_its_learning_rate_and_the_command_line_overrides_it() -> None:
    assert compose("loss=sft").optim.lr == compose("loss=dpo").optim.lr != compose("model=hf").optim.lr
    assert compose("optim.lr=0.5").optim.lr == 0.5


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ((), "reference"),
        (("data=toy_topics",), "topics_reference"),
        (("data=toy_topics", "model=toy_lora"), "topics_reference"),
        (("experiment=claims_noise", "data=toy_topics"), "topics_reference"),
        (("experiment=claims_noise",), "reference"),
    ],
)
def test_each_edition_of_the_toy_world_has_its_reference(words: tuple[str, ...], name: str) -> None:
    assert compose(*words).model.path == f"pkg://halos.toy/{name}"


def test_another_model_is_kept_with_the_first_edition() -> None:
    assert compose("data=toy_topics", "model.path=mine").model.path == "mine"
    assert compose("data=toy_topics", "model=hf", "model.path=mine").model.path == "mine"


@pytest.mark.parametrize("seed", [0, 7])
def test_one_seed_reaches_the_data(seed: int) -> None:
    assert compose(f"seed={seed}").data.source.seed == seed


def test_settings_tuned_for_a_model_with_a_loss_apply_to_those_two_alone_and_yield_to_the_command_line() -> None:
    assert compose("loss=csft").trainer.max_epochs == 6
    assert compose("loss=csft", "trainer.max_epochs=2").trainer.max_epochs == 2
    assert compose("loss=kto").trainer.max_epochs == 3
    assert compose("loss=csft", "model=hf").trainer.max_epochs == 1


def test_feedback_that_a_loss_needs_is_that_of_the_toy_world_alone() -> None:
    assert compose("loss=grpo").data.source.completions_per_prompt == 8
    assert compose("loss=grpo", "data.source.completions_per_prompt=4").data.source.completions_per_prompt == 4
    assert "completions_per_prompt" not in compose("loss=grpo", "data=files").data.source
    assert compose("loss=grpo", "data=toy_topics").data.source.completions_per_prompt == 8
    assert {loss: compose(f"loss={loss}").data.source.writer for loss in ("ppo", "grpo", "kto")} == {
        "ppo": "beginner",
        "grpo": "beginner",
        "kto": "staff",
    }
