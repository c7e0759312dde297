"""The backbone: at the start policy and reference agree to the bit, and training moves only one of them."""

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaModel

from halos.data.batches.collate import collate
from halos.policy.backbone import Backbone
from halos.policy.logprobs import chunked_head
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

ROWS = tiny.rows(6, branches=2, seed=3)


def batch(**options: Any) -> Any:
    return collate(ROWS, **{"chunks": 3, "mismatched": True, **options})


def backbone(architecture: str = "llama", *, with_reference: bool = True, **options: Any) -> Backbone:
    return Backbone(tiny.model(architecture, **options), with_reference=with_reference)


def train_one_step(made: Backbone) -> None:
    optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
    made.logprobs(batch()).sum[:, 0].mean().neg().backward()
    optimizer.step()


# Step 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64", "autocast"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_reference_equals_policy_to_the_bit_at_the_start(architecture: str, precision: str) -> None:
    dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
    made = backbone(architecture, dtype=dtype).train()
    with torch.autocast("cpu", dtype=torch.bfloat16) if precision == "autocast" else nullcontext():
        policy, reference = made.logprobs(batch()), made.reference_logprobs(batch())
    assert policy.tokens[policy.mask].abs().min() > 0
    assert torch.equal(policy.tokens, reference.tokens)
    assert torch.equal(policy.sum - reference.sum, torch.zeros(6, 2, dtype=policy.sum.dtype))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_mode_of_the_policy_does_not_matter(mode: str) -> None:
    made = getattr(backbone("gpt2"), mode)()
    assert torch.equal(made.logprobs(batch()).tokens, made.reference_logprobs(batch()).tokens)
    assert not made.reference.training


def test_the_model_in_hand_is_the_policy() -> None:
    model = tiny.model()
    assert Backbone(model, with_reference=True).policy is model


# The reference is frozen and hidden


def test_an_update_moves_the_policy_only() -> None:
    made = backbone()
    before = made.reference_logprobs(batch()).tokens
    weights = [p.clone() for p in made.reference.parameters()]
    train_one_step(made)
    assert torch.equal(made.reference_logprobs(batch()).tokens, before)
    assert all(torch.equal(p, q) for p, q in zip(made.reference.parameters(), weights, strict=True))
    assert (made.logprobs(batch()).sum - before.sum(-1)).abs().min() > 1e-3


def test_no_gradient_reaches_the_reference() -> None:
    made = backbone()
    policy, reference = made.logprobs(batch()), made.reference_logprobs(batch())
    assert not reference.tokens.requires_grad
    (policy.sum - reference.sum)[:, 0].sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in made.reference.parameters())
    assert all(p.grad is not None for p in made.policy.parameters())


def test_the_reference_is_no_part_of_the_module() -> None:
    with_one, without = backbone(), backbone(with_reference=False)
    assert list(with_one.state_dict()) == list(without.state_dict())
    assert all(name.startswith("policy.") for name in with_one.state_dict())
    inside = {id(p) for p in with_one.reference.parameters()}
    assert not inside & {id(p) for p in with_one.parameters()}
    assert len(list(with_one.parameters())) == len(list(with_one.policy.parameters()))
    assert with_one.reference not in list(with_one.modules())
    assert all(buffer is not other for buffer in with_one.buffers() for other in with_one.reference.buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_reference_follows_the_policy_to_its_precision(dtype: torch.dtype) -> None:
    made = backbone().to(dtype)
    assert {p.dtype for p in made.reference.parameters()} == {p.dtype for p in made.parameters()} == {dtype}
    assert torch.equal(made.logprobs(batch()).tokens, made.reference_logprobs(batch()).tokens)


def test_the_reference_follows_the_policy_to_its_device() -> None:
    made = backbone()
    nn.Sequential(made).to("meta")  # as part of a larger module
    assert {t.device.type for t in (*made.reference.parameters(), *made.reference.buffers())} == {"meta"}


@pytest.mark.parametrize("how", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_has_a_reference_of_its_own(how: Any) -> None:
    made = backbone()
    twin = how(made)
    train_one_step(twin)
    assert torch.equal(twin.reference_logprobs(batch()).tokens, made.reference_logprobs(batch()).tokens)
    assert torch.equal(made.logprobs(batch()).tokens, made.reference_logprobs(batch()).tokens)


# Gradient checkpointing


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_gradient_checkpointing_gives_the_same_gradients(architecture: str) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = tiny.model(architecture, dtype=torch.float64)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        made = Backbone(model, with_reference=True)
        assert model.is_gradient_checkpointing == checkpointing
        logprobs = made.logprobs(batch(), with_hidden=True)
        assert torch.equal(logprobs.tokens, made.reference_logprobs(batch()).tokens)
        return list(torch.autograd.grad(logprobs.sum[:, 0].sum(), list(model.parameters())))

    for left, right in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


# What it offers and refuses


def test_without_a_reference_there_is_none() -> None:
    made = backbone(with_reference=False)
    assert made.reference is None
    assert made.to(torch.float64).logprobs(batch()).tokens.dtype == torch.float64
    with pytest.raises(ValueError, match="expected a backbone with a reference"):
        made.reference_logprobs(batch())


def test_statistics_are_computed_for_the_policy_where_they_are_asked_for_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    own = chunked_head.measure  # type: ignore[attr-defined]
    monkeypatch.setattr(chunked_head, "measure", lambda names, *given: seen.append(len(names)) or own(names, *given))
    made = Backbone(tiny.model(), with_reference=True, head_chunk=4, statistics=["entropy"])
    assert made.logprobs(batch()).statistics is made.reference_logprobs(batch()).statistics is None
    assert not seen
    found = made.logprobs(batch(), with_statistics=True)
    assert found.statistics.shape == (*found.mask.shape, 1)
    assert (found.statistics[found.mask] > 0).all()
    assert (found.statistics[~found.mask] == 0).all()
    with pytest.raises(ValueError, match=r"model\.statistics"):
        Backbone(tiny.model(), with_reference=False, statistics=["entropi"])


def test_the_time_that_the_reference_takes_is_kept() -> None:
    made = backbone()
    assert made.reference_seconds == 0
    made.logprobs(batch())
    assert made.reference_seconds == 0
    made.reference_logprobs(batch())
    once = made.reference_seconds
    assert once > 0
    made.reference_logprobs(batch())
    assert made.reference_seconds > once


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_hidden_size_is_the_width_of_the_states(architecture: str) -> None:
    made = backbone(architecture, with_reference=False)
    assert made.hidden_size == made.logprobs(batch(), with_hidden=True).hidden.shape[-1] == 16


@pytest.mark.parametrize("model", [LlamaModel(tiny.config("llama")), nn.Linear(2, 2)], ids=["LlamaModel", "Linear"])
def test_a_model_without_a_head_is_a_value_error(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"with an LM head, found {type(model).__name__}"):
        Backbone(model, with_reference=False)  # type: ignore[arg-type]
