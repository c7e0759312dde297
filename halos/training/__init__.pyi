from .checkpoints import (
    Checkpoints as Checkpoints,
)
from .policy_point import (
    PolicyPoint as PolicyPoint,
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
