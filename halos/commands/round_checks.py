"""Checks the configuration of several rounds before the first of them is trained."""

import os
from collections.abc import Callable

from omegaconf import DictConfig

from halos.checks import check_choice, check_whole
from halos.commands.builders import build_data, build_objective
from halos.commands.judge import make_judge
from halos.config.combinations import check_combinations, values_of
from halos.config.nodes import build
from halos.data.preparation.needs import DataNeeds
from halos.data.records.record import Completion, Record
from halos.data.views.derive import VIEWS
from halos.data.views.selection import Selection
from halos.judges.labels import KINDS
from halos.objectives.base import Objective
from halos.sampling.engines import Decoding, check_installed

REFERENCES = ("last", "first")
_EXTREME_SCORE = 1e9
"""Scores of +1e9 and −1e9 lie on different sides of any threshold, and differ by more than any margin."""


def check_rounds(cfg: DictConfig, of_round: Callable[[int], DictConfig]) -> None:
    """Check a command of several rounds; nothing is loaded or written.

    Args:
        cfg: the configuration of the command.
        of_round: maps the number of a round to its configuration.

    Raises:
        ValueError: the configuration is bad, or the loss cannot learn from the feedback of the later rounds.
    """
    rounds = cfg.rounds
    # Each round starts processes of its own; under torchrun or srun every rank would start all rounds.
    if "LOCAL_RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise ValueError("rounds: expected one process, which starts those of a round; found several (torchrun, Slurm)")
    check_whole("rounds.count", rounds.count, 1)
    for name, options in (("reference", REFERENCES), ("feedback", KINDS)):
        check_choice(f"rounds.{name}", rounds[name], options)
    # Each round checks its own configuration too. Rules about rounds are checked here, as only the command's
    # configuration has their number.
    check_combinations(values_of(cfg))
    # All rounds from the second on have the same configuration except for their paths.
    numbers = ([0] if cfg.get("before") else []) + list(range(1, min(rounds.count, 2) + 1))
    objectives = [_objective(of_round(number)) for number in numbers]
    if rounds.count > 1:
        _check_sampling(cfg)
        _check_feedback(cfg, objectives[-1].data_needs())
        # The judge is made only to be checked, so on the CPU; it is made again when it is used.
        source = build_data(cfg.data, seed=cfg.seed).preparation.source
        make_judge(cfg.get("judge"), source, device="cpu", precision="32-true", progress=False)


def _objective(cfg: DictConfig) -> Objective:
    """Build the objective of one round without weights, and the specification of its model, which checks itself."""
    objective = build_objective(cfg, build(cfg.optim))
    if not objective.generates:
        raise ValueError(f"rounds: expected a loss whose policy can be sampled, found {cfg.loss.name}")
    if any(view_needs.flags.step_labels for view_needs in objective.data_needs().each()):
        raise ValueError(
            f"rounds: expected a loss of whole replies, as judges label no steps, found loss={cfg.loss.name}; set "
            "loss.step_labels=false"
        )
    build(cfg.model)  # the specification checks its values when it is made
    objective.check(cfg.trainer.accumulate_grad_batches, None)
    return objective


def _check_sampling(cfg: DictConfig) -> None:
    rounds = cfg.rounds
    for name in ("samples", "batch_size", "prompts"):
        check_whole(f"rounds.{name}", rounds[name], 1, null=name == "prompts")
    try:
        Decoding(max_new_tokens=rounds.max_new_tokens, temperature=rounds.temperature, top_p=rounds.top_p)
        check_installed(rounds.engine)
    except ValueError as error:
        raise ValueError(f"rounds.{error}") from error


def _check_feedback(cfg: DictConfig, data_needs: DataNeeds) -> None:
    """Check that the loss's views can be derived from the judge's feedback: derive them from made-up feedback.

    It is as varied as a judge's feedback on two prompts can be.
    """
    kind, samples, temperature = cfg.rounds.feedback, cfg.rounds.samples, cfg.rounds.temperature
    different = samples if temperature > 0 else 1  # at temperature 0 all samples of a prompt are equal
    if kind == "pairs" and different < 2:
        expected = "at least 2, at a temperature above 0, for rounds.feedback=pairs"
        raise ValueError(f"rounds.samples: expected {expected}; found {samples} at temperature {temperature}")
    records = [_made_up_record(kind, prompt, different) for prompt in range(2)]
    # The derivation is that of training, so that rules about views are not repeated here.
    selection: Selection = build(cfg.data.select)
    try:
        for needs in data_needs.each():
            VIEWS[needs.form](records, selection.prepare(needs.view, records, records))
    except ValueError as error:
        found = f"{kind} of {different} different completions of each prompt: {error}"
        expected = f"feedback that loss={cfg.loss.name} can learn from"
        raise ValueError(f"rounds.feedback: expected {expected}, found {found}") from error


def _made_up_record(kind: str, prompt: int, count: int) -> Record:
    """A record of up to two completions: the first is good for prompt 0 and bad for prompt 1, the second vice versa."""
    good = (prompt == 0, prompt == 1)[:count]
    completions = {
        "binary": [Completion(str(n), desirable=is_good) for n, is_good in enumerate(good)],
        "scores": [Completion(str(n), score=_EXTREME_SCORE * (1 if is_good else -1)) for n, is_good in enumerate(good)],
        "pairs": [Completion(str(n)) for n in range(len(good))],
    }[kind]
    return Record(str(prompt), str(prompt), tuple(completions), ((0, 1),) if kind == "pairs" else ())
