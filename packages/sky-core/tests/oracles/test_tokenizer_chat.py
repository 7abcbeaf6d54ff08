"""Chat templates in the style of today's models against transformers' `apply_chat_template`: text, ids and masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sky_core.components.tokenizer import Byte
from sky_core.errors import UserError
from sky_core.tokenizer.base import Tokenizer
from sky_core.tokenizer.chat import TEMPLATES, encode_chat_with_mask
from sky_core.tokenizer.huggingface import read_huggingface, write_huggingface

transformers = pytest.importorskip("transformers", reason="transformers is the reference renderer")
pytest.importorskip("tokenizers", reason="transformers reads our export with it")

STYLES = {
    "chatml": TEMPLATES["chatml"],
    "llama3": """\
{{- '<|bos|>' }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|header|>system<|end|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|header|>' + message['role'] + '<|end|>\\n\\n' }}
        {%- if message.role == 'assistant' %}
            {%- generation %}{{- message['content'] | trim + '<|eot|>' }}{%- endgeneration %}
        {%- else %}
            {{- message['content'] | trim + '<|eot|>' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header|>assistant<|end|>\\n\\n' }}
{%- endif %}
""",
    "mistral": """\
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in loop_messages %}
    {%- if message.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}
    {%- if (message.role == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant") }}
    {%- endif %}
{%- endfor %}
{%- for message in loop_messages %}
    {%- if message.role == "user" %}
        {%- if loop.index0 == ns.last and system is defined %}
            {{- "[INST] " + system + "\\n\\n" + message.content + "[/INST]" }}
        {%- else %}
            {{- "[INST] " ~ message.content ~ "[/INST]" }}
        {%- endif %}
    {%- else %}
        {%- generation -%}
        {{ " " + message.content|trim + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
""",
    "gemma": """\
{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<|turn|>' + role + '
' + message['content'] | trim + '<|eot|>
' }}
{% endfor %}
{% if add_generation_prompt %}
{{'<|turn|>model
'}}
{% endif %}
""",
    "dates and macros": """\
{%- macro show(message, depth=0) -%}
{{ message.role.title() }}: {{ message.content.split(' ')|join('_') }}{{ '%03d' % depth }}
{{ message|tojson(sort_keys=true) }}
{%- endmacro -%}
{{ strftime_now('%Y')|length }}
{% for message in messages if message.role != 'system' %}
  {%- if loop.last %}{% continue %}{% endif %}
  {{ show(message, loop.index) }}
{% endfor %}
{{ documents is none }}{{ note | default('none') }}{{ 3 * 4 ** 2 }}{{ 'ab' * 3 }}
{% for i in range(3) %}{{ i }}{% endfor %}
""",
}
TALKS: dict[str, list[dict[str, Any]]] = {
    "short": [{"role": "user", "content": " Hé <b>there</b>? "}],
    "long": [
        {"role": "user", "content": "What's 1+1?"},
        {"role": "assistant", "content": " It's 2. ✓ "},
        {"role": "user", "content": "日本\n\nsure?"},
        {"role": "assistant", "content": "Yes."},
    ],
    "system": [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "And?"},
    ],
    "out of order": [{"role": "assistant", "content": "I begin"}],
}
REFUSED = {
    ("mistral", "out of order"): "roles must alternate user/assistant",
    ("gemma", "system"): "System role not supported",
}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "1 < 2 & 'é'", "parameters": {}}}]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|bos|>", "<|header|>", "<|end|>", "<|eot|>", "<|turn|>", "[INST]", "[/INST]"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Tokenizer, Tokenizer, Any]]:
    """Our tokenizer, the same read back from a Hugging Face folder, and transformers' of that folder."""
    built: dict[str, tuple[Tokenizer, Tokenizer, Any]] = {}

    def get(style: str) -> tuple[Tokenizer, Tokenizer, Any]:
        if style not in built:
            one = Byte(special=SPECIAL).train([])
            one.chat_template = STYLES[style]
            folder = tmp_path_factory.mktemp(style.partition(" ")[0])
            write_huggingface(one, folder)
            built[style] = one, read_huggingface(folder), transformers.AutoTokenizer.from_pretrained(folder)
        return built[style]

    return get


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("prompt", [False, True], ids=["whole", "prompt"])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("style", STYLES)
def test_a_conversation_is_written_as_transformers_writes_it(
    pair: Callable[[str], Any], style: str, talk: str, prompt: bool, tools: Any
) -> None:
    ours, read, theirs = pair(style)
    options = {"add_generation_prompt": prompt, "tools": tools}
    if (style, talk) in REFUSED:
        with pytest.raises(Exception, match=REFUSED[style, talk]):
            theirs.apply_chat_template(TALKS[talk], tokenize=False, **options)
        with pytest.raises(UserError, match=REFUSED[style, talk]):
            ours.render_chat(TALKS[talk], **options)
        return
    text = theirs.apply_chat_template(TALKS[talk], tokenize=False, **options)
    ids = theirs.apply_chat_template(TALKS[talk], return_dict=False, **options)
    for one in (ours, read):
        assert one.render_chat(TALKS[talk], **options) == text
        assert one.encode_chat(TALKS[talk], **options) == ids


@pytest.mark.parametrize("talk", ["short", "long", "system"])
@pytest.mark.parametrize("style", ["chatml", "llama3", "mistral"])
def test_the_mask_of_the_answers_is_that_of_transformers(pair: Callable[[str], Any], style: str, talk: str) -> None:
    ours, read, theirs = pair(style)
    expected = theirs.apply_chat_template(TALKS[talk], return_dict=True, return_assistant_tokens_mask=True)
    for one in (ours, read):
        ids, mask = encode_chat_with_mask(one, TALKS[talk])
        assert ids == expected["input_ids"]
        assert mask == [bool(token) for token in expected["assistant_masks"]]
