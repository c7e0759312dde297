"""CSFT: conditional SFT on control tokens (Korbak et al. 2023, arXiv 2302.08582; section 3 of 2402.01306)."""

from __future__ import annotations

from typing import Unpack

from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Needs, Objective, Output
from halos.objectives.sft import sft_loss


class CSFT(Objective):
    """SFT on every completion, after a control token c for its label: −log π_θ(y_t | x, c, y_<t) of each token.

    The loss is the mean over all scored tokens of the step. Sampling conditions on the desirable token: in this
    code, and in the exported model through its chat template.

    Deviations from the papers:
        1. The control token ends the prompt instead of starting the completion, so it is not scored: the policy learns
           completions given a label, not how frequent the labels are.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        desirable_token, undesirable_token: the control tokens. They are added to the vocabulary if it lacks them.

    Raises:
        ValueError: for tokens that are empty or equal.
    """

    view = "binary"
    paper = ("Pretraining Language Models with Human Preferences", "https://arxiv.org/abs/2302.08582")
    needs = Needs(reference=False, moves=(1, 1))

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        desirable_token: str = "<|good|>",  # noqa: S107 (a token of text, no secret)
        undesirable_token: str = "<|bad|>",  # noqa: S107 (as above)
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        for name, token in (("desirable_token", desirable_token), ("undesirable_token", undesirable_token)):
            if not isinstance(token, str) or not token.strip():
                raise ValueError(f"loss.{name}: expected text, found {token!r}")
        if desirable_token == undesirable_token:
            raise ValueError(
                f"loss.undesirable_token: expected another one than desirable_token, found {desirable_token!r}"
            )
        self.control_tokens = (desirable_token, undesirable_token)

    def control(self, desirable: bool | None) -> str:
        # None is for prompts in sampling, which have no label: replies should be desirable.
        return self.control_tokens[1 if desirable is False else 0]

    def compute(self, batch: Batch, policy: LogProbs, reference: None) -> Output:
        return Output(loss={"csft": self.per_token(sft_loss(policy.tokens[:, 0]), batch)})
