"""``reference_points(cfg)``: every estimator of KTO's reference point next to the true KL of a policy."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from omegaconf import DictConfig

from halos import terminal
from halos.checks import check_whole
from halos.commands.held_data import read_data, results_folder
from halos.config.devices import check_place
from halos.config.roles import check_trusted_models
from halos.data.rows.chat_tokens import ChatTokens
from halos.data.rows.exchanges import Exchange
from halos.data.rows.mismatch import derangement
from halos.data.rows.token_rows import Row
from halos.evaluation import point_report
from halos.evaluation.heldout import held_out
from halos.evaluation.reference_points import Replies, Simulation, measure, score_rows, true_kl
from halos.evaluation.statistics import Bootstrap
from halos.files import write_atomically
from halos.policy.lookup import Policy, find_policy, reference_of
from halos.sampling.generate import sample
from halos.sampling.prompts import HeldData, distinct_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def reference_points(cfg: DictConfig) -> dict[str, Any]:
    """Measure all estimators and write ``reference_points.json``, ``.csv``, ``.md``, ``.png`` and ``.svg``.

    Returns:
        The content of the JSON file.

    Raises:
        ValueError: a setting, the data or a model cannot work, found before weights are loaded.
    """
    terminal.set_up_logging()
    check_place(cfg.device, cfg.precision)
    for name in ("samples", "max_new_tokens", "scoring_batch_size"):
        check_whole(name, cfg[name], 1)
    trusted = check_trusted_models(cfg.trust_remote_code)
    policy = find_policy("policy", cfg.policy, trusted=trusted)
    reference = _reference(policy, cfg.reference, trusted)
    folder = results_folder(cfg.output, policy, "reference_points")
    batch_size = cfg.batch_size or (policy.run.data["batch_size"] if policy.run is not None else 32)
    points = {"point_steps": cfg.reference_point_steps, "refresh_size": cfg.kl_prompts}
    simulation = Simulation(steps=cfg.steps, batch_size=batch_size, seed=cfg.seed, **points)
    data = read_data(cfg.get("data"), policy, cfg.split, cfg.seed, cfg.get("trust"))
    tokens = ChatTokens(policy.tokenizer, data.limits, data.text)
    rows = _data_rows(data, tokens, cfg.seed)
    pl.seed_everything(cfg.seed, verbose=False)
    place = {"device": cfg.device, "precision": cfg.precision, "vocabulary": len(policy.tokenizer)}
    model, other = policy.load(**place), reference.load(**place)
    track = partial(terminal.track, shown=cfg.progress)
    samples = _samples(model, data, tokens, cfg, count=cfg.samples, seed=cfg.seed)
    score = partial(score_rows, model, other, batch_size=cfg.scoring_batch_size)
    kl = true_kl(score(samples, track=partial(track, "KL of samples")), [row.group for row in samples], Bootstrap())
    began = time.perf_counter()
    drawn = score(_samples(model, data, tokens, cfg, count=1, seed=cfg.seed + 1), track=partial(track, "refreshes"))
    replies = Replies(drawn.divergence[:, 0], time.perf_counter() - began)
    scored = score(rows, track=partial(track, "completions of the data"))
    measured = measure(scored, rows, replies, kl.value, simulation)
    result = {"policy": policy.name, "kl": asdict(kl), "steps": asdict(simulation), "points": [*map(asdict, measured)]}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "reference_points.json", json.dumps(result, indent=2) + "\n")
    point_report.write(folder, measured, kl, batch_size)
    terminal.console.print(point_report.terminal(measured, kl, batch_size))
    terminal.say(f"results: {folder}")
    return result


def _reference(policy: Policy, where: str | None, trusted: Sequence[str]) -> Policy:
    if policy.is_classifier or policy.control:
        kind = "a reward model" if policy.is_classifier else "one whose prompts end with a control token"
        raise ValueError(f"policy: expected a language model trained against its reference, found {kind}")
    if (reference := reference_of(policy, where, trusted)) is None:
        raise ValueError("reference: expected a model, found none; only a run's folder brings its own")
    return reference


def _data_rows(data: HeldData, tokens: ChatTokens, seed: int) -> list[Row]:
    """The different completions of the records, each with another prompt's completion as its second branch."""
    held = held_out(data.records, data.selection, data.training)
    partners = derangement(held.groups, seed)
    exchanges = [
        Exchange(f"completion {n}", prompt, (held.completions[n], held.completions[partners[n]]))
        for n, prompt in enumerate(held.prompts)
    ]
    tokenised = tokens.tokenise(exchanges)
    tokens.check([refusal for one in tokenised for refusal in one.refusals], len(exchanges))
    prompts = [tokens.fitted_prompt(prompt) for prompt in held.prompts]
    return [
        Row(
            f"completion {n}",
            held.groups[n],
            tuple(ids),
            tuple(_fit(tokens, completion_ids, len(ids)) for completion_ids in one.completions),
            context=tuple(map(tuple, one.context)),
        )
        for n, (ids, one) in enumerate(zip(prompts, tokenised, strict=True))
    ]


def _fit(tokens: ChatTokens, completion: Sequence[int], prompt: int) -> tuple[int, ...]:
    return tuple(tokens.fit_completion(list(completion), prompt)[0])


def _samples(
    model: "PreTrainedModel", data: HeldData, tokens: ChatTokens, cfg: DictConfig, *, count: int, seed: int
) -> list[Row]:
    """``count`` samples of the policy for each prompt at temperature 1, as rows."""
    prompts = [tokens.fitted_prompt(one.prompt) for one in distinct_prompts(data.records, cfg.size, cfg.seed)]
    repeated = [ids for ids in prompts for _ in range(count)]
    draw = partial(sample, end_of_turn=tokens.end_of_turn, pad=tokens.pad, max_new_tokens=cfg.max_new_tokens)
    drawn = draw(model, repeated, seed=seed)
    pairs = enumerate(zip(repeated, drawn, strict=True))
    return [Row(f"sample {n}", n // count, tuple(ids), (tuple(completion_ids),)) for n, (ids, completion_ids) in pairs]
