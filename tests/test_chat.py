"""Chats: what files of records hold, and templates, rendered as transformers does and within bounds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

from dsv2quant.errors import InputError
from dsv2quant.text import chat as module
from dsv2quant.text.calibration import Document, load
from dsv2quant.text.chat import Chat, Templates
from dsv2quant.text.tokenizer import Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CHAT = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Größe?\nIn cm."},
    {"role": "assistant", "content": "180"},
]
CHATML = """\
{% for message in messages %}
    {% if loop.index > 9 %}
        {% break %}
    {% endif %}
    {{ '<|im_start|>' + message['role'] + '\n' + (message['content'] | tojson) + '<|im_end|>' + '\n' }}
{% endfor %}
{% if tools is not none %}never{% endif %}
"""


def write_lines(path: Path, *records: object) -> str:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return str(path)


def with_template(folder: Path, template: object) -> Path:
    """A folder with dsv2-mini's tokenizer and another chat template."""
    folder.mkdir(exist_ok=True)
    shutil.copy(tiny.MINI / "tokenizer.json", folder)
    config = json.loads((tiny.MINI / "tokenizer_config.json").read_text(encoding="utf-8"))
    config = config | {"chat_template": template} if template is not None else config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def rendered(tmp_path: Path, folder: Path, messages: object = CHAT) -> str:
    (document,) = load(write_lines(tmp_path / "chat.jsonl", {"messages": messages}), folder).documents
    assert document.is_chat
    return document.text


# Templates


def test_deepseek_v2s_own_template(tmp_path):
    assert rendered(tmp_path, tiny.MINI) == (f"{BOS}Be <brief> & kind.\n\nUser: Größe?\nIn cm.\n\nAssistant: 180{EOS}")


def test_chats_are_rendered_and_tokenized_as_transformers_does(tmp_path):
    from transformers import PreTrainedTokenizerFast

    for name, template in (("own", None), ("chatml", CHATML)):
        folder = with_template(tmp_path / name, template)
        peer = PreTrainedTokenizerFast.from_pretrained(folder)
        text = rendered(tmp_path, folder)
        assert text == peer.apply_chat_template(CHAT, tokenize=False)
        ids = peer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
        assert Tokenizer.open(folder).encode(text, parse_special=True).tolist() == ids
    assert '    <|im_start|>system\n"Be <brief> & kind."<|im_end|>\n\n    <|im_start|>user\n"Größe' in text


def test_forms_of_a_template(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}list"}]
    folder = with_template(tmp_path / "m", named)
    assert rendered(tmp_path, folder) == f"{EOS}list"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}file", encoding="utf-8")  # wins over the config's
    assert rendered(tmp_path, folder) == f"{BOS}file"
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}[{{ eos_token }}]")
    assert rendered(tmp_path, folder) == "<s>[]"


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ([{"name": "tool_use", "template": "x"}], r"no chat template \(give plain text"),
        ([{"name": "default"}], r"a chat template is {'name': 'default'} \(it must be text, or a list"),
        (["x"], "a chat template is 'x'"),
        (7, "a chat template is 7"),
        ("absent", r"no chat template \(give plain text"),
    ],
)
def test_messages_need_a_template(tmp_path, template, what):
    folder = with_template(tmp_path / "m", template)
    if template == "absent":
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=f"tokenizer_config.json: {what}"):
        rendered(tmp_path, folder)
    path = write_lines(tmp_path / "text.jsonl", {"text": "a"})
    assert load(path, folder).documents == (Document("a"),)


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "SecurityError: "),
        ("{{ raise_exception('Roles must alternate!') }}", "TemplateError: Roles must alternate!"),
        ("{{ messages[0]['content'] + none }}", "TypeError: "),
        ("{{ missing.field }}", "UndefinedError: 'missing' is undefined"),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
    ],
)
def test_a_template_that_fails_or_breaks_out(tmp_path, template, what):
    folder = with_template(tmp_path / "m", template)
    with pytest.raises(InputError) as error:
        rendered(tmp_path, folder)
    assert str(error.value).startswith(f"{tmp_path / 'chat.jsonl'}, line 1: the chat template fails: {what}")


@pytest.mark.parametrize("template", ["{% if %}", "{{ 'open", "{{ " + "(" * 10_000 + " }}"])
def test_a_template_that_is_no_template(tmp_path, template):
    folder = with_template(tmp_path / "m", template)
    with pytest.raises(InputError, match=r"tokenizer_config.json: broken chat template: .*download it again"):
        rendered(tmp_path, folder)


BUSY = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "a power": "{{ 9 ** (9 ** 9) }}",
}
LARGE = {
    "a number's width": "{{ '%999999999d' % 1 }}",
    "a filter": "{{ 'a' | center(2000000000) }}",
    "doubling": "{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "a product": "{{ 'ab' * 100000000 }}",
    "a list": "{{ [0] * 2000000000 }}",
}


@pytest.mark.parametrize("what", [*BUSY, *LARGE])
def test_a_template_that_takes_too_much(tmp_path, monkeypatch, what):
    """What ends it is the system: each is a loop, or one operation in C, that Python can't interrupt."""
    if what in BUSY:
        monkeypatch.setattr(module, "CPU_SECONDS", 1)
    monkeypatch.setattr(module, "MEMORY", 1 << 28)
    folder = with_template(tmp_path / "m", BUSY.get(what) or LARGE[what])
    bounds = "takes over 1 s" if what in BUSY else "takes too much memory|fails: it writes more than"
    with pytest.raises(InputError, match=f"line 1: the chat template (?:{bounds})"):
        rendered(tmp_path, folder)


TEMPLATES = {
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}|{% endif %}{% endfor %}",
    "date": "{{ strftime_now('%Y') }}{{ messages[1].content }}",
    "json": "{{ messages | tojson(indent=2) }}{{ messages[1] | tojson(separators=(',', ':'), sort_keys=true) }}",
    "lines": "a\n  {%- for m in messages %}\n    {% if m.role == 'user' %}\n  b {{ m.content | trim }}\n    {% endif %}"
    "\n  {% if loop.index0 > 0 %}{% break %}{% endif %}\n{% endfor %}\n",
    "tools": "{% if tools %}{{ tools | tojson }}{% endif %}{% if documents is none %}none{% endif %}",
}
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"ü": 1}}}]


def test_templates_of_all_kinds_are_rendered_as_transformers_does(tmp_path):
    from transformers import PreTrainedTokenizerFast

    peer = PreTrainedTokenizerFast.from_pretrained(tiny.MINI)
    for template in TEMPLATES.values():
        ours = Templates({"default": template}, "m", {"bos_token": BOS, "eos_token": EOS})
        for tools, prompt in ((None, False), (TOOLS, True)):
            (text,) = ours.render([Chat(CHAT, "chat", tools)], generation_prompt=prompt)
            assert text == peer.apply_chat_template(
                CHAT, tools, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )


def test_additional_templates(tmp_path):
    """As transformers 5 saves several: tools choose tool_use, and the settings' template counts for nothing."""
    folder = with_template(tmp_path / "m", "settings")
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").write_text("file")
    assert module.template_source(folder, {"chat_template": "settings"}) == "file"
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0]['function']['name'] }}")
    chats = [Chat(CHAT, 1), Chat(CHAT, 2, TOOLS), Chat(CHAT, 3)]
    assert Templates.of_folder(folder).render(chats) == ["file", "look_up", "file"]


def test_the_chat_that_fails_is_named(tmp_path):
    folder = with_template(tmp_path / "m", "{{ 1 // (messages[0]['content'] | int) }}")
    lines = [{"messages": [{"role": "user", "content": number}]} for number in ("1", "2", "0", "1")]
    with pytest.raises(InputError, match=r"chat\.jsonl, line 4: the chat template fails: ZeroDivisionError"):
        load(write_lines(tmp_path / "chat.jsonl", {"text": "a"}, *lines), folder)


# Files of records


CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"x": "ü"}'}}
ASSISTANT = {"role": "assistant", "content": None, "tool_calls": [CALL]}


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"messages": CHAT}, f"Be <brief> & kind.\n\nUser: Größe?\nIn cm.\n\nAssistant: 180{EOS}"),
    ({"messages": [{"role": "developer", "content": "D"}, CHAT[1]], "text": None}, "D\n\nUser: Größe?\nIn cm.\n\n"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        "User: a\nb\n\n",
    ),
    ({"messages": [{"role": "user", "content": "a"}, ASSISTANT]}, f"User: a\n\nAssistant: {EOS}"),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "S"},
        f"S\n\nUser: a\n\nAssistant: b{EOS}",
    ),
    ({"conversations": [{"role": "user", "content": "a"}]}, "User: a\n\n"),
    ({"prompt": [CHAT[1]], "completion": [CHAT[2]]}, f"User: Größe?\nIn cm.\n\nAssistant: 180{EOS}"),
]


@pytest.mark.parametrize("name", ["r.jsonl", "lines.json", "list.json"])
def test_forms_of_a_record(tmp_path, name):
    path = tmp_path / name
    records = [{"prompt": "a ", "completion": "b"}, *(record for record, _ in FORMS), {"text": "x"}]
    if name == "list.json":
        path.write_text(json.dumps(records, indent=1))
    else:
        write_lines(path, *records)
    chats = [Document(f"{BOS}{want}", is_chat=True) for _, want in FORMS]
    assert load(str(path), tiny.MINI).documents == (Document("a b"), *chats, Document("x"))


@pytest.mark.parametrize(
    ("template", "want"),
    [
        # As DeepSeek-V3 adds arguments up, and as templates want them that take objects.
        ("{% for m in messages %}{% for c in m.tool_calls %}{{ '[' + c.function.arguments + ']' }}{% endfor %}"
         "{% endfor %}",
         '[{"x": "ü"}]'),
        ("{% for c in messages[-1].tool_calls %}{% for k, v in c.function.arguments.items() %}{{ k ~ '=' ~ v }}"
         "{% endfor %}{% endfor %}", "x=ü"),
        ("{{ messages[-1]['content'] + messages[-1].tool_calls[0].function.arguments.x }}", "ü"),
        ("{{ messages[-1].content is none }}", "True"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("parsed", [False, True])
def test_calls_are_spelled_as_the_template_needs_them(tmp_path, template, want, parsed):
    call = CALL | {"function": {"name": "look_up", "arguments": {"x": "ü"}}} if parsed else CALL
    messages = [{"role": "user", "content": "a"}, ASSISTANT | {"tool_calls": [call]}]
    assert rendered(tmp_path, with_template(tmp_path / "m", template), messages) == want


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [], None, ""])
def test_tools_reach_the_template(tmp_path, tools):
    folder = with_template(tmp_path / "m", "{% if tools is none %}none{% else %}{{ tools | tojson }}{% endif %}")
    path = write_lines(tmp_path / "r.jsonl", {"messages": CHAT, "tools": tools})
    want = json.dumps(TOOLS, ensure_ascii=False) if tools and tools != "[]" else "none"
    assert load(path, folder).documents == (Document(want, is_chat=True),)


ONE = {"role": "user", "content": "a"}
IMAGE = {"type": "image_url", "image_url": {"url": "a"}}


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ('{"text": "a"', ": not valid JSON: Expecting ',' delimiter: column 13"),
        ("plain", ": not valid JSON"),
        ("[" * 100_000, ": not valid JSON"),
        ('{"text": "\\ud800"}', ": not valid Unicode"),
        (["a"], ": not an object (a record has one of 'text' (a string), 'messages' or"),
        ({"text": None}, ": has no text (a record has one of"),
        ({"text": ["a"]}, ": its 'text' is not what it must be (a record has one of"),
        ({"content": "a"}, ": has no text"),
        ({"prompt": "a"}, ": its 'prompt' is not what it must be"),
        ({"messages": []}, ": its 'messages' is not what"),
        ({"messages": "a"}, ": its 'messages' is not what"),
        ({"messages": ["a"]}, ", message 1: has no role"),
        ({"messages": [ONE, {"role": "user"}]}, ", message 2: has no content"),
        ({"messages": [ONE, ONE, ONE | {"content": None}]}, ", message 3: has no content"),
        ({"messages": [ONE | {"content": 5}]}, ", message 1: its content is 5 (text, or a list of parts of text"),
        ({"messages": [ONE | {"content": [IMAGE]}]}, ", message 1: a part of its content is 'image_url' (the model"),
        ({"messages": [ONE | {"tool_calls": "f"}]}, ", message 1: its 'tool_calls' are not a list of objects"),
        ({"conversations": [{"from": "human", "value": None}]}, ", message 1: has no content"),
        ({"conversations": [{"value": "a"}]}, ", message 1: has no role"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', ": not valid Unicode"),
        ({"messages": [ONE], "tools": "f"}, ", tools: not valid JSON"),
        ({"messages": [ONE], "tools": ["f"]}, ": its 'tools' are not a list of objects"),
        ({"text": "a", "messages": [ONE]}, ": has text and messages"),
    ],
)
def test_a_malformed_record_is_named(tmp_path, record: Any, what: str):
    path = tmp_path / "records.jsonl"
    line = record if isinstance(record, str) else json.dumps(record)
    path.write_text(f'{{"text": "good"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(InputError) as error:
        load(str(path), tiny.MINI)
    assert str(error.value).startswith(f"{path}, line 3{what}")
    if not isinstance(record, str):
        path = path.with_suffix(".json")
        path.write_text(json.dumps([{"text": "good"}, record]))
        with pytest.raises(InputError) as error:
            load(str(path), tiny.MINI)
        assert str(error.value).startswith(f"{path}, record 2{what}")


def test_what_the_template_leaves_out_is_told(tmp_path, caplog):
    load(write_lines(tmp_path / "r.jsonl", {"messages": CHAT}, {"text": "a"}), tiny.MINI)
    assert not caplog.messages
    tool = {"messages": [ONE, {"role": "tool", "content": "sunny, 20 degrees"}]}
    records = [{"messages": CHAT}, tool, {"messages": CHAT, "tools": TOOLS}, {"messages": [ONE, ASSISTANT]}]
    load(write_lines(tmp_path / "r.jsonl", *records), tiny.MINI)
    (message,) = caplog.messages
    assert message.startswith(f"warning: {tmp_path}/r.jsonl: the chat template leaves out some of 3 of 4 chats: roles,")
