"""Samples for many prompts, appended to a file of records, so that an interrupted command can continue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from halos.checks import check_whole
from halos.data.preparation.writing import record_row
from halos.data.records.record import Completion, Record
from halos.data.rows.chat_tokens import ChatTokens
from halos.files import Journal
from halos.sampling.engines import Engine
from halos.sampling.prompts import SourcePrompt

NumberedBatch = tuple[int, Sequence[SourcePrompt]]
"""The number of a batch of prompts, which sets its seed, and the prompts."""
Track = Callable[[Sequence[NumberedBatch]], Iterable[NumberedBatch]]
"""Iterates over batches and shows progress."""


@dataclass(frozen=True, slots=True)
class PromptSamples:
    """The samples for one prompt.

    Attributes:
        source: the prompt and its id.
        completions: token ids of each completion, end-of-turn token included.
        texts: text of each completion, without its end-of-turn token.
    """

    source: SourcePrompt
    completions: list[list[int]]
    texts: list[str]


class Sampler:
    """Draws ``count`` completions for each prompt, about ``batch_size`` completions at a time.

    Each batch of prompts has its own seed, so the samples of a prompt do not depend on the batches before.

    Args:
        engine: makes the engine; it is called before the first batch is drawn.
        tokens: turns prompts into token ids and completions into text.
        control: text that ends each prompt (a control token of CSFT), or an empty text.
        count: completions for each prompt.
        batch_size: completions in one batch.
        seed: the seed of all batches.

    Raises:
        ValueError: a number is not a whole number in its range.
    """

    def __init__(
        self, engine: Callable[[], Engine], tokens: ChatTokens, *, control: str, count: int, batch_size: int, seed: int
    ) -> None:
        check_whole("samples", count, 1)
        check_whole("batch_size", batch_size, 1)
        check_whole("seed", seed, 0)
        self._make_engine = engine
        self._engine: Engine | None = None
        self.tokens, self.control = tokens, control
        self.count, self.seed = count, seed
        # Completions of one prompt stay in one batch, even if they are more than batch_size.
        self.prompts_per_batch = max(1, batch_size // count)

    def prompt_ids(self, prompts: Sequence[SourcePrompt]) -> list[list[int]]:
        """Token ids of the prompts, with the control token.

        Raises:
            ValueError: names a prompt that does not fit the limits.
        """
        return [self.tokens.fitted_prompt(one.prompt, self.control, where=one.id) for one in prompts]

    def draw(self, prompts: Sequence[SourcePrompt], number: int) -> list[PromptSamples]:
        """Draw the samples for batch ``number`` of prompts."""
        if self._engine is None:
            self._engine = self._make_engine()
        repeated = [ids for ids in self.prompt_ids(prompts) for _ in range(self.count)]
        # Runs with neighbouring seeds share no batch's seed before batch 1,000,003. An engine's seed has 63 bits.
        completions = self._engine.generate(repeated, seed=(self.seed * 1_000_003 + number) % 2**63)
        groups = [completions[n * self.count : (n + 1) * self.count] for n in range(len(prompts))]
        return [
            PromptSamples(one, group, [self.tokens.text(completion) for completion in group])
            for one, group in zip(prompts, groups, strict=True)
        ]

    def draw_all(self, prompts: Sequence[SourcePrompt], track: Track = iter) -> list[PromptSamples]:
        """Draw the samples for all prompts."""
        return [drawn for number, batch in track(self._batches(prompts)) for drawn in self.draw(batch, number)]

    def write(self, prompts: Sequence[SourcePrompt], path: Path, track: Track = iter) -> tuple[int, int]:
        """Append the samples that the file lacks. After an interruption, the result equals an uninterrupted one.

        Args:
            prompts: the prompts, always in the same order.
            path: a file of records, which may not exist yet.
            track: shows progress over batches.

        Returns:
            The number of completions drawn now, and how many of them the length limit cut.

        Raises:
            ValueError: a prompt does not fit the limits, or the file has samples for other prompts.
        """
        self.prompt_ids(prompts)  # a prompt that does not fit is found before anything is drawn
        # Appended prompt by prompt: a kill loses the batch that was being drawn, and nothing else.
        journal = Journal(path)
        done = {row.get("id") for row in journal.rows}
        if unknown := done - {one.id for one in prompts}:
            found = f"samples for other prompts ({min(map(str, unknown))}, …); choose another file"
            raise ValueError(f"output: expected samples for the same prompts in {path}, but it holds {found}")
        # A batch is drawn as a whole even if some of its prompts are done, because its random numbers depend on all.
        todo = [(n, batch) for n, batch in self._batches(prompts) if any(one.id not in done for one in batch)]
        total = cut = 0
        for number, batch in track(todo):
            for drawn in self.draw(batch, number):
                if drawn.source.id not in done:
                    completions = tuple(Completion(text) for text in drawn.texts)
                    journal.append(record_row(Record(drawn.source.id, drawn.source.prompt, completions)))
                    total += len(drawn.completions)
                    # The length limit ended these, rather than their end-of-turn token.
                    cut += sum(ids[-1:] != [self.tokens.end_of_turn] for ids in drawn.completions)
        return total, cut

    def _batches(self, prompts: Sequence[SourcePrompt]) -> list[NumberedBatch]:
        size = self.prompts_per_batch
        return [(n, prompts[start : start + size]) for n, start in enumerate(range(0, len(prompts), size))]
