"""Judges of completions: a true reward, a reward model, or a chat model at an OpenAI-compatible endpoint."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
