"""One file per objective: a pure function in the paper's symbols, and a thin module around it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
