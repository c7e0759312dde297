from .base import (
    CompletionJudge as CompletionJudge,
)
from .chat import (
    ChatJudge as ChatJudge,
)
from .reward_model import (
    RewardModel as RewardModel,
)
from .truth import (
    TruthJudge as TruthJudge,
)
