"""Estimates the memory of each device and the time of a run, by formulas that are simple enough to check by hand.

Memory, for P parameters, w bytes a weight (2 with bf16-true, else 4), a bytes an activation (2 with bf16 or 16-mixed,
else 4), T tokens with gradient in a micro-batch of one device, and n devices over which ``fsdp`` divides the model:

- weights, gradients, and a live reference: P·w / n each
- optimizer: AdamW 2·P·w / n, RMSprop half of that, 8-bit AdamW 2·P / n, Adafactor next to nothing
- compute copies: weights in another form than they are stored in. Under mixed precision 2·P, as autocast keeps its
  casts of the weights; under ``fsdp`` the embeddings, the head and two layers, gathered from all devices
- activations: T·a·(layers·(9·h + 2·k + m·i) + 3·h) for hidden size h, keys of width k and an MLP of width i. A gated
  MLP keeps m = 4 tensors, another one 2. With gradient checkpointing T·a·(layers·h + one layer). On a CPU, unless in
  bf16-true, RMSNorm and SwiGLU keep fewer temporaries: 7·h instead of 9·h, m = 3
- logits: a chunk of ``head_chunk`` positions over the vocabulary V, three times in float32 (values, their softmax, its
  gradient); without chunks all positions of T

Time: a product with a weight takes two operations a token, and attention 4·layers·width for each pair of tokens that
see each other. A backward pass takes twice a forward pass, gradient checkpointing another forward pass, and KTO's y'
and the reference one forward pass each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from torch import nn

from halos.policy.kernels.elementwise import lean_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a decoder.

    Attributes:
        parameters: the number of all weights.
        matrices: the number of weights in the layers' linear maps.
        layers: decoder layers.
        hidden: width of the residual stream.
        attention: width of all query heads together.
        keys: width of all key heads together.
        mlp: inner width of the MLP.
        gated: whether the MLP has a gate, as SwiGLU has.
        vocabulary: rows of the LM head.
        lean: whether RMSNorm and SwiGLU keep fewer temporaries on a CPU (:mod:`halos.policy.kernels.elementwise`).
    """

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

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Return the sizes of a model, whose parameters may be on the meta device."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        table = model.get_output_embeddings().weight
        # Embeddings and the head may share their weight. Neither is one of the layers' matrices.
        tables = {id(model.get_input_embeddings().weight), id(table)}
        linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} - tables
        parameters = {id(p): p for p in model.parameters()}
        return cls(
            parameters=sum(p.numel() for p in parameters.values()),
            matrices=sum(parameters[key].numel() for key in linear),
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
        """Return how many numbers a layer keeps for its backward pass, for each token."""
        mlp_tensors = 2
        if self.gated:
            mlp_tensors = 3 if lean else 4
        return (7 if lean else 9) * self.hidden + 2 * self.keys + mlp_tensors * self.mlp

    def forward(self, tokens: float, length: float) -> float:
        """Return the operations of a forward pass over ``tokens`` in sequences of ``length``, each position scored."""
        products = 2 * (self.matrices + self.vocabulary * self.hidden)
        # Attention is causal: a token sees half of its sequence on average.
        return tokens * (products + 4 * self.layers * self.attention * length / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Tokens of one example.

    Attributes:
        trained: those that are read with gradient.
        read: those that are read without (KTO's y').
        length: tokens of one sequence, prompt and completion.
    """

    trained: float
    read: float
    length: float

    @classmethod
    def of(cls, prompt: float, completion: float, *, branches: int, mismatched: bool, shared: bool) -> Self:
        """Return the tokens of an example.

        Args:
            prompt: tokens of the prompt.
            completion: tokens of a completion.
            branches: completions of the prompt that the objective trains on.
            mismatched: whether another prompt's completion is read too, without gradient (KTO's y').
            shared: whether the prompt is computed once for all completions.
        """
        prompts = 1 if shared else branches
        read = (completion if shared else prompt + completion) if mismatched else 0
        return cls(trained=prompts * prompt + branches * completion, read=read, length=prompt + completion)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a run is computed.

    Attributes:
        precision: as in the configuration.
        cpu: whether it runs on CPUs.
        divided: devices over which the model is divided.
        state: bytes of the optimizer's state for each parameter.
        live_reference: whether a second model is the reference.
        checkpointing: whether activations are computed again in the backward pass.
        head_chunk: positions whose logits exist at a time; None for all.
    """

    precision: str = "32-true"
    cpu: bool = False
    divided: int = 1
    state: float = 8.0
    live_reference: bool = False
    checkpointing: bool = False
    head_chunk: int | None = 512

    @property
    def weight(self) -> int:
        """Bytes of a weight."""
        return 2 if self.precision == "bf16-true" else 4

    @property
    def activation(self) -> int:
        """Bytes of a number that a layer keeps."""
        return 4 if self.precision == "32-true" else 2


def memory(shape: Shape, setting: Setting, *, tokens: float) -> dict[str, float]:
    """Return the bytes that a device holds at the peak of a step, by part.

    Args:
        shape: the model.
        setting: how the run is computed.
        tokens: with gradient, in the device's largest micro-batch.
    """
    weights = shape.parameters * setting.weight / setting.divided
    lean = shape.lean and setting.cpu and setting.precision != "bf16-true"
    layer = shape.layer(lean=lean)
    # Checkpointing keeps each layer's input, and has the rest of one layer at a time.
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


def operations(shape: Shape, example: Example, setting: Setting, *, reference: bool, epochs: float) -> float:
    """Return the floating-point operations for one example over the whole run.

    Args:
        shape: the model.
        example: its tokens.
        setting: how the run is computed.
        reference: whether the objective reads a reference. A live one is computed in every pass, a cached one once.
        epochs: passes over the data.
    """
    trained = shape.forward(example.trained, example.length)
    read = shape.forward(example.read, example.length)
    training = epochs * (trained * (4 if setting.checkpointing else 3) + read)
    return training + (trained + read) * (epochs if setting.live_reference else 1) * reference
