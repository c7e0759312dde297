"""One file per objective: a pure function in the paper's symbols and a thin module round it."""

from halos.loop.humanline import Humanline
from halos.objectives.apo import APODown, APOZero, apo_down_loss, apo_zero_loss
from halos.objectives.base import Needs, Objective, Output
from halos.objectives.bco import BCO, bco_loss
from halos.objectives.bradley_terry import BradleyTerry, bradley_terry_loss
from halos.objectives.cpo import CPO, cpo_loss
from halos.objectives.csft import CSFT
from halos.objectives.dpo import DPO, dpo_loss
from halos.objectives.grpo import GRPO, group_advantages, grpo_loss
from halos.objectives.ipo import IPO, ipo_loss
from halos.objectives.kto import KTO, kto_loss, kto_reference_point
from halos.objectives.mix import Mix
from halos.objectives.orpo import ORPO, orpo_loss
from halos.objectives.ppo import PPO, PPOLosses, ppo_loss
from halos.objectives.robust_dpo import RobustDPO, robust_dpo_loss
from halos.objectives.sft import SFT, sft_loss
from halos.objectives.simpo import SimPO, simpo_loss
from halos.objectives.slic import SLiC, slic_loss

__all__ = [
    "BCO",
    "CPO",
    "CSFT",
    "DPO",
    "GRPO",
    "IPO",
    "KTO",
    "ORPO",
    "PPO",
    "SFT",
    "APODown",
    "APOZero",
    "BradleyTerry",
    "Humanline",
    "Mix",
    "Needs",
    "Objective",
    "Output",
    "PPOLosses",
    "RobustDPO",
    "SLiC",
    "SimPO",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "bradley_terry_loss",
    "cpo_loss",
    "dpo_loss",
    "group_advantages",
    "grpo_loss",
    "ipo_loss",
    "kto_loss",
    "kto_reference_point",
    "orpo_loss",
    "ppo_loss",
    "robust_dpo_loss",
    "sft_loss",
    "simpo_loss",
    "slic_loss",
]
