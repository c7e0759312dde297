"""Files in this project's format, TRL's, HALOs' or UltraFeedback's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import final

from halos.data.reading.json_files import Located
from halos.data.sources.base import FileSource, by_row
from halos.data.sources.formats import Adapted, to_record


@final
class JsonSource(FileSource):
    """Files in this project's format, TRL's, HALOs' or UltraFeedback's, recognised row by row."""

    name = "json"
    rows_alone = True

    def adapted(self, rows: Iterable[Located]) -> Iterator[Adapted]:
        return by_row(rows, to_record)
