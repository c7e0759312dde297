"""Requests to an OpenAI-compatible chat endpoint: retries, limits, and a key that is never shown or passed on."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from urllib.parse import urlsplit

import httpx2

from halos.checks import check_number, check_whole
from halos.judges.answers import MAX_BYTES, Answer, BadAnswer, parse_answer, retry_after

TRANSIENT_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP statuses after which the same request may succeed."""
SETUP_STATUSES = (401, 403, 404)
"""HTTP statuses that mean a wrong key, address or model, so that no other request would succeed either."""


class Unanswered(Exception):
    """No usable answer after all tries."""


@dataclass(slots=True)
class ChatEndpoint:
    """Sends ``POST base_url/chat/completions``. Redirects are not followed: the key would be sent to another host.

    Attributes:
        base_url: the address of the API, http(s), without user, password and query.
        key_variable: the environment variable that holds the key. It is read for each request, so that the key is in no
            field, message or file.
        timeout: seconds for one try, until the last byte of its answer.
        tries: how often a request is sent before it counts as unanswered.
        patience: seconds before the second try, doubled after each try, unless the server names a time.
        max_patience: the maximum of these seconds.
        stopped: set when the run ends; requests that wait for their next try are then given up.

    Raises:
        ValueError: ``base_url`` is not an http(s) address, ``key_variable`` not a valid name, or a number out of range.
    """

    base_url: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    tries: int = 5
    patience: float = 1.0
    max_patience: float = 60.0
    stopped: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        self.base_url = _address(self.base_url)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable or ""):
            # Somebody may have put the key itself here.
            raise ValueError(
                "judge.key_variable: expected the name of an environment variable, found something else (not shown)"
            )
        check_whole("judge.tries", self.tries, 1)
        check_number("judge.timeout", self.timeout)
        check_number("judge.patience", self.patience)
        check_number("judge.max_patience", self.max_patience)

    def check_key(self) -> None:
        """Check that the key, if there is one, can be sent.

        Raises:
            ValueError: it has a character that a header cannot have, such as a line break.
        """
        self._authorization()

    def ask(self, body: Mapping[str, object]) -> Answer:
        """Send a request until it is answered.

        Raises:
            Unanswered: all tries failed, or the server refused this request.
            ValueError: the server refuses every request, as the key, the address or the model is wrong.
        """
        for number in range(1, self.tries + 1):
            try:
                return self._send(body)
            except _TransientError as failure:
                if number == self.tries:
                    raise Unanswered(f"{self.tries} tries, the last one: {failure}") from None
                if self.stopped.wait(self._wait(number, failure.retry_after)):
                    raise Unanswered("the run ends") from None
        raise AssertionError("unreachable")

    def _send(self, body: Mapping[str, object]) -> Answer:
        # "from None" keeps the request, and with it the key, out of tracebacks.
        try:
            # An event loop for each request, because only there one deadline can cover connection, headers and body.
            return asyncio.run(self._post(json.dumps(body).encode()))
        except TimeoutError:
            raise _TransientError(f"no complete answer within {self.timeout:g} s") from None
        except BadAnswer as error:
            raise _TransientError(str(error)) from None
        except (httpx2.HTTPError, OSError) as error:  # refused connections, cut-off answers, bad headers
            raise _TransientError(f"{type(error).__name__}: {error}") from None
        except ImportError as error:  # a SOCKS proxy in the environment, without the package for it
            raise ValueError(f"judge.base_url: {error}") from None

    async def _post(self, content: bytes) -> Answer:
        # Not compressed, so that the limit of bytes also limits the memory.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **self._authorization()}
        url = f"{self.base_url}/chat/completions"
        async with (
            asyncio.timeout(self.timeout),
            httpx2.AsyncClient(verify=_tls(), timeout=None, follow_redirects=False) as client,
            client.stream("POST", url, content=content, headers=headers) as response,
        ):
            if not response.is_success:
                raise self._failure(response.status_code, response.headers)
            data = bytearray()
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > MAX_BYTES:
                    raise BadAnswer(f"an answer of more than {MAX_BYTES:,} bytes")
            return parse_answer(bytes(data))

    def _authorization(self) -> dict[str, str]:
        key = os.environ.get(self.key_variable, "").strip()
        if not re.fullmatch("[!-~]*", key):
            # The HTTP client would refuse it too, with the key in its message.
            raise ValueError(
                f"{self.key_variable}: expected a key of printable ASCII characters, found others in this environment "
                "variable (not shown); set it again"
            )
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _failure(self, status: int, headers: Mapping[str, str]) -> Exception:
        """The error of an answer that is not a success. Bodies are not shown: servers are known to repeat the key."""
        if status in TRANSIENT_STATUSES:
            return _TransientError(f"status {status}", retry_after(headers.get("Retry-After", "")))
        if 300 <= status < 400:
            return Unanswered(
                f"status {status}: {self.base_url} redirects to {_host(headers.get('Location', ''))}, which is not "
                "followed; set judge.base_url to the address that answers"
            )
        if status not in SETUP_STATUSES:
            return Unanswered(f"{self.base_url} refused the request with status {status}")
        hint = "" if status == 404 else f"; is the key in the environment variable {self.key_variable}?"
        return ValueError(
            f"judge.base_url: expected an answer, but {self.base_url} refused the request with status {status}{hint}"
        )

    def _wait(self, number: int, retry_after: float | None) -> float:
        # The random factor keeps requests that failed together from coming back together.
        doubled = self.patience * 2 ** (number - 1) * random.uniform(0.8, 1.2)
        return min(self.max_patience, doubled if retry_after is None else retry_after)


class _TransientError(Exception):
    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


def _address(url: str) -> str:
    """The address without a slash at its end; one that may hold a secret is refused without being shown."""
    host = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?"
    match = re.fullmatch(rf"https?://{host}(/[^\s?#@]*)?", url or "")
    if match is None or int((match[2] or ":0")[1:]) > 65535:
        raise ValueError(
            "judge.base_url: expected http(s)://host/path without user, password and query, found something else (not "
            "shown); the key belongs into the environment variable that judge.key_variable names"
        )
    return url.rstrip("/")


def _host(location: str) -> str:
    try:
        return urlsplit(location).netloc.rpartition("@")[2][:100] or "another path of its own"
    except ValueError:
        return "an address that is none"


@cache
def _tls() -> ssl.SSLContext:
    # Shared by all requests: reading the system's certificates takes tens of milliseconds.
    return httpx2.create_ssl_context()
