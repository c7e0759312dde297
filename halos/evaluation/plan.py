"""The settings, models and data of an evaluation, checked before any weights are loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from halos.checks import check_number, check_whole
from halos.config.devices import check_place
from halos.evaluation.duels import best_of_data
from halos.evaluation.heldout import HeldOut
from halos.judges.base import CompletionJudge
from halos.policy.lookup import Policy, check_tokenizer
from halos.sampling.engines import Decoding, check_engine
from halos.sampling.prompts import HeldData

DEFAULT_BETA = 0.1
"""β of implied rewards if neither the user nor the policy's run sets one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Decoding):
    """Plain settings of an evaluation, among them how completions are drawn.

    Attributes:
        seed: the seed of samples and of the choice of prompts.
        device: the device of the models, such as ``auto``.
        precision: their number type, such as ``32-true``.
        batch_size: completions in one forward pass.
        resamples: the number of draws of the bootstrap.
        beta: β of the implied rewards; None: the β of the policy's run.
        size: prompts to sample; 0: none, None: all.
        samples: completions of each prompt.
        engine: ``transformers`` or ``vllm``.
        tasks: names of standard tasks.
        task_folder: a folder with the user's own task files.
        task_limit: documents of each task, None: all.
        progress: whether to show progress bars.

    Raises:
        ValueError: a value is out of range.
    """

    seed: int = 0
    device: str = "auto"
    precision: str = "32-true"
    batch_size: int = 32
    resamples: int = 1000
    beta: float | None = None
    size: int | None = 512
    samples: int = 1
    engine: str = "transformers"
    tasks: Sequence[str] = ()
    task_folder: str | None = None
    task_limit: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        Decoding.__post_init__(self)
        for name, least in (("seed", 0), ("batch_size", 1), ("resamples", 1), ("samples", 1)):
            check_whole(name, getattr(self, name), least)
        check_whole("size", self.size, 0, null=True)
        check_whole("task_limit", self.task_limit, 1, null=True)
        check_number("beta", self.beta, null=True)
        check_place(self.device, self.precision)


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """A checked evaluation, which :func:`halos.evaluation.evaluator.evaluate` carries out.

    Attributes:
        settings: the plain settings.
        policy: the model to evaluate.
        reference: the model that rewards and KL are measured against, if there is one.
        data: the records of the evaluated split.
        held: pairs and labels of these records.
        judge: compares the policy's samples with the opponent's, if there is one.
        opponent: ``reference``, ``data`` or the name of a model.
        opponent_policy: the model that the opponent's completions are drawn from; None if they come from the data.

    Raises:
        ValueError: the policy, the data and the settings do not fit together.
    """

    settings: Settings
    policy: Policy
    reference: Policy | None
    data: HeldData
    held: HeldOut
    judge: CompletionJudge | None = None
    opponent: str = "reference"
    opponent_policy: Policy | None = None

    def __post_init__(self) -> None:
        if self.judge is not None and self.opponent == "data":
            best_of_data(self.data.records)  # raises if there is nothing to compare with
        elif self.judge is not None and self.opponent_policy is None:
            raise ValueError("opponent: expected reference=MODEL to compare with, found none")
        if self.settings.tasks and importlib.util.find_spec("lm_eval") is None:
            raise ValueError("tasks: lm-evaluation-harness is not installed; pip install 'halos[eval]'")
        if self.policy.is_classifier and (self.judge is not None or self.settings.tasks):
            name = self.policy.name
            raise ValueError(f"policy: {name} is a reward model: it has no samples to judge and no tasks to do")
        # Models are checked last, as the tokenizer of a hub id may have to be downloaded.
        sampled = () if self.settings.size == 0 or self.policy.is_classifier else (self.policy, self.opponent_policy)
        for key, model in self.models().items():
            check_tokenizer(key, model)
            # A reference that only scores need not be a model that the engine can sample; vLLM cannot sample adapters.
            if model in sampled:
                check_engine(self.settings.engine, model, key=key)
        if self.reference is not None:
            _check_same_vocabulary(self.policy, self.reference)

    def models(self) -> dict[str, Policy]:
        """Return the models by their keys in the configuration."""
        models = {"policy": self.policy, "reference": self.reference, "opponent": self.opponent_policy}
        return {key: model for key, model in models.items() if model is not None}


def implied_beta(policy: Policy, beta: float | None) -> float:
    """Return ``beta`` if it is set, else the β of the policy's run, else :data:`DEFAULT_BETA`. It may be 0."""
    return float(next(value for value in (beta, policy.beta, DEFAULT_BETA) if value is not None))


def _check_same_vocabulary(policy: Policy, reference: Policy) -> None:
    # Both models score the policy's token ids, and KL sums over the vocabulary: an id has to be the same text in both.
    # The policy may have more tokens, such as control tokens, which get new rows in the reference.
    vocabulary = policy.tokenizer.get_vocab()
    if other := [text for text, i in reference.tokenizer.get_vocab().items() if vocabulary.get(text) != i]:
        found = f"another in {reference.name}: it differs in {len(other)} tokens, such as {other[0]!r}"
        raise ValueError(f"reference: expected the tokenizer of {policy.name}, found {found}")
