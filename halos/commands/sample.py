"""``sample(cfg)``: completions of a policy for the prompts of a data source, as a file of records."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from halos import terminal
from halos.checks import check_whole
from halos.config.devices import check_place
from halos.data.rows.chat_tokens import ChatTokens
from halos.files import write_atomically
from halos.policy.lookup import Policy, find_policy
from halos.sampling.engines import Decoding, check_engine, make_engine
from halos.sampling.prompts import distinct_prompts, read_data
from halos.sampling.sampler import Sampler
from halos.training.identity import weights_key

log = logging.getLogger(__name__)

_FREE = ("output", "overwrite", "device", "progress")
"""Keys that may differ when a command goes on with a file: they do not change what is drawn."""


def sample(cfg: DictConfig) -> Path:
    """Sample as configured into ``cfg.output``; goes on with a file that an earlier, killed command left.

    Raises ``ValueError`` for a bad configuration, bad prompts or a bad model, before weights are loaded.
    """
    terminal.set_up_logging()
    check_whole("seed", cfg.seed, 0)
    check_place(cfg.device, cfg.precision)
    output = Path(cfg.output)
    policy = find_policy("policy", cfg.policy)
    check_engine(cfg.engine, policy)
    decoding = Decoding(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_p=cfg.top_p)
    data = read_data(cfg.get("data"), policy, cfg.split, cfg.seed)
    asked = distinct_prompts(data.records, cfg.size, cfg.seed)
    tokens = ChatTokens(policy.tokenizer, data.limits)
    where = {"device": cfg.device, "precision": cfg.precision}
    sampler = Sampler(
        partial(make_engine, cfg.engine, policy, tokens, decoding, **where),
        tokens,
        control=policy.control,
        count=cfg.samples,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
    )
    sampler.prompt_ids(asked)
    _begin(cfg, output, policy)
    total, cut = sampler.write(asked, output, partial(terminal.track, "sampling", shown=cfg.progress))
    terminal.say(f"{len(asked) * cfg.samples:,} completions for {len(asked):,} prompts in {output}")
    if cut:
        log.warning("%s of %s completions were cut at max_new_tokens=%s", cut, total, cfg.max_new_tokens)
    return output


def _begin(cfg: DictConfig, output: Path, policy: Policy) -> None:
    # What drew the samples lies beside them: a file is only gone on with by the same command about the same model.
    settings = output.with_name(output.name + ".config.yaml")
    told: Any = OmegaConf.to_container(cfg, resolve=True)
    if policy.run is not None and told.get("data") is None:
        told["data"] = policy.run.data
    if policy.spec.local is not None:
        told["weights"] = weights_key(policy.spec.local)
    if policy.spec.lora.path is not None:
        told["adapter"] = weights_key(Path(policy.spec.lora.path))
    new = OmegaConf.to_yaml({key: value for key, value in told.items() if key not in _FREE})
    if cfg.overwrite:
        output.unlink(missing_ok=True)
    elif output.exists() and (not settings.exists() or settings.read_text(encoding="utf-8") != new):
        raise ValueError(
            f"output: {output} holds samples that were drawn otherwise (see {settings}); choose another file, or set "
            "overwrite=true to replace it"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(settings, new)
