__version__: str

from . import data as data, objectives as objectives, policy as policy, testing as testing, theory as theory
from .commands.python import train as train
from .data import (
    FeedbackFiles as FeedbackFiles,
    HHSource as HHSource,
    MixedSource as MixedSource,
    OasstSource as OasstSource,
    PreferenceDataModule as PreferenceDataModule,
    Selection as Selection,
    SHPSource as SHPSource,
    StreamingDataModule as StreamingDataModule,
    UltraFeedbackSource as UltraFeedbackSource,
)
from .objectives import (
    AOT as AOT,
    BCO as BCO,
    CPO as CPO,
    CSFT as CSFT,
    DPO as DPO,
    EXO as EXO,
    FDPO as FDPO,
    GRPO as GRPO,
    HALO as HALO,
    IPO as IPO,
    KTO as KTO,
    NCA as NCA,
    ORPO as ORPO,
    PPO as PPO,
    SFT as SFT,
    SPPO as SPPO,
    AOTUnpaired as AOTUnpaired,
    APODown as APODown,
    APOZero as APOZero,
    BCOPair as BCOPair,
    BradleyTerry as BradleyTerry,
    DiscoPOP as DiscoPOP,
    EXORewards as EXORewards,
    Hinge as Hinge,
    InfoNCA as InfoNCA,
    Mix as Mix,
    NCAPair as NCAPair,
    Needs as Needs,
    Objective as Objective,
    Output as Output,
    RobustDPO as RobustDPO,
    SimPO as SimPO,
    SLiC as SLiC,
)
from .optim import (
    Adafactor as Adafactor,
    AdamW as AdamW,
    BitsAndBytesAdamW as BitsAndBytesAdamW,
    RMSprop as RMSprop,
)
from .policy import (
    Backbone as Backbone,
    LoRA as LoRA,
    ModelSpec as ModelSpec,
)
from .sharding import (
    FSDP as FSDP,
)
from .toy import (
    ToySource as ToySource,
)
