"""Logs a few sampled completions at each validation, for people to read."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from halos.data.records.record import Prompt
from halos.data.rows.chat_tokens import ChatTokens
from halos.objectives.base import Objective
from halos.reporting.tensorboard import log_text
from halos.safe_text import markdown_block
from halos.sampling.generate import sample
from halos.sharding.sharding import unsharded_root


class SampledReplies(Callback):
    """Logs the policy's replies to the same few prompts as text in TensorBoard.

    Args:
        tokens: tokenises prompts as training does.
        prompts: none for no samples.
        max_new_tokens: the longest reply.
        seed: the same at each validation, so that replies differ by the policy alone.
    """

    def __init__(self, tokens: ChatTokens, prompts: list[Prompt], *, max_new_tokens: int, seed: int) -> None:
        self.tokens, self.prompts = tokens, prompts
        self.max_new_tokens, self.seed = max_new_tokens, seed

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning passes any module, also a user's own that has no policy to sample.
        if not self.prompts or not isinstance(pl_module, Objective):
            return
        backbone = pl_module.trained
        # One rank would do, but every forward pass of a sharded policy gathers weights from all ranks.
        if not (trainer.is_global_zero or backbone.sharded):
            return
        control, tokenizer = pl_module.control(True), self.tokens.tokenizer
        prompts = [self.tokens.fitted_prompt(prompt, control) for prompt in self.prompts]
        with unsharded_root(backbone):
            replies = sample(
                backbone.policy,
                prompts,
                end_of_turn=self.tokens.end_of_turn,
                pad=tokenizer.pad_token_id,
                max_new_tokens=self.max_new_tokens,
                seed=self.seed,
                together=backbone.sharded,
            )
        blocks = [
            [markdown_block(str(tokenizer.decode(ids))) for ids in sample_ids]
            for sample_ids in zip(prompts, replies, strict=True)
        ]
        texts = [f"{prompt}\n\n**reply**\n\n{reply}" for prompt, reply in blocks]
        log_text(trainer, "samples", texts)
