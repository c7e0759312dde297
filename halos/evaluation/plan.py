"""What an evaluation will do, checked before any weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from halos.checks import check_number, check_whole
from halos.config.devices import check_place
from halos.evaluation.duels import best_of_data
from halos.evaluation.harness import check_installed
from halos.evaluation.heldout import HeldOut, held_out
from halos.judges.base import CompletionJudge
from halos.policy.lookup import Policy, check_tokenizer
from halos.sampling.engines import Decoding, check_engine
from halos.sampling.prompts import HeldData

DEFAULT_BETA = 0.1
"""β of implied rewards where neither the user nor the policy's run gives one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Plain settings of an evaluation.

    Attributes:
        seed: of samples and of the choice of prompts.
        device: where the models compute, such as ``auto``.
        precision: their number type, such as ``32-true``.
        batch_size: completions in one forward.
        resamples: draws of the bootstrap.
        beta: β of the implied rewards; None: that of the policy's run.
        size: prompts to sample; 0: none, None: all.
        samples: completions of each prompt.
        decoding: how completions are drawn.
        engine: ``transformers`` or ``vllm``.
        tasks: names of standard tasks.
        task_folder: a folder with task files of the user's own.
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
    decoding: Decoding = field(default_factory=Decoding)
    engine: str = "transformers"
    tasks: Sequence[str] = ()
    task_folder: str | None = None
    task_limit: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("batch_size", 1), ("resamples", 1), ("samples", 1)):
            check_whole(name, getattr(self, name), least)
        check_whole("size", self.size, 0, null=True)
        check_whole("task_limit", self.task_limit, 1, null=True)
        if self.beta is not None:
            check_number("beta", self.beta)
        check_place(self.device, self.precision)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """A checked evaluation: :func:`plan_evaluation` makes it, :func:`halos.evaluation.evaluator.evaluate` follows it.

    Attributes:
        settings: the plain settings.
        policy: the model to evaluate.
        reference: the model that rewards and KL are measured against, if there is one.
        data: the records of the evaluated split.
        held: pairs and labels of these records.
        judge: compares the policy's samples with the opponent's, if there is one.
        opponent: its name: ``reference``, ``data`` or a model's.
        opponent_policy: the model that the opponent's completions are drawn from; None if they are the data's own.
    """

    settings: Settings
    policy: Policy
    reference: Policy | None
    data: HeldData
    held: HeldOut
    judge: CompletionJudge | None
    opponent: str
    opponent_policy: Policy | None

    @property
    def beta(self) -> float:
        """β of the implied rewards."""
        return implied_beta(self.policy, self.settings.beta)


def plan_evaluation(
    settings: Settings,
    *,
    policy: Policy,
    reference: Policy | None,
    data: HeldData,
    judge: CompletionJudge | None = None,
    opponent: str = "reference",
    opponent_policy: Policy | None = None,
) -> EvaluationPlan:
    """Check that everything goes together; see :class:`EvaluationPlan` for the arguments.

    Raises:
        ValueError: something cannot work. No weights have been read by then.
    """
    if judge is not None and opponent == "reference":
        if reference is None:
            raise ValueError("opponent: expected reference=MODEL to compare with, found none")
        opponent_policy = reference
    elif judge is not None and opponent == "data":
        best_of_data(data.records)  # raises if there is nothing to compare with
    if settings.tasks:
        check_installed()
    if policy.is_classifier and (judge is not None or settings.tasks):
        raise ValueError(f"policy: {policy.name} is a reward model: it has no samples to judge and no tasks to do")
    for key, model in (("policy", policy), ("reference", reference), ("opponent", opponent_policy)):
        if model is not None:
            check_tokenizer(key, model)
            is_sampled = model is policy or model is opponent_policy
            if is_sampled and settings.size != 0 and not policy.is_classifier:
                check_engine(settings.engine, model, key=key)
    if reference is not None:
        _check_same_vocabulary(policy, reference)
    return EvaluationPlan(
        settings=settings,
        policy=policy,
        reference=reference,
        data=data,
        held=held_out(data.records, data.selection, data.training),
        judge=judge,
        opponent=opponent,
        opponent_policy=opponent_policy,
    )


def implied_beta(policy: Policy, beta: float | None) -> float:
    """The β that is set, else that of the policy's run, else :data:`DEFAULT_BETA`. It may be 0."""
    for candidate in (beta, policy.beta):
        if candidate is not None:
            return float(candidate)
    return DEFAULT_BETA


def _check_same_vocabulary(policy: Policy, reference: Policy) -> None:
    vocabulary = policy.tokenizer.get_vocab()
    if other := [text for text, i in reference.tokenizer.get_vocab().items() if vocabulary.get(text) != i]:
        raise ValueError(
            f"reference: expected the tokenizer of {policy.name}, found another in {reference.name}: it differs in "
            f"{len(other)} tokens, such as {other[0]!r}"
        )
