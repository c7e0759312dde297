"""Loads a backbone from a model's files, and defines the protocol of objects that provide an objective with one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from halos.policy.backbone import Backbone
from halos.policy.kernels.liger import use_liger
from halos.policy.loading import ModelSpec
from halos.policy.logprobs.attention import attend_by_flex
from halos.policy.logprobs.compiling import compile_layers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ProvidesBackbone(Protocol):
    """Where an objective gets its backbone: a :class:`Backbone` that is loaded, or a factory that loads one later."""

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
    spec: ModelSpec,
    *,
    dtype: torch.dtype = torch.float32,
    new_tokens: Sequence[int] = (),
    vocabulary: int = 0,
    with_reference: bool = False,
    adapter_reference: bool = False,
    shard: Callable[[Backbone], None] | None = None,
) -> Backbone:
    """Load the policy, and a live reference if requested.

    Args:
        spec: the model.
        dtype, new_tokens, vocabulary: see :meth:`ModelSpec.load`.
        with_reference, adapter_reference: see :class:`Backbone`.
        shard: shards the backbone's models, which have no weights yet, and then fills in the weights.
    """
    load = spec.load if shard is None else spec.skeleton
    backbone = Backbone(
        load(dtype=dtype, new_tokens=new_tokens, vocabulary=vocabulary),
        with_reference=with_reference,
        adapter_reference=adapter_reference,
        head_chunk=spec.head_chunk,
        statistics=spec.statistics,
        router_loss=spec.router_loss,
    )
    # Models are sharded before they have weights, so that no rank ever holds a whole model.
    if shard is not None:
        shard(backbone)
    use_fast_layers(backbone, spec)
    return backbone


def use_fast_layers(backbone: Backbone, spec: ModelSpec) -> None:
    """Compile the layers, or replace layers and attention by other kernels, as ``spec`` requires."""
    for member in backbone.with_reference_backbone():
        if spec.compile:
            compile_layers(member.policy)
        if spec.liger:
            use_liger(member.policy)
        if spec.packed_attention == "flex":
            attend_by_flex(member.policy)
