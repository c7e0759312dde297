"""FSDP2, tensor parallelism, sharded loading and consolidation of sharded checkpoints."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
