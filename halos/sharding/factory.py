"""The backbone of a run, made when the strategy is ready for its weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from halos.policy.backbone import Backbone
from halos.policy.export.language_model import unconditioned
from halos.policy.loading import ModelSpec, add_control_tokens
from halos.sharding.sharding import Sharding
from halos.sharding.weights import make_backbone

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class BackboneFactory:
    """Loads the policy, and its reference where one is computed in each step, once the strategy is ready.

    Under FSDP2 every rank loads only its part of the weights, so nothing may be loaded before. Only the tokenizer is
    read at once.

    Args:
        spec: the model; its ``reference`` is resolved (``cached``, ``live`` or ``adapter``).
        dtype: of the weights.

    Raises:
        ValueError: for a model that cannot be loaded, and for a reference with another tokenizer.
    """

    def __init__(self, spec: ModelSpec, *, dtype: torch.dtype = torch.float32) -> None:
        spec.check()
        self.spec, self.dtype = spec, dtype
        self.new_tokens: list[int] = []
        self._tokenizer = spec.tokenizer()
        if (
            spec.reference_path is not None
            and spec.of_reference().tokenizer().get_vocab() != self._tokenizer.get_vocab()
        ):
            raise ValueError(f"model.reference_path: expected the tokenizer of {spec.path}, found another")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, with the control tokens that were added."""
        return self._tokenizer

    def add_control_tokens(self, texts: Iterable[str]) -> None:
        """Make each text a single token of the tokenizer, and of the policy when it is loaded."""
        controls = list(texts)
        for text in controls:
            # The chat template of a policy that was trained with it ends with it already.
            unconditioned(self._tokenizer, text)
        self.new_tokens += add_control_tokens(self._tokenizer, controls)

    def make(self, *, reference: bool, sharding: Sharding | None) -> Backbone:
        """Load the policy, and a live reference if the objective needs one and its log-probs are not cached."""
        mode = self.spec.reference if reference else None
        backbone = make_backbone(
            self.spec,
            sharding,
            dtype=self.dtype,
            new_tokens=self.new_tokens,
            vocabulary=len(self._tokenizer),
            with_reference=mode == "live",
            adapter_reference=mode == "adapter",
        )
        backbone.spec, backbone.tokenizer = self.spec, self._tokenizer
        return backbone

    def reference_scorer(self, backbone: Backbone, sharding: Sharding | None) -> Backbone:
        """The model whose log-probs are the reference's: the policy before its first step, or ``reference_path``'s."""
        if self.spec.reference_path is None and not backbone.updated:
            return backbone
        return make_backbone(
            self.spec.of_reference(),
            sharding,
            dtype=self.dtype,
            new_tokens=(),
            vocabulary=len(self._tokenizer),
            with_reference=False,
        )
