"""Settings that do not go together are refused by one list of rules."""

import re
from functools import cache

import pytest

from halos.config.combinations import RULES, TRAITS, Rule, check_combinations, table, values_of
from tests.test_config import compose

SELECTIVE = "model.gradient_checkpointing=selective"
ADAPTER = "model.lora.enabled=true"
REFERENCE, WHOLE_STEP = "loss (reference)", "loss (whole step)"
COUNTS, GENERATES = "loss (label counts)", "loss (generates)"
SEVERAL_VIEWS, STEP_LABELS = "loss (several views)", "loss (labels of steps)"
DIVERGENCE, SAMPLES = "loss (divergence)", "loss (samples)"
FIRST = ("rounds.count=2", "rounds.reference=first")

CASES: list[tuple[tuple[str, ...], dict[str, bool], str]] = [
    (
        ("precision=16-mixed", "strategy=fsdp"),
        {},
        "precision: expected bf16-mixed, .* found 16-mixed with strategy.name",
    ),
    (
        ("hub.push=a/b", "sweep_seeds=[1,2]"),
        {},
        r"hub\.push: expected null with sweep_seeds, found a/b .*replace",
    ),
    (
        ("checkpoint.export=best",),
        {},
        "checkpoint.export: expected last without checkpoint.best, found best .*; name a metric, such as",
    ),
    (
        ("checkpoint.export=best", "strategy=deepspeed"),
        {},
        "checkpoint.export: expected last with strategy=deepspeed, found best with strategy.name=deepspeed; its",
    ),
    (("precision=16-mixed", "trainer.accelerator=cpu"), {}, "precision: expected bf16-mixed.* without a CUDA device"),
    (("trainer.devices=2",), {}, "trainer.devices: expected 1 with strategy=auto, .*, found 2 .* set strategy=ddp"),
    (("model.attention=flash_attention_2",), {}, "model.attention: expected sdpa or null, .* with precision=32-true"),
    (
        ("model.attention=flash_attention_2", "precision=bf16-mixed"),
        {},
        "model.attention: expected sdpa or null, found flash_attention_2 with precision=bf16-mixed, strategy.name=auto",
    ),
    (("model.packed_attention=flex", "trainer.accelerator=cpu"), {}, "model.packed_attention: expected pieces without"),
    (
        ("model.packed_attention=flex", "model.compile=true"),
        {},
        "model.packed_attention: expected pieces with model.com",
    ),
    (("model.liger=true", "model.compile=true"), {}, "model.liger: expected false with model.compile=true, found true"),
    (
        (SELECTIVE, "model.compile=true"),
        {},
        "model.gradient_checkpointing: expected true or offload with model.compile=true, found selective",
    ),
    (
        (SELECTIVE, "model.packed_attention=flex"),
        {},
        "model.gradient_checkpointing: expected true or offload with model.packed_attention=flex",
    ),
    ((SELECTIVE, "model.dropout=0.1"), {}, "model.gradient_checkpointing: expected true or offload with dropout"),
    (
        (SELECTIVE, "data.max_tokens_per_batch=64"),
        {},
        "model.gradient_checkpointing: expected true or offload with data.max_tokens_per_batch",
    ),
    (("model.reference=adapter",), {}, r"model.reference: expected auto, cached or live without LoRA, found adapter"),
    (
        ("model.reference_path=a", "model.reference=live"),
        {},
        "model.reference_path: expected null unless model.reference",
    ),
    (("model.reference_path=a", "model.lora.path=b"), {}, "model.reference_path: expected null with model.lora.path"),
    (
        ("model.reference_path=a", "model.lora.quantize=4bit"),
        {},
        "model.reference_path: expected null with model.lora.q",
    ),
    (
        ("model.lora.quantize=4bit", "model.random_weights=true"),
        {},
        "model.lora.quantize: expected null with model.rand",
    ),
    (("model.lora.quantize=4bit", "trainer.accelerator=cpu"), {}, "model.lora.quantize: expected null without a CUDA"),
    (("model.lora.quantize=4bit", "strategy=fsdp"), {}, "model.lora.quantize: expected null, or strategy=auto or ddp"),
    (
        (ADAPTER, "strategy=fsdp_tp"),
        {},
        "model.lora.enabled: expected false, or strategy=auto, ddp or fsdp, found true",
    ),
    (
        ("model.lora.export=adapter",),
        {GENERATES: False},
        "model.lora.export: expected merged for a reward model, found",
    ),
    (("model.compile=true", "strategy=fsdp_tp"), {}, "model.compile: expected false with strategy=fsdp_tp, found true"),
    (("model.liger=true", "strategy=fsdp_tp"), {}, "model.liger: expected false with strategy=fsdp_tp, found true"),
    (("model.packed_attention=flex", "strategy=fsdp_tp"), {}, "model.packed_attention: expected pieces with strategy"),
    (("model.dropout=0.1", "strategy=fsdp_tp"), {}, "model.dropout: expected 0 with strategy=fsdp_tp, found 0.1"),
    (("optim=adamw_8bit", "strategy=fsdp"), {}, "optim._target_: expected another optimizer, or strategy=auto or ddp"),
    (("optim=adafactor", "strategy=fsdp_tp"), {}, "optim._target_: expected AdamW or RMSprop with strategy=fsdp_tp"),
    (
        ("data.max_tokens_per_batch=9", "data.packing=false"),
        {},
        "data.max_tokens_per_batch: expected null without packe",
    ),
    (
        ("data.max_tokens_per_batch=9", "strategy=fsdp"),
        {},
        "data.max_tokens_per_batch: expected null, or strategy=auto",
    ),
    (("data.max_examples=9", "data.streaming=true"), {}, "data.max_examples: expected null with data.streaming=true"),
    (("data.stratified=true", "data.streaming=true"), {}, "data.stratified: expected false with data.streaming=true"),
    (("data.workers=2", "data.streaming=true"), {}, "data.workers: expected 0 or 1 with data.streaming=true, found 2"),
    (
        ("data.select.labels_from_scores=median", "data.streaming=true"),
        {},
        "data.select.labels_from_scores: expected a number or prompt with data.streaming=true, found median",
    ),
    (
        ("model.reference=cached", "data.streaming=true"),
        {REFERENCE: True},
        "model.reference: expected auto, live or adapter with data.streaming=true, found cached",
    ),
    (
        ("model.reference_path=a", "data.streaming=true"),
        {REFERENCE: True},
        "model.reference_path: expected null with data.streaming=true, found a",
    ),
    (
        ("data.streaming=true",),
        {STEP_LABELS: True},
        "data.streaming: expected false for a loss that learns from labels",
    ),
    (("data.streaming=true",), {SEVERAL_VIEWS: True}, "data.streaming: expected false for a mixture of several views"),
    (
        ("data.stratified=true",),
        {SEVERAL_VIEWS: True},
        "data.stratified: expected false for a mixture of several views",
    ),
    (("data.streaming=true",), {COUNTS: True}, "data.streaming: expected false where weights of the loss are auto"),
    (
        ("model.reference=cached",),
        {DIVERGENCE: True},
        "model.reference: expected auto, live or adapter for a loss that",
    ),
    (("model.reference_path=x",), {DIVERGENCE: True}, "model.reference_path: expected null for a loss that compares"),
    (("strategy=fsdp",), {DIVERGENCE: True}, "strategy.name: expected auto or ddp for a loss that compares"),
    (("humanline.enabled=true",), {REFERENCE: False}, "humanline.enabled: expected false, or a loss with a reference"),
    (("reference_sync.every=2",), {REFERENCE: False}, "reference_sync.every: expected 0, or a loss with a reference"),
    (
        ("reference_sync.every=2",),
        {},
        "reference_sync.every: .* model.reference=auto, data.streaming=false",
    ),
    (("reference_sync.every=2", ADAPTER), {}, "reference_sync.every: .* model.reference=auto, model.lora.enabled=true"),
    (
        ("reference_sync.bias_power=0.2", "strategy=fsdp"),
        {},
        "reference_sync.bias_power: expected null, or strategy=auto or ddp",
    ),
    (("reference_sync.alpha=0.5",), {}, "reference_sync.alpha: expected 0.6, .* with reference_sync.every=0; set"),
    (("reference_sync.ema_power=0.5",), {}, "reference_sync.ema_power: expected null while the reference stays"),
    (("reference_sync.bias_power=0.2",), {}, "reference_sync.bias_power: expected null while the reference stays"),
    (("reference_sync.lag=1",), {}, "reference_sync.lag: expected 10.0, its default, while the reference stays"),
    (("reference_sync.every=2", "model.reference=cached"), {}, "reference_sync.every: .* with model.reference=cached"),
    (
        ("trainer.accumulate_grad_batches=2",),
        {WHOLE_STEP: True},
        "trainer.accumulate_grad_batches: expected 1 for a lo",
    ),
    (("sampling.kl=true",), {GENERATES: False}, "sampling.kl: expected auto or false for a reward model"),
    (("sampling.kl=true", "sampling.kl_prompts=0"), {}, "sampling.kl: expected auto or false without prompts"),
    (
        ("sampling.kl=true", "model.random_weights=true"),
        {},
        "sampling.kl: expected auto or false with model.random_weights=true.* kept by model.reference=live alone",
    ),
    (
        ("sampling.kl=true", "model.random_weights=true"),
        {REFERENCE: False},
        "sampling.kl: expected auto or false with model.random_weights=true.* a loss without a reference",
    ),
    (("sampling.kl=true", "strategy=deepspeed"), {}, "sampling.kl: expected auto or false with strategy=deepspeed"),
    (("sampling.win_rate=true", "sampling.kl=false"), {}, "sampling.win_rate: expected auto or false with sampling.kl"),
    (("sampling.kl_prompts=0",), {SAMPLES: True}, "sampling.kl_prompts: expected 1 or more for a loss that samples"),
    (
        ("model.random_weights=true",),
        {SAMPLES: True},
        "model.random_weights: expected false for a loss that samples the policy.* model.reference=live keeps",
    ),
    (("strategy=deepspeed",), {SAMPLES: True}, "strategy.name: expected auto, ddp or fsdp for a loss that samples"),
    (("sweep_seeds=[1,2]",), {}, "sweep_metric: expected a metric with .*, found null with sweep_seeds="),
    (("sweep_max_kl=1.0",), {}, "sweep_metric: expected a metric with .*, found null with sweep_max_kl=1.0"),
    (("data.streaming=true", "rounds.count=2"), {}, "data.streaming: expected false with rounds, found true"),
    ((ADAPTER, "model.lora.export=adapter", "rounds.count=2"), {}, "model.lora.export: expected merged with rounds"),
    (("model.lora.path=a", "before=sft"), {}, "model.lora.path: expected null with rounds, found a; the next round"),
    (("model.reference=live", *FIRST), {}, "model.reference: expected auto or cached with rounds.reference=first"),
    (("model.random_weights=true", *FIRST), {}, "rounds.reference: expected last with model.random_weights=true"),
]
"""Words of the command line and traits of the loss, and the error that they lead to."""


@cache
def configured(*words: str) -> dict[str, object]:
    return values_of(compose("output_dir=out", *words))


def values(words: tuple[str, ...], traits: dict[str, bool]) -> dict[str, object]:
    return configured(*words) | traits


def refused(rule: Rule, found: dict[str, object], message: str) -> bool:
    """Whether the rule refuses the values with this message."""
    try:
        rule.check(found)
    except ValueError as error:
        return re.search(message, str(error)) is not None
    return False


@pytest.mark.long
@pytest.mark.parametrize(("words", "traits", "message"), CASES)
def test_a_combination_is_refused_and_each_of_its_settings_alone_is_not(
    words: tuple[str, ...], traits: dict[str, bool], message: str
) -> None:
    found = values(words, traits)
    (rule,) = [rule for rule in RULES if refused(rule, found, message)]
    with pytest.raises(ValueError, match=r"^[\w.]+: expected .*, found "):  # perhaps by an earlier rule
        check_combinations(found)
    for left_out in words:
        others = values(tuple(word for word in words if word != left_out), traits)
        assert not refused(rule, others, message), left_out
    if traits:
        assert not refused(rule, values(words, {trait: not value for trait, value in traits.items()}), message)


def test_every_rule_has_a_case() -> None:
    cases = [(values(words, traits), message) for words, traits, message in CASES]
    assert [rule for rule in RULES if not any(refused(rule, *case) for case in cases)] == []


def test_rules_read_keys_that_there_are() -> None:
    known = {*values((), {}), *TRAITS}
    assert {key for rule in RULES for key in rule.conditions} <= known
    assert all(rule.expected for rule in RULES)


ACCEPTED = [
    ("strategy=ddp", "trainer.devices=2"),
    ("trainer.devices=auto",),
    ("trainer.devices=[3]",),
    ("precision=16-mixed", "trainer.accelerator=gpu"),
    ("model.attention=flash_attention_2", "precision=bf16-true"),
    ("model.attention=flash_attention_2", "precision=bf16-mixed", "strategy=fsdp"),
    ("reference_sync.every=2", "data.streaming=true"),  # auto means live
    ("reference_sync.every=2", "model.reference=live", "reference_sync.alpha=0.5", "reference_sync.lag=1"),
    ("before=sft", "model.random_weights=true", *FIRST),
    ("optim=rmsprop", "strategy=fsdp_tp"),
    (SELECTIVE, "model.liger=true", "strategy=fsdp"),
    ("model.gradient_checkpointing=offload", "model.compile=true", "data.max_tokens_per_batch=64"),
    ("sweep_seeds=[1,2]", "sweep_metric=val/loss"),
    ("data.workers=many", "data.streaming=true"),  # refused elsewhere, for what it is
]


@pytest.mark.parametrize("words", ACCEPTED)
def test_what_goes_together_is_accepted(words: tuple[str, ...]) -> None:
    check_combinations(values(words, {}))


def test_every_loss_and_strategy_is_accepted_by_default() -> None:
    for word in ("loss=kto", "strategy=ddp", "strategy=fsdp", "strategy=fsdp_tp", "data=files", "model=hf"):
        check_combinations(values((word,), dict.fromkeys((REFERENCE, GENERATES), True)))


def test_a_rule_whose_keys_are_not_all_known_is_passed_over() -> None:
    check_combinations({"model.compile": True})
    with pytest.raises(ValueError, match=r"^model\.liger: "):
        check_combinations({"model.compile": True, "model.liger": True})


def test_the_table_has_a_row_for_each_rule() -> None:
    rows = list(table())
    assert len(rows) == len(RULES)
    assert ("model.liger", "model.compile", "false with model.compile=true", "") in rows
