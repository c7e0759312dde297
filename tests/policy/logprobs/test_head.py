"""The LM head in chunks, against the whole of it."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from halos.data.batches.collate import collate
from halos.policy.logprobs import chunked_head
from halos.policy.logprobs.chunked_head import LogitShape, chunked_logprobs
from halos.policy.logprobs.completions import completion_logprobs
from halos.policy.logprobs.head import HeadOptions, logit_shape
from halos.policy.logprobs.packed import can_pack
from tests import tiny

SHAPES = [LogitShape(), LogitShape(scale=0.25), LogitShape(cap=1.5), LogitShape(scale=3.0, cap=2.0)]
VOCABULARY, WIDTH, COUNT = 23, 6, 11


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(VOCABULARY, (COUNT,), generator=generator)
    return random(COUNT, WIDTH), random(VOCABULARY, WIDTH), random(VOCABULARY), targets


def whole(states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shape: LogitShape) -> Tensor:
    logits = states @ weight.T * shape.scale
    if bias is not None:
        logits = (states @ weight.T + bias) * shape.scale
    if shape.cap is not None:
        logits = torch.tanh(logits / shape.cap) * shape.cap
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets]


@pytest.mark.parametrize("rows", [1, 4, COUNT, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_the_whole(rows: int, shape: LogitShape, with_bias: bool) -> None:
    states, weight, bias, targets = tensors()
    given = [states, weight, bias] if with_bias else [states, weight]
    expected = whole(states, weight, bias if with_bias else None, targets, shape)
    found, _ = chunked_logprobs(states, weight, bias if with_bias else None, targets, rows=rows, shape=shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.linspace(-1, 2, COUNT, dtype=torch.float64)
    for left, right in zip(
        torch.autograd.grad((found * upstream).sum(), given),
        torch.autograd.grad((expected * upstream).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen: int) -> None:
    states, weight, bias, targets = tensors()
    given = (states, weight, bias)
    given[frozen].requires_grad_(False)
    chunked_logprobs(states, weight, bias, targets, rows=4)[0].sum().backward()
    assert [value.grad is None for value in given] == [n == frozen for n in range(3)]


def test_extreme_logits_stay_finite() -> None:
    states, weight, _, targets = tensors()
    found, _ = chunked_logprobs(states * 1e4, weight, None, targets, rows=4)
    found.sum().backward()
    torch.testing.assert_close(found, whole(states * 1e4, weight, None, targets, LogitShape()), rtol=1e-10, atol=1e-9)
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_bf16_is_normalised_and_added_up_in_float32() -> None:
    states, weight, bias, targets = tensors(torch.bfloat16)
    found, _ = chunked_logprobs(states, weight, bias, targets, rows=2)
    assert found.dtype == torch.float32
    logits = torch.nn.functional.linear(states, weight, bias).float()
    expected = logits.log_softmax(-1)[torch.arange(COUNT), targets]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [4, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_are_of_the_same_logits_and_change_nothing(rows: int, shape: LogitShape) -> None:
    states, weight, bias, targets = tensors()
    delta = (states.detach()[:, :2], weight.detach()[:, :2])
    options: dict[str, Any] = {"rows": rows, "shape": shape, "delta": delta}
    names = ("token_accuracy", "entropy")
    found, measured = chunked_logprobs(states, weight, bias, targets, **options, statistics=names)
    with torch.no_grad():
        logits = shape(states @ weight.T + bias + delta[0] @ delta[1].T)
        right = logits.argmax(1) == targets
        expected = torch.stack([right.double(), torch.distributions.Categorical(logits=logits).entropy()], 1)
    torch.testing.assert_close(measured, expected, rtol=0, atol=1e-12)
    assert not measured.requires_grad
    plain, nothing = chunked_logprobs(states, weight, bias, targets, **options)
    assert nothing.shape == (COUNT, 0)
    assert torch.equal(found, plain)
    for left, other in zip(
        *(torch.autograd.grad(logprobs.sum(), [states, weight, bias]) for logprobs in (found, plain)), strict=True
    ):
        assert torch.equal(left, other)


@pytest.mark.parametrize("vocabulary", [31, 64, 259, 1055])
def test_what_was_in_the_memory_before_does_not_matter(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 16, generator=generator).bfloat16().requires_grad_() for n in (67, vocabulary))
    targets = torch.randint(vocabulary, (67,), generator=generator)
    new_empty = Tensor.new_empty

    def gradients(before: float) -> list[Tensor]:
        monkeypatch.setattr(Tensor, "new_empty", lambda *given, **more: new_empty(*given, **more).fill_(before))
        logprobs, _ = chunked_logprobs(states, weight, None, targets, rows=32)
        return [logprobs.detach(), *torch.autograd.grad(logprobs.sum(), [states, weight])]

    for left, right in zip(gradients(torch.nan), gradients(0.0), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_autocast_gives_the_weight_a_float32_gradient() -> None:
    states, weight, _, targets = tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = chunked_logprobs(states, weight, None, targets, rows=4)
    found.sum().backward()
    exact = whole(states, weight, None, targets, LogitShape())
    assert 1e-4 < (found - exact).abs().max() < 0.1
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_no_more_rows_of_logits_exist_than_a_chunk_has(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    affine = chunked_head.affine  # type: ignore[attr-defined]

    def noted(x: Tensor, *rest: Any, **more: Any) -> Tensor:
        seen.append(x.numel())
        return affine(x, *rest, **more)

    monkeypatch.setattr(chunked_head, "affine", noted)
    states, weight, _, targets = tensors()
    with torch.no_grad():
        chunked_logprobs(states, weight, None, targets, rows=4)
    assert sorted(seen) == [rows * states.shape[1] for rows in (3, 4, 4)]
    seen.clear()
    chunked_logprobs(states, weight, None, targets, rows=4)[0].sum().backward()
    assert max(seen) <= 4 * len(weight)


def test_the_first_rows_are_computed_once_and_a_second_backward_pass_is_as_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states, weight, _, targets = tensors()
    products: list[int] = []
    affine = chunked_head.affine  # type: ignore[attr-defined]

    def counted(x: Tensor, w: Tensor, *rest: Any, **more: Any) -> Tensor:
        products.append(len(x)) if w.shape == weight.shape else None
        return affine(x, w, *rest, **more)

    monkeypatch.setattr(chunked_head, "affine", counted)
    found, _ = chunked_logprobs(states, weight, None, targets, rows=4)
    assert sorted(products) == [3, 4, 4]
    products.clear()
    first = torch.autograd.grad(found.sin().sum(), (states, weight), retain_graph=True)
    assert sorted(products) == [3, 4]
    products.clear()
    second = torch.autograd.grad(found.sin().sum(), (states, weight))
    assert sorted(products) == [3, 4, 4]
    assert all(map(torch.equal, first, second))


# Models


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_what_a_model_does_to_its_logits_is_known(architecture: str) -> None:
    cap = 2.0 if architecture == "gemma2" else None
    assert logit_shape(tiny.model(architecture)) == LogitShape(1.0, cap)


@pytest.mark.parametrize(
    ("architecture", "scale"), [("cohere", {"logit_scale": 0.25}), ("granite", {"logits_scaling": 4.0})]
)
def test_scaled_logits_are_known_and_give_the_models_own_gradients(architecture: str, scale: dict[str, float]) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    common = {"num_key_value_heads": 1, "vocab_size": tiny.VOCABULARY, "pad_token_id": None, "bos_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(architecture, **sizes, **common, **scale)
        model = AutoModelForCausalLM.from_config(config).double()
    assert logit_shape(model) == LogitShape(0.25)
    batch = collate(tiny.rows(4), packing=True)
    plain, chunked = completion_logprobs(model, batch), completion_logprobs(model, batch, HeadOptions(3))
    torch.testing.assert_close(chunked.tokens, plain.tokens, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(found.sum.sum(), list(model.parameters())) for found in (plain, chunked)]
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-9)


def test_logits_that_are_changed_in_another_way_are_computed_whole(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.model("gemma2")
    model.config.final_logit_softcapping = 3.0
    assert logit_shape(model) == LogitShape(cap=3.0)
    other = tiny.model("gemma2")
    forward = other.forward

    def doubled(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        output.logits = 2 * output.logits
        return output

    other.forward = doubled
    with caplog.at_level(logging.INFO, logger="halos"):
        assert logit_shape(other) is None
    assert "not computed in chunks" in caplog.text


def test_a_wrapped_head_is_computed_whole_and_exactly() -> None:
    class Wrapped(nn.Linear):
        """As LoRA's: more than its weight."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.sum(-1, keepdim=True) * torch.arange(tiny.VOCABULARY)

    model = tiny.model(dtype=torch.float64)
    wrapped = Wrapped(16, tiny.VOCABULARY, bias=False).double()
    wrapped.load_state_dict(model.lm_head.state_dict())
    model.lm_head = wrapped
    assert logit_shape(model) is None
    batch = collate(tiny.rows(4), packing=True)
    expected = completion_logprobs(model, batch)
    assert torch.equal(completion_logprobs(model, batch, HeadOptions(3)).tokens, expected.tokens)


def test_finding_out_draws_no_random_numbers() -> None:
    model = tiny.model("gpt2", attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert logit_shape(model) == LogitShape()
    assert can_pack(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
