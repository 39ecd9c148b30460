"""Chat templates: messages to token ids by the Jinja template of a checkpoint.

Only the template writes control tokens: the name of a control token in a message is text.
"""

import atexit
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.config.loading import strings_of
from llama_jax.data.tokenizer import BREAK, Tokenizer, check_text

_WORKER = Path(__file__).with_name("template_worker.py")
_TIMEOUT = 60
"""Seconds after which a process that does not answer is killed; its CPU time is limited to 2 s."""


class ChatTemplate:
    """A chat template, rendered with limits on time, memory and output.

    Args:
      source: Jinja text, as Hugging Face stores it.
      name: name of the template in error messages.

    Raises:
      ValueError: the text is not a template.

    Example:
      >>> template = ChatTemplate(Path("chat_template.jinja").read_text())
      >>> ids = template.encode([{"role": "user", "content": "Hello"}], tokenizer)
    """

    def __init__(self, source: str, name: str = "the chat template"):
        self._source, self._name = source, name
        self._render(None, [])

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

        Args:
          messages: dicts with "role", "content" and other keys that the template reads, as JSON
            values.
          tokenizer: the model's.
          tools: descriptions of functions, for templates that use them.

        Raises:
          ValueError: the template refuses the messages, fails, or needs too much time or memory; a
            text that is not valid Unicode.
        """
        # As in transformers, a key whose value is None is left out.
        messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
        for name, tree in (("messages", messages), ("tools", tools)):
            for text in strings_of(tree):
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
        check_text(f"what {self._name} writes", text.replace(BREAK, ""))
        return tokenizer.encode_marked(text)

    def _render(self, variables: dict[str, Any] | None, names: list[str]) -> str:
        request = dict(template=self._source, variables=variables, names=names, mark=BREAK)
        try:
            line = json.dumps(request)
        except (TypeError, RecursionError) as e:
            raise ValueError(f"messages must be JSON values: {e}") from None
        answer = _process.ask(line.encode())
        if "refused" in answer:
            raise ValueError(f"{self._name} refuses these messages: {answer['refused']}")
        if "error" in answer:
            raise ValueError(f"{self._name} fails: {answer['error']}")
        return answer["text"]


class _Process:
    """The process that renders; started on first use, and again after it has ended."""

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
            timer = threading.Timer(_TIMEOUT, popen.kill)
            timer.daemon = True
            timer.start()
            try:
                popen.stdin.write(line + b"\n")
                popen.stdin.flush()
                out = popen.stdout.readline()
            except BrokenPipeError:
                out = b""
            except BaseException:  # after Ctrl-C the next request must not read this answer
                self.close()
                raise
            finally:
                timer.cancel()
            if out.endswith(b"\n"):
                return json.loads(out)
            return {"error": self._ended()}

    def _start(self) -> None:
        self.close()
        # In a new session, so that Ctrl-C in the terminal does not end it.
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
            return "it takes too long (more than 2 s of CPU time)"
        return (
            f"the process that renders it ended (status {status}): nested too deeply, or too large"
        )

    def close(self) -> None:
        """End the process."""
        if self._popen is not None:
            self._popen.kill()
            self._popen.communicate()
            self._popen = None


_process = _Process()
atexit.register(_process.close)
