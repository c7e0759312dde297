"""What a run needs: memory of each device by part, and time, by formulas that are simple enough to be checked by hand.

P parameters, w bytes a weight (2 with bf16-true, else 4), a bytes an activation (2 with bf16 or 16-mixed, else 4), T
tokens with gradient in a micro-batch of one device, n devices over which ``fsdp`` divides:

- weights, gradients, and a live reference: P·w / n each
- optimizer: AdamW 2·P·w / n, RMSprop half of it, 8-bit AdamW 2·P / n, Adafactor nothing worth counting
- compute copies: what a forward reads in another form than it is kept in. Under mixed precision 2·P (autocast keeps its
  casts of the weights), under ``fsdp`` instead the embeddings, the head and two layers gathered whole
- activations: T·a·(layers·(9·h + 2·k + m·i) + 3·h) for hidden size h, keys of width k, an MLP of width i, of which a
  gated one keeps m = 4 tensors and another 2; with gradient checkpointing T·a·(layers·h + one layer). On a CPU, unless
  in bf16-true, RMSNorm and SwiGLU keep fewer temporaries: 7·h for 9·h, m = 3
- logits: a chunk of ``head_chunk`` positions over the vocabulary V, in float32 three times (values, their softmax, its
  gradient); without chunks every position of T

Time: a product with a weight takes two operations a token, attention 4·layers·width for each pair of tokens that see
each other; a backward takes twice a forward, gradient checkpointing another forward, y' of KTO and the reference one
forward each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from halos.policy.kernels.elementwise import lean_modules

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder: all its ``parameters``, ``matrices`` of its layers among them, and its sizes."""

    parameters: int
    matrices: int
    layers: int
    hidden: int
    attention: int
    keys: int
    mlp: int
    gated: bool
    vocabulary: int
    lean: bool = False
    """Whether its RMSNorm and SwiGLU keep fewer temporaries on a CPU (:mod:`halos.policy.kernels.elementwise`)."""

    @classmethod
    def of(cls, model: Any) -> Self:
        """That of a model of transformers, whose parameters may be without memory."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        table = model.get_output_embeddings().weight
        tables = {id(model.get_input_embeddings().weight), id(table)}
        linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} - tables
        everything = {id(p): p for p in model.parameters()}
        return cls(
            parameters=sum(p.numel() for p in everything.values()),
            matrices=sum(everything[key].numel() for key in linear),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            attention=heads * width,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
            mlp=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            gated=any(name.endswith("gate_proj") for name, _ in model.named_modules()),
            vocabulary=table.shape[0],
            lean=any(True for _ in lean_modules(model)),
        )

    def layer(self, *, lean: bool = False) -> int:
        """Activations that one layer keeps for its backward pass, in numbers a token."""
        mlp = (4 - lean if self.gated else 2) * self.mlp
        return (9 - 2 * lean) * self.hidden + 2 * self.keys + mlp

    def forward(self, tokens: float, length: float) -> float:
        """Operations of a forward over ``tokens`` in sequences of ``length``, each position scored."""
        products = 2 * (self.matrices + self.vocabulary * self.hidden)
        return tokens * (products + 4 * self.layers * self.attention * length / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Tokens of one example: ``trained`` with gradient, ``read`` without (y'), in sequences of ``length``."""

    trained: float
    read: float
    length: float

    @classmethod
    def of(cls, prompt: float, completion: float, *, branches: int, mismatched: bool, shared: bool) -> Self:
        """Of an objective that trains on ``branches`` completions of a prompt, ``shared`` where it is computed once
        for all of them; beside them a ``mismatched`` one is only read."""
        prompts = 1 if shared else branches
        read = (completion if shared else prompt + completion) if mismatched else 0
        return cls(trained=prompts * prompt + branches * completion, read=read, length=prompt + completion)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a run is computed. ``divided``: devices over which the model is divided; ``state``: bytes of the optimizer a
    parameter; ``head_chunk``: None for all positions at once."""

    precision: str = "32-true"
    cpu: bool = False
    divided: int = 1
    state: float = 8.0
    live_reference: bool = False
    checkpointing: bool = False
    head_chunk: int | None = 512

    @property
    def weight(self) -> int:
        return 2 if self.precision == "bf16-true" else 4

    @property
    def activation(self) -> int:
        return 4 if self.precision == "32-true" else 2


def memory(shape: Shape, setting: Setting, *, tokens: float) -> dict[str, float]:
    """Bytes that a device holds at the peak of a step, by part, for ``tokens`` with gradient in its largest
    micro-batch."""
    weights = shape.parameters * setting.weight / setting.divided
    lean = shape.lean and setting.cpu and setting.precision != "bf16-true"
    layer = shape.layer(lean=lean)
    kept = shape.layers * (shape.hidden if setting.checkpointing else layer)
    once = 3 * shape.hidden + (layer if setting.checkpointing else 0)
    positions = tokens if setting.head_chunk is None else min(tokens, setting.head_chunk)
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": shape.parameters * setting.state / setting.divided,
        "reference": weights if setting.live_reference else 0.0,
        "compute copies": _copies(shape, setting),
        "activations": tokens * setting.activation * (kept + once),
        "logits": 3 * 4 * positions * shape.vocabulary,
    }


def _copies(shape: Shape, setting: Setting) -> float:
    if setting.divided > 1:
        tables = shape.parameters - shape.matrices
        return setting.activation * (tables + 2 * shape.matrices / shape.layers)
    return 2.0 * shape.parameters if setting.precision.endswith("mixed") else 0.0


def operations(
    shape: Shape, example: Example, *, reference: bool, live: bool, checkpointing: bool, epochs: float
) -> float:
    """Floating-point operations for one example: ``epochs`` passes of training and the reference, which is computed
    once if it is cached and in every pass if it is ``live``."""
    trained = shape.forward(example.trained, example.length)
    read = shape.forward(example.read, example.length)
    training = epochs * (trained * (4 if checkpointing else 3) + read)
    return training + (trained + read) * (epochs if live else 1) * reference
