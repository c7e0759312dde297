"""Keys and values of a batch of completions, written in place.

transformers' own ``DynamicCache`` copies all keys and values for each new token, and has one length of prompts for the
whole batch. Here they lie in memory with room for more columns:

    columns        0   1   2   3 | 4   5   6   7 …
    completion 0   a   b   c   d   x   y            prompt a b c d, prefilled once for completions 0 and 1
    completion 1   a   b   c   d   z   x
    completion 2   ·   ·   e   f   y   y            a shorter prompt: zeros on the left, which the mask hides
                                                room

Attention gets the filled columns as a view. A layer with a sliding window gets the columns that the window needs, as
from ``DynamicCache``, so the model makes the same masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64
"""Columns that are added when a layer is full."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the keys and values of prefilled prompts go.

    Attributes:
        rows: the completions that continue a prompt, [m].
        prompts: the prompt of each, a row of the prefill, [m].
        shape: the number of all completions of the batch, and the columns of its longest prompt.
    """

    rows: Tensor
    prompts: Tensor
    shape: tuple[int, int]


class RowLayer(DynamicLayer):
    """Keys and values of one layer, [completions, heads, columns, width]."""

    def __init__(self, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Not keys and values: they have more columns than a model that read those would expect.
        self.store: tuple[Tensor, Tensor] | None = None
        self.window, self.is_sliding = window, window is not None
        self.columns = 0
        self.placement: Placement | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new columns and return those that attention reads. A prefill reads its own alone."""
        if self.placement is not None:
            self._place(self.placement, (key_states, value_states))
            return key_states, value_states
        assert self.store is not None, "a prompt is prefilled before it is continued"
        first, begin = self._first_column(), self.columns
        self.columns += key_states.shape[2]
        if self.columns > self.store[0].shape[2]:
            self.store = _with_room(self.store[0]), _with_room(self.store[1])
        keys, values = self.store
        keys[:, :, begin : self.columns] = key_states
        values[:, :, begin : self.columns] = value_states
        return keys[:, :, first : self.columns], values[:, :, first : self.columns]

    def _place(self, placement: Placement, states: tuple[Tensor, Tensor]) -> None:
        rows, columns = placement.shape
        if self.store is None:
            # Zeros: what is masked is multiplied by 0, and memory that is not set can hold NaN.
            keys, values = (new.new_zeros(rows, new.shape[1], columns + ROOM, new.shape[3]) for new in states)
            self.store = keys, values
        for store, new in zip(self.store, states, strict=True):
            store[placement.rows, :, columns - new.shape[2] : columns] = new[placement.prompts]

    def select(self, rows: Tensor) -> None:
        """Keep these completions."""
        if self.store is not None:
            self.store = self.store[0][rows], self.store[1][rows]

    def _first_column(self) -> int:
        return 0 if self.window is None else max(0, self.columns - self.window + 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns attention reads, and the first of them."""
        first = self._first_column()
        return self.columns + query_length - first, first

    def get_seq_length(self) -> int:
        """Return the number of filled columns; 0 until the prompts are prefilled."""
        return self.columns


def _with_room(full: Tensor) -> Tensor:
    rows, heads, columns, width = full.shape
    grown = full.new_empty(rows, heads, columns + max(ROOM, columns // 4), width)
    grown[:, :, :columns] = full
    return grown


class RowCache(DynamicCache):
    """A cache of :class:`RowLayer` for all layers.

    Raises:
        NotImplementedError: a layer keeps something else than keys and values.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.row_layers = [_row_layer(layer) for layer in self.layers]
        self.layers = list(self.row_layers)

    @contextmanager
    def placing(self, placement: Placement) -> Iterator[None]:
        """Within, the model prefills prompts."""
        try:
            for layer in self.row_layers:
                layer.placement = placement
            yield
        finally:
            for layer in self.row_layers:
                layer.placement = None

    def begin(self, columns: int) -> None:
        """Start completions after so many columns of prompts."""
        for layer in self.row_layers:
            layer.columns = columns

    def select(self, rows: Tensor) -> None:
        """Keep these completions."""
        for layer in self.row_layers:
            layer.select(rows)


def _row_layer(layer: object) -> RowLayer:
    if type(layer) is DynamicSlidingWindowLayer:
        return RowLayer(layer.sliding_window)
    if type(layer) is DynamicLayer:
        return RowLayer(None)
    raise NotImplementedError(type(layer).__name__)
