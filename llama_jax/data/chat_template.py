"""Chat templates: messages to token ids, as the template of a checkpoint writes them.

In: Jinja text as Hugging Face keeps it, and messages. Out: ids. Control ids come from the template
alone: what a message says is text, whatever is written there.

    ChatTemplate(text).encode([{"role": "user", "content": "Hello"}], tokenizer)
"""

import atexit
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_jax.data.tokenizer import BREAK, Tokenizer, check_text

_WORKER = Path(__file__).with_name("template_worker.py")
_PATIENCE = 60
"""Seconds until a process without an answer is ended; its CPU time is limited to 2 s."""


class ChatTemplate:
    """A template; each rendering is limited in time, memory and output.

    Args:
      source: Jinja text.
      where: what errors call it.

    Raises:
      ValueError: the text is no template.
    """

    def __init__(self, source: str, where: str = "the chat template"):
        self._source, self._where = source, where
        self._render(None, [])

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of a conversation, up to where the model's answer begins.

        For messages without control names they are those of transformers. A control id's name in a
        message, a role or a tool is encoded as text. That holds when the template strips, slices,
        joins or replaces parts of it, or changes its letter case. While it renders, such a string
        has a character more inside the name, so that a template that looks for the name does not
        find it. A template that builds a name of single characters of a message (turned around,
        every second one), or turns HTML's "&lt;" into "<" (the filter `striptags`), is beyond it.

        Args:
          messages: "role", "content", and what else the template reads: JSON values.
          tokenizer: of the model.
          tools: descriptions of functions, for templates that take them.

        Raises:
          ValueError: the template refuses the messages, fails, or takes too long or too much
            memory; a text that cannot be written as UTF-8.
        """
        # As in transformers: a key without a value is no key.
        messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
        for name, tree in (("messages", messages), ("tools", tools)):
            for text in _strings(tree):
                check_text(name, text)
        variables = dict(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=True,
            bos_token=tokenizer.mark(tokenizer.bos_id),
            eos_token=tokenizer.mark(tokenizer.eos_id),
        )
        text = self._render(variables, list(tokenizer.controls))
        check_text(f"what {self._where} writes", text.replace(BREAK, ""))
        return tokenizer.encode_marked(text)

    def _render(self, variables: dict[str, Any] | None, names: list[str]) -> str:
        request = dict(template=self._source, variables=variables, names=names, mark=BREAK)
        try:
            line = json.dumps(request)
        except (TypeError, RecursionError) as e:
            raise ValueError(f"messages must be JSON values: {e}") from None
        answer = _process.ask(line.encode())
        if "refused" in answer:
            raise ValueError(f"{self._where} refuses these messages: {answer['refused']}")
        if "error" in answer:
            raise ValueError(f"{self._where} fails: {answer['error']}")
        return answer["text"]


def _strings(tree: Any) -> Iterator[str]:
    """Every string of lists and dicts, keys too."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict):
            todo += [*node, *node.values()]
        elif isinstance(node, list | tuple):
            todo += node


class _Process:
    """The process that renders; started when it is needed, and again after it has ended."""

    def __init__(self):
        self._lock = threading.Lock()
        self._popen: subprocess.Popen | None = None

    def ask(self, line: bytes) -> dict[str, str]:
        """The answer to one request."""
        with self._lock:
            if self._popen is None or self._popen.poll() is not None:
                self._start()
            popen = self._popen
            assert popen is not None
            assert popen.stdin is not None
            assert popen.stdout is not None
            timer = threading.Timer(_PATIENCE, popen.kill)
            timer.daemon = True
            timer.start()
            try:
                popen.stdin.write(line + b"\n")
                popen.stdin.flush()
                out = popen.stdout.readline()
            except BrokenPipeError:
                out = b""
            except BaseException:  # Ctrl-C: its answer must not be taken for that of the next
                self.close()
                raise
            finally:
                timer.cancel()
            if out.endswith(b"\n"):
                return json.loads(out)
            return {"error": self._ended()}

    def _start(self) -> None:
        self.close()
        # A session of its own: Ctrl-C on the terminal is for the parent.
        self._popen = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _ended(self) -> str:
        assert self._popen is not None
        status = self._popen.wait()
        if status in (-signal.SIGXCPU, -signal.SIGKILL):
            return "it takes too long (more than 2 s of computing)"
        return f"it ended the process that renders it (status {status}): too deep, or too large"

    def close(self) -> None:
        """End the process."""
        if self._popen is not None:
            self._popen.kill()
            self._popen.communicate()
            self._popen = None


_process = _Process()
atexit.register(_process.close)
