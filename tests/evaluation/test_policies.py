"""Which model a run is measured against: the one that it was trained against, read as it was read there."""

import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from halos.data.templates import PLAIN_TEMPLATE
from halos.evaluation.policies import Policy, find_policy, reference_of
from halos.toy.model import REFERENCE_DIR


def run(folder: Path, **model: Any) -> Policy:
    """A finished run that started from the toy reference, with these settings of its model."""
    shutil.copytree(REFERENCE_DIR, folder / "model")
    config = {"loss": {"name": "kto"}, "data": {}, "model": {"path": str(REFERENCE_DIR), **model}}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    (folder / "summary.json").write_text("{}")
    return find_policy("policy", str(folder))


def reference(policy: Policy) -> Policy:
    found = reference_of(policy, None)
    assert found is not None
    return found


def test_the_reference_reads_prompts_by_the_runs_chat_template(tmp_path: Path) -> None:
    assert reference(run(tmp_path / "given", chat_template="plain")).tokenizer.chat_template == PLAIN_TEMPLATE
    own = reference(run(tmp_path / "own"))
    assert own.tokenizer.chat_template == find_policy("reference", str(REFERENCE_DIR)).tokenizer.chat_template
