"""A focal loss on pairs, for halos."""

from focal.loss import Focal, focal_loss

__all__ = ["Focal", "focal_loss"]
