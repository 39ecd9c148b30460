"""Continuous batching: one thread reads prompts in chunks and adds tokens to all running requests.

The programs of :mod:`llama_jax.serve.programs` have constant shapes, a request has its own pages,
sampler and keys, and keys and values that decoding made are never shared. So the tokens of a
request do not depend on other requests.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llama_jax.generate.llm import LLM
from llama_jax.model.cache import bytes_per_position
from llama_jax.model.sharding import use_mesh
from llama_jax.serve.pages import Pages
from llama_jax.serve.programs import BoundPrograms, Programs
from llama_jax.serve.request import GenerationRequest, Metrics, QueueFull, Status, Stopping
from llama_jax.serve.running import Running
from llama_jax.serve.sizes import Sizes, checked_context, num_pages, page_size

_LOG = logging.getLogger(__name__)
MAX_CHUNKS = 4
"""Most chunks of prompts between two steps of decoding."""


class Engine:
    """Answers requests with a model and its adapters; see :class:`llama_jax.serve.request.Engine`.

    Args:
      llm: the base.
      slots: requests that are decoded together.
      context: most tokens of a prompt and its answer; default: 4096, or the model's context if that
        is shorter.
      prefix_cache_bytes: memory for the starts of prompts of earlier requests.
      adapters: models with the same base, by name.
      max_waiting: requests that may wait for a slot.
      max_waiting_tokens: tokens that their prompts may have together; default: 1,048,576, or more
        if 128 prompts of full length, as one HTTP request may have, need more.
      timeout: most seconds of a request without a deadline of its own, waiting included.
      page: positions per page of the cache, and prompt tokens per call; default: by platform.
      metrics: told about all requests.

    Raises:
      ValueError: an invalid argument, or a model that the server cannot answer with.
      MemoryError: not even one request of full length fits in memory.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        slots: int = 16,
        context: int | None = None,
        prefix_cache_bytes: int = 0,
        adapters: Mapping[str, LLM] | None = None,
        max_waiting: int = 256,
        max_waiting_tokens: int | None = None,
        timeout: float | None = None,
        page: int | None = None,
        metrics: Metrics | None = None,
    ):
        self.llms = {"": llm, **(adapters or {})}
        self.fingerprint = ""
        """of the weights and of how they are computed, once the programs are compiled"""
        self.context = checked_context(llm, context)
        _check_adapters(llm, adapters or {})
        self._metrics = metrics or Metrics()
        page = page or page_size(llm)
        compute = llm._engine.compute
        position_bytes = bytes_per_position(llm.cfg, compute.cache_dtype or compute.dtype)
        page_bytes = page * position_bytes
        row_pages = -(-self.context // page)
        kept = prefix_cache_bytes // page_bytes
        count = num_pages(self.llms.values(), slots * row_pages + kept, row_pages, page_bytes)
        self._sizes = Sizes(slots, page, row_pages, count, llm.cfg.vocab_size)
        self._pages = Pages(count, kept)
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens or max(1 << 20, 128 * self.context)
        self._timeout = timeout

        self._numbers = itertools.count(1)
        self._lock = threading.Condition()
        # Shared with other threads, under the lock:
        self._waiting: collections.deque[Running] = collections.deque()
        self._waiting_tokens = 0
        self._cancelled: set[int] = set()
        self._stopping = False
        self._cancel_at = math.inf  # time.monotonic() at which a shutdown cancels what is left
        # Of the engine's thread:
        self._free_slots = list(range(slots - 1, -1, -1))
        self._running: list[Running] = []  # in order of admission
        self._unread: collections.deque[Callable[[], None]] = collections.deque()
        self._rows_B = np.zeros(slots, self._sizes.row)
        self._on_device: dict[str, tuple[bytes, Any]] = {}
        self._programs: dict[str, BoundPrograms] = {}
        self._thread: threading.Thread | None = None
        self._ready, self._last_step, self._seconds = False, time.monotonic(), 1.0

    def start(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compile all programs, and start the thread.

        Args:
          on_progress: called with the number of programs that are compiled, and of all.
        """
        model, digest = self.llms[""]._engine, hashlib.sha256()
        with use_mesh(model.mesh):
            programs = Programs(model, self._sizes)
            for i, (name, llm) in enumerate(self.llms.items()):
                on_progress(i, len(self.llms))
                self._programs[name] = programs.compile(llm.params)
                digest.update(self._programs[name].try_out())
        on_progress(len(self.llms), len(self.llms))
        self.fingerprint = digest.hexdigest()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._ready = True

    def submit(self, request: GenerationRequest) -> int:
        """Queue a request; returns its number.

        Raises:
          ValueError: an invalid request.
          QueueFull: the queue has no room.
          Stopping: the engine takes no more requests.
        """
        self._check(request)
        if request.deadline is None and self._timeout is not None:
            deadline = time.monotonic() + self._timeout
            request = dataclasses.replace(request, deadline=deadline)
        running = Running(next(self._numbers), request, self._sizes, self._metrics)
        with self._lock:
            if self._stopping or self._thread is None or not self._thread.is_alive():
                raise Stopping
            tokens = self._waiting_tokens + len(request.ids)
            # A queue without requests takes any prompt.
            if len(self._waiting) >= self._max_waiting or (
                self._waiting and tokens > self._max_waiting_tokens
            ):
                rounds = 1 + len(self._waiting) // self._sizes.slots
                raise QueueFull(math.ceil(rounds * self._seconds))
            if not (self._running or self._waiting):
                self._last_step = time.monotonic()  # no step was due before
            self._waiting_tokens = tokens
            self._waiting.append(running)
            self._lock.notify()
        return running.number

    def cancel(self, number: int) -> None:
        """End a request, running or queued, within one step; unknown numbers are ignored."""
        with self._lock:
            self._cancelled.add(number)
            self._lock.notify()

    def status(self) -> Status:
        """What is running now."""
        with self._lock:
            running, waiting = len(self._running), len(self._waiting)
        age = time.monotonic() - self._last_step if running or waiting else 0.0
        alive = self._thread is not None and self._thread.is_alive()
        pages = self._pages
        return Status(
            self._ready, alive, age, running, waiting, pages.used, pages.cached, pages.count
        )

    def drain(self, seconds: float) -> None:
        """Refuse new requests, finish those accepted, cancel those left after ``seconds``, and end
        the thread."""
        with self._lock:
            self._stopping = True
            self._cancel_at = time.monotonic() + seconds
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()

    def _check(self, request: GenerationRequest) -> None:
        ids, new, V = request.ids, request.max_new_tokens, self._sizes.vocab_size
        if request.model not in self.llms:
            raise ValueError(f"model {request.model!r} is not one of {sorted(self.llms)}")
        if not ids or min(ids) < 0 or max(ids) >= V:
            raise ValueError(f"the prompt must have ids, each from 0 to {V - 1}")
        if new < 0 or (new == 0 and not request.prompt_logprobs):
            raise ValueError(f"max_new_tokens={new} must be 1 or more")
        if len(ids) + new > self.context:
            raise ValueError(
                f"{len(ids)} tokens of the prompt and {new} new ones are more than the context of "
                f"{self.context}"
            )

    def _run(self) -> None:
        error = "the server is shutting down"
        try:
            with use_mesh(self.llms[""]._engine.mesh):
                while self._wait():
                    self._tick()
        except BaseException as e:
            error = f"the engine failed: {type(e).__name__}: {e}"
            raise
        finally:
            with self._lock:
                self._stopping = True
                left = [*self._running, *self._waiting]
                self._waiting.clear()
                self._waiting_tokens = 0
            for running in left:
                self._end(running, "error", error)

    def _wait(self) -> bool:
        """Wait for work; False at the end of a shutdown."""
        with self._lock:
            if not (self._running or self._waiting or self._unread):
                while not (self._waiting or self._stopping):
                    self._cancelled.clear()
                    self._lock.wait()
            return bool(self._running or self._waiting or self._unread or not self._stopping)

    def _tick(self) -> None:
        """Start a few chunks of prompts and one step of decoding, and read earlier results.

        The device computes one result while the host handles the one before.
        """
        self._end_cancelled()
        self._admit()
        started = False
        for _ in range(self._chunks_before_a_step()):
            started |= self._start_chunk()
        for name in self.llms:
            started |= self._start_step(name)
        if not started:
            self._read(0)

    def _end_cancelled(self) -> None:
        now = time.monotonic()
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            waiting = list(self._waiting)
        shutdown = now >= self._cancel_at
        for running in [*self._running, *waiting]:
            deadline = running.request.deadline
            if running.number in cancelled or shutdown:
                self._end(running, "cancelled")
            elif deadline is not None and now >= deadline:
                self._end(running, "deadline")

    def _admit(self) -> None:
        """Give slots and pages to the first requests of the queue, for all tokens they may need."""
        while self._free_slots and self._waiting:
            running = self._waiting[0]
            reserved = self._pages.reserve(running.shareable, running.num_pages)
            if reserved is None:
                return
            with self._lock:
                self._waiting.popleft()
                self._waiting_tokens -= len(running.ids)
                self._running.append(running)
            slot = self._free_slots.pop()
            running.slot, running.pages = slot, reserved[0]
            tokenizer = self.llms[running.request.model].tokenizer
            self._alone(running, running.start, tokenizer, reserved[1])

    def _chunks_before_a_step(self) -> int:
        """As many as prompts wait for each row that decodes, because a step takes the same time for
        few rows as for many."""
        prompts = sum(not r.prefilled for r in self._running)
        decoding = len(self._running) - prompts
        return max(1, min(MAX_CHUNKS, prompts // max(1, decoding)))

    def _start_chunk(self) -> bool:
        """Start reading a chunk of the oldest prompt that is not complete."""
        running = next((r for r in self._running if not r.prefilled), None)
        if running is None:
            return False
        shareable, page_size = running.shareable, self._sizes.page
        while (m := running.computed // page_size) < len(shareable):
            # Another request may have computed it since this one was admitted.
            page = self._pages.share(shareable[m], running.pages[m])
            if page is None:
                break
            running.reuse(page)
        chunk = self._alone(running, running.next_chunk)
        if chunk is None:
            return True
        out = self._programs[running.request.model].prefill_chunk(chunk)
        if m < len(running.keys):
            self._pages.publish(running.pages[m], running.keys[m])
        if running.prefilled:
            row = self._rows_B[running.slot]
            row["logprobs"], row["pages"] = chunk["logprobs"], chunk["pages"]
        self._unread.append(functools.partial(self._read_chunk, running, chunk, out))
        self._read(1)
        return True

    def _start_step(self, name: str) -> bool:
        """Start a step of the rows of one model; the masks of grammars need their last tokens."""
        of_model = lambda: [r for r in self._running if r.request.model == name]
        while self._unread and any(r.waits_for_mask for r in of_model()):
            self._read(len(self._unread) - 1)
        mask_BW = None
        constrained = [r for r in of_model() if r.steppable and r.request.grammar is not None]
        if constrained:
            mask_BW = np.full((self._sizes.slots, self._sizes.mask_words), -1, np.int32)
            for running in constrained:
                self._alone(running, running.fill_mask, mask_BW[running.slot])
        rows = [r for r in of_model() if r.steppable]
        if not rows:
            return False
        programs = self._programs[name]
        self._rows_B["active"] = 0
        self._rows_B["active"][[r.slot for r in rows]] = 1
        content = self._rows_B.tobytes()
        if name not in self._on_device or self._on_device[name][0] != content:
            self._on_device[name] = content, programs.rows(self._rows_B)
        out = programs.decode_step(self._on_device[name][1], mask_BW)
        for running in rows:
            running.drawn += 1
        self._unread.append(functools.partial(self._read_step, programs, rows, out))
        self._read(1)
        return True

    def _read_chunk(self, running: Running, chunk: np.ndarray, out: tuple[Any, Any]) -> None:
        programs = self._programs[running.request.model]
        drawn = programs.result(out[0])
        self._last_step = time.monotonic()
        if chunk["scores"]:
            scores_C = programs.result(out[1])
            self._alone(running, running.receive_scores, scores_C, int(chunk["start"]))
        if chunk["last"]:
            self._alone(running, running.receive, drawn)

    def _read_step(self, programs: BoundPrograms, rows: list[Running], out: Any) -> None:
        drawn_B = programs.result(out)
        self._last_step = time.monotonic()
        for running in rows:
            self._alone(running, running.receive, drawn_B[running.slot])

    def _read(self, left: int) -> None:
        """Read the oldest results until only the newest ``left`` are not read."""
        while len(self._unread) > left:
            self._unread.popleft()()

    def _alone(self, running: Running, function: Callable, *args: Any) -> Any:
        """Call a function of a request that has not ended; an error ends this request alone."""
        if running.finish is not None:
            return None
        try:
            result = function(*args)
        except Exception as e:
            if not isinstance(e, ValueError):
                _LOG.warning("request %d failed", running.number, exc_info=True)
            self._end(running, "error", str(e) or type(e).__name__)
            return None
        if running.finish is not None:
            self._release(running)
        return result

    def _end(self, running: Running, reason: str, error: str | None = None) -> None:
        """End a request for another reason than its tokens."""
        with contextlib.suppress(Exception):  # its receiver is gone
            running.end(reason, error)
        running.finish = running.finish or reason
        self._release(running)

    def _release(self, running: Running) -> None:
        """Free what an ended request holds."""
        self._pages.release(running.pages)
        running.pages = []
        with self._lock:
            if running in self._running:
                self._running.remove(running)
                self._free_slots.append(running.slot)
                self._seconds += 0.1 * (running.seconds - self._seconds)
            elif running in self._waiting:
                self._waiting.remove(running)
                self._waiting_tokens -= len(running.ids)


def _check_adapters(llm: LLM, adapters: Mapping[str, LLM]) -> None:
    for name, other in adapters.items():
        same = other.cfg == llm.cfg and other._engine.compute == llm._engine.compute
        if not name or not same or other._engine.mesh != llm._engine.mesh:
            raise ValueError(
                f"the adapter {name!r} must have a name, and be made with llm.with_adapter(...) of "
                "the model that is served"
            )
