"""Samples for many prompts, kept in a file of records as they come, so that a killed command goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halos.checks import check_whole
from halos.data.records.record import Prompt, messages_of
from halos.data.rows.chat_tokens import ChatTokens
from halos.files import Journal
from halos.sampling.engines import Engine
from halos.sampling.prompts import Asked

Track = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class Drawn:
    """The samples for one prompt: texts, ids (end-of-turn token included) and the ids of the prompt as it was read."""

    asked: Asked
    prompt: list[int]
    completions: list[list[int]]
    texts: list[str]


class Sampler:
    """Draws ``count`` completions for each prompt, about ``batch_size`` at a time.

    Each batch of prompts has its own seed, so that what a prompt gets does not depend on what was sampled before.
    """

    def __init__(
        self, engine: Callable[[], Engine], tokens: ChatTokens, *, control: str, count: int, batch_size: int, seed: int
    ) -> None:
        check_whole("samples", count, 1)
        check_whole("batch_size", batch_size, 1)
        self._make_engine = engine
        self._engine: Engine | None = None
        self.tokens, self.control = tokens, control
        self.count, self.seed, self.batch = count, seed, max(1, batch_size // count)

    def prompt_ids(self, asked: Sequence[Asked]) -> list[list[int]]:
        """The prompts' ids, the control token included. Raises ``ValueError`` naming one that does not fit."""
        return [
            self.tokens.fit_prompt(self.tokens.prompt(one.prompt, self.control, where=one.id), one.id)[0]
            for one in asked
        ]

    def draw(self, asked: Sequence[Asked], number: int) -> list[Drawn]:
        """The samples for batch ``number`` of prompts."""
        if self._engine is None:
            self._engine = self._make_engine()
        prompts = self.prompt_ids(asked)
        repeated = [ids for ids in prompts for _ in range(self.count)]
        said = self._engine.generate(repeated, seed=(self.seed * 1_000_003 + number) % 2**63)
        groups = [said[n * self.count : (n + 1) * self.count] for n in range(len(asked))]
        return [
            Drawn(one, ids, group, [self.text(completion) for completion in group])
            for one, ids, group in zip(asked, prompts, groups, strict=True)
        ]

    def draw_all(self, asked: Sequence[Asked], track: Track = iter) -> list[Drawn]:
        """The samples for all prompts."""
        return [drawn for number, batch in track(self._batches(asked)) for drawn in self.draw(batch, number)]

    def write(self, asked: Sequence[Asked], path: Path, track: Track = iter) -> tuple[int, int]:
        """Append what the file lacks; returns (completions drawn now, those of them that were cut by the limit).

        The file ends up the same whether or not it was begun before.
        """
        self.prompt_ids(asked)  # a prompt that does not fit is found before anything is drawn
        journal = Journal(path)
        done = {row.get("id") for row in journal.rows}
        if unknown := done - {one.id for one in asked}:
            raise ValueError(f"output: {path} holds samples for other prompts ({sorted(map(str, unknown))[0]}, …)")
        todo = [(n, batch) for n, batch in self._batches(asked) if any(one.id not in done for one in batch)]
        total = cut = 0
        for number, batch in track(todo):
            for drawn in self.draw(batch, number):
                if drawn.asked.id not in done:
                    journal.append(record(drawn))
                    total += len(drawn.completions)
                    cut += sum(self.is_cut(ids) for ids in drawn.completions)
        return total, cut

    def is_cut(self, ids: Sequence[int]) -> bool:
        """Whether the limit ended the completion, rather than its end-of-turn token."""
        return not ids or ids[-1] != self.tokens.end_of_turn

    def text(self, ids: Sequence[int]) -> str:
        """The completion's text without its end-of-turn token."""
        return str(self.tokens.tokenizer.decode(ids if self.is_cut(ids) else ids[:-1]))

    def _batches(self, asked: Sequence[Asked]) -> list[tuple[int, Sequence[Asked]]]:
        return [(n, asked[start : start + self.batch]) for n, start in enumerate(range(0, len(asked), self.batch))]


def record(drawn: Drawn) -> dict[str, Any]:
    """The samples as a record in this project's format, without feedback."""
    completions = [{"text": text} for text in drawn.texts]
    return {"id": drawn.asked.id, "prompt": as_json(drawn.asked.prompt), "completions": completions}


def as_json(prompt: Prompt) -> Any:
    """Text as it is, turns as a list of objects."""
    if isinstance(prompt, str):
        return prompt
    return [{"role": message.role, "content": message.content} for message in messages_of(prompt)]
