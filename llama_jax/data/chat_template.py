"""Chat templates: messages to token ids, and which of them are the answers that count in the loss.

Training, chat and serving use the same template, that of the checkpoint or a built-in one. Only the
template writes control tokens: the name of a control token in a message is text.
"""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.config.loading import strings_of
from llama_jax.data import template_process
from llama_jax.data.tokenizer import BREAK, Tokenizer, check_text
from llama_jax.data.tokenizer_json import CONTROL_NAME
from llama_jax.io import read_json, read_limited
from llama_jax.storage.copies import local_files
from llama_jax.storage.paths import as_path

BUILT_IN = ("alpaca", "vicuna", "gpt4all", "chatml", "llama2", "llama3")
"""Names of the templates in the folder ``templates``."""
MAX_TEMPLATE_BYTES = 1 << 20
"""The largest chat template read; published ones have up to 20 kB."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of the reasoning of an answer; templates read one of the first two."""
_END_OF_MESSAGE = "END_OF_MESSAGE_TO_CONTINUE"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")


def load_template(name: str, folder: Path | None) -> "ChatTemplate":
    """A chat template by the value of ``data.template``.

    Args:
      name: one of :data:`BUILT_IN`, the path of a ``.jinja`` file, or "" for the folder's own.
      folder: the checkpoint that training starts from; None if there is none.

    Raises:
      ValueError: there is no such template, or it is damaged.
    """
    known = f"{', '.join(BUILT_IN)} or the path of a .jinja file"
    if name in BUILT_IN:
        source = (
            Path(__file__).parent.joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")
        )
        return ChatTemplate(source, f"the template {name}")
    if name:
        path = local_files(as_path(name))
        if not path.is_file():
            raise ValueError(f"there is no chat template {name!r}; it must be {known}")
        return ChatTemplate(_read(path), f"the template {path}")
    if folder is None:
        raise ValueError(
            f"conversations need a chat template; set data.template (--template) to {known}"
        )
    found, why = folder_template(folder)
    if found is None:
        why = why or f"{folder} has no chat template"
        raise ValueError(f"{why}; set data.template (--template) to {known}")
    return ChatTemplate(found, f"the chat template of {folder}", _named_tokens(folder))


def _named_tokens(folder: Path) -> set[str]:
    """Texts in the files beside a tokenizer, which name its tokens."""
    folder, found = local_files(folder), set[str]()
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        settings = read_json(folder / name) if (folder / name).is_file() else {}
        found.update(strings_of({k: v for k, v in settings.items() if k != "chat_template"}))
    return found


def folder_template(folder: Path) -> tuple[str | None, str | None]:
    """The chat template in a folder of Hugging Face's format, or why there is none.

    Raises:
      ValueError: a file is damaged.
    """
    folder = local_files(folder)
    own, path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    if own.is_file():
        return _with_token_names(_read(own), settings, path), None
    template, names = default_template(settings)
    if names:
        return None, (
            f"{path} has chat templates named {', '.join(map(repr, names))}, and none "
            f"named 'default': write the one to use to {own}"
        )
    if template is None:
        return None, None
    if not isinstance(template, str):
        raise ValueError(f"{path}: chat_template must be text, not {template!r:.60}")
    return _with_token_names(template, settings, path), None


def default_template(settings: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The chat template in the content of tokenizer_config.json; if it has several templates and
    none is named "default", None and their names. Of several, transformers takes "default", or
    "tool_use" for a conversation with tools."""
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, dict)]
        template = {t.get("name"): t.get("template") for t in named}
    if not isinstance(template, dict):
        return template, []
    default, tool_use = template.get("default"), template.get("tool_use")
    if isinstance(default, str) and isinstance(tool_use, str):
        return either_template(default, tool_use), []
    return default, [] if "default" in template else list(template)


def either_template(default: str, tool_use: str) -> str:
    """One template for conversations with tools, by ``tool_use``, and without, by ``default``."""
    # Jinja drops a line break after a statement and at the end of a template, and, without "+",
    # blanks before a statement at the start of a line.
    one, other = tool_use.removesuffix("\n"), default.removesuffix("\n")
    return f"{{% if tools is not none %}}\n{one}{{%+ else %}}\n{other}{{%+ endif %}}"


def _with_token_names(template: str, settings: dict[str, Any], path: Path) -> str:
    """The template, which begins with the values of the variables ``bos_token`` and ``eos_token``
    where tokenizer_config.json has them, as in transformers: a chat model may end its answers with
    another token than documents. So the values go wherever the template is copied to."""
    values = ""
    for name in ("bos_token", "eos_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None or name not in template or f"set {name} =" in template:
            continue
        if not isinstance(token, str):
            raise ValueError(f"{path}: {name} must be text, not {token!r:.60}")
        values += f"{{% set {name} = {json.dumps(token, ensure_ascii=False)} %}}"
    # Jinja drops a line break directly after a statement, which may be the template's own, and
    # blanks before a statement only at the start of a line.
    return values + ("\n" if values and template[:1].isspace() else "") + template


def _read(path: Path) -> str:
    try:
        return read_limited(path, MAX_TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start}: {e.reason})") from None


class _Rendering(NamedTuple):
    """The output of a template, in which each answer ends with a BREAK."""

    text: str
    blocks: list[tuple[int, int]]
    """Where the ``{% generation %}`` blocks begin and end."""
    turns: list[Any]
    """Of each answer, where it begins in the text and what the template writes if it is the last
    message; or a text that says why there is no such place."""
    has_prompt: bool
    """Whether the template writes the start of an answer only on request."""


class ChatTemplate:
    """A chat template, rendered with limits on time, memory and output.

    Args:
      source: Jinja text, as Hugging Face stores it.
      name: name of the template in error messages.
      tokens: of the template of a checkpoint, the names of tokens in its files. Other names in its
        text, such as TinyLlama's ``<|user|>``, are text, as when the model was trained. Default:
        each name must be a token.

    Raises:
      ValueError: the text is not a template.

    Example:
      >>> template = ChatTemplate(Path("chat_template.jinja").read_text())
      >>> ids = template.encode([{"role": "user", "content": "Hello"}], tokenizer)
    """

    def __init__(
        self, source: str, name: str = "the chat template", tokens: set[str] | None = None
    ):
        self.source, self.name = source, name
        self._names = set(CONTROL_NAME.findall(source))
        if tokens is not None:
            self._names &= tokens
        self._has_blocks = _GENERATION.search(source) is not None
        self._ask(None, [])

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of a conversation up to the start of the model's answer.

        They are those of transformers for messages without names of control tokens. Such a name in
        a message, a role or a tool is encoded as text, also if the template strips, slices, joins
        or replaces parts of the message or changes its letter case. While the template renders, the
        name has an additional character inside, so a template that searches for it does not find
        it. Not covered: a template that composes a name from single characters of a message (in
        reverse, or every second one), or decodes HTML's "&lt;" to "<" (the filter `striptags`).
        As in training, no token belongs to both an answer and the text before it.

        Args:
          messages: dicts with "role", "content" and other keys that the template reads, as JSON
            values.
          tokenizer: the model's.
          tools: descriptions of functions, for templates that use them.

        Raises:
          ValueError: the template refuses the messages, fails, or needs too much time or memory; a
            text that is not valid Unicode.
        """
        rendering = self._render(messages, tokenizer, tools, prompt=True)
        answers, _ = self._answers(rendering, tokenizer)
        pieces, _ = self._pieces(rendering, answers, [])
        return [i for ids in tokenizer.encode_consecutive(pieces) for i in ids]

    def text(
        self,
        messages: Sequence[dict[str, Any]],
        tokenizer: Tokenizer,
        *,
        continues: bool = False,
    ) -> str:
        """The text of a conversation. The name of a control token in a message remains as it is, so
        the encoder of the text takes it for the token.

        Args:
          messages: as for :meth:`encode`.
          tokenizer: the model's.
          continues: end inside the last message, which the model continues; otherwise at the start
            of the model's answer.

        Raises:
          ValueError: as for :meth:`encode`; the template leaves out the end of the last message.
        """
        if not continues:
            return self._render(messages, tokenizer, None, prompt=True).text.replace(BREAK, "")
        *before, last = messages
        marked = [*before, last | {"content": f"{last['content']}{_END_OF_MESSAGE} "}]
        text = self._render(marked, tokenizer, None, prompt=False).text.replace(BREAK, "")
        text, found, after = text.rpartition(_END_OF_MESSAGE)
        if not found:
            raise ValueError(f"{self.name} leaves out the end of the last message")
        # Like the mark, the message loses blanks at its end if the template removes them.
        return text if after.startswith(" ") else text.rstrip()

    def encode_example(
        self,
        messages: Sequence[dict[str, Any]],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and which of them count in the loss.

        Those that count are the answers and their end-of-turn token, or what is inside the
        ``{% generation %}`` blocks of a template that has them. An answer with "weight" 0 does not
        count, as in OpenAI's format. The ids before each answer are those of :meth:`encode` for the
        messages before it.

        Args:
          messages: as for :meth:`encode`, with one or more answers (role "assistant").
          tokenizer: the model's.
          tools: as for :meth:`encode`.

        Raises:
          ValueError: as for :meth:`encode`; the answers are not found in the text of the template;
            the template leaves out calls of functions, or writes control tokens that the tokenizer
            does not have.
        """
        rendering = self._render(messages, tokenizer, tools, prompt=False)
        self._check_tokens(rendering.text, tokenizer)
        answers, problem = self._answers(rendering, tokenizer)
        if not problem and (lost := _lost_call(messages, rendering.text, answers)):
            raise ValueError(f"{self.name} {lost}; choose a template that writes such calls")
        problem = problem or _changed(messages, rendering.text, answers)
        weights = [m.get("weight", 1) for m in messages if m.get("role") == "assistant"]
        if problem and (not self._has_blocks or 0 in weights):
            raise ValueError(
                f"{self.name} does not show where {problem}; mark the answers in the template with "
                "{% generation %} ... {% endgeneration %}"
            )
        left_out = [span for span, weight in zip(answers, weights, strict=False) if weight == 0]
        pieces, counts = self._pieces(rendering, answers, left_out)
        if not any(counts):
            raise ValueError(
                f"{self.name} writes no {{% generation %}} block for an answer that counts"
                if self._has_blocks
                else "the conversation has no answer that counts (role 'assistant', weight not 0)"
            )
        encoded = tokenizer.encode_consecutive(pieces)
        flags = [count for ids, count in zip(encoded, counts, strict=True) for _ in ids]
        return [i for ids in encoded for i in ids], flags

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids of the end-of-turn tokens that the template writes after answers.

        Raises:
          ValueError: as for :meth:`encode_example`.
        """
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        self.encode_example(talk, tokenizer)  # raises
        rendering = self._render(talk, tokenizer, None, prompt=False)
        answers, _ = self._answers(rendering, tokenizer)
        start, end = (answers or rendering.blocks)[-1]
        names = tokenizer.control_names.findall(rendering.text[start:end])
        return tuple(tokenizer.controls[name] for name in names[-1:])

    def _answers(
        self, rendering: _Rendering, tokenizer: Tokenizer
    ) -> tuple[list[tuple[int, int]], str]:
        """Where the answers with their end-of-turn tokens are in the text; and a problem."""
        found, problem = [], ""
        for number, turn in enumerate(rendering.turns, 1):
            if isinstance(turn, str):
                problem = problem or f"answer {number} is: {turn}"
                continue
            start, text = turn
            end = _end(text, tokenizer, rendering.has_prompt)
            if rendering.text.startswith(text[:end], start):
                found.append((start, start + end))
            else:
                problem = problem or f"answer {number} is: its text changes when messages follow"
        return found, problem

    def _pieces(
        self,
        rendering: _Rendering,
        answers: list[tuple[int, int]],
        left_out: list[tuple[int, int]],
    ) -> tuple[list[str], list[bool]]:
        """The text in pieces that are encoded one by one, and which of them count.

        Args:
          rendering: the text and its blocks.
          answers: where the answers are in the text; a prompt ends before each.
          left_out: the answers that do not count.
        """
        text, counted = rendering.text, rendering.blocks if self._has_blocks else answers
        starts = {start for start, _ in answers}  # also within a block
        borders = sorted({0, len(text), *starts, *(at for span in counted for at in span)})
        inside = lambda start, spans: any(a <= start < b for a, b in spans)
        pieces, counts = [], []
        for start, end in itertools.pairwise(borders):
            pieces.append(text[start:end])
            counts.append(inside(start, counted) and not inside(start, left_out))
        return pieces, counts

    def _check_tokens(self, text: str, tokenizer: Tokenizer) -> None:
        missing = [n for n in self._names - set(tokenizer.controls) if n in text]
        if missing:
            first = min(missing, key=text.index)
            raise ValueError(
                f"{self.name} writes the control token {first}, which the tokenizer "
                f"{tokenizer.path} does not have; choose another template"
            )
        eos_is_set = "set eos_token =" in self.source
        if tokenizer.eos_id is None and not eos_is_set and "eos_token" in self.source:
            raise ValueError(
                f"{self.name} ends answers with the EOS token, which the tokenizer "
                f"{tokenizer.path} does not have; choose another template"
            )

    def _render(
        self,
        messages: Sequence[dict[str, Any]],
        tokenizer: Tokenizer,
        tools: Sequence[dict[str, Any]] | None,
        prompt: bool,
    ) -> _Rendering:
        # As in transformers, a key whose value is None is left out, and reasoning has both names.
        messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
        for message in messages:
            if reasoning := [message[name] for name in _REASONING if name in message]:
                message.setdefault("thinking", reasoning[0])
                message["reasoning_content"] = reasoning[0]
        for name, tree in (("messages", messages), ("tools", tools)):
            for text in strings_of(tree):
                check_text(name, text)
        variables = dict(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=prompt,
            bos_token=tokenizer.mark(tokenizer.bos_id),
            eos_token=tokenizer.mark(tokenizer.eos_id),
        )
        answer = self._ask(variables, [*tokenizer.controls, *self._names - {*tokenizer.controls}])
        check_text(f"what {self.name} writes", answer["text"].replace(BREAK, ""))
        return _Rendering(**answer)

    def _ask(self, variables: dict[str, Any] | None, names: list[str]) -> dict[str, Any]:
        request = dict(template=self.source, variables=variables, names=names, mark=BREAK)
        try:
            line = json.dumps(request)
        except (TypeError, RecursionError) as e:
            raise ValueError(f"messages must be JSON values: {e}") from None
        answer = template_process.of_thread().ask(line.encode())
        if "refused" in answer:
            raise ValueError(f"{self.name} refuses these messages: {answer['refused']}")
        if "error" in answer:
            raise ValueError(f"{self.name} fails: {answer['error']}")
        return answer


def _changed(messages: Sequence[dict[str, Any]], text: str, answers: list[tuple[int, int]]) -> str:
    """The problem of the first answer whose content is not in its place, apart from white space."""
    squeezed = lambda text: "".join(text.replace(BREAK, "").split())
    contents = [m.get("content") for m in messages if m.get("role") == "assistant"]
    for number, (content, (start, end)) in enumerate(zip(contents, answers, strict=True), 1):
        if isinstance(content, str) and squeezed(content) not in squeezed(text[start:end]):
            return f"answer {number} is: the template changes or leaves out a part of it"
    return ""


def _lost_call(
    messages: Sequence[dict[str, Any]], text: str, answers: list[tuple[int, int]]
) -> str:
    """The first call of a function that is not in its answer, which would be trained as empty."""
    said = [m for m in messages if m.get("role") == "assistant"]
    for number, (message, (start, end)) in enumerate(zip(said, answers, strict=True), 1):
        for call in message.get("tool_calls") or ():
            name = call.get("function", call)["name"]
            if name not in text[start:end].replace(BREAK, ""):
                return f"leaves out the call of {name:.60} in answer {number}"
    return ""


def _end(turn: str, tokenizer: Tokenizer, has_prompt: bool) -> int:
    """Where an answer and its end-of-turn token end in the text from the answer on.

    The token is the first control token after the text of the message. Further tokens directly
    after it also belong to the answer, such as the one that ends the turn after the one that ends
    a call of a function. A BOS token does not; nor does what a template without a separate prompt
    writes, because it may be the start of the next turn.
    """
    after = turn.rfind(BREAK) + 1
    token = tokenizer.control_names.search(turn, after)
    if token is None:
        return after or len(turn.rstrip())
    end, bos = token.end(), tokenizer.mark(tokenizer.bos_id)
    while has_prompt and (token := tokenizer.control_names.match(turn, end)) and token[0] != bos:
        end = token.end()
    return end
