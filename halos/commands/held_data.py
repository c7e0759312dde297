"""Finds the records that commands on a policy work on, and the folder for their results."""

from pathlib import Path

from omegaconf import DictConfig

from halos.commands.builders import build_data
from halos.config.roles import trusted_node
from halos.files import in_home
from halos.policy.lookup import Policy
from halos.sampling.prompts import HeldData, read_split


def read_data(node: DictConfig | None, policy: Policy | None, split: str, seed: int, trust: object = ()) -> HeldData:
    """Read a split of the configured data, or of the data that the policy was trained on.

    Args:
        node: the ``data`` node of the command; None takes the one of the run that trained the policy.
        policy: the policy that the command works on, if there is one.
        split: ``val`` or ``train``.
        trust: modules whose classes the run's own data may name, besides this package's.
        seed: the seed of the split, used with ``node``; the run's own data are split with the run's seed.

    Raises:
        ValueError: no data are known, none are held out, or the run's own data name a class of an untrusted module.
    """
    if node is None and policy is not None and policy.run is not None:
        node, seed = trusted_node(policy.run.data, "data", trust), policy.run.seed
    if node is None:
        raise ValueError("data: expected data=toy, data=files data.train=FILE …; only a run's folder brings its own")
    return read_split(build_data(node, seed=seed).preparation, split)


def results_folder(output: str | None, policy: Policy, name: str) -> Path:
    """Return the folder for the results of a command; it is not made yet.

    Args:
        output: the folder that the user named; None: one in the run's folder.
        policy: the policy that the command works on.
        name: the name of the folder in the run's folder.

    Raises:
        ValueError: no folder was named and no run is known, or the run's folder has a link of this name.
    """
    if output is not None:
        return in_home(output)
    if policy.run is None:
        raise ValueError("output: expected a folder for the results; only a run's folder has a place for them")
    folder = in_home(policy.name) / name
    if folder.is_symlink():
        raise ValueError(
            f"output: expected a folder of the run, found a link, {folder} → {folder.readlink()}; set output"
        )
    return folder
