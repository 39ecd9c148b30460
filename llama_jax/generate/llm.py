"""A model that generates, streams, scores and chats."""

import dataclasses
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import MODELS, ModelConfig
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.generate.decode import (
    DECODE_STEPS_PER_CALL,
    MAX_BATCH,
    PREFILL_CHUNKS,
    DecodeState,
    Engine,
    Request,
    next_power_of_two,
)
from llama_jax.generate.detokenize import Generation, OutputSequence, stream_text, top_dicts
from llama_jax.generate.prompts import Prompt, check_eos, check_ids, named, split_prompts
from llama_jax.generate.sampler import (
    Greedy,
    Options,
    Sample,
    check_integer,
    check_options,
    check_top_logprobs,
)
from llama_jax.model.cache import KVCache
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.quantize import is_quantized

if TYPE_CHECKING:
    from llama_jax.generate.chat import Chat
    from llama_jax.generate.scores import Scores


class LLM:
    """A model with its tokenizer, ready to generate; made by :func:`llama_jax.load`.

    Sequences of a batch have their own keys, stops and lengths, and each prompt is read on its own:
    the text of a prompt does not depend on the other prompts or on its position among them. (The
    logits of a batch differ from those of a single sequence in the last bits, because matrix
    products of another shape do.)

    Example::

        llm = llama_jax.load("checkpoints/tiny")
        llm.generate("def main(", max_new_tokens=64)
        llm.generate(["class ", "import "], sampling=llama_jax.Sample(temperature=0.8), seed=1)
        for piece in llm.stream("def main("):
            print(piece, end="")
        llm.score("for i in range(10):")  # colored text in a notebook
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
        checkpoint: Path | None = None,
    ):
        """Make a model of weights in memory.

        Args:
          cfg: sizes of the model.
          params: its weights, stacked or with one entry per layer.
          tokenizer: may have fewer ids than the embedding has rows.
          compute: dtype and sharding.
          eos_ids: EOS ids, which end a text; default: that of the tokenizer.
          mesh: the devices that hold the weights, if more than one.
          chat_template: Jinja text in the format of Hugging Face.
          no_template: why there is no chat template, for the error of :meth:`chat`.
          checkpoint: folder that the weights were read from, which adapters are compared with.

        Raises:
          ValueError: the model does not have an id of ``eos_ids``.
        """
        self.cfg, self.tokenizer = cfg, tokenizer
        self.chat_template, self.no_template = chat_template, no_template
        self.eos_ids = check_eos(eos_ids, cfg) if eos_ids is not None else ()
        if eos_ids is None and tokenizer.eos_id is not None:
            self.eos_ids = (tokenizer.eos_id,)
        self._engine = self._base = Engine(cfg, params, compute, mesh)
        self._checkpoint, self._adapter = checkpoint, ""

    def __repr__(self) -> str:
        cfg, engine = self.cfg, self._engine
        same = lambda m: dataclasses.replace(m, context=cfg.context) == cfg  # type: ignore[type-var]
        name = next((k for k, m in MODELS.items() if same(m)), None)
        devices = engine.devices()
        leaves = jax.tree.leaves(engine.params, is_leaf=is_quantized)
        dtypes = {f"int{w.bits}" for w in leaves if is_quantized(w)}
        cache = f", {engine.compute.cache_dtype} cache" if engine.compute.cache_dtype else ""
        adapter = f", adapter {self._adapter}" if self._adapter else ""
        return (
            f"LLM({name or f'{cfg.num_layers} layers of width {cfg.dim}'}, "
            f"{cfg.num_params / 1e6:,.1f} million parameters, "
            f"{' and '.join([*dtypes, engine.compute.dtype.name])}, context {cfg.context:,}, "
            f"{len(devices)} x {devices[0].device_kind}, "
            f"{engine.weight_bytes / len(devices) / 1e6:,.1f} MB of weights per device"
            f"{cache}{adapter})"
        )

    @property
    def params(self) -> dict[str, Any]:
        """The weights."""
        return self._engine.params

    def with_adapter(self, folder: str | Path) -> "LLM":
        """The same base with a LoRA adapter, in place of that of this model if it has one.

        The arrays of the base are shared: several adapters take the memory of one base.

        Args:
          folder: a run with a section [lora], or an adapter in PEFT's format. Its tokenizer, EOS
            ids and chat template are used, if it has them.

        Raises:
          ConfigError: the folder holds no adapter, a damaged one, or one for other sizes.
        """
        from llama_jax.generate.adapters import attach, check_base, open_adapter

        adapter = open_adapter(folder, self._checkpoint)
        check_base(adapter, self.cfg, self._checkpoint)
        return attach(self, adapter)

    @overload
    def generate(
        self, prompts: Prompt, *, max_new_tokens: int = ..., sampling: Greedy | Sample = ...,
        seed: int = ..., stop: str | Sequence[str] = ...,
    ) -> str: ...  # fmt: skip

    @overload
    def generate(
        self, prompts: list[str] | list[list[int]], *, max_new_tokens: int = ...,
        sampling: Greedy | Sample = ..., seed: int = ..., stop: str | Sequence[str] = ...,
    ) -> list[str]: ...  # fmt: skip

    @overload
    def generate(
        self, prompts: Prompt, *, max_new_tokens: int = ..., sampling: Greedy | Sample = ...,
        seed: int = ..., stop: str | Sequence[str] = ..., logprobs: Literal[True],
        top_logprobs: int = ...,
    ) -> Generation: ...  # fmt: skip

    @overload
    def generate(
        self, prompts: list[str] | list[list[int]], *, max_new_tokens: int = ...,
        sampling: Greedy | Sample = ..., seed: int = ..., stop: str | Sequence[str] = ...,
        logprobs: Literal[True], top_logprobs: int = ...,
    ) -> list[Generation]: ...  # fmt: skip

    @overload
    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, max_new_tokens: int = ...,
        sampling: Greedy | Sample = ..., n: int = ..., seed: int = ...,
        stop: str | Sequence[str] = ..., logprobs: bool = ..., top_logprobs: int = ...,
    ) -> Any: ...  # fmt: skip

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        sampling: Greedy | Sample = Greedy(),  # noqa: B008 (frozen)
        n: int = 1,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        logprobs: bool = False,
        top_logprobs: int = 0,
    ) -> Any:
        """Continue a prompt, or each of a list; returns the continuation without the prompt.

        Args:
          prompts: text or token ids, or a list of these. The BOS id is added before text, not
            before token ids. Empty text means the BOS id alone.
          max_new_tokens: largest number of new tokens; the model's context is a limit as well.
          sampling: :class:`Greedy` or :class:`Sample`.
          n: number of continuations of each prompt.
          seed: equal seeds give equal texts. Equal prompts of a list have different samples.
          stop: strings that end a text; they are not part of it.
          logprobs: return :class:`Generation` instead of text.
          top_logprobs: return :class:`Generation` with the log-probabilities of this number of
            most likely tokens at each position, at most 20.

        Returns:
          A text for one prompt (a list of n texts if n > 1), a list of these for a list.

        Raises:
          ValueError: an invalid argument, or a prompt that does not fit the context.
          MemoryError: the caches of all sequences do not fit in memory with the weights.
        """
        single, items = split_prompts(prompts)
        check_integer("n", n, 1)
        options = check_options(max_new_tokens, sampling, seed, stop, logprobs, top_logprobs)
        requests = _requests([self._ids_of(p, where) for where, p in named(items)], n)
        made: list[Generation] = []
        # Dynamic rotary frequencies depend on the longest sequence of a batch.
        batch = 1 if self.cfg.rope.type == "dynamic" else MAX_BATCH
        for first in range(0, len(requests), batch):
            part = requests[first : first + batch]
            sequences = [OutputSequence(self.tokenizer, r.ids, options.stops) for r in part]
            for _ in self._decode(part, sequences, options, DECODE_STEPS_PER_CALL):
                pass
            made += [sequence.result() for sequence in sequences]
        out: list[Any] = made if options.logprobs else [g.text for g in made]
        grouped = out if n == 1 else [out[i : i + n] for i in range(0, len(out), n)]
        return grouped[0] if single else grouped

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        sampling: Greedy | Sample = Greedy(),  # noqa: B008 (frozen)
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Yield the text of :meth:`generate` in pieces while it is generated.

        A piece never ends inside a character, or inside what may become a stop string.

        Args:
          prompt: text or token ids.
          max_new_tokens: largest number of new tokens.
          sampling: :class:`Greedy` or :class:`Sample`.
          seed: equal seeds give equal texts.
          stop: strings that end the text; they are not part of it.

        Raises:
          ValueError: an invalid argument, or a prompt that does not fit the context.
        """
        options = check_options(max_new_tokens, sampling, seed, stop)
        ids = self._ids_of(prompt)
        sequence = OutputSequence(self.tokenizer, ids, options.stops)
        return stream_text(sequence, self._decode([Request(ids, 0)], [sequence], options, 1))

    @overload
    def score(self, texts: Prompt, *, top_logprobs: int = ...) -> "Scores": ...

    @overload
    def score(
        self, texts: list[str] | list[list[int]], *, top_logprobs: int = ...
    ) -> "list[Scores]": ...

    def score(self, texts: Prompt | Sequence[Prompt], *, top_logprobs: int = 0) -> Any:
        """Log p and entropy of each token of a text, or of each text of a list, in nats.

        Args:
          texts: text or token ids, or a list of these; each is scored from the start of a document.
          top_logprobs: also give the log-probabilities of this number of most likely tokens at each
            place, at most 20.

        Returns:
          :class:`Scores`, shown as colored text in a notebook; for a list, a list of them.

        Raises:
          ValueError: neither text nor token ids of this model.
        """
        from llama_jax.generate import scores

        single, ids = self._texts(texts)
        num_top = check_top_logprobs(top_logprobs)
        made = scores.score_all(self._engine, self.tokenizer, ids, num_top)
        return made[0] if single else made

    def perplexity(self, texts: Prompt | Sequence[Prompt]) -> float:
        """exp of the mean of -log p over all tokens of all texts, each scored on its own."""
        from llama_jax.generate import scores

        return scores.perplexity(self._engine, self.tokenizer, self._texts(texts)[1])

    def chat(self, system: str | None = None) -> "Chat":
        """Start a conversation with a model that has a chat template.

        Args:
          system: a system message.

        Raises:
          ValueError: the model has no chat template, or an invalid one.
        """
        from llama_jax.generate.chat import Chat

        return Chat(self, system)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the BOS id if the tokenizer has one."""
        return self._ids_of(text)

    def _ids_of(self, prompt: Any, where: str = "the prompt") -> list[int]:
        """Checked ids of a prompt, which errors call ``where``."""
        ids = check_ids(prompt, where, self.tokenizer, self.cfg.vocab_size)
        if isinstance(prompt, str) and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id, *ids]
        if not ids:
            raise ValueError(f"{where} is empty, which requires a tokenizer with a BOS token")
        self._check_fits(ids, where)
        return ids

    def _texts(self, texts: Any) -> tuple[bool, list[list[int]]]:
        """Whether there is a single text, and the ids of each text."""
        single, items = split_prompts(texts)
        ids_of = lambda where, text: check_ids(text, where, self.tokenizer, self.cfg.vocab_size)
        return single, [ids_of(where, text) for where, text in named(items, "text")]

    def _check_fits(self, ids: list[int], where: str = "the prompt") -> None:
        if len(ids) >= self.cfg.context:
            raise ValueError(
                f"{where} has {len(ids)} tokens; the model's context is {self.cfg.context}, of "
                "which at least one must remain for new tokens: shorten the prompt"
            )

    def _resume(
        self,
        ids: list[int],
        known: list[int],
        cache: KVCache | None,
        sequence: OutputSequence,
        options: Options,
        steps_per_call: int,
    ) -> Generator[DecodeState, None, None]:
        """Continue ``ids`` with a cache that may already hold the first ones; steps as in _decode.

        Args:
          ids: of the prompt.
          known: ids that the cache holds; as many as equal ``ids`` are used.
          cache: of one row; its memory is reused for the new one. None: make one.
          sequence: gets the new tokens.
          options: checked settings.
          steps_per_call: tokens between two items.
        """
        engine = self._engine
        if cache is None:
            cache, known = engine.empty_cache(self.cfg.context + PREFILL_CHUNKS[-1]), []
        same = 0
        while same < min(len(known), len(ids) - 1) and known[same] == ids[same]:
            same += 1
        cache = cache._replace(lengths_B=jnp.full(1, same, jnp.int32))
        requests = [Request(ids, 0)]
        state = engine.insert_all(requests, [engine.prefill(ids[same:], cache)], options.seed)
        yield from self._decode(requests, [sequence], options, steps_per_call, state)

    def _decode(
        self,
        requests: list[Request],
        sequences: list[OutputSequence],
        options: Options,
        steps_per_call: int,
        state: DecodeState | None = None,
    ) -> Generator[DecodeState, None, None]:
        """Add tokens to ``sequences`` until all have ended; yields after each call of the model."""
        space = [self.cfg.context - len(r.ids) for r in requests]
        max_new_tokens = min(options.max_new_tokens, max(space))
        if state is None:
            state = self._engine.start(requests, max_new_tokens, options.seed)
        stop_ids = np.full(max(8, next_power_of_two(len(self.eos_ids))), -1, np.int32)
        stop_ids[: len(self.eos_ids)] = self.eos_ids
        num_generated = 0
        while num_generated < max_new_tokens and not all(s.finish for s in sequences):
            count = min(steps_per_call, max_new_tokens - num_generated)
            done_B = np.ones(state.done_B.shape, bool)
            done_B[: len(sequences)] = [s.finish is not None for s in sequences]
            state, drawn = self._engine.decode(
                state._replace(done_B=jnp.asarray(done_B)), options.settings, stop_ids, count,
                options.logprobs, options.top_logprobs > 0,
            )  # fmt: skip
            for b, sequence in enumerate(sequences):
                top_ids, top = drawn.top_ids_TBN[:count, b], drawn.top_logprobs_TBN[:count, b]
                sequence.append(
                    drawn.tokens_TB[:count, b], drawn.logprobs_TB[:count, b], self.eos_ids,
                    min(max_new_tokens, space[b]), top_dicts(top_ids, top, options.top_logprobs),
                )  # fmt: skip
            num_generated += count
            yield state


def _requests(prompts: list[list[int]], n: int) -> list[Request]:
    """n requests per prompt; equal prompts have different samples."""
    seen: Counter[tuple[int, ...]] = Counter()
    requests = []
    for ids in prompts:
        first = seen[tuple(ids)]
        requests += [Request(ids, first + i) for i in range(n)]
        seen[tuple(ids)] += n
    return requests
