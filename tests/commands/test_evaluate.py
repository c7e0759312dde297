"""sample, evaluate and label from their configurations, on the toy world."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file

from halos.cli import COMMANDS
from halos.commands.evaluate import evaluate
from halos.commands.label import label
from halos.commands.sample import sample
from halos.config.folder import config_folder
from halos.data.rows.chat_tokens import Limits
from halos.judges.reward_model import RewardModel
from halos.policy.export.card import ModelCard
from halos.policy.export.language_model import export_policy
from halos.policy.export.reward_model import export_reward_model
from halos.policy.loading import ModelSpec
from halos.toy.model import END, GOOD
from tests.policy.test_lookup import export_adapter

SPEC = ModelSpec(path="pkg://halos.toy/reference")
ITSELF = ("policy=pkg://halos.toy/reference", "reference=pkg://halos.toy/reference", "output=x")
SMALL = ("data=toy", "data.source.val_size=12", "max_new_tokens=20", "progress=false")


def compose(command: str, *words: str) -> DictConfig:
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        return hydra.compose(command, list(words))


@pytest.fixture(scope="module")
def csft(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy as CSFT leaves it: its chat template ends with the control token."""
    folder, tokenizer = tmp_path_factory.mktemp("csft") / "model", SPEC.tokenizer()
    end: Any = tokenizer.convert_tokens_to_ids(END)
    export_policy(
        SPEC.load(), tokenizer, folder, end_of_turn=end, control=GOOD, card=ModelCard(loss="csft", base="toy")
    )
    return str(folder)


@pytest.mark.parametrize("command", ["sample", "evaluate", "label", "compare", "export"])
def test_each_command_has_a_configuration_and_a_function(command: str) -> None:
    assert command in COMMANDS
    compose(command)
    assert callable(getattr(__import__(f"halos.commands.{command}", fromlist=[command]), command))


@pytest.mark.parametrize("name", ["truth", "reward_model", "chat"])
def test_the_keys_of_a_judge_are_its_parameters(name: str) -> None:
    node: Any = OmegaConf.to_container(compose("label", f"judge={name}").judge, resolve=True)
    kind: Any = get_class(node.pop("_target_"))
    from halos.judges.transport import ChatEndpoint

    known = set(inspect.signature(kind.__init__).parameters) | set(inspect.signature(ChatEndpoint).parameters)
    assert set(node) <= known


@pytest.mark.long
def test_sample_goes_on_with_its_own_file_only(csft: str, tmp_path: Path) -> None:
    words = (*SMALL, f"policy={csft}", f"output={tmp_path}/s.jsonl", "samples=2")
    before = sample(compose("sample", *words)).read_bytes()
    assert before.count(b"\n") == 12
    (tmp_path / "s.jsonl").write_bytes(before[: len(before) // 2])
    assert sample(compose("sample", *words)).read_bytes() == before
    with pytest.raises(ValueError, match=r"output: .* holds samples that were drawn with other settings"):
        sample(compose("sample", *words, "temperature=0.5"))
    sample(compose("sample", *words, "temperature=0.5", "overwrite=true"))


@pytest.mark.long
@pytest.mark.parametrize("name", ["model.safetensors", "model/adapter_model.safetensors"])
def test_samples_of_a_policy_that_was_trained_again_are_not_those_of_the_old_one(
    name: str, csft: str, tmp_path: Path
) -> None:
    policy = tmp_path / "policy"
    if "adapter" in name:
        export_adapter(policy)
    else:
        shutil.copytree(csft, policy)
    words = (*SMALL, f"policy={policy}", f"output={tmp_path}/s.jsonl")
    sample(compose("sample", *words))
    weights = load_file(policy / name)
    save_file({key: value + 1e-3 for key, value in weights.items()}, policy / name, {"format": "pt"})
    with pytest.raises(ValueError, match=r"output: .* holds samples that were drawn with other settings"):
        sample(compose("sample", *words))


def test_a_policy_against_itself_has_no_kl_no_margin_and_wins_half(tmp_path: Path) -> None:
    words = ("policy=pkg://halos.toy/reference", "reference=pkg://halos.toy/reference", "judge=truth")
    found = evaluate(compose("evaluate", *SMALL, *words, f"output={tmp_path}", "resamples=20"))
    values = {name: metric["value"] for name, metric in found["metrics"].items()}
    assert values["samples/kl"] == values["rewards/margins"] == 0
    assert values["rewards/accuracies"] == values["rewards/auc"] == values["judge/win_rate"] == 0.5
    assert found["win_rate"]["p_value"] == 1
    assert values["data/perplexity"] == values["data/perplexity_reference"]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_a_csft_policy_is_asked_with_its_control_token_and_its_reference_without(csft: str, tmp_path: Path) -> None:
    words = (f"policy={csft}", "reference=pkg://halos.toy/reference", f"output={tmp_path}", "resamples=20", "size=8")
    found = evaluate(compose("evaluate", *SMALL, *words))
    # The weights are the same: what differs is the prompt alone.
    assert found["metrics"]["data/divergence_per_token"]["value"] > 0.001


def test_data_without_an_opponent_are_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelSpec, "load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "t.jsonl").write_text('{"prompt": "q", "completion": "a", "label": false}\n')
    words: tuple[str, ...] = (
        ITSELF[0],
        "judge=chat",
        "judge.model=m",
        f"judge.cache={tmp_path}/judge.jsonl",
        "opponent=data",
    )
    words += (f"output={tmp_path}/e", "split=train", "data=files", f"data.train={tmp_path}/t.jsonl")
    with pytest.raises(ValueError, match="opponent=data: no completion is preferred, desirable or unjudged"):
        evaluate(compose("evaluate", *words, "progress=false"))


@pytest.mark.long
def test_a_policy_meets_the_datas_own_completions(tmp_path: Path) -> None:
    words = ("policy=pkg://halos.toy/reference", "judge=truth", "opponent=data", f"output={tmp_path}", "resamples=20")
    found = evaluate(compose("evaluate", *SMALL, *words))
    assert found["metrics"]["judge/desirable_opponent"]["value"] == 1.0
    assert found["metrics"]["judge/win_rate"]["value"] < 0.5
    assert "rewards/auc" not in found["metrics"]  # no reference, no rewards


@pytest.mark.long
def test_what_was_computed_before_the_judge_failed_is_kept(tmp_path: Path) -> None:
    words = ("policy=pkg://halos.toy/reference", "reference=pkg://halos.toy/reference", "resamples=20", "size=4")
    endpoint = ("judge=chat", "judge.model=m", "judge.base_url=http://127.0.0.1:9", "judge.tries=1")
    cache = f"judge.cache={tmp_path}/judge.jsonl"
    with pytest.raises(ValueError, match="judge: expected an answer to at least one of 4 duels, found none"):
        evaluate(compose("evaluate", *SMALL, *words, *endpoint, cache, f"output={tmp_path}/judged"))
    found = json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    assert found == evaluate(compose("evaluate", *SMALL, *words, f"output={tmp_path}/plain"))
    assert "samples/kl" in found["metrics"]
    lines = [json.loads(line) for line in (tmp_path / "judged" / "samples.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"prompt", "completions", "opponent"}] * 4


@pytest.mark.long
def test_a_reward_model_is_evaluated_within_the_limits_of_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, tokenizer = SPEC.load(), SPEC.tokenizer()
    end: Any = tokenizer.convert_tokens_to_ids(END)
    card = ModelCard(loss="bt", base="toy")
    head = torch.ones(1, policy.config.hidden_size)
    export_reward_model(policy, head, tokenizer, tmp_path / "model", end_of_turn=end, card=card)
    given: list[Limits] = []

    class Seen(RewardModel):
        def __init__(self, path: str, *, limits: Limits, **options: Any) -> None:
            given.append(limits)
            super().__init__(path, limits=limits, **options)

    monkeypatch.setattr("halos.evaluation.evaluator.RewardModel", Seen)
    words = (f"policy={tmp_path}/model", f"output={tmp_path}/e", "resamples=20", "data.max_length=48")
    assert "rewards/auc" in evaluate(compose("evaluate", *SMALL, *words))["metrics"]
    evaluate(compose("evaluate", *SMALL, *words, "data.max_prompt_length=9"))
    assert given == [Limits(48), Limits(48, 9)]


def test_samples_become_feedback(csft: str, tmp_path: Path) -> None:
    sample(compose("sample", *SMALL, f"policy={csft}", f"output={tmp_path}/s.jsonl", "samples=4", "size=6"))
    words = (f"samples={tmp_path}/s.jsonl", "data=toy", "judge=truth", f"output={tmp_path}/f.jsonl", "progress=false")
    rows = [json.loads(line) for line in label(compose("label", *words)).read_text().splitlines()]
    assert len(rows) == 6
    assert {type(c["desirable"]) for row in rows for c in row["completions"]} == {bool}
    with pytest.raises(ValueError, match=r"output: .* exists"):
        label(compose("label", *words))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("policy=./none",), "policy: no such directory"),
        (("policy=pkg://halos.toy/reference",), "output: expected a folder"),
        (("policy=pkg://halos.toy/reference", "judge=truth", "output=x"), "opponent: expected reference=MODEL"),
        (("policy=pkg://halos.toy/reference", "judge=chat", "output=x"), "judge.model: expected the model's name"),
        (("policy=pkg://halos.toy/reference", "split=test", "output=x"), "split: expected val or train"),
        (("policy=pkg://halos.toy/reference", "top_p=0", "output=x"), "top_p: expected"),
        ((*ITSELF, "batch_size=0"), "batch_size: expected a whole number from 1 on, found 0"),
        ((*ITSELF, "resamples=0"), "resamples: expected a whole number from 1 on, found 0"),
        ((*ITSELF, "size=-1"), "size: expected a whole number from 0 on or null, found -1"),
        ((*ITSELF, "size=4.5"), "size: expected a whole number from 0 on or null, found 4.5"),
        ((*ITSELF, "samples=0"), "samples: expected a whole number from 1 on, found 0"),
        ((*ITSELF, "max_new_tokens=abc"), "max_new_tokens: expected a whole number from 1 on, found 'abc'"),
        ((*ITSELF, "beta=abc"), "beta: expected a number from 0 on or null, found 'abc'"),
        ((*ITSELF, "seed=abc"), "seed: expected a whole number from 0 on, found 'abc'"),
        ((*ITSELF, "engine=foo"), "engine: expected transformers or vllm, found 'foo'"),
        ((*ITSELF, "device=cuda:99"), "device: expected cpu or one of .* CUDA devices, found 'cuda:99'"),
        ((*ITSELF, "precision=foo"), "precision: expected one of 32-true, bf16-true; found 'foo'"),
        ((*ITSELF, "judge=reward_model", "judge.path=none"), "judge.path: none could not be loaded as a classifier"),
        ((*ITSELF, "judge=truth", "opponent=none"), "opponent: none could not be loaded by transformers"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(
    words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelSpec, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=said):
        evaluate(compose("evaluate", *SMALL, *words))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("engine=foo",), "engine: expected transformers or vllm, found 'foo'"),
        (("device=cuda:99",), "device: expected cpu or one of"),
        (("precision=foo",), "precision: expected one of"),
        (("size=0",), "size: expected a whole number from 1 on or null, found 0"),
        (("samples=1.5",), "samples: expected a whole number from 1 on, found 1.5"),
        (("batch_size=abc",), "batch_size: expected a whole number from 1 on, found 'abc'"),
    ],
)
def test_mistakes_of_sampling_are_found_before_a_model_is_loaded(
    words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ModelSpec, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=said):
        sample(compose("sample", *SMALL, ITSELF[0], f"output={tmp_path}/s.jsonl", *words))


def test_another_tokenizer_is_refused(csft: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(csft, other)
    tokenizer = SPEC.tokenizer()
    tokenizer.add_tokens(["zzz"])
    tokenizer.save_pretrained(other)
    words = (f"policy={csft}", f"reference={other}", f"output={tmp_path}/e")
    with pytest.raises(ValueError, match=r"reference: expected the tokenizer of .* differs in 1 tokens, such as 'zzz'"):
        evaluate(compose("evaluate", *SMALL, *words))
