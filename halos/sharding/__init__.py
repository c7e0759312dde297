"""FSDP2, tensor parallelism, sharded loading and consolidation of sharded checkpoints."""
