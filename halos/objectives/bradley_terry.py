"""The Bradley-Terry reward model (Bradley and Terry 1952; Stiennon et al. 2020, arXiv 2009.01325)."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.config.parameters import require_between
from halos.objectives.base import BackboneSource, Batch, LogProbs, LoopOptions, Needs, Objective, Output
from halos.policy.export.reward_model import require_classifier
from halos.policy.heads import RewardHead


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0, centring: float = 0.0
) -> Tensor:
    """The Bradley-Terry loss of each pair: −log P(y_w preferred to y_l) = −log σ(s_w − s_l).

    s is the score s(x, y) of the chosen (w) and the rejected (l) completion. This is the loss of section 3.4 of
    Stiennon et al. With a margin m it is −log σ(s_w − s_l − m) (equation 2 of Touvron et al. 2023, arXiv 2307.09288);
    a weight η adds η(s_w + s_l)², which centres the scores at 0 (Eisenstein et al. 2023, arXiv 2312.09244).

    Args:
        chosen, rejected: scores s(x, y), [B].
        margin: m, by how much the scores of a pair should differ, [B] or a number.
        centring: η.

    Returns:
        Losses [B], to be averaged over pairs.
    """
    return -logsigmoid(chosen - rejected - margin) + centring * (chosen + rejected) ** 2


class BradleyTerry(Objective):
    """A reward model on pairs: s(x, y) is a linear head on the hidden state of y's last token, its end of turn.

    Backbone and head are trained together; the LM head is not trained. The trained model scores completions and does
    not generate: it is exported as a sequence classifier of transformers (see
    :func:`halos.policy.export.reward_model.export_reward_model`). The logged rewards are the scores. No deviations.

    Args:
        backbone, options: see :class:`halos.loop.module.TrainingLoop`.
        centring: η, the weight of the term (s_w + s_l)², 0 or more. Without this term only differences between scores
            of the same prompt are meaningful.
        margin_weight: κ, 0 or more: the margin of a pair is κ m. Above 0 each pair of the data needs a margin m.

    Raises:
        ValueError: naming the key of a value out of range; from :meth:`build`, before training, if transformers has no
            sequence classifier for the model.
    """

    view = "pairs"
    paper = ("Learning to summarize from human feedback", "https://arxiv.org/abs/2009.01325")
    needs = Needs(reference=False, last_hidden=True, moves=(0, 0))
    generates = False

    def __init__(
        self,
        backbone: BackboneSource = None,
        *,
        centring: float = 0.0,
        margin_weight: float = 0.0,
        **options: Unpack[LoopOptions],
    ) -> None:
        super().__init__(backbone, **options)
        self.centring = require_between("centring", centring, 0.0)
        self.margin_weight = require_between("margin_weight", margin_weight, 0.0)
        self.needs = replace(self.needs, margins=self.margin_weight > 0)

    def build(self, hidden_size: int) -> None:
        policy = self.trained.policy
        require_classifier(policy.config)
        self.reward_head = RewardHead(hidden_size)
        head = policy.get_output_embeddings()
        if head.weight is not policy.get_input_embeddings().weight:
            # The LM head gets no gradient, and DDP would wait for one. If it is tied to the embeddings, it has theirs.
            head.requires_grad_(False)

    def compute(self, batch: Batch, policy: LogProbs, reference: None) -> Output:
        assert policy.last is not None  # needs.last_hidden
        # The rewards are scores, not log-ratios: only differences within a prompt are meaningful.
        scores: Tensor = self.reward_head(policy.last)
        margin = self.target_margins(batch, self.margin_weight)
        losses = bradley_terry_loss(*scores.unbind(1), margin=margin, centring=self.centring)
        return Output(loss={"bradley_terry": self.per_example(losses, batch)}, rewards=scores)
