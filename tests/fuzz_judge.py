"""Mutated answers of a judge's endpoint: each is an answer or the counted failure of one question, and costs no more.

python -m tests.fuzz_judge [COUNT] [SEED]    (from the repository; 10,000 take some minutes)
"""

from __future__ import annotations

import json
import random
import re
import time
import tracemalloc
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

from halos.judges.answers import MAX_BYTES
from halos.judges.chat import ChatJudge
from tests.campaign import main
from tests.judges.stub import Reply, Stub

BATCH, WORKERS = 50, 4
SECONDS = 60
"""The limit of a batch: its answers come at once, and a try ends after five seconds."""
ALLOWANCE = 200 * 10**6
"""Bytes beyond twice the longest answer, of each worker."""
COMPLETION: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1700000000,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "good [[7]]", "refusal": None, "tool_calls": []},
            "logprobs": {"content": [{"token": "good", "logprob": -0.1, "bytes": [103], "top_logprobs": []}]},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12, "details": {"cached": 0}},
}
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0.5, 10**30, "", "[[8]]", "[[" * 1000, "\x1b]0;t\x07\u202e", "\0", "x" * 100_000, [], {}, [[]],
    {"a": {}}, "٣", "1e999", [None] * 1000,
)  # fmt: skip
ODD_TEXTS = ("1e999", "-1e999", "NaN", "9" * 5000, '"\\ud800 [[3]]"', "[" * 70 + "]" * 70, "[" * 100_000, '"\\u0000"')
"""JSON that no Python value would become."""
PLACE = "PLACE FOR A TEXT"
ODD_BYTES = (b"\xff", b"\0", b"\xef\xbb\xbf", b'"', b"\\", b"{", b"]", b"\r\n", b"\x1b[2J", b",", b"e9")
ODD_HEADERS = (
    ("Content-Encoding", "gzip"), ("Content-Length", "3"), ("Content-Length", "-1"), ("Content-Length", "99999"),
    ("Content-Type", "text/html; charset=\xb2"), ("Set-Cookie", "a=b; domain=localhost"), ("Location", "//other/"),
    ("Retry-After", "\xb2"), ("Retry-After", "9" * 400), ("Transfer-Encoding", "chunked"), ("X", "y" * 70_000),
    ("Connection", "upgrade"), ("Refresh", "0; url=http://127.0.0.1:9"),
)  # fmt: skip
KINDS = {"value": 6, "text": 3, "delete": 2, "add": 4, "bytes": 1, "cut": 1, "header": 2, "status": 1}
"""Kinds of mutations and their weights, by which more than half of the answers are still chat completions."""
STATUSES = (201, 204, 206, 301, 302, 304, 307, 400, 413, 422, 429, 451, 500, 503, 599, 999)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of a JSON value, from the inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in (*paths(item, (*path, key)), (*path, key))]


def mutated(draw: random.Random) -> tuple[int, bytes, dict[str, str]]:
    """One to three mutations of a proper chat completion."""
    body, text, status = deepcopy(COMPLETION), None, 200
    headers: dict[str, str] = {}
    kinds = draw.choices(list(KINDS), list(KINDS.values()), k=draw.choice((1, 1, 2, 3)))
    for kind in kinds:
        *path, last = draw.choice(paths(body))
        parent: Any = body
        for key in path:
            parent = parent[key]
        if kind == "value":
            parent[last] = deepcopy(draw.choice(ODD_VALUES))
        elif kind == "text":
            parent[last], text = PLACE, draw.choice(ODD_TEXTS)
        elif kind == "delete" and len(paths(body)) > 1:
            del parent[last]
        elif kind == "add":
            body[f"extra{draw.random()}"] = deepcopy(draw.choice(ODD_VALUES))
    data = json.dumps(body, ensure_ascii=draw.random() < 0.5).encode()
    if text is not None:
        data = data.replace(f'"{PLACE}"'.encode(), text.encode())
    for kind in kinds:
        at = draw.randrange(len(data) + 1)
        if kind == "bytes":
            data = data[:at] + draw.choice(ODD_BYTES) + data[at + draw.randint(0, 2) :]
        elif kind == "cut":
            data = data[:at] if draw.random() < 0.3 else data + b" " * draw.choice((1, 10_000))
        elif kind == "header":
            headers.update([draw.choice(ODD_HEADERS)])
        elif kind == "status" and draw.random() < 0.5:
            status = draw.choice(STATUSES)
    if draw.random() < 0.005:
        data += b" " * (2 * MAX_BYTES)
    return status, data, headers


def fuzz(count: int, seed: int, folder: Path) -> Counter[str]:
    """Ask ``count`` questions, each of which is answered badly in its own way.

    Returns:
        How many answers were scored, had no score in them, or were counted failures.
    """
    outcomes: Counter[str] = Counter()
    longest = 0

    def answer(question: str, _: int) -> Reply:
        nonlocal longest
        number = re.findall(r"question (\d+);", question)[0]
        reply = mutated(random.Random(f"{seed} {number}"))
        longest = max(longest, len(reply[1]))
        return reply

    tracemalloc.start()
    with Stub(answer) as stub:
        for first in range(0, count, BATCH):
            questions = [(f"question {n};", "a") for n in range(first, min(first + BATCH, count))]
            options: dict[str, Any] = {"model": "m", "base_url": stub.url, "cache": str(folder / "judge.jsonl")}
            judge = ChatJudge(**options, tries=1, timeout=5.0, workers=WORKERS)
            start = time.monotonic()
            scores = judge.scores(questions)
            assert time.monotonic() - start < SECONDS, f"from question {first} on"
            report = judge.report()
            assert report["asked"] + report["unanswered"] == len(questions)
            outcomes["scored"] += sum(score is not None for score in scores)
            outcomes["unscored"] += int(report["without a verdict"])
            outcomes["failed"] += int(report["unanswered"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * WORKERS * longest + ALLOWANCE, f"{peak:,} bytes for answers of up to {longest:,}"
    # What was kept can be read again.
    kept = ChatJudge(model="m", cache=str(folder / "judge.jsonl"))
    assert len(kept._answers) == outcomes["scored"] + outcomes["unscored"]
    return outcomes


if __name__ == "__main__":
    main(fuzz)
