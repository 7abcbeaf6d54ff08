"""Chat templates: conversations as text and ids, and programs that try more than that."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sky_core.components.tokenizer import Byte, Char, Saved
from sky_core.errors import DataError, UserError
from sky_core.tokenizer.base import Tokenizer
from sky_core.tokenizer.chat import encode_chat_with_mask, read_template

MESSAGES = [
    {"role": "user", "content": "héllo <b>&"},
    {"role": "assistant", "content": "wörld"},
    {"role": "user", "content": "more?"},
]


@pytest.fixture
def chatty() -> Tokenizer:
    return Byte(special=["<|im_start|>", "<|im_end|>"], chat_template="chatml").train([])


def test_a_conversation_is_written_and_ends_where_the_answer_begins(chatty: Tokenizer) -> None:
    assert chatty.render_chat(MESSAGES[:1], add_generation_prompt=True) == (
        "<|im_start|>user\nhéllo <b>&<|im_end|>\n<|im_start|>assistant\n"
    )


def test_its_ids_hold_special_tokens_and_the_mask_marks_the_answers(chatty: Tokenizer) -> None:
    ids, mask = encode_chat_with_mask(chatty, MESSAGES)
    assert ids == chatty.encode_chat(MESSAGES) == chatty.encode_with_special(chatty.render_chat(MESSAGES))
    said = [i for i, assistant in zip(ids, mask, strict=True) if assistant]
    assert said == [*"wörld".encode(), chatty.special["<|im_end|>"]]


def test_a_mask_needs_a_template_that_says_what_the_assistant_says(chatty: Tokenizer) -> None:
    chatty.chat_template = "{{ messages[0].content }}"
    with pytest.raises(UserError, match=r"write {% generation %}"):
        encode_chat_with_mask(chatty, MESSAGES)


def test_the_template_travels_with_the_tokenizer_and_not_with_its_fingerprint(
    chatty: Tokenizer, tmp_path: Path
) -> None:
    chatty.save(tmp_path)
    copies = [Saved(path=str(tmp_path)).train([]), pickle.loads(pickle.dumps(chatty))]
    assert [copy.chat_template for copy in copies] == [chatty.chat_template] * 2
    fingerprint = chatty.fingerprint
    plain = Byte(special=["<|im_start|>", "<|im_end|>"]).train([])
    assert plain.fingerprint == fingerprint
    plain.save(tmp_path)
    assert Saved(path=str(tmp_path)).train([]).chat_template is None, "an old template does not stay behind"
    with pytest.raises(UserError, match="has no chat template; put"):
        plain.render_chat(MESSAGES)


def texts_that_nobody_reads() -> Iterator[str]:
    raise AssertionError("the template is read first")
    yield


def test_a_template_is_a_name_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{{ bos_token is defined }} {{ eos_token }}{% for m in messages %}{{ m.content }}{% break %}{% endfor %}"
    )
    one = Byte(chat_template=str(path)).train([])
    assert one.render_chat(MESSAGES) == "False <|endoftext|>héllo <b>&"
    with pytest.raises(UserError, match=r"no chat template called 'chatlm' \(have: chatml\)"):
        read_template("chatlm")
    with pytest.raises(UserError, match="no chat template called"):
        Char(chat_template="chatlm").train(texts_that_nobody_reads())
    path.write_text("{% if %}")
    with pytest.raises(UserError, match="no Jinja template: line 1"):
        read_template(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        read_template(str(path))


def test_it_sees_tools_and_other_variables_as_plain_values(chatty: Tokenizer) -> None:
    chatty.chat_template = "{{ tools | tojson }} {{ thinking }} {{ documents is none }}"
    assert chatty.render_chat([], tools=[{"name": "<é>"}], thinking=True) == '[{"name": "<é>"}] True True'
    with pytest.raises(UserError, match=r"not a .*Path"):
        chatty.render_chat([], tools=[Path()])
    with pytest.raises(UserError, match=r"not a .*Path"):
        chatty.render_chat([{"role": "user", "content": Path()}])


def test_a_template_whose_tokens_are_spelled_out_is_told_of(
    chatty: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    assert not caplog.messages
    Byte(special=["<|im_end|>"], chat_template="chatml").train([])
    (message,) = caplog.messages
    assert "writes <|im_start|> as plain text" in message


ATTACKS = {
    "{{ ''.__class__ }}": "forbidden.*'__class__' in line 1",
    "{{ ''['__class__'] }}": "forbidden.*'__class__' in line 1",
    "{{ ''|attr('__cla' ~ 'ss__') }}": "forbidden.*'__class__' of a str",
    "{{ ''['__cla' ~ 'ss__'] }}": "forbidden.*'__class__' of a str",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "forbidden",
    "{{ messages|attr('__class__') }}": "forbidden",
    "{{ messages|map(attribute='__class__')|list }}": "forbidden",
    "{{ '{0.__class__}'.format('') }}": "forbidden",
    "{{ cycler.__init__.__globals__.os.system('touch hacked') }}": "forbidden",
    "{{ raise_exception.__globals__ }}": "forbidden",
    "{{ self.__init__.__globals__ }}": "forbidden",
    "{{ lipsum.__globals__['os'].system('touch hacked') }}": "forbidden",
    "{{ lipsum(n=1) }}": "'lipsum' is undefined",
    "{{ messages.append(1) }}": "forbidden.*'append' of a list",
    "{% do messages[0].update(role='x') %}": "no Jinja template",
    "{{ messages[0].update(role='x') }}": "forbidden.*'update' of a dict",
    "{% set messages[0].role = 'x' %}": "no Jinja template",
    "{% set messages.x = 1 %}": "non-namespace",
    "{% include '/etc/passwd' %}": "forbidden.*line 1 reads another file",
    "{% for i in range(10**9) %}{% endfor %}": "forbidden.*Range too big",
    "{{ 'a' * 10**12 }}": r"forbidden.*\* makes something larger",
    "{{ 10 ** (10 ** 10) }}": r"forbidden.*\*\* makes something larger",
    "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}": "forbidden.*~ ma",
    "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}": r"forbidden.*\+ ma",
    "{{ 'a'.ljust(10**10) }}": "forbidden.*width",
    "{{ 'a'|center(10**10) }}": "forbidden.*width",
    "{{ '%20000000000d' % 1 }}": "forbidden.*width",
    "{{ '%*d' % (10**10, 1) }}": "forbidden.*width",
    "{{ '%20000000000d'|format(1) }}": "forbidden.*width",
    "{{ '{:20000000000d}'.format(1) }}": "forbidden.*width",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% set r = range(9999)|list %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}": "more than 100,000 steps",
    "{% set r = range(9999)|list %}{% for i in r %}{% for j in r if false %}{% endfor %}{% endfor %}": "100,000 steps",
    "{{ raise_exception('first\nuser') }}": "refuses these messages: first user",
    "{{ 1 / 0 }}": "fails: ZeroDivisionError",
    "{{ messages[0].nothing.more }}": "fails: UndefinedError",
}


def test_large_numbers_that_are_no_widths_are_text_like_any_other(chatty: Tokenizer) -> None:
    number = "call 12345678901"
    chatty.chat_template = (
        "{{ messages[0].content.strip() ~ ', ' + messages[0].content|trim }}"
        "{{ ' %s %d' % (messages[0].content, 10**9) }}"
        "{{ ' {}'.format(10**9) }}{{ messages[0].content.split('12345678901')[0] }}"
    )
    text = chatty.render_chat([{"role": "user", "content": number}])
    assert text == f"{number}, {number} {number} 1000000000 1000000000call "


@pytest.mark.parametrize("template", ATTACKS)
def test_a_template_that_tries_more_than_writing_text_is_stopped(
    chatty: Tokenizer, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    messages = [dict(message) for message in MESSAGES]
    chatty.chat_template = template
    started = time.process_time()
    with pytest.raises(UserError, match=ATTACKS[template]) as problem:
        chatty.render_chat(messages)
    assert "\n" not in str(problem.value)
    assert messages == MESSAGES
    assert not list(tmp_path.iterdir())
    assert time.process_time() - started < 10, "seconds; the longest takes one"


def test_a_stopped_template_leaves_the_next_rendering_alone(chatty: Tokenizer) -> None:
    chatty.chat_template = (
        "{% if x %}{% for i in range(99999) %}{% for j in range(9) %}{% endfor %}{% endfor %}{% endif %}ok"
    )
    with pytest.raises(UserError, match="steps"):
        chatty.render_chat(MESSAGES, x=True)
    assert chatty.render_chat(MESSAGES, x=False) == "ok"
