"""Records of instruction, conversation and preference data as messages; bad records by name."""

import json

import pytest

from llama_jax.data.conversations import FORMATS, Example, detect_format, read_example

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
RECORDS = {
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    },
    "prompt_response": {"prompt": "Hi", "response": "Hello", "source": "laion"},
    "messages": {"messages": [USER, BOT]},
    "preference": {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
}  # fmt: skip


def read(record) -> Example:
    return read_example(record, detect_format(record))


@pytest.mark.parametrize("format", RECORDS)
def test_formats(format):
    assert detect_format(RECORDS[format]) == format
    example = read_example(RECORDS[format], format)
    assert example.messages == [USER, BOT]
    assert example.tools is None
    other = [USER, BOT | {"content": "No"}]
    assert example.rejected == (other if format == "preference" else None)
    assert detect_format({"text": "x"}) == "text"
    assert set(RECORDS) == set(FORMATS) - {"text"}


def test_the_input_of_alpaca():
    """Joined with the instruction by a blank line, and kept beside it."""
    for empty in ({}, {"input": None}, {"input": " \n"}):
        record = {"instruction": "Add.", "output": "3"} | empty
        assert read(record).messages[0] == {"role": "user", "content": "Add."}
    message = read({"instruction": "Add.", "input": "1 2", "output": "3"}).messages[0]
    assert message == {
        "role": "user", "content": "Add.\n\n1 2", "instruction": "Add.", "input": "1 2",
    }  # fmt: skip


def test_variants_of_conversations():
    """Keys of ShareGPT and of OpenAI in either list; roles of both; a system message."""
    system = {"role": "system", "content": "Be brief."}
    talk = [system, USER, BOT]
    for key in ("conversations", "messages"):
        assert read({key: talk}).messages == talk
        mixed = [
            {"from": "system", "value": "Be brief."},
            USER,
            {"from": "chatgpt", "value": "Hello"},
        ]
        assert read({key: mixed}).messages == talk
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert read({"messages": [{"role": "user", "content": parts}, BOT]}).messages == [USER, BOT]
    assert read({"prompt": "Hi", "completion": "Hello", "label": True}).messages == [USER, BOT]
    asked = [USER, BOT, USER]
    in_lists = read({"prompt": asked, "completion": [BOT], "tools": [{"name": "f"}]})
    assert in_lists == Example([USER, BOT | {"weight": 0}, USER, BOT], [{"name": "f"}])


def test_the_rest_of_a_record():
    """A system message beside the conversation, and earlier turns of an Alpaca record."""
    system = {"role": "system", "content": "Be brief."}
    for record in RECORDS.values():
        example, want = read(record | {"system": "Be brief."}), read(record)
        assert example.messages == [system, *want.messages]
        assert example.rejected == (want.rejected and [system, *want.rejected])
    own = {"messages": [system, USER, BOT], "system": "other"}
    assert read(own).messages == own["messages"]
    assert read(RECORDS["messages"] | {"system": None}).messages == [USER, BOT]
    earlier = RECORDS["alpaca"] | {"history": [["Hi", "Hello"]]}
    assert read(earlier).messages == [USER, BOT, USER, BOT]


def test_tools():
    """Calls without text, their arguments as an object, answers of tools."""
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    asks = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "1", "content": "3"}
    example = read({"messages": [USER, asks, result, result, BOT], "tools": tools})
    assert example.tools == tools
    called = call | {"function": {"name": "add", "arguments": {"a": 1}}}
    want = {"role": "assistant", "content": "", "tool_calls": [called]}
    assert example.messages == [USER, want, result, result, BOT]
    del asks["content"]
    assert read({"messages": [USER, asks, result, BOT]}).messages[1] == want
    flat = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    assert read({"messages": [USER, flat]}).messages[1]["tool_calls"] == [
        {k: v for k, v in called.items() if k != "id"}
    ]


def test_calls_as_json_text():
    """LLaMA-Factory's ShareGPT files have one call, or a list of them, in a message of its own."""
    call = {"name": "add", "arguments": {"a": 1}}
    want = {"type": "function", "function": call}
    for value, count in ((call, 1), ([call, call], 2), (call | {"arguments": '{"a": 1}'}, 1)):
        talk = [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": json.dumps(value)},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "Hello"},
        ]
        called = {"role": "assistant", "content": "", "tool_calls": [want] * count}
        result = {"role": "tool", "content": "3"}
        assert read({"conversations": talk, "tools": "[]"}).messages == [USER, called, result, BOT]


def test_an_empty_list_of_calls_is_left_out():
    """Templates ask whether the key is there: Llama 3.1's then wants one call."""
    for empty in ([], None):
        answer = BOT | {"tool_calls": empty}
        assert read({"messages": [USER, answer]}).messages == [USER, BOT]


def test_answers_before_the_pair_do_not_count():
    """Answers that both sides begin with are part of the prompt, as in TRL."""
    first, no = BOT | {"weight": 0}, BOT | {"content": "No"}
    want = Example([USER, first, USER, BOT], None, [USER, first, USER, no])
    for record in (
        {"chosen": [USER, BOT, USER, BOT], "rejected": [USER, BOT, USER, no]},
        {"prompt": [USER, BOT, USER], "chosen": [BOT], "rejected": [no]},
        {"instruction": "Hi", "history": [["Hi", "Hello"]], "chosen": "Hello", "rejected": "No"},
    ):
        assert read(record) == want
    same = read({"chosen": [USER, BOT], "rejected": [USER, BOT]})
    assert same == Example([USER, BOT], None, [USER, BOT])
    # Answers that follow different ones count.
    other = read({"chosen": [USER, BOT, USER, BOT], "rejected": [USER, no, USER, BOT]})
    assert other == Example([USER, BOT, USER, BOT], None, [USER, no, USER, BOT])


def test_preference_pairs():
    no = BOT | {"content": "No"}
    value = lambda m: {"from": "gpt", "value": m["content"]}
    asked = [{"from": "human", "value": "Hi"}]
    for record in (
        {"prompt": "Hi", "chosen": [USER, BOT], "rejected": [USER, no], "messages": [USER, BOT]},
        {"chosen": [USER, BOT], "rejected": [USER, no], "score_chosen": 1.0},
        {"prompt": [USER], "chosen": [BOT], "rejected": [no]},
        {"conversations": asked, "chosen": value(BOT), "rejected": value(no)},
        {"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "No"},
    ):
        assert detect_format(record) == "preference"
        assert read(record) == Example([USER, BOT], None, [USER, no])


BAD = [
    ({"question": "Hi", "solution": "x" * 300}, r'unknown format.*"question": "Hi".*\.\.\.; known.*'
     "alpaca.*sharegpt.*prompt_response.*messages.*preference"),
    ([1], r"unknown format: the record is \[1\]"),
    ({"prompt": "Hi", "completion": "No", "label": False}, "'label' is false, which marks a bad"),
    ({"prompt": [USER], "completion": "No"}, "'completion' must be a list of messages, not"),
    ({"messages": [USER]}, "the conversation has no answer"),
    ({"messages": []}, "'messages' must be a list of messages, not"),
    ({"messages": "Hi"}, "'messages' must be a list of messages, not"),
    ({"messages": None}, "must have .*'messages' is missing"),
    ({"messages": [USER, USER, BOT]}, "message 2 is from 'user', but after 'user' must"),
    ({"messages": [USER, BOT, BOT]}, "message 3 is from 'assistant', but after 'assistant' must"),
    ({"messages": [BOT, USER, BOT]}, "message 1 is from 'assistant', but at the start must come"),
    ({"messages": [USER, BOT | {"content": " \n"}]}, "the answer in message 2 is empty"),
    ({"messages": [USER, {"role": "boss", "content": "x"}]},
     "message 2 of 'messages' has the unknown role 'boss'; known: .*assistant"),
    ({"messages": [USER, {"role": ["a"], "content": "x"}]}, "unknown role"),
    ({"messages": [USER, 5]}, "message 2 of 'messages' must be an object, not 5"),
    ({"messages": [USER, {"role": "assistant"}]}, "must have 'role' and 'content', or 'from' and"),
    ({"messages": [USER, BOT | {"content": 5}]}, "content of message 2 .* must be a string or"),
    ({"messages": [USER, BOT | {"content": None}]}, "a string or a list of objects, not null"),
    ({"messages": [USER | {"content": [{"type": "image_url"}]}, BOT]}, "a part that is not text"),
    ({"messages": [USER, BOT | {"tool_calls": [{"id": 1}]}]}, "without a function's name"),
    ({"messages": [USER, BOT | {"tool_calls": [{"name": "f", "arguments": "{"}]}]}, "not JSON"),
    ({"messages": [USER, {"role": "function_call", "content": "add"}]}, "calls of .* as JSON"),
    ({"messages": [USER, {"role": "function_call", "content": "[]"}]}, "message 2 is empty"),
    ({"messages": [USER, BOT], "images": ["a.jpg"]}, "the record has 'images', and only text"),
    ({"messages": [USER, BOT], "tools": "["}, "'tools' is not JSON"),
    ({"messages": [USER, BOT], "tools": {"a": 1}}, "'tools' must be a list of objects"),
    ({"instruction": "Hi", "output": " "}, "the answer in message 2 is empty"),
    ({"instruction": "Hi", "output": 5}, "'output' must be a string, not 5"),
    ({"instruction": "Hi", "output": "x", "history": [["a"]]}, "'history' must be a list of pairs"),
    ({"instruction": "Hi", "output": "x", "history": [["a", " "]]}, "answer in message 2 is empty"),
    ({"instruction": "Hi", "output": "x", "system": 5}, "'system' must be a string, not 5"),
    ({"instruction": 5, "output": "x"}, "'instruction' must be a string, not 5"),
    ({"instruction": "Hi", "output": None}, "'output' is missing"),
    ({"prompt": "Hi", "response": "\ud800"}, "not valid Unicode"),
    ({"prompt": "Hi", "chosen": "a", "rejected": ""}, "'rejected': the answer .* is empty"),
    ({"chosen": "a", "rejected": "b"}, "'chosen': .*must come .*; the record has no 'prompt'"),
    ({"chosen": [USER, BOT], "rejected": [USER | {"content": "x"}, BOT]}, "the same prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "message"), BAD)
def test_bad_records(record, message):
    with pytest.raises(ValueError, match=message) as error:
        read(record)
    assert "\n" not in str(error.value)
    str(error.value).encode()


def test_another_format_than_named():
    with pytest.raises(ValueError, match=r"format alpaca must have .*'instruction' is missing in"):
        read_example(RECORDS["messages"], "alpaca")
    for format in ("text", "odd"):
        with pytest.raises(ValueError, match=f"format '{format}' has no conversations; known"):
            read_example(RECORDS["messages"], format)
    with pytest.raises(ValueError, match="a record must be a JSON object, not 5"):
        read_example(5, "alpaca")
