"""The token that ends a turn, where a template writes several special tokens after a reply."""

import pytest

from halos.data.records.record import Conversation, Message
from halos.data.rows.chat_tokens import ChatTokens, Limits
from tests.tiny import CHATML, END, EOS, EOT, bpe_tokenizer

START = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
REPLIED = "{% if m['role'] == 'assistant' %}"

PARTS = f"{START}{{{{ m['content'] }}}}{REPLIED}<|eot|>{{% endif %}}</s>{{% endfor %}}{PROMPT}"
"""Closes the response, then the turn with EOS, as Command A does."""

NESTED = (
    f"{START}{REPLIED}<|good|>think<|eot|><|good|>{{{{ m['content'] }}}}<|eot|>reply<|im_end|>"
    f"{{% else %}}{{{{ m['content'] }}}}<|im_end|>{{% endif %}}{{% endfor %}}{PROMPT}"
)
"""Closes parts of a reply with a token that is no end, as Kimi K3 does."""

LAST = CHATML.replace("assistant\n{% endif %}", "assistant\n{% else %}{{ eos_token }}{% endif %}")
"""Ends a whole conversation with EOS, after the token that ends a turn, as Phi 3.5 does."""

FINAL = CHATML.replace(
    "<|im_end|>", "{{ '<|eot|>' if loop.last and message['role'] == 'assistant' else '<|im_end|>' }}"
)
"""Ends the last reply with another token than earlier ones, as gpt-oss does."""


@pytest.mark.parametrize(
    ("template", "completion", "end"),
    [
        (PARTS, f"hello<|eot|>{EOS}", EOS),
        (NESTED, f"<|good|>think<|eot|><|good|>hello<|eot|>reply{END}", END),
        (LAST, f"hello{END}", END),
        (FINAL, f"hello{EOT}", EOT),
    ],
)
def test_the_end_of_a_turn_is_not_that_of_a_part_nor_of_a_conversation(
    template: str, completion: str, end: str
) -> None:
    tokenizer = bpe_tokenizer(template)
    tokens = ChatTokens(tokenizer, Limits(512))
    assert tokens.end_of_turn == tokenizer.convert_tokens_to_ids(end)
    assert tokens.completion("hello", "a") == tokenizer(completion, add_special_tokens=False)["input_ids"]


def test_a_template_for_requests_with_tools_alone_can_be_used_for_them() -> None:
    tokenizer = bpe_tokenizer("{% for tool in tools + [] %}{{ tool | tojson }}{% endfor %}" + CHATML)
    tokens = ChatTokens(tokenizer, Limits(512))
    prompt = Conversation((Message("user", "a"),), '[{"name": "f"}]')
    assert tokenizer.decode(tokens.completion("hello", prompt)) == f"hello{END}"
    with pytest.raises(ValueError, match=r"^r#0: the chat template refused the turns user"):
        tokens.prompt("a", where="r#0")
