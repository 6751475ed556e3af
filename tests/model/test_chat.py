"""Chat templates: a good one is written out, one that raises, loops or eats memory is one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from retrofit.errors import UserError
from retrofit.model import chat
from tests.tiny import tiny_tokenizer

ASKED = [{"role": "user", "content": "What is a list in Python?"}]


def test_a_conversation_with_the_start_of_an_answer() -> None:
    text = chat.rendered(tiny_tokenizer(chat_template=True), ASKED, Path("m"))
    assert text == "<|im_start|>user\nWhat is a list in Python?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for", "unexpected 'end of template'"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception('no\n\x1b[31m') }}", r"no\n\x1b[31m"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[7]['role'] }}", "list object has no element 7"),
        ("{{ 'a' * 9000000000 }}", "too much memory"),
        ("{{ 'a' * 3000000 }}", "writes more than 1,048,576 bytes"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes longer than 1 sec"),
        (" ", "writes nothing"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_message(
    template: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "SECONDS", 1)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError) as caught:
        chat.rendered(tokenizer, ASKED, Path("m"))
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3
