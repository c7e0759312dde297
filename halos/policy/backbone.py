"""Policy and frozen reference: everything that an objective needs of models."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import torch
from torch import Tensor, nn

from halos.data.batches.collate import Batch
from halos.policy.adapters import adapter_layers, adapter_parameters, as_reference, keep_only_adapters
from halos.policy.export.language_model import unconditioned
from halos.policy.kernels.elementwise import use_fewer_temporaries
from halos.policy.kernels.matmul import limit_kernel_caches, use_faster_products
from halos.policy.loading import ModelOptions, ModelSpec, add_control_tokens, grow_vocabulary
from halos.policy.logprobs.completions import LogProbs, completion_logprobs
from halos.policy.logprobs.head import evaluating
from halos.policy.logprobs.token_statistics import check_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Backbone(nn.Module):
    """The policy π_θ (a causal language model of transformers) and, where asked for, a frozen copy of it, π_ref.

    The reference is no submodule: it has no place in the optimizer, in checkpoints or in DDP's buckets. It follows the
    policy to its device and precision. ``head_chunk``: the most rows of logits that exist at a time, None for all.
    ``statistics``: what the policy's log-probs come with where they are asked for (:mod:`.token_statistics`).

    With LoRA the reference can be the policy itself with its adapter switched off (``adapter_reference``), and the
    state dict holds only what is trained.
    """

    def __init__(
        self,
        policy: nn.Module,
        *,
        with_reference: bool,
        adapter_reference: bool = False,
        head_chunk: int | None = None,
        statistics: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.head_chunk, self.adapter_reference = head_chunk, adapter_reference
        self.statistics = check_statistics(statistics)
        self.sharding: Any = None
        """How the models are divided over ranks (:class:`halos.sharding.sharding.Sharding`), if they are."""
        self.skeleton: tuple[Any, ...] = ()
        """Of a sharded policy: the same without memory for its weights, hidden from nn.Module in a tuple."""
        if getattr(policy, "get_output_embeddings", lambda: None)() is None:
            raise ValueError(f"expected a causal language model with an LM head, found {type(policy).__name__}")
        limit_kernel_caches()
        use_faster_products(policy)
        use_fewer_temporaries(policy)
        self.policy: Any = policy
        # A tuple hides it from nn.Module's registration.
        self._reference: tuple[Backbone, ...] = ()
        if with_reference:
            self._reference = (Backbone(frozen_copy(policy), with_reference=False, head_chunk=head_chunk),)
        if adapter_layers(policy):
            keep_only_adapters(self)
        elif adapter_reference:
            raise ValueError(f"expected a model with LoRA adapters, found a {type(policy).__name__} without any")
        self.reference_seconds = 0.0
        """Seconds spent on the reference's log-probs, before training or during it."""
        self.spec: ModelSpec | None = None
        """What the policy was loaded from, where that is known."""
        self.updated = False
        """Whether an optimizer has changed the policy, so that it is no longer its own reference."""
        self.control = ""
        """The control token that replies are conditioned on (CSFT)."""
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype = torch.float32, **options: Unpack[ModelOptions]
    ) -> Backbone:
        """The policy and tokenizer of a hub id, a folder or a GGUF file.

        Args:
            path: as ``model.path``.
            dtype: of the weights.
            options: the other parameters of :class:`halos.policy.ModelSpec`, such as ``lora=LoRA(enabled=True)`` or
                ``reference="live"``. By default the reference's log-probs are computed before the first step and
                cached.

        Raises:
            ValueError: for a path or options that cannot be loaded.
        """
        from halos.policy.pretrained import load_backbone

        spec = ModelSpec(path=str(path), **options).resolved(streaming=False)
        spec.check()
        tokenizer = spec.tokenizer()
        live, adapter = spec.reference == "live", spec.reference == "adapter"
        backbone = load_backbone(
            spec, dtype=dtype, vocabulary=len(tokenizer), with_reference=live, adapter_reference=adapter
        )
        backbone.spec, backbone._tokenizer = spec, tokenizer
        return backbone

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the policy, its tokenizer and a model card in Hugging Face format; adapters are merged first.

        Only the first process writes, so a script under DDP can call it on every rank.

        Raises:
            ValueError: for a policy that is divided over ranks, or that has no tokenizer.
        """
        from halos.policy.export.save import save_backbone

        save_backbone(self, Path(folder))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer. Raises ``ValueError`` for a backbone that was made without one."""
        if self._tokenizer is None:
            raise ValueError(
                "expected a backbone with a tokenizer: use Backbone.from_pretrained(path), or set backbone.tokenizer"
            )
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def add_control_tokens(self, texts: Iterable[str]) -> None:
        """Make each text a single token; its embedding starts as the mean of the others.

        Raises ``ValueError`` for a policy with adapters, whose embeddings are frozen.
        """
        controls = list(texts)
        for text in controls:
            # The chat template of a policy that was trained with it ends with it already.
            unconditioned(self.tokenizer, text)
        new_tokens = add_control_tokens(self.tokenizer, controls)
        if new_tokens and adapter_layers(self.policy):
            raise ValueError("expected a policy without LoRA for a loss with control tokens; use halos.train(loss=…)")
        for part in self.with_reference_backbone() if new_tokens else ():
            grow_vocabulary(part.policy, len(self.tokenizer), new_tokens)
        if self._reference:
            self._reference[0].policy.requires_grad_(False)

    def make(self, *, reference: bool, sharding: Any) -> Backbone:
        """This backbone. Raises ``ValueError`` under a strategy that divides weights before they are loaded."""
        if sharding is not None and self.sharding is None:
            raise ValueError(
                "expected weights that are not loaded yet under FSDP; pass a halos.sharding.BackboneFactory, or use "
                "halos.train(strategy='fsdp')"
            )
        return self

    def reference_scorer(self, backbone: Backbone, sharding: Any) -> Backbone:
        """The policy, which is its own reference until its first step; after that the same weights, loaded again.

        Raises ``ValueError`` if the policy was trained and its first weights are not known.
        """
        from halos.policy.pretrained import load_backbone

        if not self.updated and (self.spec is None or self.spec.reference_path is None):
            return self
        if self.spec is None or self.spec.random_weights:
            raise ValueError(
                "expected a policy that was not trained yet, as its log-probs are to be the reference's; make a "
                "backbone with a live reference, or use Backbone.from_pretrained"
            )
        return load_backbone(self.spec.of_reference(), dtype=self.policy.dtype, vocabulary=len(self.tokenizer))

    @property
    def reference(self) -> Any | None:
        """π_ref, or None for objectives that have none."""
        return self._reference[0].policy if self._reference else None

    @property
    def scores_reference(self) -> bool:
        """Whether the reference's log-probs are computed in each step, by a frozen copy or without the adapter."""
        return bool(self._reference) or self.adapter_reference

    def with_reference_backbone(self) -> tuple[Backbone, ...]:
        """This backbone, and that of the live reference if there is one."""
        return (self, *self._reference)

    @property
    def sharded(self) -> bool:
        """Whether the policy is divided over ranks (FSDP2), so that they have to run equally many forwards."""
        return self.sharding is not None

    @property
    def device(self) -> torch.device:
        """Where the policy computes; shards may be kept elsewhere."""
        if self.sharding is not None:
            return self.sharding.device
        device: torch.device = self.policy.get_output_embeddings().weight.device
        return device

    @property
    def hidden_size(self) -> int:
        """The width of the states that the LM head reads."""
        return int(self.policy.get_output_embeddings().weight.shape[1])

    def logprobs(self, batch: Batch, *, with_hidden: bool = False, with_statistics: bool = False) -> LogProbs:
        """Log-probs of the batch's completions under the policy, with gradient."""
        return LogProbs(*self(batch, with_hidden, with_statistics))

    def forward(self, batch: Batch, with_hidden: bool = False, with_statistics: bool = False) -> tuple[Any, ...]:
        """The fields of :meth:`logprobs`.

        A forward, which leaves plain tensors, so that the hooks of a sharded root make embeddings and head whole
        for it and for its backward pass.
        """
        statistics = self.statistics if with_statistics else ()
        options: dict[str, Any] = {"head_chunk": self.head_chunk, "statistics": statistics}
        found = completion_logprobs(self.policy, batch, with_hidden=with_hidden, **options)
        if self.sharded:
            # An in-place operation on a view would lose the hook that makes the weights whole for the backward pass.
            found.tokens = found.tokens.clone()
            found.last = None if found.last is None else found.last.clone()
        return found.tokens, found.mask, found.hidden, found.last, found.statistics

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> LogProbs:
        """Log-probs of the batch's completions under the reference: those that the batch carries, computed before
        training, or else the live reference's or those of the policy without its adapter, by the same code path as
        the policy's.

        Raises ``ValueError`` if there is neither.
        """
        if batch.reference is not None:
            return LogProbs(batch.reference, batch.mask)
        if not self.scores_reference:
            raise ValueError(
                "expected a backbone with a reference, or a batch with the reference's log-probs; found neither"
            )
        start = time.perf_counter()
        if self._reference:
            logprobs = self._reference[0].logprobs(batch)
        else:
            with evaluating(self.policy), as_reference(self.policy):
                logprobs = self.logprobs(batch)
        self.reference_seconds += time.perf_counter() - start
        return logprobs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Every move of device or dtype passes through here; the reference has to come along.
        # Buffers outside the state dict (rotary frequencies) keep their dtype: the exported model will load them in
        # float32, and a cast would train another model than that. So do float32 adapters when the model goes to half
        # precision: their steps are small, and they are too few to save much.
        kept = [
            (module, name, module._buffers[name])
            for module in self.policy.modules()
            for name in module._non_persistent_buffers_set
        ]
        wide = [(p, p.data) for p in adapter_parameters(self.policy) if p.dtype == torch.float32]
        for reference in self._reference:
            reference._apply(fn)
        result = super()._apply(fn, recurse)
        for module, name, buffer in kept:
            if buffer is not None:
                module._buffers[name] = buffer.to(module._buffers[name].device)
        for parameter, values in wide:
            if parameter.dtype.itemsize < values.dtype.itemsize:
                parameter.data = values.to(parameter.device)
        return result


def frozen_copy(policy: nn.Module) -> nn.Module:
    """A copy of the policy as it is now, in evaluation mode, without gradients: the live reference."""
    return copy.deepcopy(policy).eval().requires_grad_(False)
