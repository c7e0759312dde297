"""Which settings do not go together: one list, checked before any long work and printed in the documentation.

Each rule names the keys that it reads. A rule is checked wherever all of them are known: the command checks what the
configuration says as soon as it is composed, and once more with :data:`TRAITS` when the objective has been built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from halos.config.flat import flatten

Value = object

TRAITS = {
    "loss (reference)": "whether the loss reads a reference",
    "loss (whole step)": "whether the loss needs all examples of an optimizer step at once",
    "loss (label counts)": "whether weights of the loss are set by the counts of all training data",
    "loss (generates)": "whether the trained policy generates text; reward models do not",
    "before": "whether the run has a round 0",
    "rounds": "whether the run is one of several rounds, or has a round 0",
}
"""Keys of rules that are no configuration keys, and what their value (a boolean) says."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Settings that are refused together.

    Attributes:
        keys: the keys that the rule reads; the first is the one to change, and begins the error's line.
        refused: takes the keys' values in their order and returns whether they are refused.
        expected: values that are accepted, in words; begins with those of the first key.
        reason: why, or what to do instead.
    """

    keys: tuple[str, ...]
    refused: Callable[..., bool]
    expected: str
    reason: str = ""

    def check(self, values: Mapping[str, Value]) -> None:
        """Raise ``ValueError`` if the values are refused; a rule that misses one of its keys is passed over."""
        if not all(key in values for key in self.keys):
            return
        found = [values[key] for key in self.keys]
        if self.refused(*found):
            raise ValueError(self._message(found))

    def _message(self, found: list[Value]) -> str:
        others = zip(self.keys[1:], found[1:], strict=True)
        settings = [f"{key}={_yaml(value)}" for key, value in others if key not in TRAITS]
        beside = f" with {', '.join(settings)}" if settings else ""
        reason = f"; {self.reason}" if self.reason else ""
        return f"{self.keys[0]}: expected {self.expected}, found {_yaml(found[0])}{beside}{reason}"


def _yaml(value: Value) -> str:
    # As the user would write it on the command line.
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _above(value: Value, limit: int) -> bool:
    # What is no number is refused elsewhere, by a check of that key alone.
    return isinstance(value, int) and value > limit


def _sharded(strategy: str) -> bool:
    return strategy.startswith("fsdp")


def _is_flash(attention: str | None) -> bool:
    return str(attention).startswith("flash")


def _several(devices: str | int | list[int] | None) -> bool:
    count = len(devices) if isinstance(devices, list) else devices
    return str(count) not in ("None", "auto", "1")


def _computes_in_float32(precision: str, strategy: str) -> bool:
    # Under FSDP bf16-mixed keeps a bfloat16 copy of the weights to compute with; autocast keeps float32 weights.
    return precision != "bf16-true" and not (precision == "bf16-mixed" and _sharded(strategy))


RULES: tuple[Rule, ...] = (
    # Precision and devices
    Rule(
        ("precision", "strategy.name"),
        lambda precision, strategy: precision == "16-mixed" and _sharded(strategy),
        "bf16-mixed, bf16-true or 32-true under fsdp and fsdp_tp",
        "float16 needs loss scaling, which these have not",
    ),
    Rule(
        ("precision", "trainer.accelerator"),
        lambda precision, accelerator: precision == "16-mixed" and accelerator not in ("auto", "gpu", "cuda"),
        "bf16-mixed, bf16-true or 32-true without a CUDA device",
    ),
    Rule(
        ("trainer.devices", "strategy.name"),
        lambda devices, strategy: strategy == "auto" and _several(devices),
        "1 with strategy=auto, which uses one device",
        "set strategy=ddp for several",
    ),
    # The model
    Rule(
        ("model.attention", "precision", "strategy.name"),
        lambda attention, precision, strategy: _is_flash(attention) and _computes_in_float32(precision, strategy),
        "sdpa or null",
        "flash attention computes with weights in bfloat16 alone (precision=bf16-true)",
    ),
    Rule(
        ("model.packed_attention", "trainer.accelerator"),
        lambda attention, accelerator: attention == "flex" and accelerator == "cpu",
        "pieces without a CUDA device",
    ),
    Rule(
        ("model.packed_attention", "model.compile"),
        lambda attention, compiled: attention == "flex" and compiled,
        "pieces with model.compile=true",
    ),
    Rule(
        ("model.liger", "model.compile"),
        lambda liger, compiled: liger and compiled,
        "false with model.compile=true",
    ),
    Rule(
        ("model.reference", "model.lora.enabled"),
        lambda reference, lora: reference == "adapter" and not lora,
        "auto, cached or live without LoRA",
        "an adapter that is switched off is a reference only where there is an adapter (model.lora.enabled=true)",
    ),
    Rule(
        ("model.reference_path", "model.reference"),
        lambda path, reference: path is not None and reference not in ("auto", "cached"),
        "null unless model.reference=cached",
        "the reference model is loaded to fill the cache, and not kept",
    ),
    Rule(
        ("model.reference_path", "model.lora.path"),
        lambda path, adapter: path is not None and adapter is not None,
        "null with model.lora.path",
        "the adapter that the policy starts from is part of the reference",
    ),
    Rule(
        ("model.reference_path", "model.lora.quantize"),
        lambda path, quantize: path is not None and quantize is not None,
        "null with model.lora.quantize",
    ),
    Rule(
        ("model.lora.quantize", "model.random_weights"),
        lambda quantize, random: quantize is not None and random,
        "null with model.random_weights=true",
        "weights are quantized as they are read from a hub id or a directory",
    ),
    Rule(
        ("model.lora.quantize", "trainer.accelerator"),
        lambda quantize, accelerator: quantize is not None and accelerator == "cpu",
        "null without a CUDA device",
    ),
    Rule(
        ("model.lora.quantize", "strategy.name"),
        lambda quantize, strategy: quantize is not None and _sharded(strategy),
        "null, or strategy=auto or ddp",
        "4-bit weights are not divided",
    ),
    Rule(
        ("model.lora.enabled", "strategy.name"),
        lambda lora, strategy: lora and strategy not in ("auto", "ddp", "fsdp"),
        "false, or strategy=auto, ddp or fsdp",
    ),
    Rule(
        ("model.lora.export", "loss (generates)"),
        lambda export, generates: export == "adapter" and not generates,
        "merged for a reward model",
    ),
    # Tensor parallelism divides the layers' own products, and needs to know each of them
    *(
        Rule(
            (key, "strategy.name"),
            lambda value, strategy, accepted=accepted: strategy == "fsdp_tp" and value != accepted,
            f"{_yaml(accepted)} with strategy=fsdp_tp",
            reason,
        )
        for key, accepted, reason in (
            ("model.compile", False, ""),
            ("model.liger", False, ""),
            ("model.packed_attention", "pieces", ""),
            ("model.dropout", 0, "ranks would have to draw differently for their own heads, and alike for all else"),
        )
    ),
    # Optimizers
    Rule(
        ("optim._target_", "strategy.name"),
        lambda target, strategy: target.endswith(".BitsAndBytesAdamW") and _sharded(strategy),
        "another optimizer, or strategy=auto or ddp",
        "bitsandbytes' kernels take whole tensors",
    ),
    Rule(
        ("optim._target_", "strategy.name"),
        lambda target, strategy: strategy == "fsdp_tp" and target.endswith(".Adafactor"),
        "AdamW or RMSprop with strategy=fsdp_tp",
        "Adafactor's means of rows and columns are of whole matrices",
    ),
    # The data
    Rule(
        ("data.max_tokens_per_batch", "data.packing"),
        lambda limit, packing: limit is not None and not packing,
        "null without packed rows",
        "set data.packing=true",
    ),
    Rule(
        ("data.max_tokens_per_batch", "strategy.name"),
        lambda limit, strategy: limit is not None and strategy not in ("auto", "ddp"),
        "null, or strategy=auto or ddp",
    ),
    Rule(
        ("data.max_examples", "data.streaming"),
        lambda limit, streaming: limit is not None and streaming,
        "null with data.streaming=true",
        "trainer.max_steps limits a stream",
    ),
    Rule(
        ("data.stratified", "data.streaming"),
        lambda stratified, streaming: stratified and streaming,
        "false with data.streaming=true",
        "the order of a stream is not known beforehand",
    ),
    Rule(
        ("data.workers", "data.streaming"),
        lambda workers, streaming: _above(workers, 1) and streaming,
        "0 or 1 with data.streaming=true",
        "one process reads, tokenises and collates a stream",
    ),
    Rule(
        ("data.select.labels_from_scores", "data.streaming"),
        lambda threshold, streaming: threshold == "median" and streaming,
        "a number or prompt with data.streaming=true",
        "the median of a stream is not known before all of it is read",
    ),
    Rule(
        ("model.reference", "data.streaming", "loss (reference)"),
        lambda cached, streaming, reference: cached == "cached" and streaming and reference,
        "auto, live or adapter with data.streaming=true",
        "a stream's log-probs cannot be computed before it is read",
    ),
    Rule(
        ("model.reference_path", "data.streaming", "loss (reference)"),
        lambda path, streaming, reference: path is not None and streaming and reference,
        "null with data.streaming=true",
        "its log-probs would have to be computed before the stream is read",
    ),
    # The objective
    Rule(
        ("data.streaming", "loss (label counts)"),
        lambda streaming, counts: streaming and counts,
        "false where weights of the loss are auto",
        "they are set by the counts of all training data; give numbers",
    ),
    Rule(
        ("humanline.enabled", "loss (reference)"),
        lambda enabled, reference: enabled and not reference,
        "false, or a loss with a reference",
    ),
    Rule(
        ("reference_sync.every", "loss (reference)"),
        lambda every, reference: _above(every, 0) and not reference,
        "0, or a loss with a reference",
    ),
    Rule(
        ("reference_sync.every", "model.reference", "data.streaming", "model.lora.enabled"),
        # With a stream, and without LoRA, auto means live.
        lambda every, reference, streaming, lora: (
            _above(every, 0) and reference != "live" and not (reference == "auto" and streaming and not lora)
        ),
        "0, or model.reference=live",
        "only a reference that is kept as a model can move",
    ),
    Rule(
        ("trainer.accumulate_grad_batches", "loss (whole step)"),
        lambda accumulate, whole_step: _above(accumulate, 1) and whole_step,
        "1 for a loss that needs all examples of a step at once",
        "raise data.batch_size or trainer.devices instead",
    ),
    # Sweeps
    Rule(
        ("sweep_metric", "sweep_seeds", "sweep_max_kl"),
        lambda metric, seeds, max_kl: metric is None and not (seeds is None and max_kl is None),
        "a metric with sweep_seeds and sweep_max_kl",
        "such as sweep_metric=samples/policy_desirable",
    ),
    # Rounds
    Rule(
        ("data.streaming", "rounds.count"),
        lambda streaming, count: streaming and _above(count, 1),
        "false with rounds",
        "they sample the prompts of all data",
    ),
    Rule(
        ("model.lora.export", "model.lora.enabled", "rounds"),
        lambda export, enabled, rounds: rounds and enabled and export != "merged",
        "merged with rounds",
        "the next round starts from the export",
    ),
    Rule(
        ("model.lora.path", "rounds"),
        lambda path, rounds: rounds and path is not None,
        "null with rounds",
        "the next round starts from the merged export, which holds the adapter already; merge it into its base and set "
        "model.path to that",
    ),
    Rule(
        ("model.reference", "rounds.reference", "rounds.count"),
        lambda reference, which, count: _above(count, 1) and which == "first" and reference not in ("auto", "cached"),
        "auto or cached with rounds.reference=first",
        "the later rounds have another model as their reference than they start from",
    ),
    Rule(
        ("rounds.reference", "rounds.count", "model.random_weights", "model.reference_path", "before"),
        lambda which, count, random, path, before: (
            _above(count, 1) and which == "first" and random and path is None and not before
        ),
        "last with model.random_weights=true",
        "the weights that round 1 starts from are kept nowhere",
    ),
)
"""All combinations that are refused, in the order in which they are checked."""


def values_of(cfg: DictConfig) -> dict[str, Value]:
    """Return the values that rules read: the configuration by flat keys, and the traits that it decides."""
    values: dict[str, Value] = flatten(OmegaConf.to_container(cfg, resolve=True))
    values["before"] = bool(cfg.get("before"))
    values["rounds"] = values["before"] or values.get("rounds.count", 1) != 1
    return values


def check_combinations(values: Mapping[str, Value]) -> None:
    """Check all rules whose keys are known.

    Args:
        values: by flat keys (``model.lora.enabled``), and those of :data:`TRAITS` that are known.

    Raises:
        ValueError: naming the first key to change, with what was expected, what was found and what to do.
    """
    for rule in RULES:
        rule.check(values)


def table() -> Iterator[tuple[str, str, str, str]]:
    """Yield a row for each rule, for the documentation: the key, what it goes with, what is expected, and why."""
    for rule in RULES:
        yield rule.keys[0], ", ".join(rule.keys[1:]), rule.expected, rule.reason
