"""The prospect-theoretic view of the KTO paper (arXiv 2402.01306, section 3), as functions that compute it."""

from halos.theory.definition import Verdict, is_halo
from halos.theory.values import ImpliedLoss, Side, sides, value_curve

__all__ = ["ImpliedLoss", "Side", "Verdict", "is_halo", "sides", "value_curve"]
