"""Chat templates: which one is used, and whether it writes a prompt the same way with and without its reply."""

import logging
from pathlib import Path

import pytest
from jinja2.exceptions import SecurityError, TemplateError, UndefinedError

from halos.data.records.record import Message
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.templates import CHATML_TEMPLATE, PLAIN_TEMPLATE, check_prefixes, template_of
from tests.tiny import CHATML, WITH_BOS, WITH_EOT, bpe_tokenizer, word_tokenizer

TURNS = (Message("system", "s"), Message("user", "hello"), Message("assistant", "good"), Message("tool", "7"))
THINKS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
REWRITES = (
    "{% for message in messages %}{% if message['role'] != 'system' or messages[-1]['role'] == 'assistant' %}"
    "[{{ message['role'] }}] {{ message['content'] }}{% endif %}{% endfor %}"
)


def test_a_name_a_file_or_the_template_itself(tmp_path: Path) -> None:
    assert (template_of("plain"), template_of("chatml")) == (PLAIN_TEMPLATE, CHATML_TEMPLATE)
    assert template_of(WITH_EOT) == WITH_EOT
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    assert template_of(str(file)) == CHATML
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"mine.jinja cannot be read as text"):
        template_of(str(file))
    with pytest.raises(ValueError, match="expected plain, chatml, a file or Jinja, found 'chatlm'"):
        template_of("chatlm")


@pytest.mark.parametrize("template", [None, CHATML, WITH_BOS, WITH_EOT, PLAIN_TEMPLATE])
def test_templates_that_keep_the_prompt(template: str | None) -> None:
    check_prefixes(bpe_tokenizer(template), [("a", TURNS, "7"), ("b", "hello", "x")])


def test_a_generation_prompt_that_the_reply_does_not_have() -> None:
    said = (
        r"^f:2#0: .*differ from character 56 on, after '.*assistant\\n': '<think>' in the prompt alone, 'world<|.* with"
    )
    with pytest.raises(ValueError, match=said.replace("|", r"\|")):
        check_prefixes(bpe_tokenizer(THINKS), [("f:2#0", "hello", "world")])


def test_each_sequence_of_roles_is_tried() -> None:
    tokenizer = bpe_tokenizer(REWRITES)
    check_prefixes(tokenizer, [("a", "hello", "x"), ("b", (Message("user", "r"),), "y")])
    with pytest.raises(ValueError, match=r"^c: .*from character 2 on"):
        check_prefixes(tokenizer, [("a", "hello", "x"), ("c", (Message("system", "s"), Message("user", "q")), "y")])


def test_a_template_that_refuses_the_reply() -> None:
    template = "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('no replies') }}{% endif %}x"
    with pytest.raises(ValueError, match=r"^a: the chat template refused the turns user, assistant: no replies"):
        check_prefixes(bpe_tokenizer(template), [("a", "hello", "x")])


def test_the_plain_default_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    tokens = ChatTokens(bpe_tokenizer(), Limits(99))
    with caplog.at_level(logging.WARNING):
        tokens.prompt("hello")
        assert not caplog.records
        for _ in range(2):
            tokens.prompt(TURNS)
    assert [record.message.split(":")[0] for record in caplog.records] == ["the tokenizer has no chat template"]


@pytest.mark.parametrize(
    "escape",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "messages.__class__.__base__.__subclasses__()",
        "raise_exception.__globals__.os.mkdir('ran')",
        "cycler.__init__.__globals__.os.mkdir('ran')",
        "(messages|attr('__class__'))|attr('__subclasses__')()",
        "'{0.__class__.__mro__[1].__subclasses__}'.format(messages)()",
        "messages.append(messages)",
    ],
)
def test_a_template_does_not_escape_from_its_sandbox(
    escape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = word_tokenizer("{{ " + escape + " }}")
    with pytest.raises(TemplateError, match=r"(?i)unsafe|undefined") as raised:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert isinstance(raised.value, SecurityError | UndefinedError)
    assert not list(tmp_path.iterdir())
