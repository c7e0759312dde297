"""The load-balancing loss of routers: transformers' own, and the same however sequences are padded or packed."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from halos.data.batches.batch import Batch
from halos.data.batches.collate import collate
from halos.policy.backbone import Backbone
from halos.policy.loading import LoadOptions, ModelSpec
from halos.policy.logprobs.packed import can_pack
from halos.policy.pretrained import load_backbone
from halos.policy.router import RouterLoss, expert_load, find_router_loss
from tests import architectures, tiny
from tests.architectures import ROWS, SEQUENCES


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(architectures.model("mixtral", dtype=torch.float64), with_reference=True)


def router_loss(backbone: Backbone, batch: Batch) -> Tensor:
    logprobs = backbone.logprobs(batch, with_load=True)
    assert logprobs.load is not None
    assert backbone.router_loss is not None
    term, _ = backbone.router_loss.terms(logprobs.load, batch)
    loss: Tensor = term.total / term.step_count
    return loss


# The formula


def test_it_is_transformers_loss_of_a_padded_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits: Any = tuple(torch.randn(3 * 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    with monkeypatch.context() as patch:  # transformers rounds to float32 on its way
        patch.setattr(Tensor, "float", Tensor.double)
        patch.setattr(torch, "float32", torch.float64)
        expected: Any = load_balancing_loss_func(logits, 6, 2, mask)
    batch = collate(ROWS)
    term, logged = RouterLoss(0.25, 2).terms(expert_load(logits, mask.flatten(), 2), batch)
    assert float(logged.total) / float(logged.count) == pytest.approx(float(expected), rel=1e-14)
    assert float(term.total) / float(term.step_count or 0) == pytest.approx(0.25 * float(expected), rel=1e-14)


def test_it_is_the_sum_over_experts_by_hand() -> None:
    # Two experts and three tokens, of which the last one counts twice; probabilities 1/4, 3/4 · 1/2, 1/2 · 4/5, 1/5.
    logits = torch.tensor([[1.0, 3.0], [1.0, 1.0], [4.0, 1.0]], dtype=torch.float64).log()
    load = expert_load([logits], torch.tensor([1, 0, 2]), 1)
    torch.testing.assert_close(load, torch.tensor([[2.0, 1.0], [0.25 + 1.6, 0.75 + 0.4]], dtype=torch.float64))
    _, logged = RouterLoss(1.0, 1).terms(load, collate(ROWS))
    by_hand = 2 * (2 / 3 * 1.85 / 3 + 1 / 3 * 1.15 / 3)
    assert float(logged.total) / float(logged.count) == pytest.approx(by_hand, rel=1e-14)


# The tokens that count


def test_its_gradient_is_that_of_transformers_loss_of_separate_sequences() -> None:
    mine, theirs = (architectures.model("mixtral") for _ in range(2))
    router_loss(Backbone(mine, with_reference=False), collate(ROWS, packing=True)).backward()
    (theirs.config.router_aux_loss_coef * architectures.plain_router_loss(theirs)).backward()
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None and "lm_head" not in name:
            mine_grad = mine.get_parameter(name).grad
            torch.testing.assert_close(mine_grad, parameter.grad, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"chunks": 4},
        {"chunks": 100},
        {"packing": True},
        {"packing": True, "share_prompts": False},
        {"packing": True, "max_tokens": 30},
    ],
    ids=str,
)
def test_padding_packing_and_shared_prompts_change_nothing(backbone: Backbone, options: dict[str, Any]) -> None:
    def with_gradient(batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = router_loss(backbone, batch)
        trained = [p for name, p in backbone.policy.named_parameters() if "lm_head" not in name and "norm" not in name]
        return loss.detach(), torch.autograd.grad(loss, trained, allow_unused=True)

    assert can_pack(backbone.policy)
    expected, gradients = with_gradient(collate(ROWS))
    found, others = with_gradient(collate(ROWS, **options))
    # The model itself rounds its routers' probabilities to float32.
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    for mine, other in zip(others, gradients, strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-10)


def test_a_wide_batch_pads_nothing_into_it(backbone: Backbone) -> None:
    """Of transformers' own function, a batch without a mask counts padding."""
    ids = pad_sequence([torch.tensor(ids[:-1]) for ids in SEQUENCES], batch_first=True)
    unmasked = backbone.policy(input_ids=ids, use_cache=False, output_router_logits=True).aux_loss
    coefficient = backbone.policy.config.router_aux_loss_coef
    assert abs(float(router_loss(backbone, collate(ROWS))) / coefficient / float(unmasked) - 1) > 1e-3


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("packing", [False, True])
def test_checkpointed_layers_change_nothing(packing: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = architectures.model("mixtral")
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        router_loss(Backbone(model, with_reference=False), collate(ROWS, packing=packing)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found, expected = gradients(True), gradients(False)
    assert found.keys() == expected.keys()
    assert any("gate" in name and grad.any() for name, grad in expected.items())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("packing", [False, True])
def test_mismatched_completions_do_not_count(backbone: Backbone, packing: bool) -> None:
    without = [type(row)(row.id, row.group, row.prompt, row.branches[:1]) for row in ROWS]
    expected = router_loss(backbone, collate(without))
    found = router_loss(backbone, collate(ROWS, mismatched=True, packing=packing))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


def test_last_tokens_count_where_they_are_fed(backbone: Backbone) -> None:
    ids = pad_sequence([torch.tensor(ids) for ids in SEQUENCES], batch_first=True)
    mask = pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in SEQUENCES], batch_first=True)
    output = backbone.policy(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True)
    expected = backbone.policy.config.router_aux_loss_coef * float(output.aux_loss)
    assert float(router_loss(backbone, collate(ROWS, last_hidden=True, chunks=3))) == pytest.approx(expected, rel=1e-6)


def test_the_reference_has_none(backbone: Backbone) -> None:
    batch = collate(ROWS)
    assert backbone.reference_logprobs(batch).load is None
    assert backbone.logprobs(batch).load is None
    assert backbone.with_reference_backbone()[1].router_loss is None


# The setting


def test_the_config_decides() -> None:
    model = architectures.model("mixtral", router_aux_loss_coef=0.3)
    assert find_router_loss(model, "auto") == RouterLoss(0.3, 2)
    assert find_router_loss(model, 0) is None
    silent = architectures.model("mixtral", output_router_logits=False)
    assert find_router_loss(silent, "auto") is None
    assert find_router_loss(silent, 0.5) == RouterLoss(0.5, 2)
    assert find_router_loss(architectures.model("jetmoe", aux_loss_coef=0.7), "auto") == RouterLoss(0.7, 2)
    assert find_router_loss(architectures.model("llama"), "auto") is None


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_coefficient_for_a_model_without_the_loss_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^model\.router_loss: expected 0 for .*ForCausalLM, .*found 0\.1"):
        find_router_loss(architectures.model(name), 0.1)


def test_a_config_that_asks_for_a_loss_that_there_is_not_gets_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert find_router_loss(architectures.model("deepseek_v3", output_router_logits=True), "auto") is None
    assert "output_router_logits=true in its config, which is ignored" in caplog.text


@pytest.mark.parametrize("setting", ["off", -1, True, None])
def test_other_settings_are_refused(setting: Any) -> None:
    with pytest.raises(ValueError, match=r"^model\.router_loss: expected auto, or a coefficient of 0"):
        ModelSpec(path="x", router_loss=setting)


def test_the_key_reaches_the_backbone(tmp_path: Path) -> None:
    architectures.model("mixtral").save_pretrained(tmp_path)
    tiny.word_tokenizer().save_pretrained(tmp_path)
    made = load_backbone(ModelSpec(path=str(tmp_path), router_loss=0.25), LoadOptions())
    assert made.router_loss == RouterLoss(0.25, 2)
    assert load_backbone(ModelSpec(path=str(tmp_path)), LoadOptions()).router_loss == RouterLoss(0.001, 2)
