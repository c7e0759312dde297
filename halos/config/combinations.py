"""Which settings do not go together: one list, checked before any long work and printed in the documentation.

Each rule names the keys that it reads, and is checked as soon as all of them are known. The command checks the rules
when the configuration is composed, and again, with the objective's :data:`TRAITS`, when the objective is built.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from omegaconf import DictConfig

from halos.config.nodes import flatten, plain

Value = object
Condition = Callable[[Value], bool]

REFERENCE, WHOLE_STEP = "loss (reference)", "loss (whole step)"
COUNTS, GENERATES = "loss (label counts)", "loss (generates)"
DIVERGENCE, SAMPLES = "loss (divergence)", "loss (samples)"
SEVERAL_VIEWS, STEP_LABELS = "loss (several views)", "loss (labels of steps)"
TRAITS = {
    REFERENCE: "whether the loss reads a reference",
    WHOLE_STEP: "whether the loss needs all examples of an optimizer step at once",
    COUNTS: "whether weights of the loss are set by the counts of all training data",
    DIVERGENCE: "whether the loss compares the policy's and the reference's distributions over the whole vocabulary",
    SAMPLES: "whether the loss reads the KL of replies that the policy samples in training",
    SEVERAL_VIEWS: "whether the parts of a mixture take several views, such as pairs and labels",
    STEP_LABELS: "whether the loss learns from labels of steps of replies (`loss.step_labels=true`)",
    GENERATES: "whether the trained policy generates text; reward models do not",
    "before": "whether the run has a round 0",
    "rounds": "whether the run is one of several rounds, or has a round 0",
}
"""Keys in rules that are not configuration keys, and the meaning of their value, a boolean."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Settings that are refused together.

    Attributes:
        conditions: for each key that the rule reads, a condition on its value. The settings are refused if all
            conditions hold. The first key is the one to change, and the error begins with it.
        expected: values of the first key that are accepted, in words.
        reason: why, or what to do instead.
    """

    conditions: dict[str, Condition]
    expected: str
    reason: str = ""

    def check(self, values: Mapping[str, Value]) -> None:
        """Raise ``ValueError`` if the values are refused. Without a value for each of its keys, the rule is skipped."""
        if not all(key in values and meets(values[key]) for key, meets in self.conditions.items()):
            return
        key, *others = self.conditions
        settings = [f"{other}={_yaml(values[other])}" for other in others if other not in TRAITS]
        context = f" with {', '.join(settings)}" if settings else ""
        reason = f"; {self.reason}" if self.reason else ""
        raise ValueError(f"{key}: expected {self.expected}, found {_yaml(values[key])}{context}{reason}")


def _yaml(value: Value) -> str:
    # As the user would write it on the command line.
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _one_of(*options: Value) -> Condition:
    return lambda value: value in options


def _none_of(*options: Value) -> Condition:
    return lambda value: value not in options


def _above(limit: int) -> Condition:
    # A value that is not a number is refused elsewhere, by a check of the key itself.
    return lambda value: isinstance(value, int) and value > limit


def _several_devices(value: Value) -> bool:
    return str(len(value) if isinstance(value, list) else value) not in ("None", "auto", "1")


def _starts(text: str) -> Condition:
    return lambda value: str(value).startswith(text)


def _ends(text: str) -> Condition:
    return lambda value: str(value).endswith(text)


_ON, _OFF, _SET, _UNSET = bool, _one_of(False), _none_of(None), _one_of(None)
_ANY_FSDP, _FLASH = _starts("fsdp"), _starts("flash")
_STREAMING: dict[str, Condition] = {"data.streaming": _ON}
_FIRST: dict[str, Condition] = {"rounds.reference": _one_of("first"), "rounds.count": _above(1)}
_SELECTIVE: dict[str, Condition] = {"model.gradient_checkpointing": _one_of("selective")}
_TENSOR_PARALLEL: dict[str, Condition] = {"strategy.name": _one_of("fsdp_tp")}
_STILL: dict[str, Condition] = {"reference_sync.every": _one_of(0)}
_MOVE = "set reference_sync.every=1, or the steps between two of its moves"
_SYNC = ("0, or model.reference=live", "only a reference that is kept as a model can move")
_METRIC = ("a metric with sweep_seeds and sweep_max_kl", "such as sweep_metric=samples/policy_desirable")

# fmt: off
RULES: tuple[Rule, ...] = (
    # Precision and devices
    Rule({"precision": _one_of("16-mixed"), "strategy.name": _ANY_FSDP},
         "bf16-mixed, bf16-true or 32-true under fsdp and fsdp_tp", "float16 needs loss scaling, which these have not"),
    Rule({"precision": _one_of("16-mixed"), "trainer.accelerator": _none_of("auto", "gpu", "cuda")},
         "bf16-mixed, bf16-true or 32-true without a CUDA device"),
    Rule({"trainer.devices": _several_devices, "strategy.name": _one_of("auto")},
         "1 with strategy=auto, which uses one device", "set strategy=ddp for several"),
    # The model
    Rule({"model.attention": _FLASH, "precision": _one_of("32-true", "16-mixed")},
         "sdpa or null", "flash attention computes in bfloat16 alone (precision=bf16-true)"),
    # Under FSDP bf16-mixed computes with a bfloat16 copy of the weights; autocast keeps float32 weights.
    Rule({"model.attention": _FLASH, "precision": _one_of("bf16-mixed"), "strategy.name": _none_of("fsdp", "fsdp_tp")},
         "sdpa or null", "flash attention needs weights in bfloat16 (precision=bf16-true)"),
    Rule({"model.packed_attention": _one_of("flex"), "trainer.accelerator": _one_of("cpu")},
         "pieces without a CUDA device"),
    Rule({"model.packed_attention": _one_of("flex"), "model.compile": _ON}, "pieces with model.compile=true"),
    Rule({"model.liger": _ON, "model.compile": _ON}, "false with model.compile=true"),
    # Of selective only results of operations that PyTorch sees one by one are kept.
    Rule(_SELECTIVE | {"model.compile": _ON}, "true or offload with model.compile=true",
         "products inside compiled code cannot be kept"),
    Rule(_SELECTIVE | {"model.packed_attention": _one_of("flex")}, "true or offload with model.packed_attention=flex",
         "the result of FlexAttention, which is compiled, cannot be kept"),
    Rule(_SELECTIVE | {"model.dropout": _ON}, "true or offload with dropout",
         "attention that is kept draws no random numbers when its layer runs again; later modules would draw those"),
    Rule(_SELECTIVE | {"data.max_tokens_per_batch": _SET}, "true or offload with data.max_tokens_per_batch",
         "products of all parts of a micro-batch would be kept at once"),
    Rule({"model.reference": _one_of("adapter"), "model.lora.enabled": _OFF}, "auto, cached or live without LoRA",
         "the model without its adapter is the reference; set model.lora.enabled=true"),
    Rule({"model.reference_path": _SET, "model.reference": _none_of("auto", "cached")},
         "null unless model.reference=cached", "the reference model is loaded to fill the cache, and not kept"),
    Rule({"model.reference_path": _SET, "model.lora.path": _SET}, "null with model.lora.path",
         "the adapter that the policy starts from is part of the reference"),
    Rule({"model.reference_path": _SET, "model.lora.quantize": _SET}, "null with model.lora.quantize"),
    Rule({"model.lora.quantize": _SET, "model.random_weights": _ON}, "null with model.random_weights=true",
         "weights are quantized as they are read from a hub id or a directory"),
    Rule({"model.lora.quantize": _SET, "trainer.accelerator": _one_of("cpu")}, "null without a CUDA device"),
    Rule({"model.lora.quantize": _SET, "strategy.name": _ANY_FSDP}, "null, or strategy=auto or ddp",
         "4-bit weights are not divided"),
    Rule({"model.lora.enabled": _ON, "strategy.name": _none_of("auto", "ddp", "fsdp")},
         "false, or strategy=auto, ddp or fsdp"),
    Rule({"model.lora.export": _one_of("adapter"), GENERATES: _OFF}, "merged for a reward model"),
    # Tensor parallelism divides the layers' own products, and needs to know each of them
    Rule({"model.compile": _ON} | _TENSOR_PARALLEL, "false with strategy=fsdp_tp"),
    Rule({"model.liger": _ON} | _TENSOR_PARALLEL, "false with strategy=fsdp_tp"),
    Rule({"model.packed_attention": _one_of("flex")} | _TENSOR_PARALLEL, "pieces with strategy=fsdp_tp"),
    Rule({"model.dropout": _ON} | _TENSOR_PARALLEL, "0 with strategy=fsdp_tp",
         "ranks would have to draw differently for their own heads, and alike for all else"),
    # Optimizers
    Rule({"optim._target_": _ends(".BitsAndBytesAdamW"), "strategy.name": _ANY_FSDP},
         "another optimizer, or strategy=auto or ddp", "bitsandbytes' kernels take whole tensors"),
    Rule({"optim._target_": _ends(".Adafactor")} | _TENSOR_PARALLEL, "AdamW or RMSprop with strategy=fsdp_tp",
         "Adafactor's means of rows and columns are of whole matrices"),
    # The data
    Rule({"data.max_tokens_per_batch": _SET, "data.packing": _OFF}, "null without packed rows",
         "set data.packing=true"),
    Rule({"data.max_tokens_per_batch": _SET, "strategy.name": _none_of("auto", "ddp")},
         "null, or strategy=auto or ddp"),
    Rule({"data.max_examples": _SET} | _STREAMING, "null with data.streaming=true",
         "trainer.max_steps limits a stream"),
    Rule({"data.stratified": _ON} | _STREAMING, "false with data.streaming=true",
         "the order of a stream is not known beforehand"),
    Rule({"data.workers": _above(1)} | _STREAMING, "0 or 1 with data.streaming=true",
         "one process reads, tokenises and collates a stream"),
    Rule({"data.select.labels_from_scores": _one_of("median")} | _STREAMING,
         "a number or prompt with data.streaming=true", "the median of a stream is known when all of it is read"),
    Rule({"model.reference": _one_of("cached")} | _STREAMING | {REFERENCE: _ON},
         "auto, live or adapter with data.streaming=true",
         "a stream's log-probs cannot be computed before it is read"),
    Rule({"model.reference_path": _SET} | _STREAMING | {REFERENCE: _ON}, "null with data.streaming=true",
         "its log-probs would have to be computed before the stream is read"),
    # The objective
    Rule({"model.reference": _one_of("cached"), DIVERGENCE: _ON}, "auto, live or adapter for a loss that compares "
         "distributions (loss.reference_point=token)", "a cache holds log-probs of the data's tokens alone"),
    Rule({"model.reference_path": _SET, DIVERGENCE: _ON}, "null for a loss that compares distributions "
         "(loss.reference_point=token)", "a reference that is kept as a model is the one that the policy started from"),
    Rule({"strategy.name": _ANY_FSDP, DIVERGENCE: _ON}, "auto or ddp for a loss that compares distributions "
         "(loss.reference_point=token)", "each rank needs both models' heads whole"),
    Rule(_STREAMING | {COUNTS: _ON}, "false where weights of the loss are auto",
         "they are set by the counts of all training data; give numbers"),
    Rule(_STREAMING | {SEVERAL_VIEWS: _ON}, "false for a mixture of several views", "a stream is read in one view"),
    Rule(_STREAMING | {STEP_LABELS: _ON}, "false for a loss that learns from labels of steps",
         "the steps that the limits cut are left out before the first step"),
    Rule({"data.stratified": _ON, SEVERAL_VIEWS: _ON}, "false for a mixture of several views",
         "its examples are records, which may have both labels"),
    Rule({"hub.push": _SET, "sweep_seeds": _SET}, "null with sweep_seeds",
         "the run of each seed would replace the model of the one before"),
    Rule({"humanline.enabled": _ON, REFERENCE: _OFF}, "false, or a loss with a reference"),
    Rule({"reference_sync.every": _above(0), REFERENCE: _OFF}, "0, or a loss with a reference"),
    Rule({"reference_sync.every": _above(0), "model.reference": _one_of("cached", "adapter")}, *_SYNC),
    # auto means live for a stream without LoRA alone
    Rule({"reference_sync.every": _above(0), "model.reference": _one_of("auto"), "data.streaming": _OFF}, *_SYNC),
    Rule({"reference_sync.every": _above(0), "model.reference": _one_of("auto"), "model.lora.enabled": _ON}, *_SYNC),
    Rule({"reference_sync.bias_power": _SET, "strategy.name": _ANY_FSDP}, "null, or strategy=auto or ddp",
         "its copies of the weights are not sharded"),
    Rule({"reference_sync.alpha": _none_of(0.6)} | _STILL, "0.6, its default, while the reference stays", _MOVE),
    Rule({"reference_sync.ema_power": _SET} | _STILL, "null while the reference stays", _MOVE),
    Rule({"reference_sync.bias_power": _SET} | _STILL, "null while the reference stays", _MOVE),
    Rule({"reference_sync.lag": _none_of(10.0)} | _STILL, "10.0, its default, while the reference stays", _MOVE),
    Rule({"trainer.accumulate_grad_batches": _above(1), WHOLE_STEP: _ON},
         "1 for a loss that needs all examples of a step at once",
         "raise data.batch_size or trainer.devices instead"),
    # Samples
    Rule({"sampling.kl": _one_of(True), GENERATES: _OFF}, "auto or false for a reward model, which does not generate"),
    Rule({"sampling.kl": _one_of(True), "sampling.kl_prompts": _one_of(0)}, "auto or false without prompts",
         "set sampling.kl_prompts=64"),
    Rule({"sampling.kl": _one_of(True), "model.random_weights": _ON, "model.reference": _none_of("live"),
          "model.lora.enabled": _OFF, "model.reference_path": _UNSET}, "auto or false with model.random_weights=true",
         "the weights that training starts from are kept by model.reference=live alone"),
    Rule({"sampling.kl": _one_of(True), "model.random_weights": _ON, REFERENCE: _OFF, "model.lora.enabled": _OFF,
          "model.reference_path": _UNSET}, "auto or false with model.random_weights=true",
         "a loss without a reference keeps no live one"),
    Rule({"sampling.kl": _one_of(True), "strategy.name": _one_of("deepspeed")}, "auto or false with strategy=deepspeed",
         "replies are not sampled from the weights that it divides; use fsdp"),
    Rule({"sampling.win_rate": _one_of(True), "sampling.kl": _one_of(False)}, "auto or false with sampling.kl=false",
         "the policy's replies are compared with those of the reference that its KL is measured against"),
    # The reference point that is the KL of samples (loss.reference_point=policy)
    Rule({"sampling.kl_prompts": _one_of(0), SAMPLES: _ON}, "1 or more for a loss that samples the policy "
         "(loss.reference_point=policy)", "they are the replies of a refresh; set sampling.kl=false to measure no KL"),
    Rule({"model.random_weights": _ON, "model.reference": _none_of("live"), "model.lora.enabled": _OFF,
          "model.reference_path": _UNSET, SAMPLES: _ON}, "false for a loss that samples the policy "
         "(loss.reference_point=policy)", "model.reference=live keeps the weights that training starts from"),
    Rule({"strategy.name": _one_of("deepspeed"), SAMPLES: _ON}, "auto, ddp or fsdp for a loss that samples the policy "
         "(loss.reference_point=policy)", "replies are not sampled from the weights that deepspeed divides"),
    # Checkpoints
    Rule({"checkpoint.export": _one_of("best"), "checkpoint.best": _UNSET}, "last without checkpoint.best",
         "name a metric, such as checkpoint.best=val/loss"),
    Rule({"checkpoint.export": _one_of("best"), "strategy.name": _one_of("deepspeed")},
         "last with strategy=deepspeed", "its checkpoints are divided in a form of its own"),
    # Sweeps
    Rule({"sweep_metric": _UNSET, "sweep_seeds": _SET}, *_METRIC),
    Rule({"sweep_metric": _UNSET, "sweep_max_kl": _SET}, *_METRIC),
    # Rounds
    Rule(_STREAMING | {"rounds.count": _above(1)}, "false with rounds", "they sample the prompts of all data"),
    Rule({"model.lora.export": _none_of("merged"), "model.lora.enabled": _ON, "rounds": _ON}, "merged with rounds",
         "the next round starts from the export"),
    Rule({"model.lora.path": _SET, "rounds": _ON}, "null with rounds",
         "the next round starts from the merged export, which holds the adapter already; merge it into its base and "
         "set model.path to that"),
    Rule({"model.reference": _none_of("auto", "cached")} | _FIRST, "auto or cached with rounds.reference=first",
         "the later rounds have another model as their reference than they start from"),
    Rule(_FIRST | {"model.random_weights": _ON, "model.reference_path": _UNSET, "before": _OFF},
         "last with model.random_weights=true", "the weights that round 1 starts from are kept nowhere"),
)
# fmt: on
"""All combinations that are refused, in the order in which they are checked."""


def values_of(cfg: DictConfig) -> dict[str, Value]:
    """Return the values that rules read: the configuration by flat keys, and the traits that it decides."""
    values: dict[str, Value] = flatten(plain(cfg))
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
    """Yield a row of the documentation for each rule: the key, the other keys, what is expected, and why."""
    for rule in RULES:
        key, *others = rule.conditions
        yield key, ", ".join(others), rule.expected, rule.reason
