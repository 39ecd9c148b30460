"""``python -m llama_jax.corpus``, the same as ``llama-jax corpus``."""

import sys

from llama_jax.corpus.command import run_command


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return run_command(argv)
    except ImportError as e:
        if (e.name or "").startswith("llama_jax"):
            raise
        missing = f"error: {e.name} is not installed: pip install 'llama_jax[corpus]'"
        print(missing, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
