"""Policy and frozen reference: everything that an objective needs of models."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from halos.data.batches import Batch
from halos.policy.adapters import adapter_layers, adapter_parameters, as_reference, keep_only_adapters
from halos.policy.head import evaluating
from halos.policy.logprobs import LogProbs, completion_logprobs
from halos.policy.reference import frozen_copy


class Backbone(nn.Module):
    """The policy π_θ (a causal language model of transformers) and, where asked for, a frozen copy of it, π_ref.

    The reference is no submodule: it has no place in the optimizer, in checkpoints or in DDP's buckets. It follows the
    policy to its device and precision. ``head_chunk``: the most rows of logits that exist at a time, None for all.

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
    ) -> None:
        super().__init__()
        self.head_chunk, self.adapter_reference = head_chunk, adapter_reference
        if getattr(policy, "get_output_embeddings", lambda: None)() is None:
            raise ValueError(f"expected a causal language model with an LM head, found {type(policy).__name__}")
        self.policy: Any = policy
        # A tuple hides it from nn.Module's registration.
        self._reference: tuple[Any, ...] = (frozen_copy(policy),) if with_reference else ()
        if adapter_layers(policy):
            keep_only_adapters(self)
        elif adapter_reference:
            raise ValueError(f"expected a model with LoRA adapters, found a {type(policy).__name__} without any")
        self.reference_seconds = 0.0
        """Seconds spent on the reference's log-probs, before training or during it."""

    @property
    def reference(self) -> Any | None:
        """π_ref, or None for objectives that have none."""
        return self._reference[0] if self._reference else None

    @property
    def hidden_size(self) -> int:
        """The width of the states that the LM head reads."""
        return int(self.policy.get_output_embeddings().weight.shape[1])

    def logprobs(self, batch: Batch, *, with_hidden: bool = False) -> LogProbs:
        """Log-probs of the batch's completions under the policy, with gradient."""
        return completion_logprobs(self.policy, batch, with_hidden=with_hidden, head_chunk=self.head_chunk)

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> LogProbs:
        """Log-probs of the batch's completions under the reference: those that the batch carries, computed before
        training, or else the live reference's or those of the policy without its adapter, by the same code path as
        the policy's.

        Raises ``ValueError`` if there is neither.
        """
        if batch.reference is not None:
            return LogProbs(batch.reference, batch.mask)
        if self.reference is None and not self.adapter_reference:
            raise ValueError(
                "expected a backbone with a reference, or a batch with the reference's log-probs; found neither"
            )
        start = time.perf_counter()
        if self.reference is not None:
            logprobs = completion_logprobs(self.reference, batch, head_chunk=self.head_chunk)
        else:
            with evaluating(self.policy), as_reference(self.policy):
                logprobs = completion_logprobs(self.policy, batch, head_chunk=self.head_chunk)
        self.reference_seconds += time.perf_counter() - start
        return logprobs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Every move of device or dtype passes through here; the reference has to come along.
        # Buffers outside the state dict (rotary frequencies) keep their dtype: the exported model will load them in
        # float32, and a cast would train another model than that. So do float32 adapters when the model goes to half
        # precision: their steps are small, and they are too few to save much.
        parts = [part for part in (self.policy, self.reference) if part is not None]
        kept = [
            (module, name, module._buffers[name])
            for part in parts
            for module in part.modules()
            for name in module._non_persistent_buffers_set
        ]
        wide = [(p, p.data) for part in parts for p in adapter_parameters(part) if p.dtype == torch.float32]
        if self.reference is not None:
            self.reference._apply(fn)
        result = super()._apply(fn, recurse)
        for module, name, buffer in kept:
            if buffer is not None:
                module._buffers[name] = buffer.to(module._buffers[name].device)
        for parameter, values in wide:
            if parameter.dtype.itemsize < values.dtype.itemsize:
                parameter.data = values.to(parameter.device)
        return result
