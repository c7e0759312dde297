"""Finds the records that ``evaluate`` and ``sample`` work on, from a ``data`` node of the configuration."""

from omegaconf import DictConfig

from halos.commands.builders import build_data
from halos.policy.lookup import Policy
from halos.sampling.prompts import HeldData, read_split


def read_data(node: DictConfig | None, policy: Policy | None, split: str, seed: int) -> HeldData:
    """Read a split of the configured data, or of the data that the policy was trained on.

    Args:
        node: the ``data`` node of the command; None takes the one of the run that trained the policy.
        policy: the policy that the command is about, if there is one.
        split: ``val`` or ``train``.
        seed: the seed of the split, used with ``node``; the run's own data are split with the run's seed.

    Raises:
        ValueError: there is no data, or none is held out.
    """
    if node is None and policy is not None and policy.run is not None:
        node, seed = policy.run.data, policy.run.seed
    if node is None:
        raise ValueError("data: expected data=toy, data=files data.train=FILE …; only a run's folder brings its own")
    return read_split(build_data(node, seed=seed).preparation, split)
