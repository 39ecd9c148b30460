"""The command ``python -m llama_jax.serve``: answer requests of OpenAI's API over HTTP."""

# jax takes seconds to import. Functions import what needs it, so that bad arguments get an
# immediate answer.
import argparse
import errno
import hashlib
import importlib
import math
import re
import socket
import sys
from pathlib import Path
from typing import Any

from llama_jax.generate.__main__ import Parser, command_errors, load, model_options
from llama_jax.storage.paths import as_path

_SIZES = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}


class PortInUse(Exception):
    """Another program listens."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parser().parse_args(argv)
    with command_errors() as status:
        try:
            _serve(args)
        except PortInUse as e:
            print(f"error: {e}", file=sys.stderr)
            status.code = 1
    return status.code


def _serve(args: argparse.Namespace) -> None:
    for package in ("starlette", "uvicorn", "llguidance", "prometheus_client"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            raise ValueError(
                f"serving needs the package {package}: pip install 'llama_jax[serve]'"
            ) from None
    from llama_jax.serve.access import LOOPBACK, Access, read_keys
    from llama_jax.serve.app import OPEN_PATHS

    keys = read_keys(args.api_key_file) if args.api_key_file is not None else []
    is_local = args.host in (*LOOPBACK, "::1") or args.host.startswith("127.")
    if not is_local and not keys:
        _say(f"warning: everyone who reaches {args.host} can use this server: --api-key-file")
    host = f"[{args.host}]" if ":" in args.host else args.host
    access = Access(keys, {*LOOPBACK, host} if is_local else (), OPEN_PATHS)
    checkpoint = as_path(args.checkpoint)
    name = checkpoint.resolve().name if checkpoint.exists() else args.checkpoint
    adapters = _adapters(args.adapter, name)
    with _listen(args.host, args.port) as sock:
        _run(args, name, adapters, access, sock, f"http://{host}:{sock.getsockname()[1]}")


def _run(
    args: argparse.Namespace,
    name: str,
    adapters: dict[str, str],
    access: Any,
    sock: socket.socket,
    url: str,
) -> None:
    """Load, compile and serve."""
    _say(f"loading {args.checkpoint}")
    llm = load(args.checkpoint, dtype=args.dtype, quantize=args.quantize, cache=args.cache)
    llms = {adapter: llm.with_adapter(folder) for adapter, folder in adapters.items()}

    import jax

    import llama_jax
    from llama_jax.serve.engine import Engine
    from llama_jax.serve.metrics import Metrics
    from llama_jax.serve.models import served_model
    from llama_jax.serve.server import serve
    from llama_jax.serve.sizes import default_prefix_cache, default_slots

    models = {
        label: served_model(model, label, label if model is not llm else "")
        for label, model in {name: llm, **llms}.items()
    }
    metrics = Metrics(name)
    slots = args.slots or default_slots(llm)
    kept = default_prefix_cache(llm) if args.prefix_cache is None else args.prefix_cache
    engine = Engine(
        llm, slots=slots, context=args.context, prefix_cache_bytes=kept, adapters=llms,
        timeout=args.timeout, metrics=metrics,
    )  # fmt: skip
    engine.start(
        lambda done, total: _say(f"compiling {done + 1} of {total}") if done < total else None
    )
    configuration = repr((
        llama_jax.__version__, jax.__version__, llm, list(adapters), slots, engine.context,
        engine.fingerprint,
    ))  # fmt: skip
    fingerprint = "fp_" + hashlib.sha256(configuration.encode()).hexdigest()[:12]
    ready = f"ready: {url} serves {', '.join(models)}"
    serve(
        engine, models, metrics, access, sock, fingerprint=fingerprint,
        on_ready=lambda: _say(ready),
    )  # fmt: skip


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound before the model is loaded, which takes long."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as e:
        hint = "; another --port may be free" if e.errno == errno.EADDRINUSE else ""
        raise PortInUse(f"cannot listen on {host}, port {port}: {e.strerror}{hint}") from None


def _adapters(given: list[str], base: str) -> dict[str, str]:
    """Folders of adapters by name."""
    made: dict[str, str] = {}
    for item in given:
        name, _, folder = item.partition("=")
        if not name or not folder:
            raise ValueError(f"--adapter {item!r} must be NAME=FOLDER")
        if name in made or name == base:
            raise ValueError(f"--adapter {item}: there are two models named {name}")
        made[name] = folder
    return made


def _size(text: str) -> int:
    """Bytes of "2GiB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    if match is None or match[2] not in _SIZES:
        raise argparse.ArgumentTypeError(f"{text!r} must be a size such as 2GiB, 500MB or 0")
    return int(float(match[1]) * _SIZES[match[2]])


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} must be a port, 0 to 65535")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds, more than 0")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m llama_jax.serve",
        usage="%(prog)s CHECKPOINT [options]",
        description="Answer requests of OpenAI's API (chat/completions, completions, responses) "
        "over HTTP, with a chat page at /. The answer to a request does not depend on the others.",
        epilog="example: %(prog)s checkpoints/smollm2 --slots 8 --adapter poet=checkpoints/lora",
        conflict_handler="resolve",  # here --adapter has a name and may be repeated
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a run, or of converted,"
        " Hugging Face or Meta weights; or a GGUF file")  # fmt: skip
    arg = parser.add_argument_group("server").add_argument
    arg("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this "
        "computer only)")  # fmt: skip
    arg("--port", type=_port, default=8000, help="0: any free one (default: %(default)s)")
    arg("--api-key-file", type=Path, metavar="FILE", help="API keys, one per line; requests then "
        "need one")  # fmt: skip
    arg("--timeout", type=_seconds, metavar="SECONDS", help="end a request that is not finished "
        "after this time, waiting included (default: never)")  # fmt: skip
    arg = parser.add_argument_group("memory").add_argument
    arg("--slots", type=_positive, metavar="B", help="requests that are decoded together; more "
        "wait (default: 16, on a CPU 4)")  # fmt: skip
    arg("--context", type=_positive, metavar="T", help="most tokens of a prompt and its answer "
        "(default: the model's, at most 4096)")  # fmt: skip
    arg("--prefix-cache", type=_size, metavar="SIZE", help="memory for the starts of earlier "
        "prompts, which are then not computed again (default: 2GiB, on a CPU 512MiB)")  # fmt: skip
    arg = model_options(parser)
    arg("--adapter", action="append", default=[], metavar="NAME=FOLDER", help="LoRA adapter that "
        "requests choose with model=NAME; repeatable")  # fmt: skip
    arg("--cache", choices=["int8"], help="keys and values in 8 bits")
    return parser


if __name__ == "__main__":
    sys.exit(main())
