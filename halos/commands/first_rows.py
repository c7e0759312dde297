"""``check_first_rows(cfg)``: finds errors at the start of the data before torch is imported, which takes seconds."""

from omegaconf import DictConfig

from halos.config.nodes import build, class_of
from halos.data.reading.lines import ReadingLimits
from halos.data.sources.base import Source
from halos.data.sources.file_source import FileSource
from halos.data.sources.mixed import MixedSource


def check_first_rows(cfg: DictConfig) -> None:
    """Check that a run's files exist, their settings, and their first rows.

    Raises:
        ValueError: the same error that reading all of the data would raise.
    """
    node = cfg.data
    # Only sources of files: the constructor of another source may do work, and the run calls it again to read the data.
    if not issubclass(class_of("data.source", node.source._target_, Source), FileSource | MixedSource):
        return
    source: Source = build(node.source)
    source.reading = ReadingLimits(node.max_expansion, node.max_characters)
    source.check_first_rows()
