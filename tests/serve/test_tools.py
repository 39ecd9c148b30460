"""Calls of functions in the formats of several model families: templates, answers, grammars."""

import json
import time

import numpy as np
import pytest
import tiktoken_tools

from llama_jax.data import tiktoken_text
from llama_jax.data.chat_template import ChatTemplate
from llama_jax.data.tokenizer import JsonTokenizer, Tokenizer
from llama_jax.generate.detokenize import OutputSequence, ShowControls
from llama_jax.serve.tool_parser import Call, CallParser
from llama_jax.serve.tools import (
    ToolFormat,
    call_grammar,
    shown_ids,
    template_messages,
    tool_format,
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Paris", "Köln"]}},
        },
    },
}
TIME = {"type": "function", "function": {"name": "time.now", "parameters": {}}}
TOOLS = [WEATHER, TIME]
NAMES = ["get_weather", "time.now"]

# Short templates in the formats of published ones.
HERMES = """
{%- if tools %}<|im_start|>system
You may call functions, described in <tools></tools>:
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
Answer with <tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif -%}
{%- for message in messages %}<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}
{% if message.role == 'tool' %}<tool_response>
{{ message.name }}: {{ message.content }}
</tool_response>{% else %}{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SMOL = """{% if tools %}You have tools: {{ tools | tojson }}. Answer as
<tool_call>[
{"name": "func_name1", "arguments": {"argument1": "value1"}},
]</tool_call>{% endif %}{% for m in messages %}{{ m.content }}
{% endfor %}"""
LLAMA = """{{ '<|begin_of_text|>' }}{% for message in messages %}
{%- if 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}
{{- raise_exception('This model only supports single tool-calls at once!') }}{% endif %}
{%- set call = message.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>

{% if call.name in ('brave_search',) %}<|python_tag|>{{ call.name }}.call(){% else -%}
{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}{% endif %}<|eot_id|>
{%- elif message.role in ('tool', 'ipython') %}<|start_header_id|>ipython<|end_header_id|>

{{ message.content | tojson }}<|eot_id|>
{%- else %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{% if loop.last and tools %}Respond in the format {"name": function name, "parameters": \
dictionary of argument name and its value}.
{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}{{ message.content }}<|eot_id|>
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}{% if tools and loop.last %}[AVAILABLE_TOOLS] \
{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ message.content }}[/INST]
{%- elif message.tool_calls %}[TOOL_CALLS] [{% for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}
{{- call.function | tojson }}{% endfor %}]{{ eos_token }}
{%- elif message.role == 'tool' %}{% if message.tool_call_id | length != 9 %}
{{- raise_exception('ids have 9 characters') }}{% endif %}[TOOL_RESULTS] {"content": \
{{ message.content }}, "call_id": "{{ message.tool_call_id }}"}[/TOOL_RESULTS]
{%- else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"""
MISTRAL_NEW = MISTRAL.replace("[TOOL_CALLS] [", "[TOOL_CALLS]get_weather[ARGS]{}")
PLAIN = """{% if tools %}{{ tools | tojson }} Answer with {"name": ..., "arguments": ...}{% endif %}
{%- for m in messages %}{{ m.content }}{% endfor %}"""

FORMATS = {
    "hermes": (HERMES, ToolFormat("hermes", "<tool_call>", "</tool_call>")),
    "smol": (SMOL, ToolFormat("hermes", "<tool_call>", "</tool_call>", is_list=True)),
    "llama": (LLAMA, ToolFormat("llama", "<|python_tag|>", arguments="parameters")),
    "mistral": (MISTRAL, ToolFormat("mistral", "[TOOL_CALLS]", is_list=True)),
    "mistral_new": (MISTRAL_NEW, ToolFormat("mistral", "[TOOL_CALLS]", separator="[ARGS]")),
    "json": (PLAIN, ToolFormat("json")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_of_a_template(name):
    source, fmt = FORMATS[name]
    assert tool_format(source) == fmt


def test_templates_without_tools():
    plain = "{% for m in messages %}{{ m.content }} tools {% endfor %}"
    with pytest.raises(ValueError, match="the template of X does not use tools"):
        tool_format(plain, "the template of X")
    with pytest.raises(ValueError, match="format that is not supported"):
        tool_format("{% if tools %}<tool_call>\n<function=f>{% endif %}")


PARIS, KOLN = (("get_weather", f'{{"city": "{city}"}}') for city in ("Paris", "Köln"))
NOW = ("time.now", "{}")
W = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
T = '{"name": "time.now", "arguments": {}}'
K = '{"arguments": {"city": "K\\u00f6ln"}, "name": "get_weather"}'


def now(arguments):
    """A call in Hermes' format."""
    return f'<tool_call>{{"name": "time.now", "arguments": {arguments}}}</tool_call>'


ANSWERS = [  # format, answer, text (None: the answer), calls
    ("hermes", f"<tool_call>\n{W}\n</tool_call>", "", [PARIS]),
    ("hermes", f"I look. <tool_call>{T}</tool_call>", "I look. ", [NOW]),
    ("hermes", f"<tool_call>{T}</tool_call>\n<tool_call>\n{K}</tool_call>\n", "", [NOW, KOLN]),
    ("hermes", '<tool_call>{"name": "time.now"}</tool_call> Then.', "Then.", [NOW]),
    ("hermes", "a < b, <tool_calls> and <tool_call", None, []),
    ("hermes", now('{"a": "}</tool_call>\\""}'), "", [("time.now", '{"a": "}</tool_call>\\""}')]),
    ("hermes", now('{"a": -1e999}'), "", [("time.now", '{"a": -1.7976931348623157e+308}')]),
    ("hermes", now('"{\\"a\\": 1}"'), "", [("time.now", '{"a": 1}')]),
    ("hermes", now('{"a": "\\ud83d"}'), "", [("time.now", '{"a": "\\ud83d"}')]),
    ("hermes", now("[1]") + " x", None, []),
    ("hermes", now('{"a": NaN}'), None, []),
    ("hermes", now('{"a" 1}'), None, []),
    ("hermes", now("{}").replace("time", "space"), None, []),
    ("hermes", now("{}").replace('"time.now"', '["time.now"]'), None, []),
    ("hermes", now('{"a": 1}')[:-15], None, []),
    ("hermes", now("{}")[:-12], "", [NOW]),  # ended by its length
    ("hermes", now("{}")[:-2], "", [NOW]),
    ("hermes", now("{}")[:-12] + " and more", None, []),
    ("hermes", f"<tool_call>oh {now('{}')}", "<tool_call>oh ", [NOW]),
    ("hermes", T, None, []),
    ("hermes", "<tool_call>" + "[" * 5000 + "]" * 5000 + "</tool_call>", None, []),
    ("hermes", "<tool_call>" + "x" * 300 + f"{T}</tool_call>", None, []),
    ("smol", f"<tool_call>[{T}, {W}]</tool_call>", "", [NOW, PARIS]),
    ("smol", "<tool_call>[]</tool_call>", None, []),
    ("llama", W.replace("arguments", "parameters"), "", [PARIS]),
    ("llama", ' \n{"type": "function", "name": "time.now", "parameters": {}}', "", [NOW]),
    ("llama", f"{T}; {W}", "", [NOW, PARIS]),
    ("llama", f"<|python_tag|>{T}", "", [NOW]),
    ("llama", '<|python_tag|>time.now.call(a="b")', None, []),
    ("llama", '{"answer": 42}', None, []),
    ("llama", f'{{"answer": 42}} and {T}', None, []),
    ("llama", f"Sure: {T}", None, []),
    ("llama", "A text.", None, []),
    ("llama", "  ", None, []),
    ("mistral", f"[TOOL_CALLS] [{W}]", "", [PARIS]),
    ("mistral", f"[TOOL_CALLS][{T}, {T}]", "", [NOW, NOW]),
    ("mistral", f"[{T}]", "", [NOW]),
    ("mistral", "[TOOL", None, []),
    ("mistral", "[1] is a citation", None, []),
    ("mistral", f"[TOOL_CALLS] [{T}, 3]", None, []),
    ("mistral_new", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', "", [PARIS]),
    ("mistral_new", "[TOOL_CALLS]time.now[ARGS]{}[TOOL_CALLS]time.now[ARGS]{}", "", [NOW, NOW]),
    ("mistral_new", "[TOOL_CALLS]time.now[CALL_ID]abc123[ARGS]{}", "", [NOW]),
    ("mistral_new", "Text[TOOL_CALLS]time.now{}", "Text", [NOW]),
    ("json", '[{"function": {"name": "time.now", "arguments": "{}"}}]', "", [NOW]),
    ("json", f'{T}\n{{"name": "time.now", "parameters": {{}}}}', "", [NOW, NOW]),
    ("json", "no call", None, []),
]


def parse(fmt, pieces):
    """Text and calls of an answer that comes in pieces."""
    parser = CallParser(fmt, NAMES)
    found = [x for piece in pieces for x in parser.push(piece)] + parser.finish()
    calls = [x for x in found if isinstance(x, Call)]
    assert len({c.id for c in calls}) == len(calls)
    if fmt.name == "mistral":
        assert all(len(c.id) == 9 and c.id.isalnum() for c in calls)
    text = "".join(x for x in found if isinstance(x, str))
    return text, [(c.name, c.arguments) for c in calls]


@pytest.mark.parametrize(("name", "answer", "text", "calls"), ANSWERS)
def test_answers(name, answer, text, calls):
    """The same whole, one character at a time, and cut at random."""
    fmt = FORMATS[name][1]
    expected = (answer if text is None else text, calls)
    assert parse(fmt, [answer]) == expected
    assert parse(fmt, answer) == expected
    rng = np.random.default_rng(0)
    for _ in range(20):
        cuts = sorted(rng.integers(0, len(answer) + 1, 3))
        pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
        assert parse(fmt, pieces) == expected


def test_pieces_of_any_text_give_the_same():
    """Texts of random fragments, whole and by character; without calls, no text is lost."""
    marks = '<tool_call> </tool_call> [TOOL_CALLS] <|python_tag|> [ARGS] <tool ; { } [ ] " \\ ,'
    fragments = [*marks.split(), "time.now", "\n", " ", T, f"[{T}]", "x", "_" * 250]
    rng = np.random.default_rng(1)
    with_calls = 0
    for _ in range(1500):
        fmt = FORMATS[str(rng.choice(list(FORMATS)))][1]
        answer = "".join(rng.choice(fragments, rng.integers(1, 8)))
        whole = parse(fmt, [answer])
        assert parse(fmt, answer) == whole, (fmt, answer)
        with_calls += bool(whole[1])
        assert whole[1] or whole[0] == answer
    assert with_calls > 100


def test_text_is_not_held_back_longer_than_needed():
    parser = CallParser(FORMATS["hermes"][1], NAMES)
    shown = [parser.push(c) for c in "Hi <b> <tool_x"]
    assert "".join(x for found in shown[:3] for x in found) == "Hi "
    assert "".join(x for found in shown for x in found) == "Hi <b> <tool_x"
    parser = CallParser(FORMATS["llama"][1], NAMES)
    assert parser.push("Hello") == ["Hello"]
    assert parser.push(' {"name"') == [' {"name"']


def test_long_arguments_take_linear_time():
    parser = CallParser(FORMATS["hermes"][1], NAMES)
    head = '<tool_call>{"name": "time.now", "arguments": {"a": "'
    for piece in [head, *["xy" * 10] * 20_000]:
        assert parser.push(piece) == []
    (call,) = parser.push('"}}</tool_call>')
    assert len(call.arguments) == 400_000 + len('{"a": ""}')


def test_many_beginnings_of_calls_take_linear_time():
    start = time.process_time()
    for answer in ("<tool_call>{" * 3000, "<tool_call>{" * 3000 + "}" * 3000):
        assert parse(FORMATS["hermes"][1], [answer]) == (answer, [])
    assert time.process_time() - start < 2


CALLED = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_0123456789",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_0123456789", "content": "12 °C"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tiktoken_tools.content())
    return Tokenizer.load(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hermes", [f"<tool_call>\n{W}\n</tool_call>", "get_weather: 12 °C"]),
        ("llama", [W.replace("arguments", "parameters"), "12 °C"]),
        ("mistral", [f"[TOOL_CALLS] [{W}]", '"call_id"']),
    ],
)
def test_messages_with_calls_through_templates(name, words, tokenizer):
    source, fmt = FORMATS[name]
    messages = template_messages(CALLED, fmt)
    text = ChatTemplate(source).text(messages, tokenizer)
    for word in words:
        assert word in text
    assert CALLED[1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Paris"}'  # unchanged


def test_conversion_of_messages():
    messages = template_messages(CALLED)
    assert messages[1]["content"] == ""
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert messages[2]["name"] == "get_weather"
    assert messages[2]["tool_call_id"] == "call_0123456789"
    short = template_messages(CALLED, FORMATS["mistral"][1])
    assert len(short[2]["tool_call_id"]) == 9
    assert short[2]["tool_call_id"] == short[1]["tool_calls"][0]["id"]
    for arguments in ("", "{", "[1]", "3", "[" * 9999):
        call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
        made = template_messages([{"role": "assistant", "tool_calls": [call]}])
        # Some clients write no arguments as an empty text, which is not JSON.
        assert made[0]["tool_calls"][0]["function"]["arguments"] == (arguments or {})


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_an_empty_list_of_calls_is_an_answer_without_calls(name, tokenizer):
    """Templates ask whether the key is there: Llama's refuses such a message."""
    source, fmt = FORMATS[name]
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    sent = [talk[0], talk[1] | {"tool_calls": []}, talk[0]]
    text = ChatTemplate(source).text(template_messages(sent, fmt), tokenizer)
    assert text == ChatTemplate(source).text([*talk, talk[0]], tokenizer)
    assert "Hello" in text


def test_control_tokens_of_a_format_are_shown(tokenizer):
    fmt = FORMATS["llama"][1]
    (tag,) = shown_ids(fmt, tokenizer.controls)
    assert tokenizer.mark(tag) == "<|python_tag|>"
    assert shown_ids(FORMATS["hermes"][1], tokenizer.controls) == ()
    ids = [tag, *tokenizer.encode('{"a": "é"}'), tokenizer.controls["<|eom_id|>"]]
    assert ShowControls(tokenizer, [tag]).decode(ids) == '<|python_tag|>{"a": "é"}'
    sequence, text = (
        OutputSequence(ShowControls(tokenizer, [tag]), tokenizer.encode("x"), ["}"]),
        "",
    )
    for i in ids:
        sequence.append([i], [0.0], (), 99)
        assert sequence.stable_text().startswith(text)
        text = sequence.stable_text()
    assert text == '<|python_tag|>{"a": "é"'


@pytest.fixture(scope="module")
def with_marks(tokenizer):
    """The same tokenizer, in which the marks of calls are control tokens."""
    tree = json.dumps(tiktoken_text.to_json(tiktoken_tools.ranks(), newer=True))
    for i, mark in enumerate(("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]")):
        tree = tree.replace(f"<|reserved_special_token_{i}|>", mark)
    return JsonTokenizer(tree, tokenizer.path)


@pytest.mark.parametrize("kind", ["tokenizer", "with_marks"])
@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls(name, kind, request):
    """Random tokens that the grammar allows are read as one call with valid arguments."""
    pytest.importorskip("llguidance", reason="needs the extra serve")
    from llama_jax.serve.grammar import GrammarFactory

    fmt, tokenizer = FORMATS[name][1], request.getfixturevalue(kind)
    controls = tokenizer.controls
    factory = GrammarFactory(tokenizer, [tokenizer.eos_id], tokenizer.vocab_size)
    decoder = ShowControls(tokenizer, shown_ids(fmt, controls))
    rng = np.random.default_rng(0)
    mask_W = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
    for wanted in ("get_weather", "get_weather", None, None, None):
        grammar, ids = factory.lark(call_grammar(fmt, TOOLS, controls, wanted)), []
        while not grammar.complete and len(ids) < 2000:
            grammar.fill(mask_W)
            allowed = np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little"))
            ids.append(int(rng.choice(allowed)))
            grammar.accept(ids[-1])
        if not grammar.complete:  # random text may be long
            assert wanted is None
            continue
        if kind == "with_marks" and fmt.begin and name != "llama":
            assert ids[0] == controls[fmt.begin]
        text, ((called, arguments),) = parse(fmt, [decoder.decode(ids)])
        assert text == ""
        assert called == (wanted or called)
        if called == "get_weather":
            assert json.loads(arguments) in ({"city": "Paris"}, {"city": "Köln"})
    with pytest.raises(ValueError, match="there is no function 'other'"):
        call_grammar(fmt, TOOLS, controls, "other")
    with pytest.raises(ValueError, match="there are no functions"):
        call_grammar(fmt, [], controls)
