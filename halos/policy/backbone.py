"""The policy and its frozen reference: the models that an objective computes log-probs with."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from halos.data.batches.batch import Batch
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.policy.adapters import adapter_layers, adapter_parameters, as_reference, keep_only_adapters, merge_adapter
from halos.policy.construction import add_control_tokens, grow_vocabulary
from halos.policy.export.base_model import NO_BASE
from halos.policy.export.card import ModelCard
from halos.policy.export.language_model import export_policy
from halos.policy.export.reward_model import export_reward_model
from halos.policy.heads import RewardHead
from halos.policy.loading import LoadOptions, ModelSpec
from halos.policy.logprobs.completions import LogProbs, completion_logprobs
from halos.policy.logprobs.divergence import check_divergence, completion_divergence, divergence_reader
from halos.policy.logprobs.head import HeadOptions, evaluating, lm_head
from halos.policy.logprobs.token_statistics import check_statistics
from halos.policy.router import find_router_loss
from halos.processes.first import on_first_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from halos.policy.pretrained import ModelSharding


class Backbone(nn.Module):
    """The policy π_θ and, for objectives that need it, a frozen reference π_ref.

    A live reference is not a submodule, so the optimizer, checkpoints and DDP's buckets do not contain it. It follows
    the policy to another device or precision.

    With LoRA, the reference can be the policy itself with its adapter switched off. The state dict then contains only
    the trained weights.

    Args:
        policy: a causal language model of transformers, used unchanged. (CPU kernels are applied by
            :meth:`ModelSpec.load`.)
        with_reference: whether to keep a frozen copy of the policy as the live reference.
        adapter_reference: the reference is the policy without its trained adapter. Needs a model with LoRA adapters.
        head_chunk: rows of logits in memory at a time. None: all. ``auto``: :mod:`halos.policy.logprobs.head_rows`.
        statistics: names of the token statistics to compute with the policy's log-probs on request; see
            :mod:`halos.policy.logprobs.token_statistics`.
        router_loss: the load-balancing loss of a mixture of experts; see :func:`halos.policy.router.find_router_loss`.

    Attributes:
        sharding: how the models are sharded over ranks. None: each rank has whole models.
        skeleton: for a sharded policy, a one-tuple with the same model on the meta device, into which the export puts
            the gathered weights. The tuple hides the model from ``nn.Module``.
        reference_seconds: seconds spent on the reference's log-probs, before and during training.
        spec: the model files and settings that the policy was loaded from, if known.
        updated: whether an optimizer has changed the policy, so that it is no longer its own reference.
        control: the control token that replies are conditioned on (CSFT), or an empty string.
        loss, paper: name and paper of the loss that trains the policy, for the model card.

    Raises:
        ValueError: the model has no LM head, or ``adapter_reference`` was set for a model without adapters.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        *,
        with_reference: bool,
        adapter_reference: bool = False,
        head_chunk: int | str | None = None,
        statistics: Sequence[str] = (),
        router_loss: str | float = "auto",
    ) -> None:
        super().__init__()
        self.head_chunk, self.adapter_reference = head_chunk, adapter_reference
        self.statistics = check_statistics(statistics)
        self.sharding: ModelSharding | None = None
        self.skeleton: tuple[PreTrainedModel, ...] = ()
        self.reference_seconds = 0.0
        if getattr(policy, "get_output_embeddings", lambda: None)() is None:
            raise ValueError(f"policy: expected a causal language model with an LM head, found {type(policy).__name__}")
        self.policy = policy
        self.router_loss = find_router_loss(policy, router_loss)
        # nn.Module registers attributes that are modules, but does not look into a tuple.
        self._reference: tuple[Backbone, ...] = ()
        if with_reference:
            copied = frozen_copy(policy)
            self._reference = (Backbone(copied, with_reference=False, head_chunk=head_chunk, router_loss=0),)
        if adapter_layers(policy):
            keep_only_adapters(self)
        elif adapter_reference:
            raise ValueError(f"policy: expected a model with LoRA adapters, found {type(policy).__name__} without any")
        self.spec: ModelSpec | None = None
        self.updated = False
        self.control = ""
        self.loss: str | None = None
        self.paper: tuple[str, str] | None = None
        self.reward_head: tuple[RewardHead, ...] = ()
        """The head of a reward model, which is a submodule of the objective; in a tuple, to hide it from nn.Module."""
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Backbone:
        """Load a policy and its tokenizer.

        Args:
            path: a hub id, a directory or a GGUF file, as for ``model.path``.
            dtype: precision of the weights.
            options: the other parameters of :class:`halos.policy.ModelSpec`, such as ``lora=LoRA(enabled=True)`` or
                ``reference="live"``. By default the reference's log-probs are computed before the first step and
                cached.

        Raises:
            ValueError: the path or the options cannot be loaded.
        """
        from halos.policy.pretrained import load_backbone

        spec = ModelSpec(path=str(path), **options).resolved(streaming=False)
        spec.check()
        tokenizer = spec.tokenizer()
        new_tokens = spec.missing_tokens(tokenizer)
        load_options = LoadOptions(dtype=dtype, new_tokens=new_tokens, vocabulary=len(tokenizer))
        backbone = load_backbone(spec, load_options, reference=True)
        backbone.tokenizer = tokenizer
        return backbone

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the policy, its tokenizer and a model card in Hugging Face format, with adapters merged.

        A reward model is written with its head, as a sequence classifier.

        Only the first process writes, so a script under DDP can call this on every rank.

        Raises:
            ValueError: the policy is sharded over ranks, or has no tokenizer.
        """
        if self.sharded:
            expected = "expected a policy that each rank has whole, found a sharded one"
            raise ValueError(f"save_pretrained: {expected}; halos.train writes OUTPUT_DIR/model")
        if not on_first_process():
            return
        policy, spec, tokenizer = self.policy, self.spec, self.tokenizer
        end = ChatTokens(tokenizer, Limits(2)).end_of_turn
        base = NO_BASE if spec is None else spec.base(policy.dtype)
        merge = bool(adapter_layers(policy)) and (spec is None or spec.lora.export == "merged")
        if merge or base.dtype not in (None, policy.dtype):
            policy = copy.deepcopy(policy)  # so that the policy can be trained further
        if merge:
            merge_adapter(policy)
        trusts = spec is not None and spec.trust_remote_code
        card = ModelCard(loss=self.loss, base=None if spec is None else spec.path, paper=self.paper, remote_code=trusts)
        where = Path(folder)
        if self.reward_head:
            score = self.reward_head[0].linear.weight.detach()
            export_reward_model(policy, score, tokenizer, where, end_of_turn=end, card=card, base=base)
        else:
            control = self.control
            export_policy(policy, tokenizer, where, end_of_turn=end, control=control, card=card, base=base)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer. Raises ``ValueError`` if the backbone was built without one."""
        if self._tokenizer is None:
            hint = "use Backbone.from_pretrained(path), or set backbone.tokenizer"
            raise ValueError(f"expected a backbone with a tokenizer: {hint}")
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def add_control_tokens(self, texts: Iterable[str]) -> None:
        """Make each text a single token, whose embedding starts as the mean of the others.

        Raises:
            ValueError: the policy has adapters, which means that its embeddings are frozen.
        """
        new_tokens = add_control_tokens(self.tokenizer, texts)
        if new_tokens and adapter_layers(self.policy):
            raise ValueError("expected a policy without LoRA for a loss with control tokens; use halos.train")
        for member in self.with_reference_backbone() if new_tokens else ():
            grow_vocabulary(member.policy, len(self.tokenizer), new_tokens)
        if self._reference:  # resized embeddings are new parameters
            self._reference[0].policy.requires_grad_(False)

    def make(self, *, reference: bool, sharding: ModelSharding | None) -> Backbone:
        """Return this backbone. Raises ``ValueError`` under a strategy that shards models before weights are loaded."""
        if sharding is not None and self.sharding is None:
            hint = "use halos.train(overrides={'strategy': 'fsdp'})"
            raise ValueError(f"expected weights that are not loaded yet under FSDP; {hint}")
        return self

    def reference_scorer(self, backbone: Backbone, sharding: ModelSharding | None) -> Backbone:
        """Return the model that computes the reference's log-probs before training.

        The policy is its own reference until its first step. After that, its initial weights are loaded again.

        Raises:
            ValueError: the policy was trained, and its initial weights are not known.
        """
        from halos.policy.pretrained import load_backbone

        if not self.updated and (self.spec is None or self.spec.reference_path is None):
            return self
        if self.spec is None or self.spec.random_weights:
            hint = "make a backbone with a live reference, or use Backbone.from_pretrained"
            raise ValueError(f"expected a policy that was not trained yet, as it is to be the reference; {hint}")
        options = LoadOptions(dtype=self.policy.dtype, vocabulary=len(self.tokenizer))
        return load_backbone(self.spec.of_reference(), options)

    @property
    def reference(self) -> PreTrainedModel | None:
        """The live reference π_ref, or None if the backbone keeps no copy of the policy."""
        return self._reference[0].policy if self._reference else None

    @property
    def scores_reference(self) -> bool:
        """Whether the reference's log-probs are computed in each step, by a live reference or without the adapter."""
        return bool(self._reference) or self.adapter_reference

    def with_reference_backbone(self) -> tuple[Backbone, ...]:
        """This backbone, followed by the backbone of the live reference if there is one."""
        return (self, *self._reference)

    @property
    def sharded(self) -> bool:
        """Whether the policy is sharded over ranks. If so, all ranks must run the same number of forwards."""
        return self.sharding is not None

    @property
    def device(self) -> torch.device:
        """The device on which the policy computes. Offloaded shards are stored on another one."""
        return lm_head(self.policy).weight.device if self.sharding is None else self.sharding.device

    @property
    def hidden_size(self) -> int:
        """Width H of the hidden states that the LM head reads."""
        return lm_head(self.policy).weight.shape[1]

    def logprobs(
        self, batch: Batch, *, with_hidden: bool = False, with_statistics: bool = False, with_load: bool = False
    ) -> LogProbs:
        """Compute log-probs of the batch's completions under the policy, with gradient.

        Args:
            batch: the rows, on the policy's device.
            with_hidden: also return the hidden states that predict the completion tokens.
            with_statistics: also return the token statistics named in ``statistics``.
            with_load: also return the load of a mixture's experts, if there is a router loss.
        """
        return LogProbs(*self(batch, with_hidden, with_statistics, with_load))

    def forward(
        self, batch: Batch, with_hidden: bool = False, with_statistics: bool = False, with_load: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Compute the fields of :meth:`logprobs` as a tuple of plain tensors.

        FSDP2 attaches its hooks to ``forward``, and finds tensors in tuples but not in a :class:`LogProbs`. Its hooks
        gather the embeddings and the LM head for this forward and for its backward pass.
        """
        experts = self.router_loss.experts_per_token if with_load and self.router_loss else None
        options = HeadOptions(
            self.head_chunk,
            self.statistics if with_statistics else (),
            with_hidden,
            experts,
            None if self.sharding is None else self.sharding.tensor_group,
        )
        logprobs = completion_logprobs(self.policy, batch, options)
        if self.sharded:
            # These are views. FSDP2 attaches hooks to their graph nodes, to gather the weights for the backward pass.
            # If a view is changed in place later, autograd builds a new node for it, without the hook. Copies are safe.
            logprobs.tokens = logprobs.tokens.clone()
            logprobs.last = None if logprobs.last is None else logprobs.last.clone()
        return logprobs.tokens, logprobs.mask, logprobs.hidden, logprobs.last, logprobs.statistics, logprobs.load

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch, *, with_hidden: bool = False) -> LogProbs:
        """Return log-probs of the batch's completions under the reference.

        If the batch carries log-probs that were computed before training, these are returned. Otherwise the live
        reference, or the policy without its adapter, computes them by the same code path as the policy's.

        Args:
            batch: the rows, on the policy's device.
            with_hidden: also return the reference's hidden states that predict the completion tokens.

        Raises:
            ValueError: the batch carries no log-probs, and the backbone has no reference.
        """
        if batch.reference is not None and not with_hidden:
            return LogProbs(batch.reference, batch.mask)
        if not self.scores_reference:
            raise ValueError("expected a backbone with a reference, or a batch with its log-probs; found neither")
        start = time.perf_counter()
        if self._reference:
            logprobs = self._reference[0].logprobs(batch, with_hidden=with_hidden)
        else:
            with evaluating(self.policy), as_reference(self.policy):
                logprobs = self.logprobs(batch, with_hidden=with_hidden)
        self.reference_seconds += time.perf_counter() - start
        return logprobs

    def check_divergence(self) -> None:
        """Raise ``ValueError`` if :meth:`divergence` cannot be computed."""
        if not self.scores_reference:
            expected = "expected live (or adapter with LoRA) for a loss that compares whole distributions"
            raise ValueError(f"model.reference: {expected}, found a reference whose log-probs alone are kept")
        for member in self.with_reference_backbone():
            try:
                check_divergence(member.policy)
            except ValueError as error:
                raise ValueError(f"{error}; choose another loss.reference_point") from None

    @torch.no_grad()
    def divergence(self, policy: LogProbs, reference: LogProbs) -> Tensor:
        """Compute KL(π_θ ‖ π_ref) between the next-token distributions at each completion token, [B, K, C].

        Args:
            policy, reference: log-probs of the same batch, with the hidden states of each model.
        """
        policy_reader = divergence_reader(self.policy, policy)
        if self._reference:
            reference_reader = divergence_reader(self._reference[0].policy, reference)
        else:
            with evaluating(self.policy), as_reference(self.policy):
                reference_reader = divergence_reader(self.policy, reference)
        return completion_divergence(policy.mask, policy_reader, reference_reader, self.head_chunk)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # nn.Module calls this for every change of device or precision. Two kinds of tensors keep their precision:
        # - Buffers outside the state dict (rotary frequencies). The exported model computes them in float32, so a
        #   policy with rounded frequencies would differ from it.
        # - float32 adapters of a model that goes to half precision. Their updates are too small for half precision,
        #   and they take little memory.
        buffers = [
            (module, name, module._buffers[name])
            for module in self.policy.modules()
            for name in module._non_persistent_buffers_set
        ]
        adapters = [(p, p.data) for p in adapter_parameters(self.policy) if p.dtype == torch.float32]
        for reference in self._reference:
            reference._apply(fn)
        nn.Module._apply(self, fn, recurse)
        for module, name, buffer in buffers:
            moved = module._buffers[name]
            if buffer is not None and moved is not None:
                module._buffers[name] = buffer.to(moved.device)
        for parameter, values in adapters:
            if parameter.dtype.itemsize < values.dtype.itemsize:
                parameter.data = values.to(parameter.device)
        return self


def frozen_copy(policy: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the policy in evaluation mode and without gradients: the live reference."""
    reference = copy.deepcopy(policy)
    reference.eval().requires_grad_(False)
    return reference
