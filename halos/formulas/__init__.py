"""Formulas that users write: their grammar, and the functions of tensors that they become."""
