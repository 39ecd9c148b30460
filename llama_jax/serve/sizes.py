"""The constants of a server, which its compiled programs depend on, and what they follow from."""

import dataclasses
import functools
import re
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from llama_jax.generate.decode import device_memory
from llama_jax.generate.llm import LLM
from llama_jax.generate.sampler import MAX_TOP_LOGPROBS
from llama_jax.serve.request import Sampling
from llama_jax.serve.sampling import row_of
from pallas_kernels.rotary_prefill_attention import MAX_DECODE_QUERIES

DEFAULT_CONTEXT = 4096
MEMORY_FRACTION = 0.9
"""of the device's memory for weights, cache and other arrays that stay; the rest is for the
intermediate results of the programs"""
FREE_FRACTION = 0.5
"""of the free memory of a computer, for the cache on its CPU: other programs need memory too"""
LOGPROB, TOP_LOGPROBS = 1, 2
"""What to compute beside a token: its log p; also the most likely tokens."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The constants of a server."""

    slots: int
    """rows that are decoded together, B"""
    page: int
    """positions per page of the cache, and tokens per chunk of a prompt"""
    row_pages: int
    """largest number of pages of a row"""
    pages: int
    """pages of the cache, without page 0"""
    vocab_size: int

    @property
    def mask_words(self) -> int:
        """int32 words with one bit per id."""
        return -(-self.vocab_size // 32)

    @functools.cached_property
    def chunk(self) -> np.dtype:
        """The argument of :func:`prefill_chunk`, made of 4-byte numbers."""
        words = self.mask_words
        fields = {
            k: v for row in row_of(Sampling(), self.vocab_size) for k, v in row._asdict().items()
        }
        sampling = [(name, value.dtype, value.shape) for name, value in fields.items()]
        return np.dtype([
            ("tokens", np.int32, self.page),
            ("targets", np.int32, self.page),  # the ids after them, to compute log p of
            ("start", np.int32),  # position of the first token
            ("count", np.int32),  # the tokens after these are padding
            ("length", np.int32),  # of the whole prompt
            ("scores", np.int32),  # 0, LOGPROB or TOP_LOGPROBS of the prompt's tokens
            ("last", np.int32),  # whether to draw a token
            ("slot", np.int32),
            ("logprobs", np.int32),  # 0, LOGPROB or TOP_LOGPROBS of the drawn token
            ("pages", np.int32, self.row_pages),
            ("seed", np.uint32),
            ("index", np.uint32),
            *sampling,
            ("context", np.int32, words),  # one bit per id that the prompt contains
            ("mask", np.int32, words),  # one bit per id that the grammar allows
        ])  # fmt: skip

    @functools.cached_property
    def row(self) -> np.dtype:
        """A row of an argument of :func:`decode_step`."""
        row_pages = ("pages", np.int32, self.row_pages)
        return np.dtype([("active", np.int32), ("logprobs", np.int32), row_pages])

    @functools.cached_property
    def drawn(self) -> np.dtype:
        """The result for one token; the token is -1 if a logit is not a number."""
        return np.dtype([
            ("token", np.int32), ("logprob", np.float32),
            ("top_ids", np.int32, self.num_top), ("top_logprobs", np.float32, self.num_top),
        ])  # fmt: skip

    @property
    def num_top(self) -> int:
        """Most likely tokens that are computed if some are wanted."""
        return min(MAX_TOP_LOGPROBS, self.vocab_size)


def checked_context(llm: LLM, context: int | None) -> int:
    """The context of the server; raises ValueError if the model has a shorter one."""
    cfg = llm.cfg
    longest = cfg.context
    if cfg.rope.type == "dynamic":
        longest = min(cfg.rope.original_context or longest, longest)
    if context is None:
        context = min(DEFAULT_CONTEXT, longest)
    if not 1 < context <= cfg.context:
        raise ValueError(f"context={context} must be from 2 to the model's context, {cfg.context}")
    if context > longest:
        raise ValueError(
            f"context={context}: with dynamic rotary frequencies, a text of more than {longest} "
            "tokens would change with the lengths of other requests; give at most that"
        )
    return context


def page_size(llm: LLM) -> int:
    """Positions per page, which is also the number of prompt tokens per call."""
    if _on_cpu(llm):
        return 128
    if llm._engine.devices()[0].platform == "tpu":  # the kernel holds all queries of a key head
        queries = MAX_DECODE_QUERIES // (llm.cfg.num_heads // llm.cfg.num_kv_heads)
        return min(256, 1 << (queries.bit_length() - 1))
    return 256


def default_slots(llm: LLM) -> int:
    """Requests that are decoded together.

    On a CPU, a step takes longer with each slot, used or not, and few people ask at once.
    """
    return 4 if _on_cpu(llm) else 16


def default_prefix_cache(llm: LLM) -> int:
    """Bytes for the starts of earlier prompts. They are allocated at the start."""
    return 512 << 20 if _on_cpu(llm) else 2 << 30


def _on_cpu(llm: LLM) -> bool:
    return llm._engine.devices()[0].platform == "cpu"


def free_memory() -> int | None:
    """Bytes that programs on this computer could still take, if known; a file cache counts as
    free."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable: +(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def num_pages(llms: Iterable[LLM], wanted: int, least: int, page_bytes: int) -> int:
    """As many pages as wanted, or as fit in memory with the weights; on a CPU, in a part of the
    memory that is free.

    Args:
      llms: the models; arrays that they share count once.
      wanted: number of pages.
      least: those of one request of full length.
      page_bytes: bytes of a page.

    Raises:
      MemoryError: fewer than ``least`` pages fit.
    """
    llms = list(llms)
    devices = llms[0]._engine.devices()
    memory = device_memory(devices[0], len(devices))
    if memory is None:
        return wanted
    arrays = {id(x): x.nbytes for llm in llms for x in jax.tree.leaves(llm.params)}
    weights = sum(arrays.values())
    room = MEMORY_FRACTION * memory * len(devices) - weights
    count = min(wanted, int(room // page_bytes) - 1)  # page 0 is there too
    if count < least:
        gb = lambda x: f"{x / len(devices) / 1e9:.1f} GB"
        raise MemoryError(
            f"one request of full length takes {gb(least * page_bytes)} of cache per device in "
            f"addition to {gb(weights)} of weights, and {devices[0].device_kind} has "
            f'{gb(memory * len(devices))}: give a smaller context, load with cache="int8" or '
            'quantize="int8", or with a mesh over more devices'
        )
    free = free_memory() if _on_cpu(llms[0]) else None
    if free is not None and count * page_bytes > FREE_FRACTION * free:
        # A multiple of ``least``: the compiled programs depend on it, and are found again.
        count = min(count, max(1, int(FREE_FRACTION * free // (least * page_bytes))) * least)
    return count
