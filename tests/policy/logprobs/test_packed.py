"""Packed rows give the log-probs and gradients of separate padded rows, for every architecture that can."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from halos import objectives
from halos.data.batches import packing, prefix_tree
from halos.data.batches.batch import Batch
from halos.data.batches.collate import collate, step_size
from halos.data.rows.token_rows import Row
from halos.objectives import DPO, KTO, PPO, Objective
from halos.policy.backbone import Backbone
from halos.policy.logprobs import packed
from halos.policy.logprobs.completions import LogProbs, completion_logprobs
from halos.policy.logprobs.head import HeadOptions
from halos.policy.logprobs.packed import can_pack
from halos.policy.logprobs.token_statistics import STATISTICS
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

PLAIN = tiny.rows(5, branches=3, seed=1)
ROWS = [
    *PLAIN,
    Row("again", 9, PLAIN[1].prompt, (PLAIN[1].branches[1], (3,), PLAIN[1].branches[0])),
    *tiny.conversation(branches=3),
    Row("turns", 10, (4, 5), ((7, 8, 9, 2, 3), (12, 13), (14, 15, 16, 17)), context=(((2, 4),), (), ((1, 3),))),
]
"""Several completions of each prompt; two rows of one prompt, with completions in common; turns of a conversation, each
an example of its own and several in one completion."""
TECHNIQUES = [
    {"packing": packing, "share_prompts": share, "head_chunk": chunk}
    for packing, share, chunk in product((True, False), (True, False), (None, 4))
    if packing or share
]
VALUES, GRADIENTS = 1e-10, 1e-9


@pytest.fixture(scope="module")
def exact_softmax() -> Iterator[None]:
    # Eager attention rounds to float32 inside, in float64 too.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: torch.softmax(x, dim))
        yield


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def model(request: pytest.FixtureRequest, exact_softmax: None) -> Any:
    return tiny.exact(tiny.model(request.param, dtype=torch.float64))


@pytest.fixture
def llama() -> Any:
    return tiny.exact(tiny.model("llama", dtype=torch.float64))


def logprobs(model: Any, rows: list[Row] = ROWS, *, head_chunk: int | None = None, **options: Any) -> LogProbs:
    batch, names = collate(rows, **options), tuple(STATISTICS)
    return completion_logprobs(model, batch, HeadOptions(head_chunk, names, with_states=True))


def with_gradients(model: Any, **options: Any) -> tuple[LogProbs, list[Tensor]]:
    found = logprobs(model, **options)
    weights = torch.randn(found.tokens.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return found, list(torch.autograd.grad((found.tokens * weights).sum(), list(model.parameters())))


def assert_same(mine: Any, other: Any, within: float) -> None:
    for left, right in zip(mine, other, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=within)


# Exactness


@pytest.mark.parametrize("mismatched", [False, True])
@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
def test_every_technique_gives_the_same_numbers(model: Any, technique: dict[str, Any], mismatched: bool) -> None:
    assert can_pack(model)
    expected, expected_gradients = with_gradients(model, mismatched=mismatched)
    found, gradients = with_gradients(model, mismatched=mismatched, **technique)
    assert_same([found.tokens, found.hidden], [expected.tokens, expected.hidden], VALUES)
    assert_same([found.statistics], [expected.statistics], VALUES)
    assert_same(gradients, expected_gradients, GRADIENTS)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 0.1


@pytest.mark.parametrize(("grouped", "dense"), [(0, 10_000), (10_000, 10_000), (0, 5), (20, 20)])
def test_the_pieces_that_attention_is_computed_in_do_not_matter(
    model: Any, grouped: int, dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, expected_gradients = with_gradients(model, mismatched=True)
    monkeypatch.setattr(packing, "GROUPED_TREES_MAX_TOKENS", grouped)
    monkeypatch.setattr(packing, "DENSE_TREE_MAX_TOKENS", dense)
    monkeypatch.setattr(prefix_tree, "SHARED_MIN_TOKENS", 2)
    found, gradients = with_gradients(model, mismatched=True, packing=True)
    assert_same([found.tokens], [expected.tokens], VALUES)
    assert_same(gradients, expected_gradients, GRADIENTS)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
def test_float32_models_agree_to_float32(architecture: str, technique: dict[str, Any]) -> None:
    made = tiny.model(architecture)
    expected, expected_gradients = with_gradients(made, mismatched=True)
    found, gradients = with_gradients(made, mismatched=True, **technique)
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-5, atol=1e-5)
    for left, right in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5 * max(1.0, float(right.abs().max())))


KINDS = [
    kind
    for kind in (getattr(objectives, name) for name in dir(objectives))
    if isinstance(kind, type) and issubclass(kind, Objective) and hasattr(kind, "view") and not kind.needs.last_hidden
]
"""All but mixtures of these, and reward models, whose completions are fed whole and not packed."""


def rows_for(kind: type[Objective]) -> list[Row]:
    branches = 2 if kind.view == "pairs" or kind.needs.mismatched else 1
    return [
        replace(
            row,
            branches=row.branches[:branches],
            context=row.context[:branches],
            desirable=n % 2 == 0,
            score=0.5 - n % 2,
        )
        for n, row in enumerate(ROWS)
    ]


CASES = [
    pytest.param(
        architecture,
        kind,
        id=f"{kind.__name__}-{architecture}",
        marks=[] if architecture == "llama" else [pytest.mark.long if kind in (KTO, PPO) else pytest.mark.slow],
    )
    for architecture, kind in product(tiny.ARCHITECTURES, KINDS)
]
"""All losses with one architecture, and those that need mismatched completions or hidden states with all."""


@pytest.mark.parametrize(("model", "kind"), CASES, indirect=["model"])
def test_every_objective_has_the_same_loss_and_gradient(model: Any, kind: type[Objective]) -> None:
    def loss_and_gradients(head_chunk: int | None, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        backbone = Backbone(model, with_reference=kind.needs.reference, head_chunk=head_chunk)
        if backbone.reference is not None:
            with torch.no_grad():
                for parameter in backbone.reference.parameters():
                    parameter.mul_(0.9)
        objective = kind(backbone)
        objective.configure_model()
        objective.double()
        policy = backbone.logprobs(batch, with_hidden=objective.needs.hidden)
        reference = backbone.reference_logprobs(batch) if objective.needs.reference else None
        output = objective.compute(batch, policy, reference)
        loss = torch.stack([term.total / float(term.step_count or 1) for term in output.loss.values()]).sum()
        return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))

    rows = rows_for(kind)
    expected, expected_gradients = loss_and_gradients(None, collate(rows, mismatched=kind.needs.mismatched))
    for technique in TECHNIQUES:
        options: dict[str, Any] = {name: value for name, value in technique.items() if name != "head_chunk"}
        batch = collate(rows, mismatched=kind.needs.mismatched, chunks=2, **options)
        loss, gradients = loss_and_gradients(technique["head_chunk"], batch)
        assert_same([loss], [expected], VALUES)
        assert_same(gradients, expected_gradients, GRADIENTS)


@pytest.mark.parametrize("division", [[10], [5, 5], [1, 4, 3, 2]], ids=str)
def test_a_step_does_not_depend_on_where_its_conversations_are_divided(llama: Any, division: list[int]) -> None:
    """Micro-batches, and ranks, each with a tree of its own."""
    rows = [row for pair in zip(rows_for(DPO), rows_for(DPO)[::-1], strict=True) for row in pair][:10]
    objective = DPO(Backbone(llama, with_reference=False))

    def gradients(batches: list[Batch]) -> list[Tensor]:
        terms = []
        for batch in batches:
            policy = completion_logprobs(llama, batch)
            reference = LogProbs(policy.tokens.detach() * 0.9, policy.mask)
            output = objective.compute(batch, policy, reference)
            terms += [term.total / float(term.step_count or 1) for term in output.loss.values()]
        return list(torch.autograd.grad(torch.stack(terms).sum(), list(llama.parameters())))

    expected, step, start = gradients([collate(rows)]), step_size(rows), 0
    batches = []
    for size in division:
        batches.append(collate(rows[start : start + size], step=step, packing=True))
        start += size
    assert_same(gradients(batches), expected, GRADIENTS)


# What is computed


def fed(model: Any, batch: Batch) -> list[tuple[int, bool]]:
    """Tokens of each forward, and whether it has gradient."""
    seen: list[tuple[int, bool]] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _, args, __: seen.append((args[0].numel(), torch.is_grad_enabled()))
    )
    completion_logprobs(model, batch)
    handle.remove()
    return seen


def test_each_token_is_fed_once_and_mismatched_completions_without_gradient_nor_prompt(llama: Any) -> None:
    can_pack(llama)
    rows = tiny.rows(6, branches=2)
    trained = sum(len(row.prompt) + len(row.branches[0]) - 1 for row in rows)
    others = sum(len(row.branches[1]) - 1 for row in rows)
    assert fed(llama, collate(rows, mismatched=True, packing=True)) == [(trained, True), (others, False)]
    assert fed(llama, collate(rows, packing=True)) == [(trained + others, True)]


def test_the_turns_of_a_conversation_are_fed_once(llama: Any) -> None:
    can_pack(llama)
    rows = tiny.conversation()
    sequences = [row.prompt + row.branches[0][:-1] for row in rows]
    beginnings = {ids[:n] for ids in sequences for n in range(1, len(ids) + 1)}
    assert fed(llama, collate(rows, packing=True)) == [(len(beginnings), True)]
    assert len(beginnings) < 0.6 * sum(map(len, sequences))


def test_gradient_flows_through_trained_completions_only(model: Any) -> None:
    found = logprobs(model, mismatched=True, packing=True)
    for gradient in torch.autograd.grad(
        found.tokens[:, -1].sum(), list(model.parameters()), retain_graph=True, allow_unused=True
    ):
        assert gradient is None or gradient.eq(0).all()


# What stays as it was


def test_the_attention_implementation_is_put_back(model: Any) -> None:
    before = model.config._attn_implementation
    logprobs(model, packing=True)
    assert model.config._attn_implementation == before != "halos_packed"
    assert "halos_packed" not in model.config.to_json_string()
    ids = torch.tensor([[5, 6, 7]])
    said = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert said[0, 3] == model(ids).logits[0, -1].argmax()


def test_the_attention_implementation_is_put_back_after_an_error(llama: Any) -> None:
    can_pack(llama)
    with pytest.raises(IndexError):
        logprobs(llama, [Row("r0", 0, (tiny.VOCABULARY,), ((1,),))], packing=True)
    assert llama.config._attn_implementation == "sdpa"
    assert not llama.get_output_embeddings()._forward_pre_hooks


def test_trying_out_leaves_the_mode_of_every_module(llama: Any) -> None:
    llama.model.norm.eval()
    assert can_pack(llama)
    assert llama.training
    assert llama.model.layers[0].training
    assert not llama.model.norm.training


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mistral"])
def test_checkpointed_layers_are_recomputed_with_packed_attention(architecture: str, exact_softmax: None) -> None:
    made = tiny.exact(tiny.model(architecture, dtype=torch.float64))
    expected, expected_gradients = with_gradients(made, mismatched=True)
    made.gradient_checkpointing_enable({"use_reentrant": False})
    found, gradients = with_gradients(made, mismatched=True, packing=True)
    assert can_pack(made)
    assert_same([found.tokens], [expected.tokens], VALUES)
    assert_same(gradients, expected_gradients, GRADIENTS)
    assert made.config._attn_implementation != "halos_packed"


# Models that cannot


COMMON = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}


def other(architecture: str, dtype: torch.dtype = torch.float64, **sizes: Any) -> Any:
    config = AutoConfig.for_model(architecture, **{"vocab_size": tiny.VOCABULARY, **sizes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return tiny.exact(made.to(dtype)).eval()


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("cohere2", WINDOWS),
        ("gemma3_text", {**WINDOWS, "head_dim": 8}),
        ("granite", {"logits_scaling": 3.0}),
        ("olmo2", {}),
        ("opt", {"ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 0}),
        ("phi3", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    ],
)
def test_other_architectures_are_tried_out_and_give_the_same_numbers(architecture: str, sizes: dict[str, Any]) -> None:
    made = other(architecture, **{**COMMON, **sizes})
    assert can_pack(made)
    expected = completion_logprobs(made, collate(ROWS, mismatched=True)).tokens
    found = completion_logprobs(made, collate(ROWS, mismatched=True, packing=True), HeadOptions(3)).tokens
    assert_same([found], [expected], VALUES)


BLOOM = {"hidden_size": 16, "n_layer": 2, "n_head": 2}
MAMBA = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
SINKS = {**COMMON, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
CHUNKS = {**COMMON, "head_dim": 8, "attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 24}


@pytest.mark.parametrize(
    ("architecture", "sizes", "why"),
    [
        ("bloom", BLOOM, "attention cannot be replaced"),
        ("mamba", MAMBA, "attention cannot be replaced"),
        ("gpt_oss", SINKS, "attention with s_aux"),
        ("llama4_text", CHUNKS, "layers of other kinds than attention: chunked_attention"),
    ],
)
def test_models_that_cannot_get_padded_rows_and_say_so_once(
    architecture: str, sizes: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = other(architecture, torch.float32, **sizes)
    packed._warnings_given.clear()
    with caplog.at_level(logging.WARNING, logger="halos"):
        found = completion_logprobs(made, collate(ROWS, packing=True, chunks=2), HeadOptions(3))
        completion_logprobs(made, collate(ROWS, packing=True, chunks=2))
    assert_same([found.tokens], [completion_logprobs(made, collate(ROWS)).tokens], 1e-5)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("halos")]
    assert [why in message for message in ours] == [True]


def test_a_model_whose_packed_rows_give_other_numbers_gets_padded_ones(
    llama: Any, caplog: pytest.LogCaptureFixture
) -> None:
    # As if positions were counted from the beginning of the pack.
    rotary = llama.model.rotary_emb.forward
    llama.model.rotary_emb.forward = lambda x, position_ids: rotary(x, torch.arange(x.shape[1])[None])
    packed._warnings_given.clear()
    assert not can_pack(llama)
    assert "packed rows give other log-probs" in caplog.text


def test_a_sliding_window_that_attention_is_not_told_of_rules_packing_out(caplog: pytest.LogCaptureFixture) -> None:
    made = tiny.model("gemma2", dtype=torch.float64, sliding_window=64)  # longer than what is tried out
    for layer in made.model.layers:
        layer.self_attn.sliding_window = None
    packed._warnings_given.clear()
    assert not can_pack(made)
    assert "its sliding window is not passed to attention" in caplog.text


def test_a_window_of_all_layers_that_attention_is_not_told_of_rules_packing_out_too() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    common = {"num_key_value_heads": 2, "vocab_size": tiny.VOCABULARY, "num_local_experts": 2}
    windows = {64: False, None: True}  # None: it has no window
    for window, packable in windows.items():
        config = AutoConfig.for_model("phimoe", **sizes, **common, sliding_window=window)
        assert can_pack(AutoModelForCausalLM.from_config(config)) == packable


def test_layers_that_are_checkpointed_the_other_way_rule_packing_out(llama: Any) -> None:
    llama.gradient_checkpointing_enable({"use_reentrant": True})
    assert not can_pack(llama)


# Parts


@pytest.mark.parametrize("mismatched", [True, False])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("most", [1, 25, 60])
def test_parts_of_a_micro_batch_give_the_same_numbers(llama: Any, most: int, share: bool, mismatched: bool) -> None:
    def found(**options: Any) -> tuple[list[Tensor], list[Tensor]]:
        batch = collate(ROWS, packing=True, share_prompts=share, mismatched=mismatched, **options)
        made = completion_logprobs(llama, batch, HeadOptions(3, ("entropy",)))
        trained = made.tokens[:, :-1] if mismatched else made.tokens
        assert made.statistics is not None
        return [made.tokens, made.statistics], list(torch.autograd.grad(trained.sin().sum(), list(llama.parameters())))

    (values, gradients), (expected, whole) = found(max_tokens=most), found()
    assert_same(values, expected, 1e-10)
    for left, right in zip(gradients, whole, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-9)


def test_parts_keep_the_activations_of_one_at_a_time(llama: Any) -> None:
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    def activations(most: int | None) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            completion_logprobs(llama, collate(ROWS, packing=True, max_tokens=most), HeadOptions(3))
        return sum(kept)

    assert activations(1) < activations(None) / 10


def test_parts_are_refused_for_a_model_that_cannot_read_them(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "_supports_attention_backend", False)
    with pytest.raises(ValueError, match=r"data\.max_tokens_per_batch: expected a model that can read packed rows"):
        completion_logprobs(llama, collate(ROWS, packing=True, max_tokens=1))


def test_parts_run_again_with_the_random_numbers_of_their_device(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def noted(function: Any, *values: Any, use_reentrant: bool, **options: Any) -> Any:
        given.append(values)
        return checkpoint(function, *values, use_reentrant=use_reentrant, **options)

    monkeypatch.setattr("halos.policy.logprobs.completions.checkpoint", noted)
    batch = collate(ROWS, packing=True, max_tokens=1)
    completion_logprobs(llama, batch)
    # PyTorch keeps the state of the devices of these tensors alone.
    assert [[part.device for part in values if isinstance(part, Tensor)] for values in given] == (
        [[batch.mask.device]] * sum(part.needs_grad for part in batch.packs)
    )
