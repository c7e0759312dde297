"""Models that cannot be trained as they are: each is refused with one line that says what to set."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from halos.config.roles import check_trusted_models
from halos.config.runs import run_config
from halos.evaluation.results import Results
from halos.judges import RewardModel
from halos.policy.export.base_model import NO_BASE
from halos.policy.export.card import ModelCard, Usage
from halos.policy.loading import ModelSpec
from halos.policy.lookup import find_policy, reference_of
from tests import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "model")


# An adapter's folder


@pytest.mark.parametrize("whole", [False, True])
def test_the_folder_of_an_adapter_names_its_base_and_the_keys_to_set(whole: bool, folder: Path) -> None:
    # transformers would load the base that the adapter names, even where the folder has weights of its own.
    if not whole:
        (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "lab/base"}))
    with pytest.raises(
        ValueError, match=r"^model\.path: expected a whole model, found an adapter of lab/base in "
    ) as e:
        ModelSpec(path=str(folder)).check()
    assert f"set model.path=lab/base model.lora.enabled=true model.lora.path={folder}, or merge" in str(e.value)


def test_other_commands_name_their_own_key_first(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(
        ValueError, match=r"^policy: expected a whole model, found an adapter of its base in .* model\."
    ):
        find_policy("policy", str(folder))


# Code of the model's own


def custom(folder: Path, file: str) -> None:
    values = json.loads((folder / file).read_text())
    names = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.Own",
        "AutoTokenizer": ["own.OwnTokenizer", None],
    }
    values |= {"auto_map": names, "tokenizer_class": "OwnTokenizer"}
    if file == "config.json":
        values["model_type"] = "own_type"
    (folder / file).write_text(json.dumps(values))
    (folder / "own.py").write_text("raise RuntimeError('this code must not run')\n")


@pytest.mark.parametrize(("file", "method"), [("config.json", "load"), ("tokenizer_config.json", "tokenizer")])
def test_code_of_the_models_own_is_refused_without_a_question(
    file: str, method: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    custom(folder, file)

    def ask(*_: Any) -> str:
        raise AssertionError("transformers asks on the terminal")

    monkeypatch.setattr("builtins.input", ask)
    with pytest.raises(ValueError, match=r"^model\.path: .* needs code of its own \(auto_map in its config\)"):
        getattr(ModelSpec(path=str(folder)), method)()


def test_a_known_architecture_is_loaded_with_transformers_own_code(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(values))
    assert type(ModelSpec(path=str(folder)).load()).__module__.startswith("transformers.")


OWN = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own_type"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_the_models_own_runs_only_where_the_user_allows_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    custom(folder, "config.json")
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(OWN.format(marker=str(marker)))
    for refused in (ModelSpec(path=str(folder)), find_policy("policy", str(folder)).spec):
        with pytest.raises(ValueError, match=r"if you know that code, allow it: model\.trust_remote_code=true for"):
            refused.load()
    assert not marker.exists()
    allowed = ModelSpec(path=str(folder), trust_remote_code=True)
    with caplog.at_level(logging.WARNING):
        allowed.check()
    assert "runs with all your rights" in caplog.text
    assert type(allowed.load()).__name__ == "Own"
    assert marker.exists()
    tokenizer = allowed.tokenizer()
    allowed.try_export(tokenizer, NO_BASE, end_of_turn=tokenizer.eos_token_id)  # before the first step of a run


@pytest.mark.parametrize("value", ["true", "no", 1, None])
def test_only_true_allows_it(value: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.trust_remote_code: expected true or false, found"):
        ModelSpec(path=str(folder), trust_remote_code=value)


def test_a_revision_is_passed_on_and_is_of_a_hub_id_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[dict[str, Any]] = []

    def from_pretrained(name: str, **options: Any) -> None:
        passed.append({"name": name, **options})
        raise OSError("offline")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    spec = ModelSpec(path="lab/base", revision="1a2b3c", reference_path="lab/other")
    for one in (spec, spec.of_reference(), ModelSpec(path="lab/base", revision="1a2b3c").of_reference()):
        with pytest.raises(ValueError, match="offline"):
            one.load()
    assert [(call["name"], call.get("revision")) for call in passed] == [
        ("lab/base", "1a2b3c"), ("lab/other", None), ("lab/base", "1a2b3c")
    ]  # fmt: skip
    assert {call["trust_remote_code"] for call in passed} == {False}
    with pytest.raises(ValueError, match=r"model\.revision: expected null for files of this machine"):
        ModelSpec(path=str(folder), revision="main").check()
    with pytest.raises(ValueError, match=r"model\.revision: expected a commit"):
        ModelSpec(path="lab/base", revision="")


# Markers that are no tokens


def without_markers(folder: Path) -> Path:
    tokenizer = tiny.bpe_tokenizer(named=())
    # A tokenizer without special tokens of ChatML, such as Llama 2's.
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<|im")]
    tiny.save(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return folder


def test_chatml_without_its_tokens_is_refused_with_their_pieces(tmp_path: Path) -> None:
    spec = ModelSpec(path=str(without_markers(tmp_path / "model")), chat_template="chatml")
    pieces = len(ModelSpec(path=spec.path).tokenizer()(tiny.START)["input_ids"])
    assert pieces > 1
    with pytest.raises(ValueError, match=r"^model\.chat_template: .*single tokens") as error:
        spec.tokenizer()
    assert f"splits <|im_start|> into {pieces}, <|im_end|> into" in str(error.value)
    assert "model.chat_template=plain" in str(error.value)


def test_a_template_of_the_users_own_with_split_markers_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = ModelSpec(path=str(without_markers(tmp_path / "model")), chat_template=tiny.CHATML)
    with caplog.at_level(logging.WARNING):
        assert spec.tokenizer().chat_template == tiny.CHATML
    assert "this tokenizer splits <|im_start|> into" in caplog.text


@pytest.mark.parametrize("template", ["chatml", "plain", tiny.CHATML])
def test_templates_whose_markers_are_tokens_pass(template: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ModelSpec(path=str(folder), chat_template=template).tokenizer()
    assert "markers" not in caplog.text


def own_model(folder: Path, modules: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the folder's model code of its own; return the file that shows that the code has run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    custom(folder, "config.json")
    marker = modules.with_name(f"ran-{modules.name}")
    (folder / "own.py").write_text(OWN.format(marker=str(marker)))
    return marker


def test_other_commands_run_code_of_the_models_that_the_user_names(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = own_model(folder, tmp_path / "one", monkeypatch)
    for trusted in ((), ("lab/other",), (str(folder / "x"),)):
        with pytest.raises(ValueError, match=rf"trust_remote_code=\[{folder}\] in other commands"):
            find_policy("policy", str(folder), trusted=trusted).spec.load()
    assert not marker.exists()
    policy = find_policy("policy", str(folder), trusted=(str(folder),))
    assert type(policy.spec.load()).__name__ == "Own"
    assert marker.exists()


def test_what_a_run_says_of_trust_is_never_enough(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = own_model(folder, tmp_path / "two", monkeypatch)
    run = tmp_path / "run"
    tiny.save(run / "model")
    model = {"path": str(folder), "trust_remote_code": True}
    (run / "config.yaml").write_text(json.dumps({"loss": {}, "data": {}, "model": model}))
    (run / "summary.json").write_text("{}")
    # The user trusts the run: that is not the base that its config names.
    for trusted in ((), (str(run),)):
        policy = find_policy("policy", str(run), trusted=trusted)
        assert policy.spec.trust_remote_code is (str(run) in trusted)
        reference = reference_of(policy, None, trusted)
        assert reference is not None
        assert reference.spec.trust_remote_code is False
        with pytest.raises(ValueError, match="needs code of its own"):
            reference.spec.load()
        assert run_config(run, trusted=trusted).model.trust_remote_code is False
    assert not marker.exists()
    reference = reference_of(policy, None, (str(folder),))
    assert reference is not None
    assert reference.spec.trust_remote_code is True
    assert run_config(run, trusted=(str(folder),)).model.trust_remote_code is True


def test_a_judge_runs_code_of_its_own_only_where_the_user_allows_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    marker = own_model(folder, tmp_path / "three", monkeypatch)
    with pytest.raises(ValueError, match=r"if you know its code, set judge\.trust_remote_code=true"):
        RewardModel(str(folder), device="cpu").check()
    assert not marker.exists()
    with pytest.raises(ValueError, match=r"^judge\.trust_remote_code: expected true or false, found 'yes'"):
        RewardModel(str(folder), trust_remote_code="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^judge\.path: expected one score"), caplog.at_level(logging.WARNING):
        RewardModel(str(folder), device="cpu", trust_remote_code=True).check()  # Own has two classes
    assert "runs with all your rights" in caplog.text
    assert marker.exists()


@pytest.mark.parametrize("models", [True, "", {"a": True}, ["a", 3], [""], None])
def test_trusted_models_are_a_list_of_names(models: object) -> None:
    with pytest.raises(ValueError, match=r"^trust_remote_code: expected a list of models, found"):
        check_trusted_models(models)
    assert check_trusted_models(["lab/a"]) == check_trusted_models("lab/a") == ("lab/a",)


def test_card_and_results_say_that_code_of_a_model_was_allowed_to_run() -> None:
    said = "was allowed to run code that came with its base model"
    assert said in ModelCard(base="b", remote_code=True).render(Usage(chat=True))
    assert said not in ModelCard(base="b").render(Usage(chat=True))
    options: dict[str, Any] = {"policy": "p", "reference": None, "beta": 0.1, "counts": {}, "left_out": {}}
    assert Results(**options, remote_code=["p"]).as_json()["remote_code"] == ["p"]
    assert "remote_code" not in Results(**options).as_json()
