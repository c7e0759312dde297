"""One file per objective: a pure function in the paper's symbols and a thin module round it."""

from halos.objectives.base import Objective, Output
from halos.objectives.csft import CSFT
from halos.objectives.dpo import DPO, dpo_loss
from halos.objectives.kto import KTO, kto_loss, kto_reference_point
from halos.objectives.ppo import PPO, PPOLosses, ppo_loss
from halos.objectives.sft import SFT, sft_loss

__all__ = [
    "CSFT",
    "DPO",
    "KTO",
    "PPO",
    "SFT",
    "Objective",
    "Output",
    "PPOLosses",
    "dpo_loss",
    "kto_loss",
    "kto_reference_point",
    "ppo_loss",
    "sft_loss",
]
