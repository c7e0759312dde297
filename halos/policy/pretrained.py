"""Loads a backbone from a model's files; and the protocols of objects that provide or shard a backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from halos.policy.backbone import Backbone
from halos.policy.kernels.liger import use_liger
from halos.policy.loading import LoadOptions, ModelSpec
from halos.policy.logprobs.attention_choice import AUTO, PIECES
from halos.policy.logprobs.compiling import compile_layers
from halos.policy.logprobs.packed import attend_by

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedTokenizerBase


class ModelSharding(Protocol):
    """How models are sharded over ranks. :class:`halos.sharding.sharding.Sharding` implements this protocol."""

    @property
    def device(self) -> torch.device:
        """The device that computes."""

    @property
    def tensor_group(self) -> ProcessGroup | None:
        """The devices that compute the same batches together; None: each device computes its own."""

    def shard_beside(self, module: nn.Module) -> None:
        """Shard the modules of an objective other than the backbone."""

    def begin_micro_batch(self, module: nn.Module, *, last: bool) -> None:
        """Prepare for a backward pass."""


class ProvidesBackbone(Protocol):
    """Provides an objective with its backbone: a loaded :class:`Backbone`, or a factory that loads one later."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""

    def add_control_tokens(self, texts: Iterable[str]) -> None:
        """Make each text a single token of the tokenizer and of the policy."""

    def make(self, *, reference: bool, sharding: Any) -> Backbone:
        """Return the backbone.

        Args:
            reference: the objective needs a reference. The backbone then has a model for it, unless the reference's
                log-probs are cached.
            sharding: how to shard the models (:class:`halos.sharding.sharding.Sharding`), or None.
        """

    def reference_scorer(self, backbone: Backbone, sharding: Any) -> Backbone:
        """Return the model that computes the reference's log-probs before training: the backbone, or another one."""


def load_backbone(
    spec: ModelSpec, options: LoadOptions, *, reference: bool = False, shard: Callable[[Backbone], None] | None = None
) -> Backbone:
    """Load the policy.

    Args:
        spec: the model. Its ``reference`` must be resolved if the reference is to be loaded.
        options: see :class:`LoadOptions`.
        reference: whether an objective needs the reference. The backbone then has a model for it, unless the
            reference's log-probs are cached.
        shard: shards the backbone's models, which have no weights yet, and then fills in the weights.
    """
    mode = spec.reference if reference else None
    model = spec.load(options) if shard is None else spec.skeleton(options)
    backbone = Backbone(
        model,
        with_reference=mode == "live",
        adapter_reference=mode == "adapter",
        head_chunk=spec.head_chunk,
        statistics=spec.statistics,
        router_loss=spec.router_loss,
    )
    backbone.spec = spec
    # Models are sharded before they have weights, so that no rank ever holds a whole model.
    if shard is not None:
        shard(backbone)
    for member in backbone.with_reference_backbone():
        if spec.compile:
            compile_layers(member.policy)
        if spec.liger:
            use_liger(member.policy)
        attend_by(member.policy, _packed_attention(spec, backbone.sharding))
    return backbone


def _packed_attention(spec: ModelSpec, sharding: ModelSharding | None) -> str:
    # Where FlexAttention is refused, auto makes no choice either.
    divided = sharding is not None and sharding.tensor_group is not None
    without_choice = spec.compile or spec.gradient_checkpointing == "selective" or divided
    return PIECES if spec.packed_attention == AUTO and without_choice else spec.packed_attention
