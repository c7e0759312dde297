"""Human feedback: sources, records, views, token rows, batches and the DataModule."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
