"""The command ``python -m llama_jax.generate``: continue a prompt, or chat, in a terminal."""

# jax takes seconds to import. Functions import what needs it, so that Ctrl-C and bad arguments get
# an immediate answer.
import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_GRACE = 1.0
"""Maximum seconds from Ctrl-C to the end of the process."""


class Status:
    """The exit status of a command."""

    code = 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parser().parse_intermixed_args(argv)
    with command_errors() as status:
        _answer(args)
    return status.code


@contextlib.contextmanager
def command_errors() -> Iterator[Status]:
    """Turn errors for people into one line, and Ctrl-C into "stopped"; sets the exit status."""
    status = Status()
    with _interruptible() as interrupted:
        try:
            yield status
        except BrokenPipeError:
            # The reader has exited, as in `| head -1`: discard the rest of the buffer.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status.code = 141
        except BaseException as e:
            expected = isinstance(e, ValueError | MemoryError | OSError)
            # A library interrupted during its import may raise another error, before the thread
            # that sets the event has run.
            if isinstance(e, KeyboardInterrupt) or interrupted.wait(0 if expected else 0.2):
                print("\nstopped", file=sys.stderr)
                status.code = 130
            elif expected:
                from llama_jax.io import file_error

                print(f"error: {file_error(e)}", file=sys.stderr)
                status.code = 2
            else:
                raise


def load(folder: str, **compute: Any) -> Any:
    """:func:`llama_jax.load`."""
    from llama_jax.generate.load import load

    return load(folder, **compute)


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """End the process within a second of Ctrl-C, also during a compilation.

    Python raises KeyboardInterrupt only between two of its instructions, and a compilation is a
    single one that takes seconds to minutes. The event is set by Ctrl-C.
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
                if not ended.wait(_GRACE):
                    os.write(2, b"\nstopped\n")
                    os._exit(130)

    def stop(number: int, frame: FrameType | None) -> None:
        """Within an import, an exception can end a library with a crash."""
        interrupted_in = frame
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                os.write(2, b"\nstopped\n")
                os._exit(130)
            frame = frame.f_back
        signal.default_int_handler(number, interrupted_in)

    ended = threading.Event()
    replaced = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if replaced:
        signal.signal(signal.SIGINT, stop)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield interrupted
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        if replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(writing)
        watcher.join()
        os.close(reading)


def _answer(args: argparse.Namespace) -> None:
    from llama_jax.data.tokenizer import check_text
    from llama_jax.generate.sampler import Greedy, Sample, check_integer, check_options

    sampling: Greedy | Sample = Greedy()
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: x for name in names if (x := getattr(args, name)) is not None}
    if given:
        sampling = Sample(**given)
    max_new_tokens = args.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = 256 if args.chat else 128
    options: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens, sampling=sampling, seed=args.seed, stop=args.stop
    )
    # Checked before the weights are read, which may take minutes.
    if args.prompt is None and not args.chat:
        raise ValueError("give a PROMPT to continue, or --chat")
    if args.chat and (args.json or args.top_logprobs or args.n != 1):
        raise ValueError("--chat prints one answer as text: leave out --json, --top-logprobs, --n")
    check_text("the prompt", args.prompt or "")
    check_integer("n", args.n, 1)
    check_options(**options, top_logprobs=args.top_logprobs)
    llm = load(
        args.checkpoint,
        adapter=args.adapter,
        dtype=args.dtype,
        quantize=args.quantize,
        cache=args.cache,
    )
    if args.chat:
        _chat(llm, args.prompt, options)
        return
    if args.prompt != "-":
        _continue(llm, args.prompt, args, options)
        return
    for number, line in enumerate(sys.stdin, 1):
        try:
            _continue(llm, line.rstrip("\n"), args, options)
        except ValueError as e:
            raise ValueError(f"line {number}: {e}") from None


def _continue(llm: Any, prompt: str, args: argparse.Namespace, options: dict[str, Any]) -> None:
    if args.json or args.top_logprobs:
        more = dict(n=args.n, logprobs=True, top_logprobs=args.top_logprobs)
        made = llm.generate([prompt], **more, **options)[0]
        for g in made if args.n > 1 else [made]:
            print(json.dumps({"prompt": prompt, **dataclasses.asdict(g)}), flush=True)
    elif args.n > 1:
        for text in llm.generate(prompt, n=args.n, **options):
            print(prompt + text, end="\n\n", flush=True)
    else:
        pieces = llm.stream(prompt, **options)
        # The prompt is printed with the first piece, after all notices of compilation.
        print(prompt + next(pieces, ""), end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


def _chat(llm: Any, message: str | None, options: dict[str, Any]) -> None:
    """Answer one message, or the lines of the terminal until Ctrl-D."""
    chat = llm.chat()
    for line in [message] if message not in (None, "-") else _messages():
        try:
            for piece in chat.stream(line, **options):
                print(piece, end="", flush=True)
        except ValueError as e:  # a conversation that no longer fits the context
            if not sys.stdin.isatty():
                raise
            print(f"error: {e}", file=sys.stderr)
        print(flush=True)


def _messages() -> Iterator[str]:
    """Lines of the standard input that are not empty."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401 (input then has a history and can be edited)

        print("Type a message; Ctrl-D ends the chat.", file=sys.stderr)
    with contextlib.suppress(EOFError):
        while True:
            if (line := input("> " if terminal else "")).strip():
                yield line
    print(end="\n" * terminal)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage of all options."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message} (--help lists all)\n")


def model_options(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """Add the options of how a model is loaded; returns the function that adds others to them."""
    arg = parser.add_argument_group("model").add_argument
    arg("--adapter", metavar="FOLDER", help="LoRA adapter: a run with a section [lora], or PEFT's")
    arg("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else bfloat16")
    arg("--quantize", choices=["int8", "int4"], help="matrices of the layers in 8 or 4 bits")
    return arg


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m llama_jax.generate",
        usage="%(prog)s CHECKPOINT PROMPT [options]\n       %(prog)s CHECKPOINT --chat [MESSAGE]",
        description="Continue a prompt, or chat, and print the text while it is generated. Greedy, "
        "unless an option of sampling is given.",
        epilog='example: %(prog)s checkpoints/tiny "def main(" --temperature 0.7 --top-p 0.95',
    )
    arg = parser.add_argument
    arg("checkpoint", metavar="CHECKPOINT", help="folder of a run, or of converted, Hugging Face "
        "or Meta weights; or a GGUF file")  # fmt: skip
    arg("prompt", metavar="PROMPT", nargs="?", help='text to continue, or a message; "-" reads one '
        "per line from stdin")  # fmt: skip
    arg("--chat", action="store_true", help="answer the message, or those typed until Ctrl-D, with "
        "the model's chat template")  # fmt: skip
    arg = parser.add_argument_group("length and output").add_argument
    arg("--max-new-tokens", type=int, metavar="T", help="default: 128, with --chat 256")
    arg("--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT; repeatable")
    arg("--n", type=int, default=1, metavar="N", help="continuations per prompt (default: 1)")
    arg("--json", action="store_true", help="a JSON object per line: text, ids, logprobs, finish")
    arg("--top-logprobs", type=int, default=0, metavar="N", help="--json with the N most likely "
        "tokens at each position, at most 20")  # fmt: skip
    arg = parser.add_argument_group("sampling").add_argument
    arg("--temperature", type=float, metavar="X", help="1 is the model's own distribution")
    arg("--top-k", type=int, metavar="K", help="keep only the K most likely tokens")
    arg("--top-p", type=float, metavar="P", help="keep the most likely tokens whose probabilities "
        "add up to P")  # fmt: skip
    arg("--min-p", type=float, metavar="P", help="keep tokens at least P times as likely as the "
        "most likely")  # fmt: skip
    arg("--repetition-penalty", type=float, metavar="R", help="above 1: fewer repetitions")
    arg(
        "--seed", type=int, default=0, metavar="N", help="equal seeds give equal texts (default: 0)"
    )
    arg = model_options(parser)
    arg("--cache", choices=["int8"], help="keys and values in 8 bits")
    return parser


if __name__ == "__main__":
    sys.exit(main())
