"""The chat judge against a local server that times out, answers nonsense, limits the rate and dies with us."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from halos.data.records.record import Conversation, Message
from halos.judges.chat import ChatJudge
from tests.judges.stub import Reply, Stub, longer, says, until

ROOT = Path(__file__).parents[2]
DUELS = [("p", "long answer", "short"), ("p", "aa", "bbbb"), ("q", "same", "size")]


def judge(stub: Stub, tmp_path: Path, **options: Any) -> ChatJudge:
    options = {"timeout": 5.0, "patience": 0.01, "tries": 3, "workers": 2, **options}
    return ChatJudge(model="stub", base_url=stub.url, cache=str(tmp_path / "judge.jsonl"), **options)


def test_both_orders_are_asked_and_a_judge_that_looks_at_the_answers_is_followed(tmp_path: Path) -> None:
    with Stub(lambda question, _: longer(question)) as stub:
        one = judge(stub, tmp_path, price=(1e6, 2e6))
        assert one.verdicts(DUELS) == [1.0, 0.0, 0.5]
    assert len(stub.seen) == 6
    report = one.report()
    assert report["asked"] == 6
    assert report["order decided"] == 0
    assert report["cost"] == 6 * (10 * 1 + 2 * 2)


def test_a_judge_that_always_likes_the_first_place_gives_ties(tmp_path: Path) -> None:
    with Stub(lambda *_: says("[[A]]")) as stub:
        one = judge(stub, tmp_path)
        assert one.verdicts(DUELS) == [0.5] * 3
    assert one.report()["order decided"] == 3


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    with Stub(lambda question, _: longer(question)) as stub:
        first = judge(stub, tmp_path).verdicts(DUELS + DUELS)
        again = judge(stub, tmp_path)
        assert again.verdicts(DUELS + DUELS) == first
        assert again.report()["from cache"] == 6
    assert set(stub.seen.values()) == {1}


def failing(kind: str) -> Any:
    def answer(question: str, attempt: int) -> Reply | None:
        if attempt >= 2:
            return longer(question)
        return {
            "time-out": None,
            "not json": (200, b"<html>", {}),
            "no choices": (200, b'{"error": "busy"}', {}),
            "null": (200, b"null", {}),
            "cut off": (200, b'{"choices"', {"Content-Length": "5000"}),
            "rate limit": (429, b"{}", {"Retry-After": "0.05"}),
            "server error": (503, b"", {}),
        }[kind]

    return answer


@pytest.mark.parametrize(
    "kind", ["time-out", "not json", "no choices", "null", "cut off", "rate limit", "server error"]
)
def test_passing_failures_are_survived(kind: str, tmp_path: Path) -> None:
    with Stub(failing(kind)) as stub:
        one = judge(stub, tmp_path, timeout=0.3 if kind == "time-out" else 10)
        assert one.verdicts(DUELS[:1]) == [1.0]
        assert one.report()["unanswered"] == 0
    assert set(stub.seen.values()) == {3}


class Waits(threading.Event):
    """Remembers how long the endpoint would have waited for its next try."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout)
        return False


def test_a_rate_limit_is_waited_for(tmp_path: Path) -> None:
    waits = Waits()
    limited = (429, b"", {"Retry-After": "7"})
    with Stub(lambda question, attempt: longer(question) if attempt else limited) as stub:
        one = judge(stub, tmp_path)
        one.endpoint.stopped = waits
        assert one.scores([("p", "four")]) == [4.0]
    assert waits.seconds == [7.0]


def test_what_stays_unanswered_is_counted_not_kept_and_asked_again_by_the_next_run(tmp_path: Path) -> None:
    with Stub(lambda question, attempt: longer(question) if attempt >= 3 else (500, b"", {})) as stub:
        first = judge(stub, tmp_path)
        assert first.verdicts(DUELS[:1]) == [None]
        assert first.report()["unanswered"] == 2
        assert judge(stub, tmp_path).verdicts(DUELS[:1]) == [1.0]


def test_refusals_are_counted_kept_and_not_asked_again(tmp_path: Path) -> None:
    with Stub(lambda *_: says("I would rather not say.")) as stub:
        for _ in range(2):
            one = judge(stub, tmp_path)
            assert one.verdicts(DUELS[:1]) == [None]
            assert one.report()["without a verdict"] == 2
    assert set(stub.seen.values()) == {1}


def test_a_refused_key_ends_the_run_and_shows_the_key_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with Stub(lambda *_: (401, b'{"error": "bad key sk-secret"}', {})) as stub:
        with pytest.raises(ValueError, match=r"status 401; is the key in the environment variable OPENAI_API_KEY"):
            judge(stub, tmp_path).verdicts(DUELS)
        assert stub.keys == {"Bearer sk-secret"}
    with Stub(lambda question, _: longer(question)) as stub:
        made = judge(stub, tmp_path)
        made.verdicts(DUELS)
    seen = repr(vars(made)) + repr(made.endpoint) + caplog.text + "".join(capfd.readouterr())
    assert "sk-secret" not in seen + "".join(f.read_text() for f in tmp_path.rglob("*") if f.is_file())


def test_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    with Stub(lambda question, _: longer(question)) as stub:
        judge(stub, tmp_path).verdicts([("{a} {x}", "{b}", "\\1 {prompt}")])
    (question,) = [question for question in stub.seen if question.index("{b}") < question.index("\\1 {prompt}")]
    assert "user: {a} {x}" in question


def test_calls_and_tools_are_shown(tmp_path: Path) -> None:
    call = Message("assistant", "", '{"tool_calls": [{"name": "f"}]}')
    prompt = Conversation((Message("user", "q"), call, Message("tool", "found")), '[{"name": "f"}]')
    with Stub(lambda question, _: longer(question)) as stub:
        judge(stub, tmp_path).verdicts([(prompt, "a", (call,))])
    assert len(stub.seen) == 2
    shown = f'tools: [{{"name": "f"}}]\n\nuser: q\n\nassistant: {call.fields}\n\ntool: found'
    assert all(shown in question and question.count(call.fields) == 2 for question in stub.seen)


KILLED = """
import sys
from halos.data.records.record import Conversation, Message
from halos.judges.chat import ChatJudge
url, cache = sys.argv[1:]
judge = ChatJudge(model="stub", base_url=url, cache=cache, workers=1, timeout=60.0)
print(judge.scores([("p", "x" * n) for n in range(1, 9)]))
"""


def test_after_a_kill_only_what_was_not_answered_is_asked(tmp_path: Path) -> None:
    hang = True

    def answer(question: str, _: int) -> Reply | None:
        return None if hang and "xxxxx" in question else longer(question)

    cache = tmp_path / "judge.jsonl"
    words = [sys.executable, "-c", KILLED]
    with Stub(answer) as stub:
        process = subprocess.Popen([*words, stub.url, str(cache)], cwd=ROOT)
        until(lambda: len(stub.seen) == 5 and cache.read_bytes().count(b"\n") == 4)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with cache.open("ab") as stream:
            stream.write(b'{"key": "half a li')  # as if the kill had come in the middle of a line
        hang = False
        done = subprocess.run([*words, stub.url, str(cache)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert len(stub.answered) == 8
    assert set(stub.answered.values()) == {1}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": None}, "judge.model: expected the model's name"),
        ({"model": "m", "base_url": "ftp://x"}, "judge.base_url: expected http"),
        ({"model": "m", "workers": 0}, "judge.workers: expected"),
        ({"model": "m", "price": (1.0,)}, "judge.price: expected"),
        ({"model": "m", "price": (1.0, -1.0)}, "judge.price: expected"),
        ({"model": "m", "tries": 0}, "judge.tries: expected"),
        ({"model": "m", "threshold": "6"}, "judge.threshold: expected a number or null, found '6'"),
        ({"model": "m", "threshold": True}, "judge.threshold: expected a number or null, found True"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        ChatJudge(cache=str(tmp_path / "c"), **options)


@pytest.mark.parametrize("name", ["workers", "max_tokens", "tries"])
@pytest.mark.parametrize("value", [True, 1.5, 0, "8"])
def test_what_is_no_whole_number_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^judge\.{name}: expected a whole number from 1 on"):
        ChatJudge(model="m", cache=str(tmp_path / "c"), **{name: value})


@pytest.mark.parametrize("name", ["temperature", "timeout", "patience", "max_patience"])
@pytest.mark.parametrize("value", [True, -1.0, float("inf"), "1"])
def test_what_is_no_number_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^judge\.{name}: expected a number from 0 on"):
        ChatJudge(model="m", cache=str(tmp_path / "c"), **{name: value})


def test_what_is_null_is_left_out_of_the_request(tmp_path: Path) -> None:
    made = ChatJudge(model="m", cache=str(tmp_path / "c"), temperature=None, max_tokens=None, threshold=None)
    assert made.options == {"model": "m"}
