"""Requests to an OpenAI-compatible chat endpoint: retries, rate limits, and a key that is never shown."""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from halos.checks import check_number, check_whole

TRANSIENT_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP statuses after which the same request may succeed."""


class Unanswered(Exception):
    """No usable answer after all tries."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The text of an answer, and the tokens that it cost."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class ChatEndpoint:
    """Sends ``POST base_url/chat/completions``.

    Attributes:
        base_url: the address of the API, http(s).
        key_variable: the environment variable that holds the key. It is read for each request, so that the key stands
            in no field, no message and no file.
        timeout: seconds for one try.
        tries: how often a request is sent before it counts as unanswered.
        patience: seconds before the second try, doubled after each try, unless the server names a time.
        max_patience: the maximum of these seconds.

    Raises:
        ValueError: the address is not http(s), or a number is outside its range.
    """

    base_url: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    tries: int = 5
    patience: float = 1.0
    max_patience: float = 60.0

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"judge.base_url: expected http(s)://…, found {self.base_url!r}")
        check_whole("judge.tries", self.tries, 1)
        check_number("judge.timeout", self.timeout)
        check_number("judge.patience", self.patience)
        check_number("judge.max_patience", self.max_patience)

    def ask(self, body: Mapping[str, object]) -> Answer:
        """Send a request until it is answered.

        Raises:
            Unanswered: all tries failed in a way that may pass.
            ValueError: the server refused the request.
        """
        for number in range(1, self.tries + 1):
            try:
                return self._send(body)
            except _TransientError as failure:
                if number == self.tries:
                    raise Unanswered(f"{self.tries} tries, the last one: {failure}") from None
                time.sleep(self._wait(number, failure.retry_after))
        raise AssertionError("unreachable")

    def _send(self, body: Mapping[str, object]) -> Answer:
        request = urllib.request.Request(
            self.base_url.rstrip("/") + "/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **self._authorization()},
        )
        # "from None" keeps the request, and with it the key, out of tracebacks.
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return _answer(response.read())
        except urllib.error.HTTPError as error:
            raise self._failure(error) from None
        except (OSError, http.client.HTTPException) as error:  # time-outs, refused connections, cut-off answers
            raise _TransientError(f"{type(error).__name__}: {getattr(error, 'reason', error)}") from None

    def _authorization(self) -> dict[str, str]:
        key = os.environ.get(self.key_variable, "").strip()
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _failure(self, error: urllib.error.HTTPError) -> Exception:
        if error.code in TRANSIENT_STATUSES:
            # Retry-After may also be a date; then the doubled patience decides.
            after = error.headers.get("Retry-After", "")
            seconds = float(after) if after.replace(".", "", 1).isdigit() else None
            return _TransientError(f"status {error.code}", seconds)
        # The body is not shown: servers are known to repeat the key in it.
        hint = f"; is the key in the environment variable {self.key_variable}?" if error.code in (401, 403) else ""
        return ValueError(
            f"judge.base_url: expected an answer, but {self.base_url} refused the request with status "
            f"{error.code}{hint}"
        )

    def _wait(self, number: int, retry_after: float | None) -> float:
        # The random factor keeps requests that failed together from coming back together.
        doubled = self.patience * 2 ** (number - 1) * random.uniform(0.8, 1.2)
        return min(self.max_patience, doubled if retry_after is None else retry_after)


class _TransientError(Exception):
    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


def _answer(data: bytes) -> Answer:
    # Servers under load are known to answer 200 with HTML or half an object; that is worth another try.
    try:
        answer = json.loads(data)
        text = answer["choices"][0]["message"]["content"]
        usage = answer.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _TransientError("an answer that is not a chat completion") from None
    # A refusal has its text in another field and null here.
    return Answer(text if isinstance(text, str) else "", *tokens)
