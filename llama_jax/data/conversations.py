"""Records of instruction, conversation and preference data as lists of chat messages.

A message is a dict with "role" and "content" as in OpenAI's format. What a record must have is
checked here, so a template gets only conversations that a model can learn from.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from llama_jax.config.loading import strings_of
from llama_jax.data.tokenizer import check_text

FORMATS = {
    "text": '{"text"}',
    "alpaca": '{"instruction", "input", "output"}',
    "sharegpt": '{"conversations": [{"from", "value"}, ...]}',
    "prompt_response": '{"prompt", "response"}',
    "messages": '{"messages": [{"role", "content"}, ...]}',
    "preference": '{"prompt", "chosen", "rejected"}',
}
"""The formats of records by name, with their keys."""
_ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant",
    "system": "system", "developer": "developer",
    "tool": "tool", "observation": "tool", "function_call": "assistant",
}  # fmt: skip
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Fields of records whose messages refer to them, as "<image>"."""
# Which roles may follow a role; None stands for the start of the conversation.
_AFTER = {
    None: ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}


class Example(NamedTuple):
    """A conversation with its answers."""

    messages: list[dict[str, Any]]
    """From the first message to the last. A user message of an Alpaca record with an input also has
    the keys "instruction" and "input", for the template ``alpaca``."""
    tools: list[dict[str, Any]] | None = None
    """Descriptions of the functions that the model may call."""
    rejected: list[dict[str, Any]] | None = None
    """The same conversation with the worse answer, for a preference pair."""


def detect_format(record: Any) -> str:
    """The format of a record by its keys.

    Raises:
      ValueError: none of :data:`FORMATS`; shows the start of the record.
    """
    keys = record.keys() if isinstance(record, dict) else ()
    if "chosen" in keys and "rejected" in keys:
        return "preference"
    if "conversations" in keys:
        return "sharegpt"
    if "messages" in keys:
        return "messages"
    if "instruction" in keys and "output" in keys:
        return "alpaca"
    if "prompt" in keys and ("response" in keys or "completion" in keys):
        return "prompt_response"
    if "text" in keys:
        return "text"
    known = "; ".join(f"{name} {form}" for name, form in FORMATS.items())
    raise ValueError(f"unknown format: the record is {_start(record)}; known formats: {known}")


def read_example(record: Any, format: str) -> Example:
    """The conversation of a record.

    Args:
      record: a JSON object.
      format: a name of :data:`FORMATS` except "text".

    Raises:
      ValueError: keys are missing or have other types, roles are unknown or out of order, there is
        no answer, an answer is empty, or a text is not valid Unicode.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object, not {_start(record)}")
    if format not in _READERS:
        raise ValueError(
            f"format {format!r} has no conversations; known formats: {', '.join(_READERS)}"
        )
    for text in strings_of(record):
        check_text("a text of the record", text)
    if media := next((key for key in _MEDIA if record.get(key)), None):
        raise ValueError(f"the record has {media!r}, and only text is read")
    example = _READERS[format](record)
    system = {"role": "system", "content": _text(record, "system")}
    if not system["content"] or example.messages[0]["role"] != "user":
        return example
    rejected = example.rejected and [system, *example.rejected]
    return Example([system, *example.messages], example.tools, rejected)


def _alpaca(record: dict[str, Any]) -> Example:
    _need(record, "alpaca", "instruction", "output")
    answer = _answer(record["output"], "'output'")
    return Example(_checked([*_history(record), _instruction(record), answer]))


def _history(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Earlier turns of an Alpaca record, given as pairs of texts."""
    history = record.get("history") or []
    if not isinstance(history, list) or not all(map(_is_pair, history)):
        raise ValueError(f"'history' must be a list of pairs of texts, not {_start(history)}")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(roles, pair, strict=True)
    ]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(x, str) for x in value)


def _instruction(record: dict[str, Any]) -> dict[str, Any]:
    instruction, more = _text(record, "instruction"), _text(record, "input")
    if not more.strip():
        return {"role": "user", "content": instruction}
    joined = f"{instruction}\n\n{more}"
    return {"role": "user", "content": joined, "instruction": instruction, "input": more}


def _prompt_response(record: dict[str, Any]) -> Example:
    key = "response" if "response" in record else "completion"
    _need(record, "prompt_response", "prompt", key)
    if record.get("label") is False:
        raise ValueError("'label' is false, which marks a bad answer: leave such records out")
    if not isinstance(record["prompt"], list):
        prompt = {"role": "user", "content": _text(record, "prompt")}
        return Example(_checked([prompt, _answer(record[key], f"'{key}'")]))
    # TRL's form: lists of messages, of which those of the answer count.
    before = _messages_of(record, "prompt")
    before = [m | {"weight": 0} if m["role"] == "assistant" else m for m in before]
    return Example(_checked([*before, *_messages_of(record, key)]), _tools(record))


def _sharegpt(record: dict[str, Any]) -> Example:
    _need(record, "sharegpt", "conversations")
    return Example(_checked(_messages_of(record, "conversations")), _tools(record))


def _messages(record: dict[str, Any]) -> Example:
    _need(record, "messages", "messages")
    return Example(_checked(_messages_of(record, "messages")), _tools(record))


def _preference(record: dict[str, Any]) -> Example:
    _need(record, "preference", "chosen", "rejected")
    prompt = _prompt_of(record)
    pair = []
    for key in ("chosen", "rejected"):
        answer = record[key]
        if isinstance(answer, list):  # a whole conversation, or what follows the prompt
            messages = _messages_of(record, key)
            if messages[0].get("role") == "assistant":
                messages = prompt + messages
        elif isinstance(answer, dict):
            messages = [*prompt, _message(answer, f"'{key}'")]
        else:
            messages = [*prompt, _answer(answer, f"'{key}'")]
        try:
            pair.append(_checked(messages))
        except ValueError as e:
            missing = "" if prompt else "; the record has no 'prompt'"
            raise ValueError(f"'{key}': {e}{missing}") from None
    chosen, rejected = pair
    count = 1 + [m["role"] for m in chosen].index("assistant")
    if chosen[: count - 1] != rejected[: count - 1]:
        raise ValueError("'chosen' and 'rejected' must answer the same prompt; theirs differ")
    chosen, rejected = _without_shared(chosen, rejected), _without_shared(rejected, chosen)
    return Example(chosen, _tools(record), rejected)


def _without_shared(
    messages: list[dict[str, Any]], others: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The messages, where answers that both sides of a pair begin with do not count: they are part
    of the prompt. The last answer always counts."""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    pairs = zip(messages[: answers[-1]], others, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return [m | {"weight": 0} if i in answers and i < shared else m for i, m in enumerate(messages)]


def _prompt_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages before the two answers; none if the answers are whole conversations."""
    for key in ("prompt", "conversations", "messages"):
        if isinstance(record.get(key), list):
            return _messages_of(record, key)
        if isinstance(record.get(key), str):
            return [{"role": "user", "content": record[key]}]
    return [*_history(record), _instruction(record)] if "instruction" in record else []


_READERS: dict[str, Callable[[dict[str, Any]], Example]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "prompt_response": _prompt_response,
    "messages": _messages,
    "preference": _preference,
}


def _messages_of(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    messages = record[key]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'{key}' must be a list of messages, not {_start(messages)}")
    return [_message(m, f"message {i} of '{key}'") for i, m in enumerate(messages, 1)]


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message in OpenAI's format, from that or from ShareGPT's keys."""
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be an object, not {_start(message)}")
    names = [
        next((k for k in pair if k in message), None)
        for pair in (("role", "from"), ("content", "value"))
    ]
    role_key, content_key = names
    calls = message.get("tool_calls")
    if role_key is None or (content_key is None and not calls):
        raise ValueError(
            f"{where} must have 'role' and 'content', or 'from' and 'value'; it is "
            f"{_start(message)}"
        )
    role = message[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"{where} has the unknown role {role!r:.60}; known: {', '.join(_ROLES)}")
    more = {k: v for k, v in message.items() if k not in (*names, "tool_calls") and v is not None}
    if calls:  # not an empty list: templates ask whether the key is there
        more["tool_calls"] = [_call(c, where) for c in _list(calls, f"'tool_calls' of {where}")]
    content = message.get(content_key) if content_key else None
    if role == "function_call":  # before an "observation": calls as JSON text
        return {"role": "assistant", "content": "", "tool_calls": _calls_of(content, where), **more}
    if content is None and calls and _ROLES[role] == "assistant":
        return {"role": "assistant", "content": "", **more}
    return {"role": _ROLES[role], "content": _content(content, where), **more}


def _content(content: Any, where: str) -> str:
    """Text, or the text of OpenAI's list of parts."""
    if isinstance(content, str):
        return content
    for part in _list(content, f"the content of {where}", "a string or "):
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where} has a part that is not text: {_start(part)}")
    return "".join(part["text"] for part in content)


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A call of a function whose arguments are an object, as templates read them."""
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} has a tool call without a function's name: {_start(call)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI's format: JSON text
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise ValueError(
                f"{where} has a tool call whose arguments are not JSON: {arguments!r:.60}"
            ) from None
    outer = call if "function" in call else {}
    return {"type": "function", **outer, "function": {**function, "arguments": arguments}}


def _calls_of(text: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a message that consists of one call, or a list of them, as JSON."""
    try:
        calls = json.loads(_content(text, where))
    except ValueError:
        raise ValueError(
            f"{where} must be calls of functions as JSON, not {_start(text)}"
        ) from None
    calls = calls if isinstance(calls, list) else [calls]
    return [_call(call, where) for call in _list(calls, f"the JSON of {where}")]


def _tools(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except ValueError:
            raise ValueError(f"'tools' is not JSON: {tools!r:.60}") from None
    return _list(tools, "'tools'") if tools else None


def _answer(text: Any, name: str) -> dict[str, Any]:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, not {_start(text)}")
    return {"role": "assistant", "content": text}


def _text(record: dict[str, Any], key: str) -> str:
    """A text of the record; "" if it is missing or null."""
    text = record.get(key)
    if not isinstance(text, str | None):
        raise ValueError(f"{key!r} must be a string, not {_start(text)}")
    return text or ""


def _list(value: Any, name: str, also: str = "") -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise ValueError(f"{name} must be {also}a list of objects, not {_start(value)}")
    return value


def _need(record: dict[str, Any], format: str, *keys: str) -> None:
    missing = [key for key in keys if record.get(key) is None]
    if missing:
        raise ValueError(
            f"a record of format {format} must have {FORMATS[format]}; {missing[0]!r} is missing "
            f"in {_start(record)}"
        )


def _checked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, if their roles are in order and no answer is empty."""
    last = None
    for i, message in enumerate(messages, 1):
        role = message["role"]
        if role not in _AFTER[last]:
            place = "at the start" if last is None else f"after {last!r}"
            expected = " or ".join(map(repr, _AFTER[last]))
            raise ValueError(
                f"roles are out of order: message {i} is from {role!r}, but {place} must come "
                f"{expected}"
            )
        if role == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise ValueError(f"the answer in message {i} is empty")
        last = role
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("the conversation has no answer: no message is from 'assistant'")
    return messages


def _start(value: Any) -> str:
    """The start of a value as JSON, for messages."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= 200 else text[:200] + " ..."
