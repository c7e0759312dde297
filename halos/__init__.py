"""Align language models with human feedback: KTO, DPO, offline PPO, CSFT and their family, on PyTorch Lightning."""

import lazy_loader

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version  # takes longer to import than the rest of this file

        return version("halos")
    return _attribute(name)
