"""Load a run's backbone once the strategy is set up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch

from halos.policy.backbone import Backbone
from halos.policy.construction import add_control_tokens
from halos.policy.export.base_model import BaseModel
from halos.policy.loading import LoadOptions, ModelSpec
from halos.sharding.sharding import Sharding
from halos.sharding.weights import make_backbone


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
        self.tokenizer = spec.tokenizer()
        """The policy's tokenizer, including the control tokens that were added."""
        reference = self.tokenizer if spec.reference_path is None else spec.of_reference().tokenizer()
        if reference.get_vocab() != self.tokenizer.get_vocab():
            raise ValueError(f"model.reference_path: expected the tokenizer of {spec.path}, found another")
        self.new_tokens = spec.missing_tokens(self.tokenizer)

    @cached_property
    def base(self) -> BaseModel:
        """What the export takes over from the policy's base; read once, so that the run's end needs no hub."""
        return self.spec.base(self.dtype)

    def add_control_tokens(self, texts: Iterable[str]) -> None:
        """Make each text a single token of the tokenizer now, and of the policy when it is loaded."""
        self.new_tokens += add_control_tokens(self.tokenizer, texts)
        self.spec.check_new_tokens(self.new_tokens)

    def make(self, *, reference: bool, sharding: Sharding | None) -> Backbone:
        """Load the policy, and a live reference if the objective needs one whose log-probs are not cached."""
        backbone = make_backbone(self.spec, sharding, self._options(self.new_tokens), reference=reference)
        backbone.tokenizer = self.tokenizer
        return backbone

    def reference_scorer(self, backbone: Backbone, sharding: Sharding | None) -> Backbone:
        """Return the model that computes the reference's log-probs before training.

        It is the model in ``reference_path`` or, if that is not set, the policy before its first step. If the policy
        was trained, its initial weights are loaded again.
        """
        if self.spec.reference_path is None and not backbone.updated:
            return backbone
        return make_backbone(self.spec.of_reference(), sharding, self._options(()))

    def _options(self, new_tokens: Sequence[int]) -> LoadOptions:
        return LoadOptions(dtype=self.dtype, new_tokens=new_tokens, vocabulary=len(self.tokenizer))
