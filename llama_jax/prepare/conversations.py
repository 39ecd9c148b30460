"""Conversation records to documents: the format of a source, and its examples."""

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_jax.data.conversations import Example, detect_format, read_example
from llama_jax.prepare.python_library import Instruction
from llama_jax.prepare.records import (
    JSON,
    BadLine,
    Document,
    Record,
    key_of,
    read_json,
    read_parquet,
)

log = logging.getLogger(__name__)

_TRIED_RECORDS = 100
"""Records at the start of a file that may be bad, with skip_bad_lines."""


def read_records(file: Path) -> Iterator[Record | BadLine]:
    """The records of a .json, .jsonl or .parquet file."""
    if file.suffix.lower() != ".parquet":
        return read_json(file)
    return (Record(where, _json_fields(row)) for where, row in read_parquet(file))


def _json_fields(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a parquet file as JSON values.

    All structs of a column have the same fields, and those that a message, call or tool does not
    have are null: they are left out. A template would write them. Dates and numbers that JSON does
    not have become text.
    """
    return {key: _json_value(value) for key, value in row.items()}


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _json_value(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_json_value(v) for v in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def format_of(file: Path, skip_bad_lines: bool) -> str:
    """The format of a file, by its first record.

    A record with a text is text, also if it has the fields of a conversation.

    Args:
      file: .json, .jsonl or .parquet.
      skip_bad_lines: look at some more records if the first one cannot be used.

    Returns:
      "text" or a format of conversations.

    Raises:
      ValueError: the first record is neither; shows it and names the known formats.
    """
    for record in itertools.islice(read_records(file), _TRIED_RECORDS if skip_bad_lines else 1):
        if isinstance(record, BadLine):
            problem = record.message
            if file.name.lower().endswith(JSON):
                problem += "; a .json file must be an array of records, or have one record a line"
        elif record.value == []:
            problem = f"{file} is an empty array; give one with records"
        elif not isinstance(record.value, dict):
            if skip_bad_lines:
                continue
            return "text"  # whose reader names the problem
        elif isinstance(record.value.get("text"), str):
            _warn_of_conversation(record)
            return "text"
        else:
            try:
                return detect_format(record.value)
            except ValueError as e:
                kind = "column" if file.suffix.lower() == ".parquet" else "field"
                fields = ", ".join(list(record.value)[:8])
                problem = f'{record.where} has no "text" {kind}, only {fields}: {e}'
        if not skip_bad_lines:
            raise ValueError(problem)
    return "text"


def _warn_of_conversation(record: Record) -> None:
    if (format := detect_format(record.value)) != "text":
        log.warning(
            f'{record.where} has the field "text" and those of the format {format!r}: it is read '
            f"as text; to read it as a conversation, name the format: {format}"
        )


def read_conversations(file: Path, format: str) -> Iterator[Document | BadLine]:
    """The conversations of a file.

    Args:
      file: .json, .jsonl or .parquet.
      format: how a record states its messages.
    """
    for record in read_records(file):
        if isinstance(record, BadLine):
            yield record
            continue
        try:
            yield _document(read_example(record.value, format), record.where)
        except RecursionError:
            yield BadLine("bad record", f"{record.where}: nested too deeply")
        except ValueError as e:
            yield BadLine("bad record", f"{record.where}: {e}")


def _document(example: Example, where: str, key: int | None = None) -> Document:
    messages = (*example.messages, *(example.rejected or ())[-1:])
    text = "\n".join(message["content"] for message in messages)
    if key is None:
        key = key_of(json.dumps(example, sort_keys=True, ensure_ascii=False))
    return Document(text, key, len(text.encode()), example, where)


def instruction_document(instruction: Instruction, file: Path, key: int) -> Document:
    """The conversation of a question and its answer.

    Args:
      instruction: about the standard library.
      file: the module.
      key: of the module.
    """
    messages = [
        {"role": "user", "content": instruction.question},
        {"role": "assistant", "content": instruction.answer},
    ]
    return _document(Example(messages), str(file), key)
