from .aot import AOT as AOT, AOTUnpaired as AOTUnpaired, aot_loss as aot_loss
from .apo import APODown as APODown, APOZero as APOZero, apo_down_loss as apo_down_loss, apo_zero_loss as apo_zero_loss
from .base import Humanline as Humanline, Needs as Needs, Objective as Objective, Output as Output
from .bco import BCO as BCO, BCOPair as BCOPair, bco_loss as bco_loss, bco_pair_loss as bco_pair_loss
from .bradley_terry import BradleyTerry as BradleyTerry, bradley_terry_loss as bradley_terry_loss
from .cpo import CPO as CPO, cpo_loss as cpo_loss
from .csft import CSFT as CSFT
from .discopop import DiscoPOP as DiscoPOP, discopop_loss as discopop_loss
from .dpo import DPO as DPO, dpo_loss as dpo_loss
from .exo import EXO as EXO, EXORewards as EXORewards, exo_loss as exo_loss, exo_rw_loss as exo_rw_loss
from .f_dpo import FDPO as FDPO, f_derivative as f_derivative, f_dpo_loss as f_dpo_loss
from .grpo import GRPO as GRPO, group_advantages as group_advantages, grpo_loss as grpo_loss
from .halo import HALO as HALO, halo_loss as halo_loss
from .hinge import Hinge as Hinge, hinge_loss as hinge_loss
from .ipo import IPO as IPO, ipo_loss as ipo_loss
from .kto import KTO as KTO, kto_loss as kto_loss
from .mix import Mix as Mix
from .nca import (
    NCA as NCA,
    InfoNCA as InfoNCA,
    NCAPair as NCAPair,
    group_shares as group_shares,
    infonca_loss as infonca_loss,
    nca_loss as nca_loss,
    nca_pair_loss as nca_pair_loss,
)
from .orpo import ORPO as ORPO, orpo_loss as orpo_loss
from .ppo import PPO as PPO, PPOLosses as PPOLosses, ppo_loss as ppo_loss
from .robust_dpo import RobustDPO as RobustDPO, robust_dpo_loss as robust_dpo_loss
from .sft import SFT as SFT, sft_loss as sft_loss
from .simpo import SimPO as SimPO, simpo_loss as simpo_loss
from .slic import SLiC as SLiC, slic_loss as slic_loss
from .sppo import SPPO as SPPO, sppo_loss as sppo_loss
