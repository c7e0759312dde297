"""The toy world: a small language with a known true reward, its feedback and its reference policy."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
