"""A chat endpoint on this machine that misbehaves as told, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, bytes | Iterable[bytes], dict[str, str]]
"""Status, body (in one piece, or piece by piece) and headers; with status 0 the body is all that is sent."""


def says(text: str) -> Reply:
    """A proper chat completion."""
    body = {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 10, "completion_tokens": 2}}
    return 200, json.dumps(body).encode(), {}


def longer(question: str) -> Reply:
    """Prefers the longer of two answers, in whichever place it stands; rates by length."""
    if "[Answer B]" not in question:
        return says(f"fine [[{len(_part(question, '[Answer]', '[End'))}]]")
    a, b = (_part(question, f"[Answer {name}]", f"[End of answer {name}]") for name in "AB")
    return says(f"so [[{'C' if len(a) == len(b) else 'A' if len(a) > len(b) else 'B'}]]")


def _part(text: str, start: str, end: str) -> str:
    return text.split(start)[1].split(end)[0].strip()


class Stub:
    """``answer(question, attempt)`` says what to reply to a question's n-th attempt (from 0); None hangs.

    Attributes:
        seen: how often each question was asked.
        answered: how often each question was answered with status 200.
        keys: the Authorization headers of all requests, and None for requests without one.
        sent: bytes of bodies that were sent.
    """

    def __init__(self, answer: Callable[[str, int], Reply | None]) -> None:
        self.seen: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.keys: set[str | None] = set()
        self.sent = 0
        self.closing = threading.Event()
        stub, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                question = json.loads(body)["messages"][0]["content"] if body else self.path
                with lock:
                    attempt = stub.seen[question]
                    stub.seen[question] += 1
                    stub.keys.add(self.headers.get("Authorization"))
                reply = answer(question, attempt)
                if reply is None:
                    stub.closing.wait(30)
                    return
                status, data, headers = reply
                if status:
                    self.send_response(status)
                    length = {"Content-Length": str(len(data))} if isinstance(data, bytes) else {}
                    for name, value in {**length, **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                try:
                    for piece in [data] if isinstance(data, bytes) else data:
                        self.wfile.write(piece)
                        stub.sent += len(piece)
                except OSError:  # the client has closed the connection
                    self.close_connection = True
                    return
                if status == 200:
                    with lock:
                        stub.answered[question] += 1

            do_GET = do_POST  # what a client sends that follows a redirect

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> Stub:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
