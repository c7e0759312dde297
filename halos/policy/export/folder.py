"""The folder of an exported model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from halos.files import atomic_folder
from halos.processes.errors import RunFailed


@contextmanager
def model_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write a model to; it replaces ``folder`` when the block ends without an error.

    Raises:
        RunFailed: safetensors cannot write the weights. Its error for a full disk is no ``OSError``.
    """
    try:
        with atomic_folder(folder) as part:
            yield part
    except SafetensorError as error:
        raise RunFailed(f"{folder}: the model could not be written: {error}") from error
