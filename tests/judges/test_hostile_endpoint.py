"""A judge at a stranger's endpoint: whatever it answers costs one question, and the key goes nowhere else."""

from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Iterator
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from halos.judges.answers import retry_after
from halos.judges.chat import ChatJudge
from halos.judges.transport import ChatEndpoint
from tests.judges.stub import Reply, Stub, longer, says
from tests.judges.test_chat import Waits, judge

KEY = "sk-secret-0123"
BAD = "the question that is answered badly"
THREE = [("p", "four"), (BAD, "aa"), ("q", "sixsix")]


def completion(content: str = '"[[3]]"', usage: str = "{}", more: str = "0") -> bytes:
    """A chat completion in which parts are replaced by any JSON text."""
    return f'{{"choices": [{{"message": {{"content": {content}}}}}], "usage": {usage}, "more": {more}}}'.encode()


def tokens(number: str) -> bytes:
    return completion(usage=f'{{"prompt_tokens": {number}}}')


def pieces(piece: bytes, number: int, seconds: float = 0.0) -> Iterator[bytes]:
    for _ in range(number):
        yield piece
        time.sleep(seconds)


BAD_ANSWERS: dict[str, Any] = {
    "nested arrays": completion(more="[" * 1000 + "]" * 1000),
    "nested objects": completion(more='{"a":' * 100_000 + "1" + "}" * 100_000),
    "brackets that never close": b"[" * 1_000_000,
    "a string that never closes": b'{"a": "' + b'\\"' * 1_000_000,
    "infinitely many tokens": tokens("1e999"),
    "tokens that are no number": tokens("NaN"),
    "a negative number of tokens": tokens("-5"),
    "a number of 5,000 digits": tokens("9" * 5000),
    "tokens in words": tokens('"many"'),
    "tokens that are true": tokens("true"),
    "usage that is a list": completion(usage="[1]"),
    "bytes that are no UTF-8": completion(content='"[[3]]\\u00ff"').replace(b"\\u00ff", b"\xff"),
    "UTF-16": completion().decode().encode("utf-16"),
    "an encoding that was not asked for": (200, gzip.compress(completion()), {"Content-Encoding": "gzip"}),
    "a status line that is none": (0, b"HTTP/9.9 what\r\n\r\n", {}),
    "headers without an end": (0, b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 100_000, {}),
    "a length that is none": (200, b"{}", {"Content-Length": "-1"}),
    "a chunk that is none": (200, b"zz\r\n{}\r\n", {"Transfer-Encoding": "chunked"}),
    "a time to wait that is no number": (429, b"", {"Retry-After": "²"}),
    "a time to wait without end": (503, b"", {"Retry-After": "inf"}),
    "a wait of 5,000 digits": (503, b"", {"Retry-After": "9" * 5000}),
    "a date that is none": (503, b"", {"Retry-After": "Sun, 99 Feb 99999 00:00:00 GMT"}),
    "a request that was too long": (413, b"", {}),
    "a question that is refused": (400, b'{"error": "content_filter"}', {}),
    "a status that does not exist": (799, b"", {}),
    "nothing": (204, b"", {}),
}


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_a_bad_answer_is_the_counted_failure_of_one_question(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = BAD_ANSWERS[kind] if isinstance(BAD_ANSWERS[kind], tuple) else (200, BAD_ANSWERS[kind], {})
    with Stub(lambda question, _: bad if BAD in question else longer(question)) as stub:
        one = judge(stub, tmp_path, tries=2, max_patience=0.02)
        assert one.scores(THREE) == [4.0, None, 6.0]
        assert one.report()["unanswered"] == 1
        # The others' answers are on disk, and the next run sends the one question again.
        again = judge(stub, tmp_path, tries=1)
        assert again.scores(THREE) == [4.0, None, 6.0]
        assert again.report()["from cache"] == 2
    assert caplog.text.count("a request to the judge stayed unanswered") == 2


def test_a_lone_surrogate_is_kept_escaped_and_does_not_end_the_next_run(tmp_path: Path) -> None:
    odd: Reply = 200, completion(content='"so \\ud800 [[3]]"'), {}
    with Stub(lambda question, _: odd if BAD in question else longer(question)) as stub:
        assert judge(stub, tmp_path).scores(THREE) == [4.0, 3.0, 6.0]
        again = judge(stub, tmp_path)
        assert again.scores(THREE) == [4.0, 3.0, 6.0]
        assert again.report()["from cache"] == 3
    answers = [json.loads(line)["answer"] for line in (tmp_path / "judge.jsonl").read_text("utf-8").splitlines()]
    assert r"so \ud800 [[3]]" in answers


def test_no_more_than_the_limit_is_read_of_an_endless_body(tmp_path: Path) -> None:
    endless = 200, pieces(b" " * 1_000_000, 600), {"Content-Length": "600000000"}
    with Stub(lambda question, _: endless if BAD in question else longer(question)) as stub:
        one = judge(stub, tmp_path, tries=1, timeout=60.0)
        assert one.scores(THREE) == [4.0, None, 6.0]
    assert stub.sent < 40_000_000  # what lies in the buffers of both sockets is more than the limit of 4 MiB


@pytest.mark.parametrize("status", [0, 200], ids=["headers", "body"])
def test_one_byte_at_a_time_ends_at_the_deadline(status: int, tmp_path: Path) -> None:
    def answer(question: str, _: int) -> Reply:
        slow: Reply = status, pieces(b"H" if status == 0 else b" ", 200, 0.05), {}
        return slow if BAD in question else longer(question)

    start = time.monotonic()
    with Stub(answer) as stub:
        one = judge(stub, tmp_path, tries=1, timeout=0.5)
        assert one.scores(THREE) == [4.0, None, 6.0]
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_a_failure_that_names_the_host_and_sends_it_nothing(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with Stub(lambda *_: says("[[9]]")) as other:
        location = f"http://localhost:{other.server.server_port}/take?key=1"
        with Stub(lambda *_: (status, b"", {"Location": location})) as stub:
            one = judge(stub, tmp_path)
            assert one.scores(THREE) == [None] * 3
            assert stub.keys == {f"Bearer {KEY}"}
            assert set(stub.seen.values()) == {1}  # the same answer would come again
    assert not other.seen
    assert one.report()["unanswered"] == 3
    assert f"redirects to localhost:{other.server.server_port}," in caplog.text
    assert KEY not in caplog.text  # nor among what the HTTP client logs


@pytest.mark.parametrize("location", ["", "/elsewhere", "http://[bad", "//\x1b]0;title\x07"])
def test_a_redirect_to_no_host_is_a_failure_too(location: str, tmp_path: Path) -> None:
    with Stub(lambda *_: (302, b"", {"Location": location})) as stub:
        assert judge(stub, tmp_path).scores(THREE) == [None] * 3


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("0.05", 0.05),
        ("-1", None),
        ("1e3", None),
        ("²", None),
        ("٣", None),  # a digit for Python
        ("1.", None),
        ("inf", None),
        ("", None),
        ("9" * 400, None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Sun, 99 Feb 99999 00:00:00 GMT", None),
        ("tomorrow", None),
    ],
)
def test_retry_after_is_read_as_ascii_digits_or_a_date(header: str, seconds: float | None) -> None:
    assert retry_after(header) == seconds


def limited_once(limited: Reply, question: str, attempt: int) -> Reply:
    return longer(question) if attempt else limited


def test_the_wait_for_a_date_ends_at_the_date_or_at_the_limit(tmp_path: Path) -> None:
    waits = Waits()
    for ahead in (30, 10_000):
        limited: Reply = (429, b"", {"Retry-After": formatdate(time.time() + ahead, usegmt=True)})
        with Stub(partial(limited_once, limited)) as stub:
            one = judge(stub, tmp_path / str(ahead), max_patience=60.0)
            one.endpoint.stopped = waits
            assert one.scores([("p", "four")]) == [4.0]
    assert 25 < waits.seconds[0] <= 30
    assert waits.seconds[1] == 60.0


def test_the_same_model_at_another_endpoint_is_another_judge(tmp_path: Path) -> None:
    with Stub(lambda *_: says("[[3]]")) as first, Stub(lambda *_: says("[[8]]")) as second:
        assert judge(first, tmp_path).scores(THREE) == [3.0] * 3
        assert judge(second, tmp_path).scores(THREE) == [8.0] * 3
        # With and without the slash it is the same address.
        slash = ChatJudge(model="stub", base_url=first.url + "/", cache=str(tmp_path / "judge.jsonl"))
        assert slash.scores(THREE) == [3.0] * 3
    assert sum(first.seen.values()) == sum(second.seen.values()) == 3


def test_answers_under_way_are_kept_when_the_key_is_refused(tmp_path: Path) -> None:
    def answer(question: str, _: int) -> Reply:
        if BAD in question:
            time.sleep(0.1)
            return 401, b"", {}
        time.sleep(0.4)
        return longer(question)

    with Stub(answer) as stub:
        with pytest.raises(ValueError, match="status 401"):
            judge(stub, tmp_path, workers=3).scores(THREE)
        assert len(stub.answered) == 2
    assert len((tmp_path / "judge.jsonl").read_bytes().splitlines()) == 2


def test_a_run_that_ends_does_not_wait_for_the_next_try(tmp_path: Path) -> None:
    def answer(question: str, _: int) -> Reply:
        if BAD not in question:
            return 429, b"", {"Retry-After": "50"}
        time.sleep(0.2)
        return 401, b"", {}

    start = time.monotonic()
    with Stub(answer) as stub, pytest.raises(ValueError, match="status 401"):
        judge(stub, tmp_path, workers=3, max_patience=60.0).scores(THREE)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("key", [f"{KEY}\nX-Other: 1", f"{KEY}\r", f"{KEY}€", f"{KEY} x", f"{KEY}\x00", f"{KEY}\x7f"])
def test_a_key_that_fits_in_no_header_is_refused_without_being_shown(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # os.environ itself takes no NUL.
    monkeypatch.setattr("halos.judges.transport.os.environ", {"OPENAI_API_KEY": key + "end"})
    one = ChatJudge(model="m", cache=str(tmp_path / "c"))
    for ask in (one.check, lambda: one.scores(THREE)):
        with pytest.raises(ValueError, match="OPENAI_API_KEY: expected a key of printable ASCII") as caught:
            ask()
        assert caught.value.__context__ is None
        assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2@host/v1",
        "https://hunter2@host/v1",
        "ftp://user:hunter2@host/v1",
        "user:hunter2@host",
        "https://host/v1?key=hunter2",
        "https://host/v1#hunter2",
        "https://",
        "https://[hunter2/v1",
        "https://host:hunter2/v1",
        "https://host:99999/hunter2",
        "https://a b/hunter2",
        "https://host/hunter2\n",
        "https://host\\@hunter2/v1",
        "https://hunter2\u2024host/v1",
        "",
    ],
)
def test_an_address_with_a_password_or_no_host_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ValueError, match=r"^judge\.base_url: expected http\(s\)://host/path") as caught:
        ChatEndpoint(url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize("url", ["http://[::1]:8000/v1", "https://api.example.com", "http://10.0.0.1:65535/v1/"])
def test_addresses_of_every_kind_are_taken(url: str) -> None:
    assert ChatEndpoint(url).base_url == url.rstrip("/")


def test_a_socks_proxy_without_its_package_is_said_in_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"^judge\.base_url: .*socksio"):
        ChatJudge(model="m", base_url="http://host.invalid/v1", cache=str(tmp_path / "c"), tries=1).scores(THREE)


@pytest.mark.parametrize("name", ["sk-secret", "", "A B", "A=B", None])
def test_a_key_in_place_of_the_name_of_its_variable_is_not_shown(name: Any) -> None:
    with pytest.raises(ValueError, match=r"^judge\.key_variable: expected the name of an") as caught:
        ChatEndpoint("https://host/v1", name)
    assert "secret" not in str(caught.value)
