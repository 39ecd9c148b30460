"""A tiny random model, engines that share its compiled programs, and requests to them."""

import dataclasses
import threading
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from model_tools import F32, random_weights, small, tree_of

from llama_jax.generate.llm import LLM
from llama_jax.prepare.tokenizer import train_tokenizer
from llama_jax.serve import engine as engine_module
from llama_jax.serve.engine import Engine
from llama_jax.serve.programs import Programs
from llama_jax.serve.request import GenerationRequest, Token, Update

TEXT = ["the cat sat on a mat", "some animals saw 12 cats", "日本 and é", "def main(argv):"]
SIZES: dict[str, Any] = dict(slots=16, context=576, page=32, prefix_cache_bytes=1 << 21)


def tiny_llm(folder: Path, seed: int = 0) -> LLM:
    """A random model whose logits differ enough to generate varied text."""
    tokenizer = train_tokenizer([t for t in TEXT for _ in range(50)], 300, folder / "t.model")
    cfg = small(vocab_size=300, context=600)
    params = jax.tree.map(jnp.asarray, tree_of(random_weights(cfg, seed)))
    return LLM(cfg, params, tokenizer, F32, eos_ids=())


class SharedPrograms(Programs):
    """Programs that are compiled once per process, for engines with the same sizes."""

    compiled: ClassVar[dict[Any, Any]] = {}

    def __init__(self, model, sizes):
        super().__init__(model, sizes)
        self._compiled = self.compiled.setdefault((model.cfg, sizes), {})


def start_engine(llm: LLM, monkeypatch: Any, **changes) -> Engine:
    """A running engine; ``changes`` of :data:`SIZES` may need other programs."""
    engine = Engine(llm, **(SIZES | changes))
    with monkeypatch.context() as patched:
        patched.setattr(engine_module, "Programs", SharedPrograms)
        engine.start()
    return engine


@dataclasses.dataclass
class Answer:
    """The updates of one request."""

    updates: list[Update] = dataclasses.field(default_factory=list)
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)
    number: int = 0

    def send(self, update: Update) -> None:
        """Take an update; there is none after the last one."""
        assert not self.ended.is_set()
        self.updates.append(update)
        if update.finish:
            self.ended.set()

    def wait(self) -> "Answer":
        """Wait for the last update."""
        assert self.ended.wait(60), "no last update"
        return self

    @property
    def tokens(self) -> list[Token]:
        return [t for u in self.updates for t in u.tokens]

    @property
    def ids(self) -> list[int]:
        return [t.id for t in self.tokens]

    @property
    def text(self) -> str:
        return "".join(u.text for u in self.updates)

    @property
    def finish(self) -> str | None:
        return self.updates[-1].finish

    @property
    def cached(self) -> int:
        return self.updates[0].cached_tokens

    @property
    def content(self) -> tuple:
        """Everything that must not depend on other requests; floats are compared exactly."""
        prompt = [t for u in self.updates for t in u.prompt]
        return self.tokens, self.text, self.finish, prompt


def submit(engine: Engine, ids: Any, max_new_tokens: int = 20, **fields: Any) -> Answer:
    """Send a request."""
    answer = Answer()
    request = GenerationRequest(
        tuple(map(int, ids)), max_new_tokens, **({"send": answer.send} | fields)
    )
    answer.number = engine.submit(request)
    return answer


def ask(engine: Engine, ids: Any, max_new_tokens: int = 20, **fields: Any) -> Answer:
    """Send a request and wait for its answer."""
    return submit(engine, ids, max_new_tokens, **fields).wait()


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random ids; prompts of other seeds differ from the first id on."""
    return [3 + seed % 290, *np.random.default_rng(seed).integers(3, 300, length - 1)]


class EveryThird:
    """A grammar: each id has the remainder that the one before determines.

    Args:
      seed: of the remainders.
      fails_after: raise at this number of tokens.
      length: complete after this number of tokens.
    """

    def __init__(self, seed: int = 0, fails_after: int | None = None, length: int | None = None):
        self.state, self.fails_after, self.length = seed, fails_after, length
        self.tokens, self.complete = 0, False

    def fill(self, mask_W):
        ids = np.arange(32 * len(mask_W)) % 3 == self.state % 3
        mask_W[:] = np.packbits(ids, bitorder="little").view(np.int32)

    def accept(self, token):
        assert token % 3 == self.state % 3, "the mask was not used"
        self.state = self.state * 5 + token + 1
        self.tokens += 1
        self.complete = self.tokens == self.length
        if self.tokens == self.fails_after:
            raise ValueError("the grammar fails here")
