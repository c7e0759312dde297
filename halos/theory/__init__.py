"""The prospect-theoretic view of the KTO paper (arXiv 2402.01306, section 3), as functions that compute it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
