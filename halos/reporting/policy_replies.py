"""Replies that are sampled from the policy while it trains, with their divergence from the reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import lightning.pytorch as pl

from halos.data.rows.chat_tokens import ChatTokens
from halos.objectives.base import Objective
from halos.processes.collectives import all_gather_list, data_rank_and_world
from halos.reporting.kl_reference import kl_reference
from halos.sampling.choice import uniform_draws
from halos.sampling.generate import sample
from halos.sampling.replies import Reply
from halos.sampling.scoring import score
from halos.sharding.sharding import unsharded_root

Ids = Sequence[int]


def policy_replies(
    trainer: pl.Trainer,
    objective: Objective,
    tokens: ChatTokens,
    prompts: Sequence[tuple[Ids, Ids]],
    *,
    max_new_tokens: int,
    seed: int,
    kl: bool,
    before: int | None = None,
) -> list[Reply]:
    """Sample a reply to each prompt at temperature 1. All ranks call it together and share the work.

    Each prompt has random numbers of its own, which depend on the seed and its place alone, so replies are the same on
    any number of ranks.

    Args:
        trainer: has the precision.
        objective: whose policy is sampled.
        tokens: knows the end-of-turn token.
        prompts: token ids of each as the policy and as the reference read it, the same on all ranks.
        max_new_tokens: the longest reply.
        seed: of the random numbers.
        kl: compute the divergence of each reply from the reference.
        before: with ``kl``, the seed of a reply of the reference to each prompt; None: there are none.

    Raises:
        NoRoomError: the reference does not fit into memory.
    """
    rank, world = data_rank_and_world()
    # The same number on each rank, some prompts twice: all run a sharded policy and read the reference together.
    count = -(-len(prompts) // world)
    numbers = [number % len(prompts) for number in range(rank, count * world, world)]
    ours, theirs = ([list(prompts[number][side]) for number in numbers] for side in (0, 1))
    draws = uniform_draws(len(prompts), max_new_tokens, seed=seed)[numbers]
    backbone = objective.trained
    options = {"end_of_turn": tokens.end_of_turn, "pad": tokens.pad, "max_new_tokens": max_new_tokens}
    with trainer.precision_plugin.forward_context():
        with unsharded_root(backbone):
            drawn = sample(backbone.policy, ours, draws=draws, together=backbone.sharded, **options)
        divergences: Sequence[float | None] = [None] * len(drawn)
        befores: Sequence[list[int] | None] = [None] * len(drawn)
        if kl:
            with kl_reference(trainer, objective) as (reference, as_reference), unsharded_root(backbone):
                measure = partial(score, backbone.policy, reference, device=backbone.device, as_reference=as_reference)
                divergences = measure(ours, theirs, drawn).divergence.tolist()
                if before is not None:
                    draws = uniform_draws(len(prompts), max_new_tokens, seed=before)[numbers]
                    with as_reference():
                        befores = sample(reference, theirs, draws=draws, together=backbone.sharded, **options)
    truncated = [ids[-1] != tokens.end_of_turn for ids in drawn]
    rank_replies = [Reply(*reply) for reply in zip(numbers, drawn, truncated, divergences, befores, strict=True)]
    replies = {reply.prompt: reply for reply in all_gather_list(rank_replies)}
    return [replies[number] for number in range(len(prompts))]
