"""``check_first_rows(cfg)``: what is wrong at the start of the data, before torch is imported, which takes seconds."""

from omegaconf import DictConfig

from halos.config.nodes import build, class_of
from halos.data.reading.lines import ReadingLimits
from halos.data.sources.base import Source
from halos.data.sources.file_source import FileSource
from halos.data.sources.mixed import MixedSource


def check_first_rows(cfg: DictConfig) -> None:
    """Check the settings of a run's files, that they are there, and their first rows.

    Raises:
        ValueError: as reading all of the data would.
    """
    node = cfg.data
    # Another source may do work in its constructor, which is called once more when the run reads the data.
    if not issubclass(class_of("data.source", node.source._target_, Source), FileSource | MixedSource):
        return
    source: Source = build(node.source)
    source.reading = ReadingLimits(node.max_expansion, node.max_characters)
    source.check_first_rows()
