"""``llama-jax VERB ...``, the same as ``python -m llama_jax.VERB ...``."""

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator

import llama_jax
from llama_jax.train import interrupt

VERBS = {
    "corpus": "make clean text of raw public dumps, such as those of Wikipedia and arXiv",
    "prepare": "tokenize text into token shards",
    "train": "pretrain or fine-tune a model",
    "generate": "sample text from a model, or chat with it",
    "serve": "answer requests of OpenAI's API over HTTP, with a chat page",
    "evaluate": "evaluate a model on the benchmarks of the LLaMA paper, or others",
    "report": "collect results of other commands on one HTML page",
    "convert": "convert weights between Meta, Hugging Face, GGUF, PEFT and our checkpoints",
    "verify": "check every file of a run, a checkpoint or prepared data",
    "plan": "predict memory, speed and cost of a run on any TPU or GPU",
}


def main(argv: list[str] | None = None) -> int | str | None:
    """Run a command; returns its exit status."""
    is_command = argv is None
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, VERBS))
        print("usage: llama-jax VERB ...\n")
        print(*(f"  {verb:{width}}  {what}" for verb, what in VERBS.items()), sep="\n")
        print("\nllama-jax VERB --help describes the arguments of a verb; llama-jax --version.")
        return 0
    if argv[0] == "--version":
        from llama_jax.versions import source_version

        print(f"llama_jax {llama_jax.__version__}, {source_version()}")
        return 0
    if argv[0] not in VERBS:
        print(
            f"error: unknown command {argv[0]!r}; the commands are {', '.join(VERBS)}",
            file=sys.stderr,
        )
        return 2
    name = f"llama_jax.{argv[0]}.__main__"
    if argv[0] == "train" and is_command:
        interrupt.start_command()  # before the imports, which take seconds
        return importlib.import_module(name).main(argv[1:])
    with _stopped_by_ctrl_c() if is_command else contextlib.nullcontext():
        module = importlib.import_module(name)
    return module.main(argv[1:])


@contextlib.contextmanager
def _stopped_by_ctrl_c() -> Iterator[None]:
    """Ctrl-C ends the process at once: raised within an import, it is a traceback of a library."""

    def stop(*_: object) -> None:
        os.write(2, b"\nstopped\n")
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not ignored, as in the background of a script
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
