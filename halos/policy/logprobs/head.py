"""The LM head, applied only to the states that predict a scored token."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halos.policy.adapters import head_delta, plain_head
from halos.policy.logprobs.chunked_head import LogitShape, chunked_logprobs
from halos.policy.logprobs.divided_head import RowShare
from halos.policy.logprobs.head_rows import chunk_rows
from halos.policy.logprobs.token_statistics import measure
from halos.policy.router import expert_load

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """How the LM head is computed, and what is returned besides log-probs.

    Attributes:
        chunk_rows: rows of logits that exist at a time. None: all. ``auto``: :mod:`halos.policy.logprobs.head_rows`.
        statistics: names in :data:`halos.policy.logprobs.token_statistics.STATISTICS`.
        with_states: whether to return the states that predict the tokens.
        experts_per_token: of a mixture whose experts' load is returned; None: it is not.
        group: devices with the same states, over which the rows are divided; None: this device computes all rows.
    """

    chunk_rows: int | str | None = None
    statistics: tuple[str, ...] = ()
    with_states: bool = False
    experts_per_token: int | None = None
    group: ProcessGroup | None = None


class HeadResults(NamedTuple):
    """Results for M scored tokens.

    Attributes:
        logprobs: log-probs of the targets [M].
        statistics: statistics of the logits [M, names], without gradient.
        states: the last layer's states that predict the targets [M, H], detached; None unless requested.
        load: the load of a mixture's experts [2, E] (:func:`halos.policy.router.expert_load`); None unless requested.
    """

    logprobs: Tensor
    statistics: Tensor
    states: Tensor | None
    load: Tensor | None


def lm_head(model: PreTrainedModel) -> nn.Linear:
    """Return the model's head: any module with a weight [V, H] and a bias, such as a sharded one or one with LoRA."""
    get_head: Callable[[], nn.Linear] = model.get_output_embeddings
    return get_head()


class ModelOutput(Protocol):
    """What a forward of a causal language model returns; ``router_logits`` where they were requested."""

    logits: Tensor
    router_logits: tuple[Tensor, ...]


def run(model: PreTrainedModel, **inputs: Any) -> ModelOutput:
    """Run the model without a cache of keys and values, on one sequence in each row unless it gets positions."""
    with nullcontext() if "position_ids" in inputs else _no_sequences_in_rows():
        output: ModelOutput = model(**inputs, use_cache=False)
    return output


@contextmanager
def _no_sequences_in_rows() -> Iterator[None]:
    # transformers looks for several sequences in a row by reading the values of positions, which it has just made
    # itself. The host would wait for these values in each forward.
    from transformers import masking_utils

    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


def forward_scored(
    model: PreTrainedModel,
    forward: Callable[..., ModelOutput],
    targets: Tensor,
    choose: Callable[[Tensor], Tensor],
    options: HeadOptions = HeadOptions(),
    weights: Tensor | None = None,
) -> tuple[HeadResults, Tensor]:
    """Run one forward of the model, with its head applied only to the M states that predict a target.

    Two kinds of models compute all M rows of logits at once, whatever ``options.chunk_rows`` is: those whose head is
    not a linear layer with or without LoRA (such as a sharded head), and those that transform their logits in an
    unknown way.

    Args:
        model: a causal language model.
        forward: calls the model once, with further keywords for it, and returns its output with logits [1, M, V].
        targets: token ids [M].
        choose: picks, from all states of the last layer, those that predict the targets, [M, H].
        options: how the head is computed.
        weights: how often each fed token counts in the load of experts, if that is requested; None: no token does.

    Returns:
        The results for the targets, and all states of the last layer [..., H].
    """
    head = lm_head(model)
    shape = logit_shape(model) if options.chunk_rows else None
    with _head_input(head, choose, idle=shape is not None) as head_input:
        output = forward(output_router_logits=True) if options.experts_per_token else forward()
    logits = output.logits[0]
    load = None
    if options.experts_per_token and weights is not None:
        load = expert_load(output.router_logits, weights, options.experts_per_token)
    all_states, states = head_input
    rows, statistics = chunk_rows(options.chunk_rows, states, len(head.weight)), options.statistics
    if rows and shape is not None:
        share = None if options.group is None else RowShare(options.group, len(targets))
        part, part_targets = (states, targets) if share is None else (share.take(states), share.slice_of(targets))
        delta = head_delta(head, part)
        logprobs, measured = chunked_logprobs(
            part, head.weight, head.bias, part_targets, rows=rows, shape=shape, delta=delta, statistics=statistics
        )
        if share is not None:
            logprobs, measured = share.gather(logprobs), share.all_of(measured)
    else:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logprobs = -F.cross_entropy(logits, targets, reduction="none")
        logits = logits.detach()
        normaliser = logits.logsumexp(1) if statistics else logits  # unused without statistics
        measured = measure(statistics, logits, normaliser, targets)
    return HeadResults(logprobs, measured, states.detach() if options.with_states else None, load), all_states


ReadLogits = Callable[[slice], Tensor]
"""Computes some rows of the logits [M, V] of M tokens, in float32 or wider."""


def scored_logits(
    model: PreTrainedModel, forward: Callable[[], ModelOutput], choose: Callable[[Tensor], Tensor]
) -> ReadLogits:
    """Run one forward of the model, and return what computes the logits of the chosen states, a few rows at a time.

    Models whose head cannot be computed in chunks (:func:`forward_scored`) compute all M rows at once.

    Args:
        model: a causal language model.
        forward: calls the model once.
        choose: picks M states [M, H] from all states of the last layer.
    """
    head, shape = lm_head(model), logit_shape(model)
    with _head_input(head, choose, idle=shape is not None) as head_input:
        all_logits = forward().logits[0]
    if shape is None:
        return lambda rows: all_logits[rows].to(torch.promote_types(all_logits.dtype, torch.float32))
    return head_reader(model, head_input[1], shape)


def head_reader(model: PreTrainedModel, states: Tensor, shape: LogitShape) -> ReadLogits:
    """Return what computes the logits of last states [M, H], a few rows at a time.

    Args:
        model: a causal language model.
        states: what its LM head reads.
        shape: its :func:`logit_shape`.
    """
    head = lm_head(model)
    delta = head_delta(head, states)  # now: an adapter may be on or off in this context alone

    def read(rows: slice) -> Tensor:
        logits = F.linear(states[rows], head.weight, head.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if delta is not None:
            low, up = delta
            logits = logits + F.linear(low[rows], up).to(logits)
        return shape(logits)

    return read


@contextmanager
def _head_input(head: nn.Linear, choose: Callable[[Tensor], Tensor], *, idle: bool) -> Iterator[list[Tensor]]:
    """Within this context, the LM head gets only the chosen states [1, M, H]; if ``idle``, it computes nothing.

    The context yields a list. When the model runs, all states and the chosen states are appended to it.
    """
    # A hook on the head, instead of separate calls of the model's body and head: models differ in what they do between
    # the two (scaling, normalising), and with a hook the model's own code does it.
    head_input: list[Tensor] = []

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = choose(args[0])
        head_input.extend((args[0], states))
        return (states.unsqueeze(0), *args[1:])

    own_forward = {name: value for name, value in head.__dict__.items() if name == "forward"}
    with head.register_forward_pre_hook(select):  # removed at the end of the block
        try:
            if idle:
                head.__dict__["forward"] = lambda states: states.new_empty(1, 0, head.weight.shape[0])
            yield head_input
        finally:
            head.__dict__.pop("forward", None)
            head.__dict__.update(own_forward)


_shapes: WeakKeyDictionary[nn.Module, LogitShape | None] = WeakKeyDictionary()


def logit_shape(model: PreTrainedModel) -> LogitShape | None:
    """Return what the model does to its head's logits, or None if its head cannot be computed in chunks.

    The shape is read from the config and checked against the model's own logits, once for each model.
    """
    if model not in _shapes:
        _shapes[model] = _find_shape(model)
        if _shapes[model] is None:
            log.info("%s: the LM head is not computed in chunks (model.head_chunk)", type(model).__name__)
    return _shapes[model]


def assume_logit_shape(model: PreTrainedModel) -> None:
    """Take the shape of a model without weights from its config, unchecked."""
    _shapes[model] = _configured_shape(model)


def _configured_shape(model: PreTrainedModel) -> LogitShape | None:
    if not plain_head(lm_head(model)):
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return LogitShape(float(scale), getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def _find_shape(model: PreTrainedModel) -> LogitShape | None:
    head, shape = lm_head(model), _configured_shape(model)
    if shape is None:
        return None
    head_outputs: list[Tensor] = []
    ids = torch.arange(4, device=head.weight.device)[None]
    record = head.register_forward_hook(lambda _, __, output: head_outputs.append(output))
    with record, evaluating(model), torch.autocast(head.weight.device.type, enabled=False):
        logits = run(model, input_ids=ids).logits
    raw_logits, logits = head_outputs[0].double(), logits.double()
    tolerance = float(torch.finfo(head.weight.dtype).eps) ** 0.5 * float(raw_logits.std())
    return shape if torch.allclose(shape(raw_logits), logits, rtol=0, atol=max(tolerance, 1e-12)) else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context, the model is in evaluation mode, so that a trial forward draws no random numbers."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        # Not train(), which would also switch on modules that were in evaluation mode before.
        for module in training:
            module.training = True
