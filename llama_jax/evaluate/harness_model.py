"""A model of this package as a model of lm-evaluation-harness.

Prompts, truncation and answers are those of the harness's own ``hf`` model on the same weights.
"""

import copy
import functools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from llama_jax.data.chat_template import ChatTemplate
from llama_jax.data.tokenizer import Tokenizer, check_text
from llama_jax.evaluate.journal import Answer, Journal
from llama_jax.evaluate.special_tokens import SpecialTokens, special_tokens
from llama_jax.generate.decode import (
    DECODE_STEPS_PER_CALL,
    MAX_BATCH,
    Request,
    next_power_of_two,
)
from llama_jax.generate.detokenize import Detokenizer, OutputSequence
from llama_jax.generate.sampler import Greedy, Options, Sample, check_options

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from llama_jax.generate.llm import LLM

Pair = tuple[list[int], list[int]]
"""Token ids of a context and of its continuation."""
Scorer = Callable[[Sequence[Pair]], Iterable[tuple[int, float, bool]]]
"""Yields, in any order, the index of a pair, log p of its continuation in nats, and whether each
token of the continuation is the most likely one."""
Found = tuple[int, Any, bool]
"""Index of a request, its answer, and whether its prompt was truncated."""

MAX_NEW_TOKENS = 256
"""New tokens if a task does not say how many; the harness's default."""
MAX_POSITIONS = 1 << 15
"""Cache positions of all sequences that are generated at once."""
_SAMPLER = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class HarnessModel(TemplateLM):
    """A model that answers the harness's requests.

    Each distinct request is computed once; equal requests with sampling have different samples.
    :attr:`truncated` has the ids of the documents, by task, whose prompt was cut on the left.

    Example::

        model = HarnessModel.from_llm(llama_jax.load("checkpoints/tiny"))
        lm_eval.simple_evaluate(model=model, tasks=["hellaswag"])
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        score: Scorer,
        context: int,
        *,
        tokens: SpecialTokens | None = None,
        llm: "LLM | None" = None,
        journal: Journal | None = None,
    ):
        """Make a model.

        Args:
          tokenizer: of the model.
          score: scores continuations, as ``likelihood.score_continuations`` without the engine.
          context: largest number of tokens that the model reads.
          tokens: BOS and EOS; default: those of the tokenizer's folder.
          llm: generates text; without it, tasks that need text are an error.
          journal: keeps the answers; default: in memory.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = context
        self.truncated: dict[str, set[int]] = defaultdict(set)
        self._score, self._llm = score, llm
        self._tokens = tokens or special_tokens(tokenizer)
        self._journal = journal or Journal()
        # The continuations of a question have the same context.
        self._encode = functools.lru_cache(maxsize=64)(self._encode_text)
        self._prefix_text = ""
        if not (self._tokens.bos is None and self._tokens.eos is None):
            self._prefix_text = tokenizer.mark(self.prefix_token_id)

    @classmethod
    def from_llm(cls, llm: "LLM", journal: Journal | None = None) -> "HarnessModel":
        """A model for all types of requests.

        Args:
          llm: a loaded model.
          journal: keeps the answers; default: in memory.
        """
        from llama_jax.evaluate.likelihood import score_continuations

        score = functools.partial(score_continuations, llm._engine)
        tokens = special_tokens(llm.tokenizer, llm)
        return cls(
            llm.tokenizer, score, llm.cfg.context, tokens=tokens, llm=llm, journal=journal
        )  # fmt: skip

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict | None = None
    ) -> "HarnessModel":
        """The model of ``lm_eval --model_args checkpoint=PATH,dtype=float32``."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "HarnessModel":
        """The model of ``--model_args`` as a dict.

        Args:
          arg_dict: checkpoint, and arguments of :func:`llama_jax.load` with ``tensor`` in place of
            ``mesh``.
          additional_config: batch sizes and the device of torch, which are not used.

        Raises:
          ValueError: an unknown argument, or no checkpoint.
        """
        from llama_jax.evaluate.load import load_model

        known = ("checkpoint", "adapter", "dtype", "quantize", "cache", "tensor")
        if unknown := [name for name in arg_dict if name not in known]:
            raise ValueError(f"unknown model_args {unknown[0]!r}; they are {', '.join(known)}")
        if "checkpoint" not in arg_dict:
            raise ValueError("give the checkpoint: --model_args checkpoint=PATH")
        checkpoint = str(arg_dict["checkpoint"])
        return cls.from_llm(load_model(**(arg_dict | {"checkpoint": checkpoint})))

    # Tokens ---------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int | None:
        return self._tokens.eos

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without context: BOS, or EOS if there is no BOS."""
        prefix = self._tokens.eos if self._tokens.bos is None else self._tokens.bos
        if prefix is None:
            raise ValueError(
                f"the tokenizer {self.tokenizer.path} has neither a BOS nor an EOS token: texts "
                "without context cannot be scored"
            )
        return prefix

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW_TOKENS

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Ids of a text in which names of control tokens stand for these tokens.

        Args:
          string: the text.
          add_special_tokens: whether to begin with BOS if the tokenizer does so; None: only if the
            text does not begin with it.
          left_truncate_len: keep only this number of ids at the end.
          **kwargs: not used.
        """
        if add_special_tokens is None:
            add_special_tokens = not (
                self._prefix_text and has_bos_prefix(string, self._prefix_text)
            )
        ids = self._encode(string, add_special_tokens and self._tokens.adds_bos)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _encode_text(self, text: str, bos: bool) -> list[int]:
        check_text("the text of a request", text)
        ids = self.tokenizer.encode_marked(text)
        return [self._tokens.bos, *ids] if bos and self._tokens.bos is not None else ids

    # Chat -----------------------------------------------------------------------------------------

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        llm = self._llm
        if llm is None or llm.chat_template is None:
            raise ValueError(
                (llm and llm.no_template)
                or "this model has no chat template: it is a base model; evaluate it without a "
                "chat template"
            )
        return ChatTemplate(llm.chat_template, f"the chat template of {llm.tokenizer.path.parent}")

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.path.parent).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the chat template; None if none is to be used."""
        return self._template.source if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation.

        Args:
          chat_history: messages.
          add_generation_prompt: whether the model answers the last message; otherwise it continues
            that message.

        Raises:
          ValueError: the model has no chat template, or it refuses the messages.
        """
        text = functools.partial(
            self._template.text, tokenizer=self.tokenizer, continues=not add_generation_prompt
        )
        try:
            return text(chat_history)
        except ValueError:
            without_system = [m for m in chat_history if m["role"] != "system"]
            if len(without_system) == len(chat_history):
                raise
            return text(without_system)

    # Requests -------------------------------------------------------------------------------------

    def loglikelihood(
        self, requests: list["Instance"], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        answers = self._answer("loglikelihood", requests, self._score_requests, disable_tqdm)
        return [(logprob, greedy) for logprob, greedy in answers]

    def loglikelihood_rolling(
        self, requests: list["Instance"], disable_tqdm: bool = False
    ) -> list[float]:
        return self._answer("loglikelihood_rolling", requests, self._score_texts, disable_tqdm)

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        return self._answer("generate_until", requests, self._generate, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = {i: (logprob, greedy) for i, logprob, greedy, _ in self._scored(
            [(context, continuation) for _, context, continuation in requests]
        )}  # fmt: skip
        return [found[i] for i in range(len(requests))]

    def _answer(
        self,
        kind: str,
        requests: list["Instance"],
        compute: Callable[[list[tuple[tuple, int]]], Iterator[list[Found]]],
        disable_tqdm: bool,
    ) -> list[Any]:
        """The answers to all requests, in order; those that the journal has are not computed.

        Args:
          kind: type of the requests.
          requests: of all tasks; a repeated request is there several times.
          compute: yields the answers to (arguments, repeat).
          disable_tqdm: whether to hide the progress bar.
        """
        journal, repeats = self._journal, Counter[str]()
        keys, new = [], dict[str, tuple[tuple, int]]()
        for request in requests:
            key, repeat = journal.key(kind, request.args, 0), 0
            if kind == "generate_until" and is_sampled(request.args[1]):
                repeat, repeats[key] = repeats[key], repeats[key] + 1
                key = journal.key(kind, request.args, repeat)
            keys.append(key)
            if key not in journal:
                new.setdefault(key, (request.args, repeat))
        new_keys, total = list(new), len(set(keys))
        with tqdm(
            total=total, initial=total - len(new), desc=kind, disable=disable_tqdm or None
        ) as bar:
            for found in compute(list(new.values())) if new else ():
                journal.add((new_keys[i], Answer(x, truncated)) for i, x, truncated in found)
                bar.update(len(found))
        answers = [journal[key] for key in keys]
        for request, answer in zip(requests, answers, strict=True):
            if answer.truncated:
                self.truncated[request.task_name].add(request.doc_id)
        return [answer.value for answer in answers]

    def _score_requests(self, requests: list[tuple[tuple, int]]) -> Iterator[list[Found]]:
        pairs = [self._pair(*args) for args, _ in requests]
        for i, logprob, greedy, truncated in self._scored(pairs):
            yield [(i, [logprob, greedy], truncated)]

    def _pair(self, context: str, continuation: str) -> Pair:
        """Ids of a request; blanks at the end of the context belong to the continuation."""
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else (
            [self.prefix_token_id], ids
        )  # fmt: skip

    def _scored(self, pairs: list[Pair]) -> Iterator[tuple[int, float, bool, bool]]:
        """Index, log p, whether greedy, and whether truncated, of each pair."""
        fitting = []
        for context, continuation in pairs:
            if not 0 < len(continuation) <= self.max_length:
                text = self.tokenizer.decode([*context[-8:], *continuation[:8]])
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, and must have from 1 to "
                    f"{self.max_length}, the model's context, as in the harness's own models: "
                    f"leave its task out, or use a model with a longer context; near {text!r}"
                )
            fitting.append((context[-(self.max_length + 1 - len(continuation)) :], continuation))
        for i, logprob, greedy in self._score(fitting):
            if not math.isfinite(logprob):
                text = self.tokenizer.decode(pairs[i][1])
                raise ValueError(
                    f"the model gives log p = {logprob} to the continuation {text!r:.80}: its "
                    "weights or its logits are not finite"
                )
            yield i, float(logprob), bool(greedy), len(fitting[i][0]) < len(pairs[i][0])

    def _score_texts(self, requests: list[tuple[tuple, int]]) -> Iterator[list[Found]]:
        """log p of whole texts, in windows that fit the context."""
        pairs: list[Pair] = []
        owners: list[int] = []
        missing = Counter[int]()
        for i, ((text,), _) in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            new = list(map(make_disjoint_window, windows))
            if not new:
                yield [(i, 0.0, False)]
            pairs += new
            missing[i] = len(new)
            owners += [i] * len(new)
        logprobs = defaultdict(list)
        for window, logprob, *_ in self._scored(pairs):
            i = owners[window]
            logprobs[i].append(logprob)
            missing[i] -= 1
            if not missing[i]:
                yield [(i, math.fsum(logprobs.pop(i)), False)]

    # Generation -----------------------------------------------------------------------------------

    def _generate(self, requests: list[tuple[tuple, int]]) -> Iterator[list[Found]]:
        """Texts of requests, in batches of equal settings and similar length."""
        groups = defaultdict(list)
        for i, ((_, settings), _) in enumerate(requests):
            groups[json.dumps(settings, sort_keys=True)].append(i)
        for members in groups.values():
            settings = requests[members[0]][0][1]
            until, options = self._options(settings)
            longest = self.max_length - options.max_new_tokens
            if longest < 1:
                raise ValueError(
                    f"a task asks for {options.max_new_tokens} new tokens, which must be less "
                    f"than the model's context, {self.max_length}"
                )
            prompts = {}
            for i in members:
                ids = self.tok_encode(requests[i][0][0]) or [self.prefix_token_id]
                prompts[i] = Request(ids[-longest:], requests[i][1]), len(ids) > longest
            # Samples of one prompt are neighbors, and are read once.
            members.sort(key=lambda i: (-len(prompts[i][0].ids), *prompts[i][0]))
            while members:
                made = self._generate_some([prompts[i][0] for i in members], until, options)
                yield [(i, text, prompts[i][1]) for i, text in zip(members, made, strict=False)]
                members = members[len(made) :]

    def _options(self, settings: dict[str, Any]) -> tuple[list[str], Options]:
        """Strings that end a text, and the options of generation.

        Raises:
          ValueError: a setting that this package does not have.
        """
        known = normalize_gen_kwargs(settings, self.max_gen_toks)
        eos = None if self._tokens.eos is None else self.tokenizer.mark(self._tokens.eos)
        stops = [text for text in known.pop("until") if text is not None]  # "until: null"
        until = handle_stop_sequences(stops, eos or None)
        max_new_tokens, sampled = known.pop("max_gen_toks"), known.pop("do_sample")
        given = {name: known.pop(name) for name in _SAMPLER if name in known}
        if known.pop("num_beams", 1) != 1 or known:
            name = next(iter(known), "num_beams")
            raise ValueError(
                f"the generation setting {name}={settings[name]!r} of a task is not supported; "
                f"settings are until, do_sample, max_gen_toks, {', '.join(_SAMPLER)}"
            )
        sampling = Sample(**given) if sampled else Greedy()
        if not sampled and given.get("repetition_penalty"):
            sampling = Sample(temperature=0.0, repetition_penalty=given["repetition_penalty"])
        stops = [text for text in until if text and text not in self.tokenizer.controls]
        return until, check_options(max_new_tokens, sampling, seed=0, stop=stops)

    def _generate_some(
        self, requests: list[Request], until: list[str], options: Options
    ) -> list[str]:
        """The texts of the first requests, as many as are generated at once."""
        if self._llm is None:
            raise ValueError("this model scores texts but does not generate: choose other tasks")
        llm = copy.copy(self._llm)
        controls = self.tokenizer.controls
        ends = [*llm.eos_ids, *(controls[text] for text in until if text in controls)]
        llm.eos_ids = tuple(dict.fromkeys(ends))
        positions = next_power_of_two(len(requests[0].ids) + options.max_new_tokens)
        rows = min(len(requests), MAX_BATCH, max(1, MAX_POSITIONS // positions))
        # Dynamic rotary frequencies depend on the longest sequence of a batch.
        rows = 1 if llm.cfg.rope.type == "dynamic" else rows
        batch = requests[:rows]
        sequences = [OutputSequence(self.tokenizer, r.ids, options.stops) for r in batch]
        for state in llm._decode(batch, sequences, options, DECODE_STEPS_PER_CALL):
            if np.isnan(np.asarray(state.logits_BV)[:rows]).any():
                raise ValueError("the logits of the model are NaN: its weights are not finite")
        return [
            postprocess_generated_text(self._decode_after(r.ids, s.result().ids), until, None)
            for r, s in zip(batch, sequences, strict=True)
        ]

    def _decode_after(self, prompt: list[int], ids: Sequence[int]) -> str:
        """Text of ids that follow a prompt: decoded alone, they may lose a space."""
        detokenizer = Detokenizer(self.tokenizer, prompt)
        return "".join(map(detokenizer.push, ids)) + detokenizer.rest()


def is_sampled(settings: dict[str, Any]) -> bool:
    """Whether the settings of a generation draw tokens at random."""
    return bool(normalize_gen_kwargs(settings)["do_sample"])
