"""A conversation becomes the text that transformers makes of it, whatever its template uses; what is hostile in one is refused."""

from __future__ import annotations

import time

import pytest

from joulemark.errors import BadInput
from joulemark_agent.chat_template import render_template

MESSAGES = [{"role": "user", "content": "hi"}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def test_a_tokenizer_that_begins_texts_itself_does_not_begin_them_twice() -> None:
    template = "{{ bos_token }}[{{ messages[0].content }}]{{ bos_token }}"
    assert render_template(template, MESSAGES, SPECIAL, adds_bos=False) == "<s>[hi]<s>"
    assert render_template(template, MESSAGES, SPECIAL, adds_bos=True) == "[hi]<s>"
    assert render_template("[hi]", MESSAGES, SPECIAL, adds_bos=True) == "[hi]"
    assert render_template("[hi]", MESSAGES, {}, adds_bos=True) == "[hi]"


def test_what_transformers_gives_to_templates_is_there() -> None:
    loop = "{% for message in messages %}{{ message.content }}{% break %}{% endfor %}"
    assert render_template(loop, MESSAGES * 2, SPECIAL, False) == "hi"
    marked = "{% for m in messages %}<{% generation %}{{ m.content }}{% endgeneration %}>{% endfor %}"
    assert render_template(marked, MESSAGES * 2, SPECIAL, False) == "<hi><hi>"
    assert render_template("{{ strftime_now('%Y') }}", MESSAGES, SPECIAL, False) == time.strftime("%Y")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{% generation %}",
        "{{ strftime_now() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_what_is_hostile_or_broken_is_refused_in_words(template: str) -> None:
    with pytest.raises(BadInput):
        render_template(template, MESSAGES, SPECIAL, False)
