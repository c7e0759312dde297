"""A saved configuration names classes of halos, for the role of their place, or of modules that the user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from halos.config.nodes import plain
from halos.config.roles import check_roles, check_trust
from halos.config.runs import run_config, saved_run
from tests.configs import compose

OWN = """
import pathlib
from halos.objectives import KTO
pathlib.Path(__file__).with_name('imported').touch()
class MyLoss(KTO): pass
class Other: pass
"""


@pytest.fixture
def mylab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's that shows that it was imported."""
    (tmp_path / "mylab_of_roles.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "imported"


@pytest.mark.parametrize("loss", ["kto", "mix", "bradley_terry"])
@pytest.mark.parametrize(
    "words",
    [("data=toy",), ("data=toy_topics",), ("data=mix", "data.mix={a: {train: x}}"), ("before=sft", "optim=rmsprop")],
)
def test_every_configuration_of_halos_may_be_built(loss: str, words: tuple[str, ...]) -> None:
    check_roles({key: value for key, value in plain(compose(f"loss={loss}", *words)).items() if key != "logger"})


def test_rounds_may_be_built(tmp_path: Path) -> None:
    world = {"_target_": "halos.toy.ToySource", "annotator": {"_target_": "halos.toy.Annotator"}}
    source = {"_target_": "halos.data.OnPolicySource", "world": world}
    check_roles({"_target_": "halos.data.PreferenceDataModule", "source": source}, "data")


REFUSED: dict[str, tuple[str, str]] = {
    "loss": ("os.system", r"trust=\[os\]"),
    "data.select": ("torch.storage._load_from_bytes", r"trust=\[torch\]"),
    "data.source": ("numpy.load", r"trust=\[numpy\]"),
    "data.source.world": ("halos.data.Selection", "expected a subclass of Source, found"),
    "data.columns": ("halos.data.Selection", "expected no class here"),
    "judge": ("halos.judges.judge", "could not be imported"),
    "optim": ("halos.objectives.KTO", "expected a subclass of Optim, found"),
    "loss.parts.a": ("halos.optim.AdamW", "expected a subclass of Objective, found"),
    "before.loss": ("builtins.eval", r"trust=\[builtins\]"),
    "model": ("halos.cli.os.system", "could not be imported"),
    "model.lora": ("halos.objectives.KTO.load_from_checkpoint", "could not be imported"),
    "humanline": ("halos.objectives.KTO", "expected no class here"),
}


@pytest.mark.parametrize("place", REFUSED)
def test_a_class_of_another_role_or_module_is_refused(place: str) -> None:
    target, message = REFUSED[place]
    node: dict[str, Any] = {"_target_": target}
    for name in reversed(place.split(".")):
        node = {name: node}
    with pytest.raises(ValueError, match=message) as refused:
        check_roles(node)
    assert str(refused.value).startswith(f"{place}._target_: ")


@pytest.mark.parametrize(
    "target", [3, ["os.system"], "", "halos.", "halos.objectives.__class__", "halos..objectives.KTO"]
)
def test_what_is_no_name_is_refused(target: object) -> None:
    with pytest.raises(ValueError, match=r"data\[0\]\._target_: expected the name of a class"):
        check_roles([{"_target_": target}], "data")


@pytest.mark.parametrize("flag", ["_args_", "_recursive_", "_convert_", "_partial_"])
def test_other_keys_of_hydra_are_refused(flag: str) -> None:
    with pytest.raises(ValueError, match=rf"loss\.{flag}: expected no such key in a saved configuration"):
        check_roles({"loss": {"_target_": "halos.objectives.KTO", flag: ["x"]}})


def test_modules_of_the_user_are_imported_only_if_he_names_them(mylab: Path) -> None:
    node = {"loss": {"_target_": "mylab_of_roles.MyLoss", "reward": {"_target_": "mylab_of_roles.Other"}}}
    for trust in ((), ("mylab",), ("mylab_of_roles.sub",)):
        with pytest.raises(ValueError, match=r"trust=\[mylab_of_roles\]"):
            check_roles(node, trust=trust)
    assert not mylab.exists()
    check_roles(node, trust=("mylab_of_roles",))
    assert mylab.exists()
    with pytest.raises(ValueError, match=r"expected a subclass of Objective, found mylab_of_roles\.Other"):
        check_roles({"loss": {"_target_": "mylab_of_roles.Other"}}, trust=("mylab_of_roles",))


def test_a_run_is_read_for_building_without_what_only_the_run_builds(tmp_path: Path) -> None:
    config = compose("loss=kto", "strategy=ddp", "logger=tensorboard", "+callbacks.mine._target_=os.system")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True).replace("${", ""))
    cfg = run_config(tmp_path)
    assert "_target_" not in cfg.logger
    assert "_target_" not in cfg.strategy.trainer
    assert "_target_" not in cfg.callbacks.mine
    assert cfg.loss._target_ == "halos.objectives.KTO"
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    assert saved_run(tmp_path)["model"]["trust_remote_code"] is True
    assert run_config(tmp_path).model.trust_remote_code is False
    (tmp_path / "config.yaml").write_text("loss: {_target_: os.system}\ndata: {}\nmodel: {}\n")
    with pytest.raises(ValueError, match=r"config.yaml: loss._target_: expected a subclass of Objective"):
        run_config(tmp_path)


@pytest.mark.parametrize(
    ("trust", "modules"),
    [(None, ()), ([], ()), ("mylab", ("mylab",)), (OmegaConf.create(["a", "b.c"]), ("a", "b.c"))],
)
def test_trust_is_a_list_of_modules(trust: object, modules: tuple[str, ...]) -> None:
    assert check_trust(trust) == modules


@pytest.mark.parametrize("trust", [3, True, {"a": 1}, ["a", 3], [""], "a b", ["os;"], [None]])
def test_anything_else_is_refused(trust: object) -> None:
    with pytest.raises(ValueError, match=r"trust: expected a list of modules"):
        check_trust(trust)
