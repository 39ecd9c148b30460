"""Load on a server of OpenAI's API: tokens/s, requests/s, times to the first and between tokens.

    python -m benchmarks.serve http://127.0.0.1:8000 [--model M] [--streams 1 4 16] [--rounds 3]
        [--prompt-tokens 105] [--new-tokens 64] [--shared-prefix 512]
        [--fields '{"ignore_eos": true}']

Each of ``--streams`` clients sends a request, reads its stream to the end, and sends the next. A
round has as many requests as clients, but at least 4. Prompts are common English words, most of
which are one token in the usual vocabularies; no two prompts begin alike. What the server counts
(``usage``) is what is reported. With ``--shared-prefix N``, single requests with N words more are
measured, first all different, then with the same N first words.

Nothing but Python's standard library is needed. A server that refuses ``ignore_eos`` needs
``--fields '{}'``; a key is taken from OPENAI_API_KEY. Printed: a table, then one line of JSON.
"""

import argparse
import http.client
import itertools
import json
import math
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from benchmarks.common import environment

WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or"
    " had an they which one you were all her she there would their we him been has when who will"
    " no more if out so up said what its about than into them can only other time new some could"
    " these two may first then do any like my now over such our man me even most made after also"
    " did many off before must well back through years where much your way down should because"
    " long each just those people too how little good world make very year still see own work men"
    " day get here old life both between being under three never know same last another while us"
)
LEAST_REQUESTS = 4
"""per round"""


class Answer(NamedTuple):
    """When the parts of one answer arrived, in seconds of time.perf_counter()."""

    start: float
    times: list[float]
    """of each part with text"""
    end: float
    prompt_tokens: int
    new_tokens: int


class Load:
    """A server and what to ask of it.

    Args:
      url: of the server, without /v1.
      model: name; empty for the first that the server lists.
      prompt_tokens: words of a prompt.
      new_tokens: tokens to generate.
      fields: more fields of each request.
    """

    def __init__(
        self, url: str, model: str, prompt_tokens: int, new_tokens: int, fields: dict[str, Any]
    ):
        self._url = urlsplit(url)
        self._prompt_tokens = prompt_tokens
        self._numbers = itertools.count()
        key = os.environ.get("OPENAI_API_KEY")
        self._headers = {"Content-Type": "application/json"}
        self._headers |= {"Authorization": f"Bearer {key}"} if key else {}
        model = model or self._get("/v1/models")["data"][0]["id"]
        self._body = {
            "model": model, "max_tokens": new_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, **fields,
        }  # fmt: skip

    def _connect(self) -> http.client.HTTPConnection:
        secure = self._url.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        return kind(self._url.hostname or "", self._url.port, timeout=600)

    def _get(self, path: str) -> Any:
        connection = self._connect()
        connection.request("GET", self._url.path.rstrip("/") + path, headers=self._headers)
        with connection.getresponse() as response:
            return json.loads(_checked(response).read())

    def ask(self, prefix: str = "") -> Answer:
        """One request with a prompt that no other request has."""
        prompt = words(next(self._numbers), self._prompt_tokens)
        body = json.dumps(self._body | {"prompt": f"{prefix} {prompt}" if prefix else prompt})
        start = time.perf_counter()
        connection = self._connect()
        path = self._url.path.rstrip("/") + "/v1/completions"
        connection.request("POST", path, body, self._headers)
        times, usage = [], None
        with _checked(connection.getresponse()) as response:
            for line in response:
                data = line.removeprefix(b"data:").strip()
                if data == line.strip() or data == b"[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise RuntimeError(f"the server ended the stream: {chunk['error']}")
                if any(choice.get("text") for choice in chunk.get("choices", ())):
                    times.append(time.perf_counter())
                usage = chunk.get("usage") or usage
        connection.close()
        if not times or usage is None:
            raise RuntimeError("the server sent no text, or no usage at the end of the stream")
        end = time.perf_counter()
        return Answer(start, times, end, usage["prompt_tokens"], usage["completion_tokens"])

    def round(self, streams: int) -> list[Answer]:
        """The answers to ``streams`` clients at once."""
        with ThreadPoolExecutor(streams) as clients:
            ready = threading.Barrier(streams)  # threads exist before the clock starts
            list(clients.map(lambda _: ready.wait(), range(streams)))
            number = max(streams, LEAST_REQUESTS)
            return list(clients.map(lambda _: self.ask(), range(number)))

    def prefix(self, shared: int, repeats: int) -> dict[str, Any]:
        """Times to the first token with ``shared`` first words that are new, and that are known."""
        start = next(self._numbers)
        new = [self.ask(words(start + 1_000_003 * (i + 1), shared)) for i in range(repeats)]
        known = words(start + 500_009, shared)
        self.ask(known)
        again = [self.ask(known) for _ in range(repeats)]
        ttft = [statistics.median(a.times[0] - a.start for a in part) for part in (new, again)]
        return {
            "shared_tokens": shared, "prompt_tokens": mean([a.prompt_tokens for a in new]),
            "ttft_new_s": digits(ttft[0]), "ttft_shared_s": digits(ttft[1]),
            "ratio": digits(ttft[1] / ttft[0]),
        }  # fmt: skip


def words(seed: int, number: int) -> str:
    """Random words, others for each seed."""
    return " ".join(random.Random(seed).choices(WORDS.split(), k=number))


def _checked(response: http.client.HTTPResponse) -> http.client.HTTPResponse:
    if response.status != 200:
        raise RuntimeError(f"HTTP {response.status}: {response.read().decode(errors='replace')}")
    return response


def quantile(values: Sequence[float], fraction: float) -> float:
    """The smallest value that at least ``fraction`` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(fraction * len(values)) - 1)]


def mean(values: Sequence[float]) -> float:
    return digits(statistics.mean(values), 4)


def digits(value: float, number: int = 3) -> float:
    """Rounded to significant digits."""
    return float(f"{value:.{number}g}")


def summary(streams: int, rounds: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """What the rounds of one number of clients show; rates are medians over the rounds."""
    answers = [answer for part in rounds for answer in part]
    seconds = [max(a.end for a in part) - min(a.start for a in part) for part in rounds]
    tokens = [sum(a.new_tokens for a in part) for part in rounds]
    rates = [n / s for n, s in zip(tokens, seconds, strict=True)]
    ttft = [a.times[0] - a.start for a in answers]
    gaps = [b - a for answer in answers for a, b in itertools.pairwise(answer.times)]
    return {
        "streams": streams,
        "requests": len(answers),
        "prompt_tokens": mean([a.prompt_tokens for a in answers]),
        "new_tokens": mean([a.new_tokens for a in answers]),
        "output_tokens_per_s": digits(statistics.median(rates)),
        "output_tokens_per_s_range": [digits(min(rates)), digits(max(rates))],
        "requests_per_s": digits(
            statistics.median(len(p) / s for p, s in zip(rounds, seconds, strict=True))
        ),
        "ttft_p50_s": digits(statistics.median(ttft)),
        "ttft_p99_s": digits(quantile(ttft, 0.99)),
        "itl_p50_ms": digits(1e3 * statistics.median(gaps)) if gaps else None,
        "itl_p99_ms": digits(1e3 * quantile(gaps, 0.99)) if gaps else None,
    }


COLUMNS = (
    "streams", "requests", "prompt_tokens", "new_tokens", "output_tokens_per_s", "requests_per_s",
    "ttft_p50_s", "ttft_p99_s", "itl_p50_ms", "itl_p99_ms",
)  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([row[c] for c in COLUMNS] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of the load."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arg = parser.add_argument
    arg("--streams", type=int, nargs="+", default=[1, 4, 16], metavar="C")
    arg("--prompt-tokens", type=int, default=105, metavar="N")
    arg("--new-tokens", type=int, default=64, metavar="N")
    arg("--rounds", type=int, default=3)
    arg("--shared-prefix", type=int, default=0, metavar="N")
    arg("--fields", type=json.loads, default={"ignore_eos": True}, metavar="JSON")
    return parser


def main() -> None:
    options = parser(__doc__)
    options.add_argument("url")
    options.add_argument("--model", default="")
    args = options.parse_args()
    result: dict[str, Any] = {"machine": environment(()), "load": []}
    try:
        load = Load(args.url, args.model, args.prompt_tokens, args.new_tokens, args.fields)
        load.ask()  # a first connection, and whatever the server does once
        for streams in args.streams:
            rounds = [load.round(streams) for _ in range(args.rounds)]
            result["load"].append(summary(streams, rounds))
        if args.shared_prefix:
            result["prefix"] = load.prefix(args.shared_prefix, max(3, args.rounds))
    except (OSError, RuntimeError, ValueError, LookupError, http.client.HTTPException) as e:
        sys.exit(f"{args.url}: {type(e).__name__}: {e}")
    print(table(result["load"]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
