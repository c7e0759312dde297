"""Load a run's backbone once the strategy is set up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from halos.policy.backbone import Backbone
from halos.policy.export.base_model import BaseModel
from halos.policy.loading import ModelSpec, add_control_tokens
from halos.sharding.sharding import Sharding
from halos.sharding.weights import make_backbone

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class BackboneFactory:
    """Loads the policy, and a live reference if the run needs one, once the strategy is set up.

    Under FSDP2 each rank loads only its own shards, and the strategy determines which those are. The constructor
    therefore loads the tokenizer and no weights.

    Args:
        spec: the model. Its ``reference`` must be resolved to ``cached``, ``live`` or ``adapter``.
        dtype: precision of the weights.

    Raises:
        ValueError: the model cannot be loaded, or the reference has another tokenizer.
    """

    def __init__(self, spec: ModelSpec, *, dtype: torch.dtype = torch.float32) -> None:
        spec.check()
        self.spec, self.dtype = spec, dtype
        self._tokenizer = spec.tokenizer()
        self.new_tokens = spec.missing_tokens(self._tokenizer)
        reference = self._tokenizer if spec.reference_path is None else spec.of_reference().tokenizer()
        if reference.get_vocab() != self._tokenizer.get_vocab():
            raise ValueError(f"model.reference_path: expected the tokenizer of {spec.path}, found another")

    @cached_property
    def base(self) -> BaseModel:
        """What the export takes over from the policy's base; read once, so that the run's end needs no hub."""
        return self.spec.base(self.dtype)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, including the control tokens that were added."""
        return self._tokenizer

    def add_control_tokens(self, texts: Iterable[str]) -> None:
        """Make each text a single token of the tokenizer now, and of the policy when it is loaded."""
        self.new_tokens += add_control_tokens(self._tokenizer, texts)
        self.spec.check_new_tokens(self.new_tokens)

    def make(self, *, reference: bool, sharding: Sharding | None) -> Backbone:
        """Load the policy, and a live reference if the objective needs one whose log-probs are not cached."""
        mode = self.spec.reference if reference else None
        live, adapter = mode == "live", mode == "adapter"
        backbone = self._load(self.spec, sharding, self.new_tokens, with_reference=live, adapter_reference=adapter)
        backbone.spec, backbone.tokenizer = self.spec, self._tokenizer
        return backbone

    def reference_scorer(self, backbone: Backbone, sharding: Sharding | None) -> Backbone:
        """Return the model that computes the reference's log-probs before training.

        It is the model in ``reference_path`` or, if that is not set, the policy before its first step. If the policy
        was trained, its initial weights are loaded again.
        """
        if self.spec.reference_path is None and not backbone.updated:
            return backbone
        return self._load(self.spec.of_reference(), sharding, (), with_reference=False)

    def _load(self, spec: ModelSpec, sharding: Sharding | None, tokens: Sequence[int], **reference: bool) -> Backbone:
        size = len(self._tokenizer)
        return make_backbone(spec, sharding, dtype=self.dtype, new_tokens=tokens, vocabulary=size, **reference)
