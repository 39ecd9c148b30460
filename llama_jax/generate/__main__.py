"""The command line of sampling: continue a prompt, printed as it comes.

python -m llama_jax.generate checkpoints/tiny "def main(" --temperature 0.7
python -m llama_jax.generate checkpoints/tiny - --json < prompts.txt
"""

# jax takes seconds to import: functions import what needs it, so that Ctrl-C and a bad argument are
# answered at once.
import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

_GRACE = 1.0
"""Seconds from Ctrl-C until the process ends, whatever it is doing."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parser().parse_args(argv)
    with _interruptible() as interrupted:
        try:
            return _answer(args)
        except BrokenPipeError:
            # Who read has enough, as `| head -1`; what is still in the buffer goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except BaseException as e:
            # A library that is being imported makes another error of Ctrl-C.
            if isinstance(e, KeyboardInterrupt) or interrupted.is_set():
                print("\nstopped", file=sys.stderr)
                return 130
            if isinstance(e, ValueError | MemoryError | OSError):
                print(f"error: {e}", file=sys.stderr)
                return 2
            raise


def load(folder: str, **compute: Any) -> Any:
    """:func:`llama_jax.load`."""
    from llama_jax.generate import load as loading

    return loading.load(folder, **compute)


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C ends the process within a second, in a compilation too.

    Python itself raises KeyboardInterrupt only between two of its own instructions, and a
    compilation is one that takes seconds to minutes. The event says that Ctrl-C came.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while signals := os.read(reading, 1):
            if signals[0] == signal.SIGINT:
                interrupted.set()
                if not over.wait(_GRACE):
                    os.write(2, b"\nstopped\n")
                    os._exit(130)

    over = threading.Event()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield interrupted
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(writing)
        watcher.join()
        os.close(reading)


def _answer(args: argparse.Namespace) -> int:
    from llama_jax.generate.llm import check_arguments, stops_of
    from llama_jax.generate.sampler import Greedy, Sample

    sampling: Greedy | Sample = Greedy()
    chosen = dict(top_k=args.top_k, top_p=args.top_p, min_p=args.min_p)
    chosen["repetition_penalty"] = args.repetition_penalty
    if args.temperature is not None or any(x is not None for x in chosen.values()):
        heat = 1.0 if args.temperature is None else args.temperature
        sampling = Sample(temperature=heat, **chosen)
    # Before the weights are read, which may take minutes.
    check_arguments([args.prompt], args.max_new_tokens, args.n, args.seed)
    stops = stops_of(args.stop)
    more: dict[str, Any] = dict(max_new_tokens=args.max_new_tokens, seed=args.seed, stop=stops)
    llm = load(args.checkpoint, dtype=args.dtype, quantize=args.quantize)
    more["sampling"] = sampling
    if args.prompt != "-":
        _continue(llm, args.prompt, args, more)
        return 0
    for number, line in enumerate(sys.stdin, 1):
        try:
            _continue(llm, line.rstrip("\n"), args, more)
        except ValueError as e:
            raise ValueError(f"line {number}: {e}") from None
    return 0


def _continue(llm: Any, prompt: str, args: argparse.Namespace, more: dict[str, Any]) -> None:
    if args.json:
        made = llm.generate([prompt], n=args.n, logprobs=True, **more)[0]
        for g in made if args.n > 1 else [made]:
            print(json.dumps({"prompt": prompt, **dataclasses.asdict(g)}), flush=True)
    elif args.n > 1:
        for text in llm.generate(prompt, n=args.n, **more):
            print(prompt + text, end="\n\n", flush=True)
    else:
        pieces = llm.stream(prompt, **more)
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """One line, without the usage of all options."""
        self.exit(2, f"error: {message} (--help lists all)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m llama_jax.generate",
        description="Continue a prompt with a model, printed as it comes. Greedy, unless a setting "
        "of sampling is given.",
    )
    arg = parser.add_argument
    arg("checkpoint", help="folder of a run, or of converted weights")
    arg("prompt", help='text to continue; "-" reads one from each line of standard input')
    arg("--max-new-tokens", type=int, default=128, metavar="T", help="default: 128")
    arg("--temperature", type=float, help="sample; 1 is the model's own distribution")
    arg("--top-k", type=int, metavar="K", help="only the K likeliest tokens")
    arg("--top-p", type=float, metavar="P", help="the likeliest that together reach P")
    arg("--min-p", type=float, metavar="P", help="those at least P times as likely as the best")
    arg("--repetition-penalty", type=float, metavar="R", help="above 1: fewer repetitions")
    arg("--n", type=int, default=1, help="continuations of each prompt")
    arg("--seed", type=int, default=0, help="the same seed gives the same text")
    arg("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    arg("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else bfloat16")
    arg("--quantize", choices=["int8", "int4"], help="the layers' matrices in fewer bits")
    arg("--json", action="store_true", help="an object a line: text, ids, logprobs, finish")
    return parser


if __name__ == "__main__":
    sys.exit(main())
