"""What a refusal recommends to set: a value that was tried out, not one that only has the right name."""

import re

import pytest

from halos.data.records.record import Message, Prompt, Reply, json_text
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.switches import reads
from halos.data.rows.tokenise import few_rows
from halos.data.rows.written import check_written
from halos.data.views.examples import Demonstration
from tests.data.rows.traits import FORGETS
from tests.tiny import CHATML, bpe_tokenizer


def prompt_ends(condition: str) -> str:
    """A template whose generation prompt holds a closed think block that replies do not have, under a condition."""
    block = f"{{% if {condition} %}}<think></think>{{% endif %}}"
    return CHATML.replace("assistant\n{% endif %}", f"assistant\n{block}{{% endif %}}")


def refusal(template: str, prompt: Prompt = "a", reply: Reply = "b") -> str:
    tokens = ChatTokens(bpe_tokenizer(template), Limits(512))
    with pytest.raises(ValueError, match=r"^data: expected the chat template to write every prompt") as error:
        few_rows([Demonstration("x", prompt, reply)], [], tokens, lambda _: "")
    return str(error.value)


@pytest.mark.parametrize(
    ("template", "setting"),
    [
        (FORGETS, "enable_thinking=false"),
        (prompt_ends("not enable_thinking"), "enable_thinking=true"),  # Gemma 4
        (prompt_ends("thinking is not defined or thinking"), "thinking=false"),
        (prompt_ends("true or enable_thinking"), None),
        (prompt_ends("messages[-1].thinking is not defined"), None),
        (prompt_ends("messages[-1]['thinking'] is not defined"), None),
    ],
)
def test_a_refused_prompt_is_told_the_value_that_helps(template: str, setting: str | None) -> None:
    found = re.findall(r"set model\.chat_template_kwargs\.([^,]*),", refusal(template))
    assert found == ([] if setting is None else [setting])


def test_thoughts_that_are_not_written_are_told_the_value_that_helps() -> None:
    block = "{% if enable_thinking and message.reasoning_content %}<think>{{ message.reasoning_content }}{% endif %}"
    template = CHATML.replace("{{ message['content'] }}", block + "{{ message['content'] }}")
    reply = (Message("assistant", "7", json_text({"reasoning_content": "hm"})),)
    with pytest.raises(ValueError, match=r"; set model\.chat_template_kwargs\.enable_thinking=true, or another"):
        check_written(bpe_tokenizer(template), "f:2#0", "a", (reply,))
    with pytest.raises(ValueError, match=r"; set another template with model\.chat_template"):
        check_written(bpe_tokenizer(CHATML), "f:2#0", "a", (reply,))


@pytest.mark.parametrize(
    ("template", "is_read"),
    [
        ("{{ tone }}", True),
        ("{%if tone%}", True),
        ("{{ 'a' ~tone|upper }}", True),
        ("{{ m.tone }}", False),
        ("{{ m['tone'] }}", False),
        ('{{ m.get("tone") }}', False),
        ("{{ overtone }}{{ tones }}", False),
    ],
)
def test_a_variable_is_neither_a_field_nor_a_text(template: str, is_read: bool) -> None:
    assert reads(template, "tone") is is_read
