"""Rows collated to tensors, in a seeded order."""
