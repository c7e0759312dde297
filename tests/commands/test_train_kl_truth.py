"""``val/kl`` of whole runs against the KL of thousands of replies that transformers draws and scores."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor
from transformers import AutoModelForCausalLM

from halos.objectives import Objective
from halos.reporting.replies import SampledReplies
from halos.toy.model import REFERENCE_DIR
from tests.train_runs import column, run

pytestmark = pytest.mark.slow

PROMPTS, PER_PROMPT, LIMIT = 64, 240, 20
"""15,360 replies of up to 20 tokens at each validation."""
WORDS = (
    "data.source.size=512", "data.source.val_size=256", "data.batch_size=32", "trainer.max_epochs=8",
    "trainer.max_steps=16", "trainer.val_check_interval=4", "optim.lr=3e-3", "sampling.kl=true",
    f"sampling.kl_prompts={PROMPTS}", f"sampling.max_new_tokens={LIMIT}", "sampling.validations=5",
)  # fmt: skip


def divergences(policy: Any, reference: Any, prompts: Tensor, end: int) -> Tensor:
    """Sample PER_PROMPT replies to each of the prompts [P, T], and return Σ_t KL of the two next tokens [P, S]."""
    torch.manual_seed(int(prompts.sum()))
    drawn = policy.generate(
        prompts.repeat_interleave(PER_PROMPT, 0), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        max_new_tokens=LIMIT, eos_token_id=end, pad_token_id=end, attention_mask=None,
    )  # fmt: skip
    start = prompts.shape[1]
    ended = (drawn[:, start:] == end).cumsum(1)
    # A reply's tokens up to its first end-of-turn token, which is one of them.
    scored = (ended == 0) | ((ended == 1) & (drawn[:, start:] == end))
    ours, theirs = (model(drawn).logits[:, start - 1 : -1].double().log_softmax(-1) for model in (policy, reference))
    each = (ours.exp() * (ours - theirs)).sum(-1)
    return (each * scored).sum(1).view(len(prompts), PER_PROMPT)


@torch.no_grad()
def kl_of_many(objective: Objective, prompts: list[list[int]], end: int) -> tuple[float, float]:
    """KL(policy ‖ reference) over these prompts by many replies, and the variance of a mean of one reply to each."""
    reference = AutoModelForCausalLM.from_pretrained(REFERENCE_DIR, dtype=torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(REFERENCE_DIR, dtype=torch.float32)
    policy.load_state_dict(objective.trained.policy.state_dict())
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for prompt in prompts:
        by_length[len(prompt)].append(prompt)
    found = torch.cat(
        [divergences(policy.eval(), reference.eval(), torch.tensor(same), end) for same in by_length.values()]
    )
    return float(found.mean()), float(found.var(1).sum()) / len(prompts) ** 2


def test_it_is_the_kl_of_many_replies_at_every_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truths: dict[int, tuple[float, float]] = {}
    measure = SampledReplies.measure

    def measured(self: SampledReplies, trainer: Any, objective: Objective) -> None:
        measure(self, trainer, objective)
        prompts = [self.tokens.fitted_prompt(prompt) for prompt in self.prompts]
        truths[trainer.global_step] = kl_of_many(objective, prompts, self.tokens.end_of_turn)

    monkeypatch.setattr(SampledReplies, "measure", measured)
    differences = []
    for loss in ("kto", "dpo", "sft"):
        run(tmp_path / loss, *WORDS, f"loss={loss}")
        metric = column(tmp_path / loss, "val/kl")
        start, *steps = truths
        assert start == 0
        assert metric[0] == pytest.approx(truths[0][0], abs=1e-6) == 0
        assert list(metric) == [0, *steps]
        assert len(steps) == 4
        for step in steps:
            kl, variance = truths[step]
            # The many replies' own error is small beside that of one reply to each prompt, but not nothing.
            differences.append((metric[step] - kl) / (variance * (1 + 1 / PER_PROMPT)) ** 0.5)
        truths.clear()
    joint = sum(z**2 for z in differences)
    assert joint < chi2.ppf(0.999, len(differences)), differences
    # Differences that are all near 0 would be those of replies that both have used.
    assert joint > chi2.ppf(0.001, len(differences)), differences
