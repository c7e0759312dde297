from .checkpoints import (
    Checkpoints as Checkpoints,
)
from .record import (
    RunRecord as RunRecord,
)
from .reference_sync import (
    ReferenceSync as ReferenceSync,
)
from .run_folder import (
    RunFolder as RunFolder,
)
