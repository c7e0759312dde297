from .batches.batch import Batch as Batch
from .batches.collate import Batches as Batches, collate as collate
from .module import (
    PreferenceDataModule as PreferenceDataModule,
)
from .records.record import (
    Completion as Completion,
    Conversation as Conversation,
    Message as Message,
    Record as Record,
)
from .records.truth import (
    TrueReward as TrueReward,
)
from .rows.token_rows import (
    Row as Row,
)
from .sources.base import (
    Source as Source,
)
from .sources.feedback_files import (
    FeedbackFiles as FeedbackFiles,
)
from .sources.file_source import (
    FileSource as FileSource,
    RowSource as RowSource,
)
from .sources.hh import (
    HHSource as HHSource,
)
from .sources.mixed import (
    MixedSource as MixedSource,
)
from .sources.oasst import (
    OasstSource as OasstSource,
)
from .sources.on_policy import (
    OnPolicySource as OnPolicySource,
)
from .sources.shp import (
    SHPSource as SHPSource,
)
from .sources.ultrafeedback import (
    UltraFeedbackSource as UltraFeedbackSource,
)
from .streaming.module import (
    StreamingDataModule as StreamingDataModule,
)
from .views.selection import (
    Selection as Selection,
)
