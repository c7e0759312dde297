"""The Bradley-Terry reward model (Bradley and Terry 1952; Stiennon et al. 2020, arXiv 2009.01325)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.objectives.base import Batch, LogProbs, Needs, Objective, Output
from halos.policy.export.reward_model import require_classifier
from halos.policy.heads import RewardHead


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The Bradley-Terry loss of each pair: −log P(y_w preferred to y_l) = −log σ(s_w − s_l).

    s is the score s(x, y) of the chosen (w) and the rejected (l) completion. This is the loss of section 3.4 of
    Stiennon et al.

    Args:
        chosen, rejected: scores s(x, y), [B].

    Returns:
        Losses [B], to be averaged over pairs.
    """
    return -logsigmoid(chosen - rejected)


class BradleyTerry(Objective):
    """A reward model on pairs: s(x, y) is a linear head on the hidden state of y's last token, its end of turn.

    Backbone and head are trained together; the LM head is not trained. The trained model scores completions and does
    not generate: it is exported as a sequence classifier of transformers (see
    :func:`halos.policy.export.reward_model.export_reward_model`). The logged rewards are the scores. No deviations.

    Raises:
        ValueError: from :meth:`build`, before training, if transformers has no sequence classifier for the model.
    """

    view = "pairs"
    paper = ("Learning to summarize from human feedback", "https://arxiv.org/abs/2009.01325")
    needs = Needs(reference=False, last_hidden=True, moves=(0, 0))
    generates = False

    def build(self, hidden_size: int) -> None:
        policy = self.trained.policy
        require_classifier(policy.config)
        self.reward_head = RewardHead(hidden_size)
        head = policy.get_output_embeddings()
        if head.weight is not policy.get_input_embeddings().weight:
            # It gets no gradient, and DDP would wait for one. Where it is tied to the embeddings, these give it one.
            head.requires_grad_(False)

    def compute(self, batch: Batch, policy: LogProbs, reference: None) -> Output:
        assert policy.last is not None  # needs.last_hidden
        # The rewards are scores, not log-ratios: only differences within a prompt mean something.
        scores: Tensor = self.reward_head(policy.last)
        losses = bradley_terry_loss(*scores.unbind(1))
        return Output(loss={"bradley_terry": self.per_example(losses, batch)}, rewards=scores)
