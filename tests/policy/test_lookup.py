"""Which model a run is measured against: the one that it was trained against, read as it was read there."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from halos.config.devices import check_place
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.templates import PLAIN_TEMPLATE
from halos.evaluation.plan import implied_beta
from halos.policy.adapters import save_adapter
from halos.policy.export.card import ModelCard
from halos.policy.export.language_model import export_policy
from halos.policy.loading import ModelSpec
from halos.policy.lookup import Policy, find_policy, reference_of
from halos.policy.lora import LoRA
from halos.sampling.engines import Decoding, make_engine
from halos.toy.model import END, GOOD, REFERENCE_DIR
from tests.configs import compose


def run(folder: Path, loss: str = "kto", words: tuple[str, ...] = (), **model: Any) -> Policy:
    """A finished run that started from the toy reference, with these settings of its loss and of its model."""
    shutil.copytree(REFERENCE_DIR, folder / "model")
    node = compose(f"loss={loss}", *words).loss
    config = {"loss": node, "data": {}, "model": {"path": str(REFERENCE_DIR), **model}}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    (folder / "summary.json").write_text("{}")
    return find_policy("policy", str(folder))


@pytest.mark.parametrize(
    ("loss", "words", "beta"),
    [
        ("kto", ("loss.beta=0.3",), 0.3),
        ("ppo", ("loss.beta=0",), 0.0),
        ("mix", ("loss.parts.dpo.beta=0.5",), 0.5),
        ("mix", ("~loss.parts.dpo", "~loss.weights.dpo"), None),
        ("sft", (), None),
    ],
)
def test_the_beta_of_a_run_is_that_of_its_loss(
    loss: str, words: tuple[str, ...], beta: float | None, tmp_path: Path
) -> None:
    policy = run(tmp_path / "run", loss, words)
    assert policy.beta == beta
    for given, expected in ((None, 0.1 if beta is None else beta), (0.0, 0.0), (0.2, 0.2)):
        assert implied_beta(policy, given) == expected


def reference(policy: Policy) -> Policy:
    found = reference_of(policy, None)
    assert found is not None
    return found


def test_the_reference_reads_prompts_by_the_runs_chat_template(tmp_path: Path) -> None:
    assert reference(run(tmp_path / "given", chat_template="plain")).tokenizer.chat_template == PLAIN_TEMPLATE
    own = reference(run(tmp_path / "own"))
    assert own.tokenizer.chat_template == find_policy("reference", str(REFERENCE_DIR)).tokenizer.chat_template


def adapted() -> Any:
    """The toy reference with an adapter that changes it."""
    model = ModelSpec(path=str(REFERENCE_DIR), lora=LoRA(enabled=True, rank=2)).load().eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_the_reference_of_a_continued_adapter_has_it_as_it_was(tmp_path: Path) -> None:
    started = adapted()
    (tmp_path / "adapter").mkdir()
    save_adapter(started, tmp_path / "adapter")
    lora = {"enabled": True, "path": str(tmp_path / "adapter"), "rank": None, "export": "merged"}
    found = reference(run(tmp_path / "run", lora=lora))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        loaded = found.load(device="cpu", precision="32-true", vocabulary=len(found.tokenizer))
        torch.testing.assert_close(loaded(ids).logits, started(ids).logits)
    tokens = ChatTokens(found.tokenizer, Limits(64))
    with pytest.raises(ValueError, match=r"engine: expected transformers for .* with the adapter"):
        make_engine("vllm", found, tokens, Decoding(), device="cpu", precision="32-true")


def export_adapter(folder: Path, **model: Any) -> Any:
    """The policy of a finished run with ``model.lora.export=adapter``, which is written to the folder."""
    trained, tokenizer = adapted(), ModelSpec(path=str(REFERENCE_DIR), chat_template="plain").tokenizer()
    end: Any = tokenizer.convert_tokens_to_ids(END)
    run(folder, **model)
    export_policy(
        trained, tokenizer, folder / "model", end_of_turn=end, control=GOOD, card=ModelCard(loss="k", base="b")
    )
    return trained


def test_a_run_that_exported_its_adapter_is_its_base_with_it_and_its_chat_template(tmp_path: Path) -> None:
    trained = export_adapter(tmp_path / "run", lora={"enabled": True, "export": "adapter"})
    found = find_policy("policy", str(tmp_path / "run"))
    assert found.tokenizer.chat_template.startswith(PLAIN_TEMPLATE)
    assert GOOD in found.tokenizer.chat_template
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        loaded = found.load(device="cpu", precision="32-true", vocabulary=len(found.tokenizer))
        torch.testing.assert_close(loaded(ids).logits, trained(ids).logits)
        base = reference(found).load(device="cpu", precision="32-true", vocabulary=len(found.tokenizer))
        assert (base(ids).logits - loaded(ids).logits).abs().max() > 0.1


def test_an_adapter_without_its_base_is_refused(tmp_path: Path) -> None:
    export_adapter(tmp_path / "drawn", random_weights=True)
    with pytest.raises(ValueError, match=r"policy: .* exported an adapter for random weights"):
        find_policy("policy", str(tmp_path / "drawn"))
    export_adapter(tmp_path / "moved", path=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"policy: no such directory or file: .*gone"):
        find_policy("policy", str(tmp_path / "moved"))


@pytest.mark.parametrize(
    ("device", "precision", "said"),
    [
        ("foo", "32-true", "device: expected auto, cpu, cuda or cuda:N, found 'foo'"),
        ("cuda:99", "32-true", "device: expected cpu or one of .* CUDA devices, found 'cuda:99'"),
        ("cpu", "16", "precision: expected one of 32-true, bf16-true; found '16'"),
    ],
)
def test_a_place_that_is_not_here_is_refused(device: str, precision: str, said: str) -> None:
    check_place("auto", "bf16-true")
    with pytest.raises(ValueError, match=said):
        check_place(device, precision)
