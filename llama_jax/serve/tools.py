"""Calls of functions: the format in which a model writes them, their conversion to what chat
templates read, and grammars that demand them. :mod:`llama_jax.serve.tool_parser` finds them in
answers."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llama_jax.serve.grammar import json_rule

_USES_TOOLS = re.compile(r"\{[%{][^}]*\btools\b")
_UNSUPPORTED = ("<function=", "<arg_key>", "tool▁call", "<|tool_call>")
"""What templates contain whose models write calls in other formats than JSON."""
_MISTRAL_ID = re.compile("[A-Za-z0-9]{9}")


class ToolFormat(NamedTuple):
    """How a model writes calls."""

    name: str
    """"hermes": ``<tool_call>{...}</tool_call>``, also Qwen's and SmolLM's; "llama": one JSON
    object, perhaps after ``<|python_tag|>``; "mistral": a list after ``[TOOL_CALLS]``; "json": any
    other template that uses ``tools``"""
    begin: str = ""
    """marker before a call"""
    end: str = ""
    """marker after it"""
    arguments: str = "arguments"
    """key of the arguments"""
    is_list: bool = False
    """calls are in a JSON list"""
    separator: str = ""
    """marker between the name and the arguments, which are then the only JSON"""


def tool_format(source: str, name: str = "the chat template") -> ToolFormat:
    """The format of the model that a chat template belongs to.

    Args:
      source: of the template.
      name: of the template, for the message.

    Raises:
      ValueError: the template does not use tools, or its format is not supported.
    """
    if not _USES_TOOLS.search(source):
        raise ValueError(f"{name} does not use tools: this model has not learned to call functions")
    if any(mark in source for mark in _UNSUPPORTED):
        raise ValueError(f"{name} writes calls of functions in a format that is not supported")
    if "<tool_call>" in source:
        is_list = re.search(r"<tool_call>\s*\[", source) is not None
        return ToolFormat("hermes", "<tool_call>", "</tool_call>", is_list=is_list)
    if "[TOOL_CALLS]" in source:
        separator = "[ARGS]" if "[ARGS]" in source else ""
        return ToolFormat("mistral", "[TOOL_CALLS]", is_list=not separator, separator=separator)
    if "<|python_tag|>" in source:
        return ToolFormat("llama", "<|python_tag|>", arguments="parameters")
    has = lambda key: re.search(rf"""["']{key}["']\s*:""", source) is not None
    only_parameters = has("parameters") and not has("arguments")
    return ToolFormat("json", arguments="parameters" if only_parameters else "arguments")


def shown_ids(fmt: ToolFormat, controls: Mapping[str, int]) -> tuple[int, ...]:
    """Control tokens that belong to the format: their names must be part of an answer's text.

    Args:
      fmt: of the model.
      controls: of its tokenizer.
    """
    marks = (fmt.begin, fmt.end, fmt.separator)
    return tuple(controls[mark] for mark in marks if mark in controls)


def template_messages(
    messages: Sequence[Mapping[str, Any]], fmt: ToolFormat | None = None
) -> list[dict[str, Any]]:
    """OpenAI's messages as chat templates read them.

    Arguments of calls become objects; results get the name of their function; ids get the form that
    Mistral's templates demand; an empty list of calls is left out, because templates take it for
    calls.

    Args:
      messages: JSON values; ``arguments`` without text stand for no arguments, others that are not
        JSON text of an object remain as they are.
      fmt: of the model, if it calls functions.
    """
    made, names = [], {}
    for message in messages:
        message = {"content": ""} | {k: v for k, v in message.items() if v is not None}
        calls = []
        for call in message.get("tool_calls") or ():
            function = dict(call["function"])
            names[call.get("id")] = function["name"]
            function["arguments"] = _object_or_text(function.get("arguments"))
            calls.append(call | {"function": function})
        message.pop("tool_calls", None)
        if calls:
            message["tool_calls"] = calls
        if message.get("role") == "tool" and message.get("tool_call_id") in names:
            message.setdefault("name", names[message["tool_call_id"]])
        if fmt is not None and fmt.name == "mistral":
            _shorten_ids(message)
        made.append(message)
    return made


def _object_or_text(arguments: Any) -> Any:
    try:
        value = json.loads(arguments or "{}")
    except (TypeError, ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _shorten_ids(message: dict[str, Any]) -> None:
    short = lambda i: i if _MISTRAL_ID.fullmatch(i) else hashlib.sha256(i.encode()).hexdigest()[:9]
    if isinstance(message.get("tool_call_id"), str):
        message["tool_call_id"] = short(message["tool_call_id"])
    if "tool_calls" in message:
        calls = message["tool_calls"]
        message["tool_calls"] = [
            c | {"id": short(c["id"])} if isinstance(c.get("id"), str) else c for c in calls
        ]


def call_grammar(
    fmt: ToolFormat,
    tools: Sequence[Mapping[str, Any]],
    controls: Mapping[str, int],
    name: str | None = None,
) -> str:
    """Lark source of an answer that is one call.

    Args:
      fmt: of the model.
      tools: OpenAI's descriptions of functions.
      controls: of the tokenizer.
      name: of the function to be called; None for any.

    Raises:
      ValueError: there is no function of this name, or no function at all.
    """
    functions = [tool["function"] for tool in tools]
    if name is not None:
        functions = [f for f in functions if f["name"] == name]
    if not functions:
        raise ValueError(f"there is no function {name!r:.80}" if name else "there are no functions")
    mark = lambda text: f" <[{controls[text]}]> " if text in controls else f" {_quoted(text)} "
    rules, between = [], ""
    if fmt.name == "hermes" and not fmt.is_list:
        between = _quoted("\n")
    before, after = ("[", "]") if fmt.is_list else ("", "")
    begin = mark(fmt.begin) if fmt.begin and fmt.name != "llama" else ""
    for i, function in enumerate(functions):
        schema = {"type": "object"} | (function.get("parameters") or {})
        if fmt.separator:
            call = f"{_quoted(function['name'])}{mark(fmt.separator)}arguments_{i}"
        else:
            head = f'{before}{{"name": {json.dumps(function["name"])}, "{fmt.arguments}": '
            call = f"{_quoted(head)} arguments_{i} {_quoted('}' + after)}"
        rules += [f"call_{i}: {call}", f"arguments_{i}: {json_rule(schema)}"]
    choice = " | ".join(f"call_{i}" for i in range(len(functions)))
    end = f"{between}{mark(fmt.end)}" if fmt.end else ""
    return "\n".join([f"start: {begin}{between} ({choice}) {end}", *rules])


def _quoted(text: str) -> str:
    """A text of ASCII as a string of Lark."""
    return json.dumps(text)
