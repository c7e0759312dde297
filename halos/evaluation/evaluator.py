"""Carries out an evaluation plan in stages: held-out feedback, the policy's samples, the judge, standard tasks.

After each stage, everything computed so far is yielded. A caller that writes it at once keeps the results of earlier
stages if a later one fails, as when a judge does not answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from halos import terminal
from halos.data.records.record import Prompt, Reply, prompt_key, reply_text, transcript
from halos.data.rows.chat_tokens import ChatTokens
from halos.data.rows.exchanges import Exchange, Tokenised
from halos.data.rows.token_rows import Span
from halos.evaluation.duels import Texts, best_of_data, win_rate
from halos.evaluation.harness import run_tasks
from halos.evaluation.heldout import HeldOut, feedback_metrics, likelihood_metrics, on_policy_metrics
from halos.evaluation.plan import EvaluationPlan, implied_beta
from halos.evaluation.results import Line, Results
from halos.evaluation.statistics import Bootstrap, Estimate
from halos.judges.base import CompletionJudge
from halos.judges.reward_model import RewardModel
from halos.policy.lookup import Policy
from halos.sampling.engines import make_engine
from halos.sampling.prompts import SourcePrompt, distinct_prompts
from halos.sampling.sampler import PromptSamples, Sampler
from halos.sampling.scoring import Array, Ids, Scores, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate(plan: EvaluationPlan) -> Iterator[Results]:
    """Evaluate the policy of a plan.

    Yields:
        After each stage, the results of this and all earlier stages.

    Raises:
        ValueError: a prompt does not fit, a model cannot be loaded, or the judge answers nothing.
    """
    results = Results(
        policy=plan.policy.name,
        reference=plan.reference.name if plan.reference else None,
        beta=implied_beta(plan.policy, plan.settings.beta),
        counts={"records": len(plan.data.records), "pairs": len(plan.held.pairs), "labels": len(plan.held.labels)},
        left_out=plan.data.report + plan.held.report,
        opponent=plan.opponent,
        remote_code=[model.name for model in plan.models().values() if model.spec.trust_remote_code],
    )
    if plan.policy.is_classifier:
        yield _classifier_results(plan, results)
    else:
        yield from LanguageModelEvaluator(plan).stages(results)


def feedback_rewards(plan: EvaluationPlan) -> tuple[Array, Array]:
    """Return the reward and the number of tokens of each held-out completion, both [n].

    The reward is the score of a reward model, or else the log-ratio of policy and reference, without β.

    Raises:
        ValueError: a prompt does not fit, or a model cannot be loaded.
    """
    if not plan.policy.is_classifier:
        scores = LanguageModelEvaluator(plan).feedback_scores()
        return scores.log_ratios, scores.tokens
    settings, data = plan.settings, plan.data
    model = RewardModel(
        plan.policy.name,
        limits=data.limits,
        text=data.text,
        device=settings.device,
        precision=settings.precision,
    )
    answers = list(zip(plan.held.prompts, plan.held.completions, strict=True))
    return np.array(model.scores(answers), dtype=float), np.array(model.tokens(answers), dtype=float)


def _classifier_results(plan: EvaluationPlan, results: Results) -> Results:
    rewards, tokens = feedback_rewards(plan)
    metrics = feedback_metrics(plan.held, rewards, tokens, Bootstrap(resamples=plan.settings.resamples))
    return replace(_with_rewards(results, plan.held, rewards), metrics=metrics)


def _with_rewards(results: Results, held: HeldOut, rewards: Array) -> Results:
    lines = [{"reward": float(rewards[i]), "desirable": bool(desirable)} for i, desirable in held.labels]
    margins = [float(rewards[chosen] - rewards[rejected]) for chosen, rejected in held.pairs]
    return replace(results, rewards=lines, margins=margins)


class LanguageModelEvaluator:
    """Evaluates a policy that generates text.

    Args:
        plan: the checked plan. Held-out feedback is tokenised and the weights of policy and reference are loaded when
            the evaluator is made.

    Raises:
        ValueError: a held-out prompt does not fit, or a model cannot be loaded.
    """

    def __init__(self, plan: EvaluationPlan) -> None:
        self.plan, self.settings = plan, plan.settings
        self.bootstrap = Bootstrap(resamples=plan.settings.resamples)
        self.tokens = self._tokens_of(plan.policy)
        # Tokenised before the weights are loaded, so that a prompt that does not fit is found at once.
        self._prompts = self._prompt_ids([SourcePrompt(f"prompt {n}", one) for n, one in enumerate(plan.held.prompts)])
        # Completions are cut by the longer of the two prompts, so that both models score the same tokens.
        held = self._held_completions()
        self._contexts = [one.context[0] for one in held]
        self._completions = [
            self.tokens.fit_completion(one.completions[0], max(len(ours), len(theirs)))[0]
            for one, ours, theirs in zip(held, *self._prompts, strict=True)
        ]
        self.policy_model = self._load(plan.policy)
        self.reference_model = self._load(plan.reference) if plan.reference else None

    def _held_completions(self) -> list[Tokenised]:
        held, control = self.plan.held, self.plan.policy.control
        exchanges = [
            Exchange(f"prompt {n}", prompt, (reply,), control)
            for n, (prompt, reply) in enumerate(zip(held.prompts, held.completions, strict=True))
        ]
        tokenised = self.tokens.tokenise(exchanges)
        self.tokens.check([refusal for one in tokenised for refusal in one.refusals], len(exchanges))
        return tokenised

    def _tokens_of(self, policy: Policy) -> ChatTokens:
        return ChatTokens(policy.tokenizer, self.plan.data.limits, self.plan.data.text)

    def stages(self, results: Results) -> Iterator[Results]:
        """Add the results of each stage to ``results``, and yield them."""
        yield (results := self._feedback_stage(results))
        if self.settings.size != 0:
            prompts = distinct_prompts(self.plan.data.records, self.settings.size, self.settings.seed)
            drawn = self._draw(self.plan.policy, self.policy_model, prompts)
            # Yielded before they are scored: samples take long to draw and are worth reading by themselves.
            samples: list[Line] = [{"prompt": _as_text(one.source.prompt), "completions": one.texts} for one in drawn]
            yield (results := replace(results, samples=samples))
            yield (results := replace(results, metrics={**results.metrics, **self._on_policy(prompts, drawn)}))
            if self.plan.judge is not None:
                opponents = self._opponent_texts(prompts)
                # Yielded before the judge is called, so that its answers can be checked against what it saw.
                pairs = zip(samples, opponents, strict=True)
                samples = [{**line, "opponent": [*map(reply_text, texts)]} if texts else line for line, texts in pairs]
                yield (results := replace(results, samples=samples))
                yield (results := self._judged(self.plan.judge, results, drawn, opponents))
        if self.settings.tasks:
            yield replace(results, tasks=run_tasks(self.policy_model, self.plan.policy.tokenizer, self.settings))

    def feedback_scores(self) -> Scores:
        """Return the scores of the held-out completions."""
        return self._score(*self._prompts, self._completions, "held-out feedback", self._contexts)

    def _feedback_stage(self, results: Results) -> Results:
        held, bootstrap = self.plan.held, self.bootstrap
        scores = self.feedback_scores()
        metrics = likelihood_metrics(held, scores, bootstrap)
        if self.plan.reference is not None:  # rewards are log-ratios, so without a reference there are none
            rewards = results.beta * scores.log_ratios
            metrics = feedback_metrics(held, rewards, scores.tokens, bootstrap) | metrics
            results = _with_rewards(results, held, rewards)
        return replace(results, metrics=metrics)

    def _on_policy(self, prompts: Sequence[SourcePrompt], drawn: Sequence[PromptSamples]) -> dict[str, Estimate]:
        """KL, entropy and length of the samples."""
        ours, theirs = self._prompt_ids(prompts)
        groups = [group for group, one in enumerate(drawn) for _ in one.completions]
        completions = [ids for one in drawn for ids in one.completions]
        scores = self._score([ours[g] for g in groups], [theirs[g] for g in groups], completions, "KL of samples")
        cut = [float(ids[-1] != self.tokens.end_of_turn) for ids in completions]
        plain = self.settings.temperature == self.settings.top_p == 1
        metrics = on_policy_metrics(scores, groups, self.bootstrap, plain=plain)
        return {**metrics, "samples/truncated": self.bootstrap.rate(cut, groups)}

    def _judged(
        self,
        judge: CompletionJudge,
        results: Results,
        drawn: Sequence[PromptSamples],
        opponents: Sequence[Sequence[Reply]],
    ) -> Results:
        judged = [n for n, replies in enumerate(opponents) if replies]  # the data may have no answer to some prompts
        prompts = [drawn[n].source.prompt for n in judged]
        ours, theirs = [drawn[n].texts for n in judged], [opponents[n] for n in judged]
        won = win_rate(judge, prompts, ours, theirs, self.bootstrap)
        metrics = {**results.metrics, "judge/win_rate": won.rate}
        if not judge.asks_twice:  # a chat model rates by other questions than it compares, at twice the cost
            for side, texts in (("policy", ours), ("opponent", theirs)):
                metrics |= self._ratings(judge, side, prompts, texts)
        return replace(results, metrics=metrics, win_rate=won, judge=judge.report())

    def _ratings(
        self, judge: CompletionJudge, side: str, prompts: Sequence[Prompt], texts: Texts
    ) -> dict[str, Estimate]:
        """The judge's scores and labels of one side's completions."""
        answers = [(prompt, text) for prompt, prompt_texts in zip(prompts, texts, strict=True) for text in prompt_texts]
        groups = [group for group, prompt_texts in enumerate(texts) for _ in prompt_texts]
        # Judges that compute their scores always answer. For other judges, a missing answer counts as 0.
        scores = [value or 0.0 for value in judge.scores(answers)]
        metrics = {f"judge/score_{side}": self.bootstrap.mean(scores, groups)}
        if judge.labels_are_absolute:  # by the median of these very scores, half of either side would be desirable
            desirable = [float(label or False) for label in judge.labels(answers)]
            metrics[f"judge/desirable_{side}"] = self.bootstrap.rate(desirable, groups)
        return metrics

    def _opponent_texts(self, prompts: Sequence[SourcePrompt]) -> Texts:
        """The opponent's completions of each prompt; empty where the data have none."""
        opponent = self.plan.opponent_policy
        if opponent is None:
            best = best_of_data(self.plan.data.records)
            opponents = [best.get(prompt_key(one.prompt), []) for one in prompts]
            if not any(opponents):
                raise ValueError("opponent=data: expected desirable completions of the sampled prompts, found none")
            return opponents
        model = self.reference_model if opponent is self.plan.reference else None
        return [one.texts for one in self._draw(opponent, model, prompts)]

    def _draw(
        self, policy: Policy, model: PreTrainedModel | None, prompts: Sequence[SourcePrompt]
    ) -> list[PromptSamples]:
        """Sample a policy; ``model`` is its loaded model, or None to load it now."""
        settings, tokens = self.settings, self._tokens_of(policy)
        where = {"device": settings.device, "precision": settings.precision}
        engine = partial(make_engine, settings.engine, policy, tokens, settings, **where, loaded=model)
        # Generation keeps no logits, so more completions fit into memory than when they are scored.
        sampling = {"count": settings.samples, "batch_size": settings.batch_size * 4, "seed": settings.seed}
        sampler = Sampler(engine, tokens, control=policy.control, **sampling)
        track = partial(terminal.track, f"sampling {policy.name}", shown=settings.progress)
        return sampler.draw_all(prompts, track)

    def _prompt_ids(self, prompts: Sequence[SourcePrompt]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of the prompts as the policy reads them (with CSFT's control token), and as the reference does."""
        sides = []
        for model in (self.plan.policy, self.plan.reference or self.plan.policy):
            tokens = self._tokens_of(model)
            sides.append([tokens.fitted_prompt(one.prompt, model.control, where=one.id) for one in prompts])
        return sides[0], sides[1]

    def _score(
        self,
        ours: Sequence[Ids],
        theirs: Sequence[Ids],
        completions: Sequence[Ids],
        name: str,
        contexts: Sequence[Sequence[Span]] | None = None,
    ) -> Scores:
        models, size = (self.policy_model, self.reference_model), self.settings.batch_size
        track = partial(terminal.track, name, shown=self.settings.progress)
        return score(*models, ours, theirs, completions, contexts=contexts, batch_size=size, track=track)

    def _load(self, policy: Policy) -> PreTrainedModel:
        # Both models get at least the policy's vocabulary, or their distributions could not be compared.
        size = len(self.plan.policy.tokenizer)
        return policy.load(device=self.settings.device, precision=self.settings.precision, vocabulary=size)


def _as_text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else transcript(prompt)
