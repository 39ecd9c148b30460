"""A model that samples: prompts read in chunks, then one token at a time for all rows.

In: a run or converted weights, and prompts. Out: their continuations.

    llm = llama_jax.load("checkpoints/tiny")
    llm.generate("def main(", max_new_tokens=64)           # str -> str; list -> list

Shapes are rounded up (rows, chunks of a prompt, cache slots), and settings are arguments of the
compiled step: another prompt length, number of tokens or temperature compiles nothing.
"""

import contextlib
import functools
import numbers
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.data.tokenizer import Tokenizer, check_text
from llama_jax.generate import decode as decoding
from llama_jax.generate.decode import DECODE_STEPS_PER_CALL, Rows
from llama_jax.generate.detokenize import Generation, Row
from llama_jax.generate.sampler import Greedy, Sample, Settings, check_whole, settings_of
from llama_jax.model.llama import ComputeConfig, KVCache
from llama_jax.model.params import structure
from llama_jax.model.quantize import bytes_of
from llama_jax.model.sharding import use_mesh

if TYPE_CHECKING:
    from llama_jax.generate.chat import Chat
    from llama_jax.generate.scores import Scores

PREFILL_CHUNKS = (32, 256)
"""Tokens of a prompt that go through the model at once: the few of a chat's turn, or many."""
MAX_BATCH = 32
"""Rows at once; more prompts than that take turns."""


class LLM:
    """A model with its tokenizer, ready to sample from; :func:`llama_jax.load` makes one.

    A row of a batch has its own key, stop and length, and its prompt is read on its own: its text
    does not depend on the other rows or on its place among them. (Logits of a batch differ from
    those of a single row in the last bits, as matrix products of another shape do.)
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: dict[str, Any],
        tokenizer: Tokenizer,
        compute: ComputeConfig,
        *,
        eos_ids: Sequence[int] | None = None,
        mesh: jax.sharding.Mesh | None = None,
        chat_template: str | None = None,
        no_template: str | None = None,
    ):
        """As :func:`llama_jax.load` calls it.

        Args:
          cfg: sizes of the model.
          params: its weights, stacked or one layer after the other.
          tokenizer: may have fewer ids than the embedding has rows.
          how: dtype and sharding.
          eos_ids: ids that end a text; default: the tokenizer's own.
          mesh: where the weights lie, if on several devices.
          chat_template: Jinja text, as Hugging Face keeps it.
          no_template: why there is no chat template, for the error of :meth:`chat`.

        Raises:
          ValueError: an id of ``eos_ids`` that the model does not have.
        """
        self.cfg, self.params, self.tokenizer, self.mesh = cfg, params, tokenizer, mesh
        self.compute, self.chat_template, self.no_template = compute, chat_template, no_template
        self.eos_ids = check_eos(eos_ids, cfg) if eos_ids is not None else ()
        if eos_ids is None and tokenizer.eos_id is not None:
            self.eos_ids = (tokenizer.eos_id,)
        self._compiled: dict[tuple, Any] = {}
        with use_mesh(self.mesh):
            unstacked = 0 in params["blocks"]
            self._graphdef = structure(cfg, self.compute, unstacked)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        sampling: Greedy | Sample = Greedy(),  # noqa: B008 (frozen)
        n: int = 1,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        logprobs: bool = False,
    ) -> Any:
        """Continue a prompt, or each of a list; the continuation alone, without the prompt.

        Args:
          prompts: text; empty starts a document.
          max_new_tokens: at most so many; also ends where the model's context does.
          sampling: :class:`Greedy` or :class:`Sample`.
          n: continuations of each prompt.
          seed: the same seed gives the same texts again.
          stop: ends a row where one of these comes up; it is not part of the text.
          logprobs: give :class:`Generation` instead of text.

        Returns:
          For a prompt a text (n > 1: a list of n), for a list a list of these.

        Raises:
          ValueError: an argument that cannot be, or a prompt that does not fit the context.
          MemoryError: the cache for all these rows cannot fit beside the weights.
        """
        single = isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence)
        texts: list[Any] = [prompts] if single else list(prompts)
        check_arguments(texts, max_new_tokens, n, seed)
        stops = stops_of(stop)
        settings = settings_of(sampling)
        encoded = [self.encode(text, where) for where, text in _named(texts)]
        asked = [(ids, sample) for ids in encoded for sample in range(n)]
        made: list[Generation] = []
        # Dynamic rotary frequencies follow the longest row: a row of its own for each.
        most_rows = 1 if self.cfg.rope.type == "dynamic" else MAX_BATCH
        for first in range(0, len(asked), most_rows):
            part = asked[first : first + most_rows]
            rows = [Row(self.tokenizer, ids, stops) for ids, _ in part]
            making = self._decode(
                part, rows, max_new_tokens, settings, seed, DECODE_STEPS_PER_CALL, logprobs=logprobs
            )
            for _ in making:
                pass
            made += [row.result() for row in rows]
        out = made if logprobs else [g.text for g in made]
        grouped = out if n == 1 else [out[i : i + n] for i in range(0, len(out), n)]
        return grouped[0] if single else grouped

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        sampling: Greedy | Sample = Greedy(),  # noqa: B008 (frozen)
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """The text of :meth:`generate` in pieces, as they come.

        A piece never ends inside a character, nor in what may become a stop.
        """
        check_arguments([prompt], max_new_tokens, 1, seed)
        ids = self.encode(prompt)
        row = Row(self.tokenizer, ids, stops_of(stop))
        making = self._decode([(ids, 0)], [row], max_new_tokens, settings_of(sampling), seed, 1)

        def pieces() -> Iterator[str]:
            given = 0
            for _ in making:
                text = row.settled()
                if len(text) > given:
                    yield text[given:]
                    given = len(text)
            if rest := row.result().text[given:]:
                yield rest

        return pieces()

    def score(self, text: str) -> "Scores":
        """Log p and entropy of each token of a text, nats; coloured text in a notebook."""
        from llama_jax.generate import scores

        return scores.score(self, text)

    def perplexity(self, texts: str | Sequence[str]) -> float:
        """exp of the mean of -log p over all tokens of all texts."""
        from llama_jax.generate import scores

        return scores.perplexity(self, texts)

    def chat(self, system: str | None = None) -> "Chat":
        """A conversation that keeps the cache; for models with a chat template."""
        from llama_jax.generate.chat import Chat

        return Chat(self, system)

    def resume(
        self,
        ids: list[int],
        known: list[int],
        cache: KVCache | None,
        *,
        max_new_tokens: int,
        sampling: Greedy | Sample,
        seed: int,
    ) -> tuple[Generation, list[int], KVCache]:
        """Continue ``ids``, of which a cache may already hold the first ones (``known``).

        Returns:
          The continuation, the ids that the cache now holds, and the cache.

        Raises:
          ValueError: they do not fit the context, or an argument out of its range; ``cache`` can
            then be used again.
        """
        # All that can be refused is refused here: from the first prefill on, the cache that was
        # given is gone (its memory holds the new one).
        check_arguments([], max_new_tokens, 1, seed)
        settings = settings_of(sampling)
        self._check_room(ids)
        if cache is None:
            cache, known = self.empty_cache(self.cfg.context + PREFILL_CHUNKS[-1]), []
        same = 0
        while same < min(len(known), len(ids) - 1) and known[same] == ids[same]:
            same += 1
        cache = cache._replace(lengths_B=jnp.full(1, same, jnp.int32))
        first = self.prefill(ids[same:], cache)
        row = Row(self.tokenizer, ids, ())
        state = self._rows([(ids, 0)], [first], seed)
        making = self._decode(
            [(ids, 0)], [row], max_new_tokens, settings, seed, DECODE_STEPS_PER_CALL, state, True
        )
        while True:
            try:
                next(making)
            except StopIteration as end:
                made = row.result()
                # What was drawn last is not in the cache when it ended the row.
                return made, [*ids, *made.ids], end.value.cache

    def encode(self, text: str, where: str = "the prompt") -> list[int]:
        """Ids of a prompt, which errors call ``where``, with the id that starts a document where
        the tokenizer has one.

        Raises:
          ValueError: they leave no room in the context.
        """
        ids = self.tokenizer.encode(text, bos=self.tokenizer.bos_id is not None)
        if not ids:
            raise ValueError("an empty prompt needs a tokenizer with an id that starts a text")
        self._check_room(ids, where)
        return ids

    def check_ids(self, ids: list[int], where: str) -> None:
        """Raise ValueError for an id that the embedding does not have."""
        if ids and max(ids) >= self.cfg.vocab_size:
            raise ValueError(
                f"{where} has token id {max(ids)}, and the model only {self.cfg.vocab_size} ids: "
                f"its tokenizer {self.tokenizer.path} ({self.tokenizer.vocab_size} ids) belongs to "
                "another model"
            )

    def _check_room(self, ids: list[int], where: str = "the prompt") -> None:
        self.check_ids(ids, where)
        if len(ids) >= self.cfg.context:
            raise ValueError(
                f"{where} has {len(ids)} tokens; the model's context is {self.cfg.context}, of "
                "which one at least must be left for new ones: shorten the prompt"
            )

    def prefill(self, ids: Sequence[int], cache: KVCache) -> tuple[Any, KVCache]:
        """Read tokens into a cache of one row; the logits [V] after the last, and the cache."""
        done = 0
        logits_V = None
        with use_mesh(self.mesh):
            while done < len(ids):
                size = next((c for c in PREFILL_CHUNKS if c >= len(ids) - done), PREFILL_CHUNKS[-1])
                part = list(ids[done : done + size])
                tokens_1T = np.zeros((1, size), np.int32)
                tokens_1T[0, : len(part)] = part
                left = np.int32(len(ids) - done)
                args = (self.params, tokens_1T, np.int32(len(part)), cache, left)
                logits_V, cache = self.run("prefill", decoding.prefill, args, (3,))
                done += len(part)
        return logits_V, cache

    def empty_cache(self, slots: int) -> KVCache:
        """A cache of one row with room for ``slots`` positions, rounded up."""
        room = self._room(slots)
        make = functools.partial(decoding.empty, self.compute, self.cfg, room)
        with use_mesh(self.mesh):
            return self.run(f"cache {room}", make, ())

    def _room(self, slots: int) -> int:
        chunk = PREFILL_CHUNKS[-1]
        # A doubling beyond the context (and a padded chunk) would be memory for nothing.
        most = -(-self.cfg.context // chunk) * chunk + chunk
        return min(max(_power(slots), 2 * chunk), most)

    def _decode(
        self, asked, rows: list[Row], most: int, settings: Settings, seed: int, stride: int,
        state: Rows | None = None, logprobs: bool = False,
    ):  # fmt: skip
        """Fill ``rows`` with tokens; yields after each stride, until all have ended."""
        room = [self.cfg.context - len(ids) for ids, _ in asked]
        most = min(most, max(room))
        if state is None:
            longest = self.cfg.context - min(room)
            # A prompt's last chunk is padded, and a row ends at the context at the latest.
            slots = max(longest + PREFILL_CHUNKS[-1], min(longest + most, self.cfg.context))
            state = self._prefilled(asked, slots, seed)
        ends = np.full(max(8, _power(len(self.eos_ids))), -1, np.int32)
        ends[: len(self.eos_ids)] = self.eos_ids
        made = 0
        while made < most and not all(row.finish for row in rows):
            count = min(stride, most - made)
            done_B = np.ones(state.done_B.shape, bool)
            done_B[: len(rows)] = [row.finish is not None for row in rows]
            state = state._replace(done_B=jnp.asarray(done_B))
            args = (self.params, state, settings, ends, np.int32(count), np.bool_(logprobs))
            with use_mesh(self.mesh):
                state, tokens_TB, logprobs_TB = self.run("decode", decoding.decode, args, (1,))
            tokens_TB, logprobs_TB = np.asarray(tokens_TB), np.asarray(logprobs_TB)
            for b, row in enumerate(rows):
                new = (tokens_TB[:count, b], logprobs_TB[:count, b])
                row.take(*new, self.eos_ids, min(most, room[b]))
            made += count
            yield
        for row in rows:
            row.finish = row.finish or "length"
        return state

    def _prefilled(self, asked, slots: int, seed: int) -> Rows:
        """Each prompt read on its own, several samples of one only once."""

        def firsts():
            before, first = None, None
            for ids, _ in asked:
                if ids != before:
                    before, first = ids, self.prefill(ids, self.empty_cache(slots))
                yield first

        self._check_memory(len(asked), self._room(slots))
        return self._rows(asked, firsts(), seed)

    def _rows(self, asked, firsts, seed: int) -> Rows:
        """Prefilled prompts (logits, cache), put in the rows of a batch one after the other."""
        batch = _power(len(asked))
        root = jax.random.key(seed)
        state: Any = None  # until the shapes of the first row are known
        with use_mesh(self.mesh):
            for b, ((ids, sample), (logits_V, cache)) in enumerate(zip(asked, firsts, strict=True)):
                if state is None:
                    make = functools.partial(decoding.empty_rows, self.compute, batch)
                    state = self.run(f"rows {batch}", make, (cache, logits_V))
                seen_V = np.zeros(self.cfg.vocab_size, bool)
                seen_V[ids] = True
                row = (np.int32(b), logits_V, cache, seen_V, jax.random.fold_in(root, sample))
                state = self.run("insert", decoding.insert, (state, *row), (0,))
        return state

    def _check_memory(self, rows: int, slots: int) -> None:
        """Raises MemoryError before a cache is made that cannot fit beside the weights."""
        L, K, H = self.cfg.shape("LKH")
        batch = _power(rows)
        cache = 2 * L * K * H * slots * self.compute.dtype.itemsize * (batch + 1)  # one being read
        held = bytes_of(self.params)
        devices = 1 if self.mesh is None else self.mesh.size
        device = jax.local_devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        have = memory_of(device, devices)
        if have is not None and (held + cache) / devices > have:
            raise MemoryError(
                f"a cache of {rows} rows of {slots} positions takes {cache / devices / 1e9:.1f} "
                f"GB a device beside {held / devices / 1e9:.1f} GB of weights, and "
                f"{device.device_kind} has {have / 1e9:.1f} GB: give fewer prompts at once, "
                'fewer new tokens, load with quantize="int8", or with a mesh over more devices'
            )

    def run(self, name: str, function, args: tuple, donated: tuple[int, ...] = ()) -> Any:
        """Call a compiled function; the first call of a shape says that it compiles."""
        leaves, tree = jax.tree.flatten(args)
        key = (name, tree, *((x.shape, x.dtype) for x in leaves))
        if key not in self._compiled:
            with _notice(name):
                if name in ("prefill", "decode", "score"):
                    function = functools.partial(function, self._graphdef)
                jitted = jax.jit(function, donate_argnums=donated)
                # jax 0.10 calls no program compiled ahead with arrays of 4 bits: it takes them to
                # be laid out in another way.
                ahead = all(x.dtype != jnp.int4 for x in leaves)
                self._compiled[key] = jitted.lower(*args).compile() if ahead else jitted
                return self._compiled[key](*args)
        return self._compiled[key](*args)


def memory_of(device: jax.Device, sharing: int = 1) -> float | None:
    """Bytes of memory for a device's arrays, where it says; a CPU's is shared by ``sharing``."""
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / sharing
    return (device.memory_stats() or {}).get("bytes_limit")


def _power(least: int) -> int:
    """The first power of two that is not smaller."""
    return 1 << max(least - 1, 0).bit_length()


@contextlib.contextmanager
def _notice(name: str):
    """Says on a terminal that it compiles; a step takes seconds to minutes the first time."""
    shown = name in ("prefill", "decode", "score") and sys.stderr.isatty()
    if shown:
        print(f"compiling {name} ...", end="", file=sys.stderr, flush=True)
    yield
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _named(texts: list[Any]) -> Iterator[tuple[str, Any]]:
    """Each prompt, and what errors call it."""
    for i, text in enumerate(texts):
        yield f"prompts[{i}]" if len(texts) > 1 else "the prompt", text


def check_eos(eos_ids: Any, cfg: ModelConfig) -> tuple[int, ...]:
    """The ids that end a text, each once.

    Raises:
      ValueError: what is no list of ids of the model.
    """
    several = isinstance(eos_ids, Sequence) and not isinstance(eos_ids, str)
    ids: list[Any] = list(eos_ids) if several else [eos_ids]
    for i in ids:
        whole = isinstance(i, numbers.Integral) and not isinstance(i, bool)
        if not whole or not 0 <= i < cfg.vocab_size:
            raise ValueError(
                f"the end-of-text id {i!r:.60} must be a whole number from 0 to "
                f"{cfg.vocab_size - 1}, an id of the model"
            )
    return tuple(dict.fromkeys(map(int, ids)))


def check_arguments(texts: list[Any], max_new_tokens: Any, n: Any, seed: Any) -> None:
    """Raise ValueError for the first argument of :meth:`LLM.generate` that cannot be."""
    for where, text in _named(texts):
        check_text(where, text)
    check_whole("max_new_tokens", max_new_tokens, 1)
    check_whole("n", n, 1)
    check_whole("seed", seed, 0)
    if seed >= 2**32:  # a key is made of 32 bits: others would repeat those of smaller seeds
        raise ValueError(f"seed={seed} must be less than 2**32")


def stops_of(stop: str | Sequence[str]) -> list[str]:
    """The stop strings as a list; raises ValueError for what is no text, or empty."""
    stops = [stop] if isinstance(stop, str) or not isinstance(stop, Sequence) else list(stop)
    if any(not isinstance(s, str) or not s for s in stops):
        raise ValueError(f"stop={stop!r} must be texts that are not empty")
    return stops
