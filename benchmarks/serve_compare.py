"""Our server and llama.cpp's on the same weights, over HTTP, in one run on the CPU.

    pip install -e '.[serve]' xllamacpp
    python -m benchmarks.serve_compare CHECKPOINT [options of benchmarks.serve]

llama.cpp gets the weights as a GGUF file in float32 and its own defaults otherwise: a float16
cache, as many slots as there are streams, as many threads as there are cores. Ours has ``--slots``
equal to the streams. For each number of streams both servers are started and warmed up, then they
take turns, round by round. Run it on an idle machine. Result: benchmarks/results/serve.json.
"""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import serve
from benchmarks.common import ALLOCATOR, ROOT, environment, write

TARGETS = {1: (1.1, 0.6), 4: (1.2, 0.65), 16: (1.5, 0.4)}
"""Streams: least ratio of the tokens/s, largest of the median times to the first token."""
PREFIX_TARGET = 0.3
"""Largest ratio of the times to the first token with and without a prefix that is known."""
STARTUP = 180
"""seconds"""


def run_llama_cpp(model: str, port: str, slots: str, context: str) -> None:
    """llama.cpp's server, until it is killed."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port = model, int(port)
    params.n_parallel, params.n_ctx = int(slots), int(context) * int(slots)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    params.cache_ram_mib, params.verbosity = 0, 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(60)


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[str]:
    """The URL of a server that is ready; the process ends with the block."""
    env = os.environ | ALLOCATOR | {"JAX_PLATFORMS": "cpu"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=env)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + STARTUP
        while not answers(url):
            if process.poll() is not None or time.monotonic() > end:
                sys.exit(f"{' '.join(command)} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    """Whether the server generates."""
    try:
        serve.Load(url, "", 4, 1, {}).ask()
    except (OSError, RuntimeError, http.client.HTTPException):
        return False
    return True


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def context_of(args: Any, shared: int = 0) -> str:
    """Positions of a request, a power of two; words may be two tokens."""
    need = 2 * (args.prompt_tokens + shared) + args.new_tokens
    return str(max(512, 1 << need.bit_length()))


def our_command(checkpoint: str, port: int, slots: int, context: str) -> list[str]:
    options = ["--port", str(port), "--slots", str(slots), "--context", context]
    return [sys.executable, "-m", "llama_jax.serve", checkpoint, *options]


def known_prefix(args: Any, log: Path) -> dict[str, Any]:
    """Our server with one slot and prompts that begin alike."""
    port = free_port()
    command = our_command(args.checkpoint, port, 1, context_of(args, args.shared_prefix))
    with running(command, port, log) as url:
        load = serve.Load(url, "", args.prompt_tokens, args.new_tokens, args.fields)
        load.ask()
        return load.prefix(args.shared_prefix, max(3, args.rounds))


def compare(args: Any, gguf: Path, streams: int) -> dict[str, Any]:
    """Both servers with ``streams`` slots, in turns."""
    context, ports = context_of(args), (free_port(), free_port())
    commands = {
        "llama_jax": our_command(args.checkpoint, ports[0], streams, context),
        "llama.cpp": [sys.executable, "-m", "benchmarks.serve_compare", "--llama-cpp", str(gguf),
                      str(ports[1]), str(streams), context],
    }  # fmt: skip
    rounds: dict[str, list[list[serve.Answer]]] = {name: [] for name in commands}
    result: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        loads = {}
        for (name, command), port in zip(commands.items(), ports, strict=True):
            url = stack.enter_context(running(command, port, gguf.with_name(f"{name}.log")))
            sizes = args.prompt_tokens, args.new_tokens
            loads[name] = serve.Load(url, "", *sizes, args.fields)
            loads[name].ask()
        for _ in range(args.rounds):
            for name, load in loads.items():
                rounds[name].append(load.round(streams))
    for name, measured in rounds.items():
        result[name] = serve.summary(streams, measured)
    ours, theirs = result["llama_jax"], result["llama.cpp"]
    for key in ("output_tokens_per_s", "ttft_p50_s"):
        result[f"{key}_ratio"] = serve.digits(ours[key] / theirs[key])
    return result


def main() -> None:
    if sys.argv[1:2] == ["--llama-cpp"]:
        run_llama_cpp(*sys.argv[2:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the servers end too
    options = serve.parser(__doc__)
    options.add_argument("checkpoint")
    args = options.parse_args()
    versions = ("jax", "flax", "numpy", "starlette", "uvicorn", "xllamacpp")
    output: dict[str, Any] = {"machine": environment(versions), "allocator": ALLOCATOR}
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "model.gguf"
        subprocess.run(
            [sys.executable, "-m", "llama_jax.convert", args.checkpoint, str(gguf), "--to", "gguf",
             "--type", "f32"], check=True, cwd=ROOT,
        )  # fmt: skip
        for streams in args.streams:
            output[f"streams {streams}"] = part = compare(args, gguf, streams)
            print(f"\n{streams} streams: llama_jax, then llama.cpp")
            print(serve.table([part["llama_jax"], part["llama.cpp"]]))
            tokens, first = part["output_tokens_per_s_ratio"], part["ttft_p50_s_ratio"]
            least, largest = TARGETS.get(streams, ("none", "none"))
            print(f"ratios: tokens/s {tokens} (target: at least {least}), time to the first token "
                  f"{first} (at most {largest})", flush=True)  # fmt: skip
        if args.shared_prefix:
            output["prefix"] = part = known_prefix(args, Path(folder) / "prefix.log")
            print(f"\ntime to the first token with {args.shared_prefix} known first tokens: "
                  f"{part['ratio']} of without (target: at most {PREFIX_TARGET})")  # fmt: skip
    write("serve", output)


if __name__ == "__main__":
    main()
