"""Chats rendered by transformers: the model's own template, and ones that use what templates use."""

from datetime import datetime, timezone
from pathlib import Path

import transformers.utils.chat_template_utils as utils
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

# `strftime_now` is held at this second.
NOW = 1_732_352_063

USER = {"role": "user", "content": "What is 2+2? \"Quote\" <b>&amp; caf\u00e9</b>"}
ASSISTANT = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief.\n"}
CHATS = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "  And 3+3?  "},
              {"role": "assistant", "content": "6\n"}],
}
TOOLS = [{
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather \u2013 in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1},
                           "scale": {"type": "number", "default": 1.0, "minimum": 1e-7}},
            "required": ["city"],
            "empty": {}, "list": [], "flag": True, "nothing": None,
        },
    },
}]
CALL = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {
        "name": "get_weather", "arguments": {"city": "K\u00f6ln", "days": 2}}}]},
    {"role": "tool", "name": "get_weather", "content": "{\"t\": 7}"},
    {"role": "assistant", "content": "7 degrees."},
]

WITH_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content | trim + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(index=0, last=none) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "system" and tools %}{% continue %}{% endif %}
    {%- set content = message.content.strip() if message.content is string else '' %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
    {%- elif 'x' in content or content.startswith('And') %}
        {{- '\\n[' ~ content.split(' ')[-1] ~ '|' ~ content.replace('+', ' plus ').upper() ~ ']' }}
    {%- else %}
        {{- '\\n' + content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|im_start|>assistant\\n' ~ ('<' ~ ns.last ~ '>') }}
    {%- endif %}
{%- endfor %}
"""
STRICT = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate, got ' + message['role']) }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {% generation %}
        {{- ' ' + message['content'] + eos_token }}
        {%- endgeneration -%}
    {%- endif %}
{%- endfor %}
"""
DATED = """\
{{ bos_token }}
{% if tools is not none %}
Tools: {{ tools | tojson(indent=4) }}
{{ tools | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}
{% endif %}
    {# lstrip_blocks and trim_blocks at work #}
    {% for key, value in messages[0].items() %}
{{ loop.index }}. {{ key }}={{ value }}
    {% endfor %}
Today: {{ strftime_now("%d %b %Y, %A %H:%M") }}
{{ 'yes' if add_generation_prompt else 'no' }} {{ true }} {{ none }} {{ 1.0 }} {{ 7 // 2 }} {{ -7 % 3 }}
{{ ['a', "it's", 1, none, true] }} {{ {'k': 'v', 'n': 1.5} }}
{{ messages | map(attribute='role') | join(', ') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{- messages[-1].get('missing', ' default') }}
"""


def cases(gguf: Path) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = [
        {"chat": name, "generate": generate,
         "ids": tokenizer.apply_chat_template(chat, add_generation_prompt=generate)["input_ids"]}
        for name, chat in CHATS.items() for generate in (False, True)
    ]
    hold_time()
    chats = CHATS | {"call": CALL, "wrong": [ASSISTANT, USER]}
    templates = [
        {"source": source, "cases": [
            {"chat": name, "tools": bool(tools), "generate": generate,
             **render(source, chat, tools, generate)}
            for name, chat in chats.items() for tools in (None, TOOLS) for generate in (False, True)
        ]}
        for source in (tokenizer.chat_template, WITH_TOOLS, STRICT, DATED)
    ]
    return {"now": NOW, "chats": chats, "tools": TOOLS, "model": model, "templates": templates}


def render(source: str, chat: list, tools, generate: bool) -> dict:
    try:
        texts, _ = render_jinja_template(
            [chat], tools=tools, chat_template=source, add_generation_prompt=generate,
            bos_token="<s>", eos_token="</s>",
        )
        return {"text": texts[0]}
    except Exception as error:  # The message is what the Rust side must find again.
        return {"error": str(error)}


def hold_time() -> None:
    class Held(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.fromtimestamp(NOW, timezone.utc)

    utils.datetime = Held
