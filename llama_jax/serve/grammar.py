"""Answers constrained to a JSON schema, a regular expression, a list of choices or a grammar, with
llguidance: which tokens may come next."""

import concurrent.futures
import json
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llama_jax.data.tokenizer import Tokenizer

MAX_SOURCE = 1 << 16
"""Characters of a schema, expression or grammar; one of this size compiles in a second."""
# Limits on the work for one token (about 4 ms on a CPU), and on the memory of a grammar (40 MB).
_LIMITS: dict[str, Any] = {
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
}
_STACK = 256 << 20
"""Bytes of stack to compile with; the longest chain of rules that a source can hold needs 50 MB."""
_STACK_LOCK = threading.Lock()
_WHITE_SPACE = r"( |\r?\n[ \t]{0,40})"
"""Between the parts of JSON. Unlimited white space is something that models do not end."""
_TOO_COMPLEX = re.compile("(?i)too many|too large|limits[.]|max is|panic:|fuel")


class LLGrammar:
    """The state of one answer; see :class:`llama_jax.serve.request.Grammar`.

    It is made in any thread, and then used by one thread at a time.
    """

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def complete(self) -> bool:
        """Whether no text may follow."""
        return self._matcher.is_stopped()

    def fill(self, mask_W: np.ndarray) -> None:
        """Write which ids may come next into int32 words: one bit per id, the lowest bit first.

        Ids of padded rows of the vocabulary are not set.

        Raises:
          ValueError: the grammar needs too much work, or no token continues the text.
        """
        mask_W[:] = 0
        words = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: len(mask_W)]
        mask_W[: len(words)] = words
        if self._vocab_size < 32 * len(mask_W):  # the last bit may stand for an EOS id of no model
            last = self._vocab_size // 32
            mask_W[last] &= (1 << self._vocab_size % 32) - 1
            mask_W[last + 1 :] = 0
        self._check()
        if not mask_W.any() and not self.complete:
            raise ValueError("no token of the model continues the text that the grammar allows")

    def accept(self, token: int) -> None:
        """Advance by a token.

        Raises:
          ValueError: the grammar does not allow the token, or needs too much work.
        """
        self._matcher.consume_token(token)
        self._check()

    def copy(self) -> "LLGrammar":
        """The same state, to be advanced on its own."""
        return LLGrammar(self._matcher.deep_copy(), self._vocab_size)

    def _check(self) -> None:
        if problem := self._matcher.get_error():
            raise ValueError(_message(problem))


class GrammarFactory:
    """Compiles grammars for the tokens of one model.

    Args:
      tokenizer: of the model.
      eos_ids: ids that end an answer; allowed where the text is complete. Without any, an answer
        ends where no text may follow, and otherwise by its length.
      vocab_size: ids of the model, which may be more than those of the tokenizer.

    Example::

      factory = GrammarFactory(llm.tokenizer, llm.eos_ids, llm.cfg.vocab_size)
      grammar = factory.make("json", {"type": "object", "properties": {"name": {"type": "string"}}})
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int], vocab_size: int):
        import llguidance

        self._vocab_size = vocab_size
        tokens = _Tokens(tokenizer, [i for i in eos_ids if i < vocab_size], vocab_size)
        wrapper = llguidance.TokenizerWrapper(tokens)
        self._tokenizer = llguidance.LLTokenizer(wrapper, eos_token=tokens.eos_ids)
        self._limits = llguidance.LLParserLimits(verbose_errors=False, **_LIMITS)
        self._matcher = llguidance.LLMatcher

    def make(self, kind: str, value: Any) -> LLGrammar:
        """Compile a grammar, in up to a second; other threads run meanwhile.

        Args:
          kind: "json" (a schema, as an object or as text), "json_object" (any object), "regex",
            "choice" (a list of texts), or "grammar" (Lark, in llguidance's syntax).
          value: of this kind; ignored for "json_object".

        Raises:
          ValueError: the value is invalid, too complex, or uses something unsupported.
        """
        return self.lark(_source(kind, value))

    def lark(self, source: str) -> LLGrammar:
        """Compile a grammar in Lark's syntax with llguidance's extensions.

        Raises:
          ValueError: as for :meth:`make`.
        """
        if len(source) > MAX_SOURCE:
            raise ValueError(
                f"a grammar of {len(source):,} characters is too large; at most {MAX_SOURCE:,} are "
                "allowed"
            )
        return _with_large_stack(self._compile, source)

    def _compile(self, source: str) -> LLGrammar:
        grammar = self._matcher.grammar_from_lark(source)
        matcher = self._matcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        made = LLGrammar(matcher, self._vocab_size)
        self._try(made.copy())
        return made

    def _try(self, grammar: LLGrammar) -> None:
        """Take the first tokens of some answer. Their masks need most of the work, so that errors
        and delays come here and not in the engine's thread."""
        mask_W = np.empty(-(-self._vocab_size // 32), np.int32)
        for _ in range(3):
            grammar.fill(mask_W)
            if grammar.complete:
                return
            grammar.accept(
                int(np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little"))[0])
            )


class _Tokens:
    """A tokenizer as llguidance reads it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_ids: list[int], vocab_size: int):
        self._tokenizer = tokenizer
        self._text = tokenizer.token_bytes[:vocab_size]
        self.tokens = self._text + [b""] * (vocab_size - len(self._text))
        self.special_token_ids = [i for i in tokenizer.controls.values() if i < vocab_size]
        for name, i in tokenizer.controls.items():
            if i < vocab_size:
                self.tokens[i] = name.encode()
        # llguidance needs an EOS id: a model without one gets an id that it cannot draw.
        self.eos_ids = eos_ids or [vocab_size]
        if not eos_ids:
            self.tokens.append(b"")
        self.eos_token_id = self.eos_ids[0]
        self._longest = max(map(len, self._text), default=1)
        self._id_of = {b: i for i, b in reversed(list(enumerate(self._text))) if b}

    def __call__(self, text: str) -> list[int]:
        """Ids of a text that must follow; exactly its bytes, whatever the tokenizer normalizes."""
        data = text.encode()  # llguidance tries bytes first, which fails here, as it should
        ids = self._tokenizer.encode_array(text, start=False).tolist()
        known = all(i < len(self._text) for i in ids)
        if known and b"".join(self._text[i] for i in ids) == data:
            return ids
        return self._longest_first(data)

    def _longest_first(self, data: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(data):
            sizes = range(min(self._longest, len(data) - at), 0, -1)
            size = next((n for n in sizes if data[at : at + n] in self._id_of), None)
            if size is None:
                break  # no token has this byte; llguidance gets the part before it
            ids.append(self._id_of[data[at : at + size]])
            at += size
        return ids


def _with_large_stack(function: Callable[[str], LLGrammar], source: str) -> LLGrammar:
    """The result of a function, called in a thread with a large stack: llguidance's compiler
    recurses along chains of rules and of references, and an overflow would end the process."""
    future: concurrent.futures.Future[LLGrammar] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function(source))
        except BaseException as e:
            future.set_exception(e)

    with _STACK_LOCK:  # the size is that of all threads that start
        before = threading.stack_size(_STACK)
        try:
            threading.Thread(target=run, daemon=True).start()
        finally:
            threading.stack_size(before)
    return future.result()


def json_rule(schema: Any) -> str:
    """A schema as an expression of Lark.

    Args:
      schema: an object, True, or JSON text of these.

    Raises:
      ValueError: it is none of these.
    """
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise ValueError(f"a JSON schema is an object, not {schema!r:.60}")
        options = {"x-guidance": {"whitespace_pattern": _WHITE_SPACE}}
        return "%json " + json.dumps(schema | options, allow_nan=False)
    except RecursionError:
        raise ValueError("the JSON schema is nested too deeply") from None


def literal(text: str) -> str:
    """A text as an expression of Lark."""
    escaped = (c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):X}}}" for c in text)
    return f"/{''.join(escaped)}/" if text else '""'


def _source(kind: str, value: Any) -> str:
    if kind == "json":
        return f"start: {json_rule(value)}"
    if kind == "json_object":
        return f"start: {json_rule({'type': 'object'})}"
    if kind == "choice":
        return "start: " + " | ".join(literal(text) for text in value)
    if kind == "regex":
        return f"start: /{_escaped(value)}/"
    return value


def _escaped(expression: str) -> str:
    """A regular expression that may stand between slashes; it always matches whole answers."""
    import llguidance

    expression = expression.removeprefix("^")
    if re.search(r"(?<!\\)(\\\\)*\$$", expression):
        expression = expression[:-1]
    return llguidance.regex_to_lark(expression)


def _message(problem: str) -> str:
    """An error of llguidance in one line, without the state of its parser."""
    if problem.startswith("NoExtension"):
        return "no text satisfies it"
    # An excerpt of the grammar, or the state, follows on lines of its own.
    shown = re.split(r"\n(?:<| *\d+ \| )", problem)[0]
    shown = re.sub(r"^at 1\(8\): (failed to compile JSON schema: )?", "", shown)
    shown = " ".join(shown.split())
    shown = re.sub("^.*regex parse error: .* error: ", "regular expression: ", shown)
    if _TOO_COMPLEX.search(shown):
        return f"it is too complex: {shown.split(';')[0]:.100}"
    return shown if len(shown) <= 300 else f"{shown[:300]} ..."
