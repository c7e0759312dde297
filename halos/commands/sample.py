"""``sample(cfg)``: completions of a policy for the prompts of a data source, as a file of records."""

import logging
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from halos import terminal
from halos.checks import check_whole
from halos.commands.held_data import read_data
from halos.config.devices import check_place
from halos.config.nodes import plain
from halos.config.roles import check_trusted_models
from halos.data.rows.chat_tokens import ChatTokens
from halos.files import write_atomically
from halos.policy.lookup import Policy, find_policy
from halos.sampling.engines import Decoding, check_engine, make_engine
from halos.sampling.prompts import distinct_prompts
from halos.sampling.sampler import Sampler
from halos.training.identity import weights_key

log = logging.getLogger(__name__)

_FREE_KEYS = ("output", "overwrite", "device", "progress", "trust")
"""Keys that may change when a command continues a file: the samples do not depend on them."""


def sample(cfg: DictConfig) -> Path:
    """Sample a policy into the file ``cfg.output``, or continue a file that a killed command has left.

    Returns:
        The file.

    Raises:
        ValueError: a setting, a prompt or the model cannot work (found before weights are loaded), or the file holds
            samples that were drawn with other settings.
    """
    terminal.set_up_logging()
    check_whole("seed", cfg.seed, 0)
    check_place(cfg.device, cfg.precision)
    output = Path(cfg.output)
    policy = find_policy("policy", cfg.policy, trusted=check_trusted_models(cfg.trust_remote_code))
    check_engine(cfg.engine, policy)
    decoding = Decoding(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_p=cfg.top_p)
    data = read_data(cfg.get("data"), policy, cfg.split, cfg.seed, cfg.get("trust"))
    prompts = distinct_prompts(data.records, cfg.size, cfg.seed)
    tokens = ChatTokens(policy.tokenizer, data.limits, data.text)
    engine = partial(make_engine, cfg.engine, policy, tokens, decoding, device=cfg.device, precision=cfg.precision)
    sampling = {"count": cfg.samples, "batch_size": cfg.batch_size, "seed": cfg.seed}
    sampler = Sampler(engine, tokens, control=policy.control, **sampling)
    sampler.prompt_ids(prompts)  # raises for a prompt that does not fit, before the output is touched
    _open(cfg, output, policy, tokens)
    total, cut = sampler.write(prompts, output, partial(terminal.track, "sampling", shown=cfg.progress))
    terminal.say(f"{len(prompts) * cfg.samples:,} completions for {len(prompts):,} prompts in {output}")
    # Cut completions have no end-of-turn token, so a judge may rate them lower than the policy deserves.
    if cut:
        log.warning("%s of %s completions were cut at max_new_tokens=%s", cut, total, cfg.max_new_tokens)
    return output


def _open(cfg: DictConfig, output: Path, policy: Policy, tokens: ChatTokens) -> None:
    """Write the settings of the samples next to them, or check that those there are the same."""
    file = output.with_name(output.name + ".config.yaml")
    settings = plain(cfg)
    if policy.run is not None and settings.get("data") is None:
        settings["data"] = plain(policy.run.data)
    # A model that was trained again has the same path, so its weights and its tokenizer count too.
    settings["tokens"] = tokens.key
    if policy.spec.local is not None:
        settings["weights"] = weights_key(policy.spec.local)
    if policy.spec.lora.path is not None:
        settings["adapter"] = weights_key(Path(policy.spec.lora.path))
    new = OmegaConf.to_yaml({key: value for key, value in settings.items() if key not in _FREE_KEYS})
    if cfg.overwrite:
        output.unlink(missing_ok=True)
    elif output.exists() and (not file.exists() or file.read_text(encoding="utf-8") != new):
        hint = "choose another file, or set overwrite=true to replace it"
        raise ValueError(f"output: {output} holds samples that were drawn with other settings (see {file}); {hint}")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, new)
