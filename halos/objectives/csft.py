"""CSFT: conditional SFT on control tokens (Korbak et al. 2023, arXiv 2302.08582; section 3 of 2402.01306)."""

from __future__ import annotations

from typing import Unpack

from halos.data.batches.collate import Batch
from halos.objectives.base import BackboneSource, LoopOptions, Needs, Objective, Output
from halos.objectives.sft import sft_loss
from halos.policy.logprobs.completions import LogProbs


class CSFT(Objective):
    """SFT on every completion, behind a control token that says whether people found it desirable.

    −Σ_t log π_θ(y_t | x, c, y_<t) / tokens, with c the control token of y's label. Sampling conditions on the desirable
    one: here, and in the exported model through its chat template.

    Deviations from the papers:
        1. The control token ends the prompt's tokens rather than beginning the completion's, so it is not itself
           scored: the policy learns replies given a label, not how often labels occur.

    Args:
        desirable_token, undesirable_token: the control tokens; added to the vocabulary unless they are in it.
    """

    view = "binary"
    paper = ("Pretraining Language Models with Human Preferences", "https://arxiv.org/abs/2302.08582")
    needs = Needs(reference=False, moves=(1, 1))

    def __init__(
        self,
        backbone: BackboneSource | None = None,
        *,
        desirable_token: str = "<|good|>",
        undesirable_token: str = "<|bad|>",
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        for name, token in (("desirable_token", desirable_token), ("undesirable_token", undesirable_token)):
            if not isinstance(token, str) or not token.strip():
                raise ValueError(f"loss.{name}: expected text, found {token!r}")
        if desirable_token == undesirable_token:
            raise ValueError(
                f"loss.undesirable_token: expected another than desirable_token, found {desirable_token!r}"
            )
        self.control_tokens = (desirable_token, undesirable_token)

    def control(self, desirable: bool | None) -> str:
        return self.control_tokens[1 if desirable is False else 0]

    def compute(self, batch: Batch, policy: LogProbs, reference: None) -> Output:
        return Output(loss={"csft": self.per_token(sft_loss(policy.tokens[:, 0]), batch)})
