"""Streams of any source, for the tests of this folder."""

from typing import Any

from halos.data.preparation.needs import DataNeeds, RowNeeds
from halos.data.rows.chat_tokens import Limits
from halos.data.sources.base import Source
from halos.data.streaming.examples import Stream
from halos.data.streaming.preparation import StreamPreparation


def stream_of(
    source: Source,
    view: str = "binary",
    *,
    mismatched: bool = False,
    grouped: bool = False,
    held: frozenset[int] = frozenset(),
    strict_held: bool = False,
    **settings: Any,
) -> Stream:
    preparation = StreamPreparation(source=source, limits=Limits(512), **settings)
    return Stream(
        preparation, DataNeeds(view=view, flags=RowNeeds(mismatched=mismatched, grouped=grouped)), held, strict_held
    )
