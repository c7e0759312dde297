"""A few sampled completions at each validation, to be read by a person."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from halos.data.records.record import Prompt
from halos.data.rows.chat_tokens import ChatTokens
from halos.objectives.base import Objective
from halos.reporting.tensorboard import log_text
from halos.sampling.generate import sample
from halos.sharding.sharding import unsharded_root


class SampledReplies(Callback):
    """Replies of the policy to the same few prompts, as text in TensorBoard."""

    def __init__(self, tokens: ChatTokens, prompts: list[Prompt], *, max_new_tokens: int, seed: int) -> None:
        self.tokens, self.prompts = tokens, prompts
        self.max_new_tokens, self.seed = max_new_tokens, seed

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.prompts or not isinstance(pl_module, Objective):
            return
        backbone = pl_module.trained
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
        texts = [
            f"{tokenizer.decode(prompt)}\n\n**{tokenizer.decode(reply)}**"
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        log_text(trainer, "samples", texts)
