"""Human feedback: sources, records, views, token rows, batches and the DataModule.

Read the packages in this order: ``module``, ``preparation`` (whose ``prepare`` calls the others), ``sources``,
``reading``, ``layouts``, ``records``, ``views``, ``rows``, ``batches``. ``streaming`` does the same for streams, and
``store`` keeps tables on disk.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
