from .fsdp import FSDP as FSDP
from .fsdp_tp import FSDPTP as FSDPTP
