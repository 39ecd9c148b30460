"""Convert weights between Meta, Hugging Face, GGUF and our Orbax checkpoints, bit for bit, and LoRA
adapters between PEFT's format and ours.

python -m llama_jax.convert SOURCE DESTINATION [--to orbax|hf|meta|gguf] [--dtype D] [--verify]
python -m llama_jax.convert ADAPTER DESTINATION [--to peft|orbax] [--base BASE] [--merge]
python -m llama_jax.convert --inspect PATH
"""

import argparse
import errno
import os
import re
import sys

from llama_jax.checkpoint.model_json import QUANTIZED
from llama_jax.convert import copy
from llama_jax.convert.formats import FLOATS
from llama_jax.convert.gguf import KINDS
from llama_jax.convert.job import convert, inspect
from llama_jax.convert.sources import NAMES
from llama_jax.io import file_error
from llama_jax.storage.paths import path_argument


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.inspect is None) == (args.destination is None):
        parser.error("give SOURCE and DESTINATION, or --inspect PATH")
    # Conversion needs no accelerator, and starting one takes its memory from other jobs.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        if args.inspect:
            print(inspect(args.inspect, args.context, args.base))
        else:
            args.max_memory -= copy.resident_bytes()  # the option limits the whole process
            convert(**{k: v for k, v in vars(args).items() if k != "inspect"})
    except OSError as e:
        hint = "; the same command continues here" if e.errno == errno.ENOSPC else ""
        return _fail(f"error: {file_error(e)}{hint}")
    except ValueError as e:
        return _fail(f"error: {e}")
    except MemoryError as e:
        return _fail(f"error: out of memory: {e}; give a smaller --max-memory")
    except KeyboardInterrupt:
        return _fail("stopped; the same command continues from here", 130)
    return 0


def _fail(message: str, status: int = 1) -> int:
    print(message, file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.convert",
        description="Convert LLaMA weights between Meta, Hugging Face, Orbax and GGUF.",
    )
    arg = parser.add_argument
    arg("source", nargs="?", type=path_argument, metavar="SOURCE",
        help="folder of weights, or GGUF file; its format is recognized")  # fmt: skip
    arg("destination", nargs="?", type=path_argument, metavar="DESTINATION",
        help="folder (for GGUF: file) to create")  # fmt: skip
    arg("--to", choices=[*NAMES, "peft"], help="format to write (default: orbax, or hf from orbax)")
    dtypes = ["keep", *(d.name for d in FLOATS)]
    arg("--dtype", choices=dtypes, default="keep", help="dtype to write (default: keep)")
    arg("--quantize", choices=QUANTIZED, help="quantize the matrices of the layers (Orbax only)")
    arg("--type", choices=list(KINDS), help="type of the matrices in GGUF (default: f16)")
    arg("--shards", type=int, metavar="N", help="files (default: Meta 1, HF at most 5 GB each)")
    arg("--max-memory", type=_memory, default="2GiB", metavar="SIZE", help="limit of this process, "
        "such as 8GiB (default: 2GiB)")  # fmt: skip
    arg("--verify", action="store_true", help="read the result back and compare with the source")
    arg("--context", type=int, metavar="T", help="context length, which params.json lacks")
    arg(
        "--base",
        metavar="BASE",
        help="weights that an adapter was trained on (default: as it says)",
    )
    arg("--merge", action="store_true", help="write the base's weights with the adapter added")
    arg(
        "--inspect",
        type=path_argument,
        metavar="PATH",
        help="describe the content of a folder or file",
    )
    return parser


def _memory(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory like 2GiB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** "_KMGT".index(prefix.upper() or "_"))


if __name__ == "__main__":
    sys.exit(main())
