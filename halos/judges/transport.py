"""Asking an OpenAI-compatible chat endpoint: retries, rate limits, and a key that nobody gets to see."""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses that may be gone on the next try."""


class Unanswered(Exception):
    """No usable answer after all tries."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said, and the tokens that it took."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class ChatEndpoint:
    """``POST base_url/chat/completions``.

    The key is read from the environment variable ``key_variable`` when a question is sent; it stands in no field, no
    message and no file. ``timeout``: seconds for one try; ``tries``: how often a question is sent before it counts as
    unanswered; ``patience``: seconds before the second try, doubled after each, unless the server names a time.
    """

    base_url: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    tries: int = 5
    patience: float = 1.0
    most_patience: float = 60.0

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"judge.base_url: expected http(s)://…, found {self.base_url!r}")
        if self.tries < 1:
            raise ValueError(f"judge.tries: expected a whole number from 1 on, found {self.tries}")

    def ask(self, body: dict[str, Any]) -> Answer:
        """The model's answer. Raises ``Unanswered`` after ``tries`` passing failures, ``ValueError`` for others."""
        for number in range(1, self.tries + 1):
            try:
                return self._once(body)
            except _Passing as failure:
                if number == self.tries:
                    raise Unanswered(f"{self.tries} tries, the last one: {failure}") from None
                time.sleep(self._wait(number, failure.after))
        raise AssertionError("unreachable")

    def _once(self, body: dict[str, Any]) -> Answer:
        request = urllib.request.Request(
            self.base_url.rstrip("/") + "/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **self._authorization()},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return _answer(response.read())
        except urllib.error.HTTPError as error:
            raise self._failure(error) from None
        except (OSError, http.client.HTTPException) as error:  # time-outs, refused connections, cut-off answers
            raise _Passing(f"{type(error).__name__}: {getattr(error, 'reason', error)}") from None

    def _authorization(self) -> dict[str, str]:
        key = os.environ.get(self.key_variable, "").strip()
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _failure(self, error: urllib.error.HTTPError) -> Exception:
        if error.code in PASSING:
            after = error.headers.get("Retry-After", "")
            return _Passing(f"status {error.code}", float(after) if after.replace(".", "", 1).isdigit() else None)
        # The body is not shown: servers are known to repeat the key in it.
        hint = f"; is the key in the environment variable {self.key_variable}?" if error.code in (401, 403) else ""
        return ValueError(f"judge.base_url: {self.base_url} refused the question with status {error.code}{hint}")

    def _wait(self, number: int, after: float | None) -> float:
        # Random, so that questions sent side by side do not come back all at once.
        wait = self.patience * 2 ** (number - 1) * random.uniform(0.8, 1.2) if after is None else after
        return min(self.most_patience, wait)


class _Passing(Exception):
    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


def _answer(data: bytes) -> Answer:
    try:
        found = json.loads(data)
        text = found["choices"][0]["message"]["content"]
        usage = found.get("usage") or {}
        counts = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        if not isinstance(text, str):
            text = ""  # a refusal in a field of its own
        return Answer(text, *counts)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _Passing("an answer that is not a chat completion") from None
