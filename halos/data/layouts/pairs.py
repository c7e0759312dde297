"""From rows with two replies, of which one is preferred, to records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from halos.data.layouts.agreement import check_agreement, one_prompt
from halos.data.layouts.chats import common_prompt
from halos.data.layouts.hints import missing_prompt
from halos.data.layouts.reader import Preferences, RowReader
from halos.data.layouts.roles import Path, value_at
from halos.data.layouts.values import plain_word
from halos.data.reading.fields import RawRow, keys_of, required, wrong
from halos.data.records.adapted import DIFFERENT_PROMPTS, FILTERED, NOTED
from halos.data.records.record import Completion, Record, reply_text

TIE = f"{FILTERED}ties (data.ties=keep keeps them)"


class PairReader(RowReader):
    """Reads rows with a chosen and a rejected reply, or with two sides and what says which is better."""

    def _preferred(self, where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
        row_prompt = self._prompt(where, row, dropped)
        paths = [self._required(where, row, role)[0] for role in ("chosen", "rejected")]
        (before, chosen), (before_rejected, rejected) = (self._reply(where, row, path, row_prompt) for path in paths)
        prompt, other = before or row_prompt, before_rejected or row_prompt
        if prompt is None or other is None:
            text, chosen, rejected = common_prompt(where, reply_text(chosen), reply_text(rejected))
            dropped[f"{NOTED}prompts that are the common start of both sides"] += 1
            prompt = other = self._with_history(where, row, text)
        compared = one_prompt((prompt, chosen), (other, rejected))
        if compared is None:
            dropped[DIFFERENT_PROMPTS] += 1
            return None
        prompt, chosen, rejected = compared
        if row_prompt is not None:
            check_agreement(where, paths[0], row_prompt, prompt)
        if isinstance(row_prompt, tuple) and isinstance(self._value(row, "prompt"), str):
            # The space after "Assistant:" belongs to the transcript.
            chosen, rejected = (reply.strip() if isinstance(reply, str) else reply for reply in (chosen, rejected))
        scores = [self.roles.get(role) for role in ("score_chosen", "score_rejected")]
        completions = tuple(
            Completion.of(reply, score=self._score(where, row, path if isinstance(path, str) else None))
            for reply, path in zip((chosen, rejected), scores, strict=True)
        )
        return self._weighed(where, row, Record(where, prompt, completions, ((0, 1),)), dropped)

    def _compared(self, where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
        sides = self._pair_of_paths("sides")
        row_prompt = self._prompt(where, row, dropped)
        replies = [self._reply(where, row, side, row_prompt) for side in sides]
        prompts = [
            self._agreed(where, side, row_prompt, before) for side, (before, _) in zip(sides, replies, strict=True)
        ]
        if prompts[0] is None or prompts[1] is None:
            raise missing_prompt(where, row, self.roles)
        compared = one_prompt((prompts[0], replies[0][1]), (prompts[1], replies[1][1]))
        if compared is None:
            dropped[DIFFERENT_PROMPTS] += 1
            return None
        paths = self._pair_of_paths("scores") if "scores" in self.roles else (None, None)
        scores = [self._score(where, row, path) for path in paths]
        preferences = self._winner(where, row, sides, scores, dropped)
        if preferences is None:
            return None
        prompt, *both = compared
        completions = tuple(Completion.of(reply, score=score) for reply, score in zip(both, scores, strict=True))
        return self._weighed(where, row, Record(where, prompt, completions, preferences), dropped)

    def _pair_of_paths(self, role: str) -> tuple[Path, Path]:
        paths = self.roles[role]
        return paths[0], paths[1]

    def _winner(
        self, where: str, row: RawRow, sides: tuple[Path, Path], scores: Sequence[float | None], dropped: Counter[str]
    ) -> Preferences | None:
        """Return the preference between two sides; None for a tie that is left out."""
        column = self.roles.get("winner")
        if column is None:
            if None in scores:
                raise ValueError(
                    f"{where}: expected a column that says which of {sides[0]!r} and {sides[1]!r} is better, or their "
                    f"scores; found {keys_of(row)}; name it with data.columns.winner=… or data.columns.scores=[…]"
                )
            return ()
        if isinstance(column, str):
            place = self._winner_in(where, row, column, sides, dropped)
        else:
            won = [self.values.label(where, path, value_at(row, path)) for path in column]
            if sum(won) > 1:
                raise ValueError(
                    f"{where}: expected one winner, found {', '.join(column[n] for n, w in enumerate(won) if w)}"
                )
            place = tuple(n for n, has_won in enumerate(won[:2]) if has_won)
        if place:
            return ((0, 1),) if place == (0,) else ((1, 0),)
        if self.declaration.keep_ties:
            return ()
        dropped[TIE] += 1
        return None

    def _winner_in(
        self, where: str, row: RawRow, column: Path, sides: tuple[Path, Path], dropped: Counter[str]
    ) -> tuple[int, ...]:
        value = value_at(row, column)
        if value is None:
            required(where, row, column)
            raise wrong(where, column, "given", None)
        # HALOs' pairwise feedback: 1 says that A is preferred, 0 that B is.
        if column in ("label", "labels") and sides[0][-1:] in "aA" and plain_word(value) in ("1", "0", "true", "false"):
            return (0,) if plain_word(value) in ("1", "true") else (1,)
        numbers = [side[-1:] for side in sides]
        if isinstance(value, float) and all(n.isdigit() for n in numbers) and not value.is_integer():
            low, high = map(int, numbers)
            if low < value < high:
                dropped[f"{NOTED}soft preferences rounded"] += 1
                return () if value - low == high - value else (0,) if value - low < high - value else (1,)
        return self.values.winner(where, column, value, sides)
