from .apo import APODown as APODown, APOZero as APOZero, apo_down_loss as apo_down_loss, apo_zero_loss as apo_zero_loss
from .base import Humanline as Humanline, Needs as Needs, Objective as Objective, Output as Output
from .bco import BCO as BCO, bco_loss as bco_loss
from .bradley_terry import BradleyTerry as BradleyTerry, bradley_terry_loss as bradley_terry_loss
from .cpo import CPO as CPO, cpo_loss as cpo_loss
from .csft import CSFT as CSFT
from .dpo import DPO as DPO, dpo_loss as dpo_loss
from .grpo import GRPO as GRPO, group_advantages as group_advantages, grpo_loss as grpo_loss
from .halo import HALO as HALO, halo_loss as halo_loss
from .ipo import IPO as IPO, ipo_loss as ipo_loss
from .kto import KTO as KTO, kto_loss as kto_loss
from .mix import Mix as Mix
from .orpo import ORPO as ORPO, orpo_loss as orpo_loss
from .ppo import PPO as PPO, PPOLosses as PPOLosses, ppo_loss as ppo_loss
from .robust_dpo import RobustDPO as RobustDPO, robust_dpo_loss as robust_dpo_loss
from .sft import SFT as SFT, sft_loss as sft_loss
from .simpo import SimPO as SimPO, simpo_loss as simpo_loss
from .slic import SLiC as SLiC, slic_loss as slic_loss
